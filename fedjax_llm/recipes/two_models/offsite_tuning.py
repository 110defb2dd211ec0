"""Offsite tuning: clients tune the outer layers beside a frozen emulator.

Xiao et al. 2023, arXiv 2302.04870.
"""

import functools
from typing import Any

from fedjax_llm import local, scopes, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.two_models import emulators
from fedjax_llm.types import FederatedAlgorithm, Loss, Model

# What the config of each method changes.
NEEDS = {
  'offsite_tuning': dict(model=dict(num_layers=4)),
}


def offsite_tuning(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  bottom: int = 1,
  top: int = 1,
  drop: float = 0.5,
  **parts: Any,
) -> FederatedAlgorithm:
  """Offsite tuning: clients tune the outer layers beside a frozen emulator.

      emulator    layers floor(i (n - 1) / (n' - 1)), i < n', of the n between
      client      minimises the loss of bottom + emulator + top layers
      server      averages the adapters and plugs them into the whole network

  Xiao et al. 2023, arXiv 2302.04870, with federated averaging of the adapters:
  a client never has the whole model, which is served with its adapters. The
  paper trains the outer layers whole and may distil the emulator before; here
  they carry a low-rank adapter, and the emulator is the layer drop alone
  (`fed_biot` distils it). With drop=0 it is FedAvg on the adapters of the outer
  layers. The metric `local/loss` is that of the emulator.

  Args:
    model: the network.
    bottom, top: the number of outer layers that clients tune.
    drop: the share of the layers between them that the emulator leaves out.

  Raises:
    Error: a setting out of range, a scope in `parts`, a loss without `build`;
      from `init`, an adapter without low-rank factors in all layers, or a
      network with too few layers.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import LowRank
  >>> method = offsite_tuning(None, local.optimizer('sgd'), model=None)
  >>> node = LowRank(jnp.ones((4, 2, 1)), jnp.ones((4, 1, 2)), jnp.ones(4))
  >>> state = method.init(None, {'layers': {'q': node}})
  >>> method.personal(state.params, None)['layers']['q'].scale.tolist()
  [1.0, 0.0, 0.0, 1.0]
  """
  refuse('offsite_tuning', 'scope', parts)
  layout = emulators.checked('offsite_tuning', bottom, top, drop)
  plugged = functools.partial(emulators.plugged, layout=layout)
  cut = lambda params: emulators.cut(params, layout, 'offsite_tuning')
  small = local.viewed(emulators.on_emulator(loss, model, layout), plugged)
  fold = parts.pop('fold', None)
  return server.on_part(
    functools.partial(
      fed_avg, small, optimizer, scope=scopes.frozen('^server/'), **parts
    ),
    wrap=lambda key, params: cut(params),
    get=plugged,
    put=lambda both, params: cut(params),
    fold=fold,
  )
