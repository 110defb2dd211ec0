"""FedAvgM, FedAdagrad, FedAdam and FedYogi: optimizers on the server.

Hsu et al. 2019, arXiv 1909.06335; Reddi et al. 2021, arXiv 2003.00295.
"""

from typing import Any

from fedjax_llm import server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import SLOWLY
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'fed_avgm': {},
  'fed_adagrad': SLOWLY,
  'fed_adam': SLOWLY,
  'fed_yogi': SLOWLY,
}


def fed_avgm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  momentum: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAvgM: momentum on the server (Hsu et al. 2019, arXiv 1909.06335).

  Defaults of the server's settings are those of `server.fed_avgm`.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_avgm(None, local.optimizer('sgd'), momentum=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m
  {'w': Array([0., 0.], dtype=float32)}
  """
  step = server.fed_avgm(
    **_without_none(learning_rate=server_learning_rate, momentum=momentum)
  )
  return _with_server('fed_avgm', step, loss, optimizer, parts)


def fed_adagrad(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  tau: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_adagrad`.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_adagrad(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].v  # tau^2
  {'w': Array([0.25, 0.25], dtype=float32)}
  """
  step = server.fed_adagrad(
    **_without_none(learning_rate=server_learning_rate, b1=b1, tau=tau)
  )
  return _with_server('fed_adagrad', step, loss, optimizer, parts)


def fed_adam(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  b2: float | None = None,
  tau: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_adam`.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_adam(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m
  {'w': Array([0., 0.], dtype=float32)}
  """
  step = server.fed_adam(
    **_without_none(learning_rate=server_learning_rate, b1=b1, b2=b2, tau=tau)
  )
  return _with_server('fed_adam', step, loss, optimizer, parts)


def fed_yogi(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  server_learning_rate: float | None = None,
  b1: float | None = None,
  b2: float | None = None,
  tau: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

  Defaults of the server's settings are those of `server.fed_yogi`.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_yogi(None, local.optimizer('sgd'), tau=0.5)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].v  # tau^2
  {'w': Array([0.25, 0.25], dtype=float32)}
  """
  step = server.fed_yogi(
    **_without_none(learning_rate=server_learning_rate, b1=b1, b2=b2, tau=tau)
  )
  return _with_server('fed_yogi', step, loss, optimizer, parts)


def _with_server(name, step, loss, optimizer, parts):
  if 'server' in parts:
    raise Error(
      f'{name} brings its own server optimizer: leave the server section out, '
      'or name fed_avg with the server that you want.'
    )
  return fed_avg(loss, optimizer, server=step, **parts)


def _without_none(**settings: Any) -> dict[str, Any]:
  """Returns the settings that are not None; builders hold the defaults."""
  return {k: v for k, v in settings.items() if v is not None}
