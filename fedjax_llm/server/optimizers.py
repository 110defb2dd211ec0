"""Server optimizers: optax transformations of the pseudo-gradient, -delta.

The three adaptive ones are algorithm 2 of Reddi et al. 2021, "Adaptive
Federated Optimization" (arXiv 2003.00295). They are no `optax.adam`: without
bias correction, tau beside the square root, and v starts at tau^2. Moments are
float32; the step has the dtype of the leaf. A leaf whose delta is `None` gets
no step and keeps its moments.

`learning_rate` is a number or an optax schedule over rounds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm import tree
from fedjax_llm.types import Error, ServerOptimizer, known


class Moments(NamedTuple):
  """Running moments of the delta, float32, shaped as the parameters."""

  m: Any
  v: Any = ()


def _check_rate(name: str, learning_rate: optax.ScalarOrSchedule) -> None:
  if isinstance(learning_rate, int | float) and not learning_rate > 0:
    raise Error(f'{name}: learning_rate={learning_rate} must be positive.')


def _check_decay(name: str, field: str, value: float) -> None:
  if known(value) and not 0 <= value < 1:
    raise Error(f'{name}: {field}={value} must be at least 0 and below 1.')


def _keep(new: Any, old: Any) -> Any:
  """Returns `new` where a leaf is present, `old` elsewhere."""
  return tree.merge(new, old)


def _steps(direction: Any, updates: Any) -> Any:
  return tree.map_present(lambda d, u: d.astype(u.dtype), direction, updates)


def sgd(
  learning_rate: optax.ScalarOrSchedule = 1.0,
) -> ServerOptimizer:
  """Returns SGD on the server: x <- x + eta delta.

  With eta = 1 the server takes the clients' mean.

  >>> server = sgd()
  >>> step, _ = server.update(jnp.float32(-2.0), server.init(jnp.float32(0)))
  >>> float(step)
  2.0

  Raises:
    Error: `learning_rate` is not positive.
  """
  _check_rate('sgd', learning_rate)
  return optax.scale_by_learning_rate(learning_rate)


def fed_avgm(
  learning_rate: optax.ScalarOrSchedule = 1.0, momentum: float = 0.9
) -> ServerOptimizer:
  """Returns server momentum: m <- momentum m + delta, x <- x + eta m.

  Hsu et al. 2019 (arXiv 1909.06335), section 4.3. The new delta is not damped
  by 1 - momentum, so a steady delta is taken up to 1 / (1 - momentum) times.

  Raises:
    Error: `learning_rate` is not positive or `momentum` not in [0, 1).

  >>> server, x = fed_avgm(momentum=0.5), jnp.float32(0)
  >>> first, state = server.update(jnp.float32(-1), server.init(x))
  >>> second, _ = server.update(jnp.float32(-1), state)
  >>> float(first), float(second)
  (1.0, 1.5)
  """
  _check_rate('fed_avgm', learning_rate)
  _check_decay('fed_avgm', 'momentum', momentum)

  def init(params):
    return Moments(tree.zeros_like(params, jnp.float32))

  def update(updates, state, params=None):
    del params
    m = tree.map_present(
      lambda g, m: g.astype(jnp.float32) + momentum * m, updates, state.m
    )
    return _steps(m, updates), Moments(_keep(m, state.m))

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(learning_rate),
  )


def _adaptive(
  name: str,
  learning_rate: optax.ScalarOrSchedule,
  b1: float,
  tau: float,
  second: Callable[[jax.Array, jax.Array], jax.Array],
) -> ServerOptimizer:
  """Returns algorithm 2 with `second(v, delta^2) -> v`."""
  _check_rate(name, learning_rate)
  _check_decay(name, 'b1', b1)
  if known(tau) and not tau > 0:
    raise Error(f'{name}: tau={tau} must be positive.')

  def init(params):
    v = jax.tree.map(
      lambda x: jnp.full(jnp.shape(x), tau**2, jnp.float32), params
    )
    return Moments(tree.zeros_like(params, jnp.float32), v)

  def update(updates, state, params=None):
    del params
    g = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
    m = tree.map_present(lambda g, m: b1 * m + (1 - b1) * g, g, state.m)
    v = tree.map_present(lambda g, v: second(v, g * g), g, state.v)
    direction = tree.map_present(lambda m, v: m / (jnp.sqrt(v) + tau), m, v)
    state = Moments(_keep(m, state.m), _keep(v, state.v))
    return _steps(direction, updates), state

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(learning_rate),
  )


def fed_adagrad(
  learning_rate: optax.ScalarOrSchedule = 10**-1.5,
  b1: float = 0.0,
  tau: float = 1e-3,
) -> ServerOptimizer:
  """Returns Adagrad on the server:

      m <- b1 m + (1 - b1) delta
      v <- v + delta^2,   v_0 = tau^2
      x <- x + eta m / (sqrt(v) + tau)

  Reddi et al. 2021 (arXiv 2003.00295), algorithm 2. Its experiments use no
  momentum here and tau = 1e-3. The paper tunes eta: its value for next word
  prediction on Stack Overflow is 10^-1.5.

  Raises:
    Error: `learning_rate` or `tau` is not positive, or `b1` not in [0, 1).

  >>> server, x = fed_adagrad(learning_rate=1.0, tau=3.0), jnp.float32(0)
  >>> step, _ = server.update(jnp.float32(-4.0), server.init(x))
  >>> float(step)  # 4 / (sqrt(9 + 16) + 3)
  0.5
  """
  return _adaptive(
    'fed_adagrad', learning_rate, b1, tau, lambda v, square: v + square
  )


def fed_adam(
  learning_rate: optax.ScalarOrSchedule = 1e-2,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
) -> ServerOptimizer:
  """Returns Adam on the server, without bias correction:

      m <- b1 m + (1 - b1) delta
      v <- b2 v + (1 - b2) delta^2,   v_0 = tau^2
      x <- x + eta m / (sqrt(v) + tau)

  Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, with the b1, b2 and tau
  of its experiments. The paper tunes eta: its value for both language models
  (Shakespeare, and next word prediction on Stack Overflow) is 1e-2. Deltas of
  adapters are often far below tau; each round then takes about eta / (2 tau) of
  their running mean (5 with these defaults), so choose eta to suit tau.

  Raises:
    Error: `learning_rate` or `tau` is not positive, or a decay not in [0, 1).

  >>> server, x = fed_adam(1.0, b1=0.5, b2=0.0, tau=1.0), jnp.float32(0)
  >>> step, _ = server.update(jnp.float32(-3.0), server.init(x))
  >>> float(step)  # (3 / 2) / (3 + 1)
  0.375
  """
  _check_decay('fed_adam', 'b2', b2)
  return _adaptive(
    'fed_adam', learning_rate, b1, tau,
    lambda v, square: b2 * v + (1 - b2) * square,
  )  # fmt: skip


def adamw(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
) -> ServerOptimizer:
  """Returns AdamW on the server, with bias correction, as torch's optimizer:

      m <- b1 m + (1 - b1) delta,   v <- b2 v + (1 - b2) delta^2
      x <- (1 - eta weight_decay) x
           + eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

  Loshchilov and Hutter 2019 (arXiv 1711.05101), with the defaults of
  `torch.optim.AdamW`, which is the server of the code of FLASC (arXiv
  2406.05233). The FedAdam of Reddi et al. is `fed_adam`. Unlike the others,
  AdamW needs the delta of every leaf.

  Raises:
    Error: `learning_rate` or `eps` is not positive, a decay not in [0, 1), or a
      negative `weight_decay`.

  >>> server, x = adamw(0.1, weight_decay=0.25), jnp.float32(2)
  >>> step, _ = server.update(jnp.float32(-3.0), server.init(x), x)
  >>> round(float(step), 4)  # 0.1 * (1 - 0.25 * 2)
  0.05
  """
  _check_rate('adamw', learning_rate)
  _check_decay('adamw', 'b1', b1)
  _check_decay('adamw', 'b2', b2)
  if known(eps) and not eps > 0:
    raise Error(f'adamw: eps={eps} must be positive.')
  if known(weight_decay) and not weight_decay >= 0:
    raise Error(f'adamw: weight_decay={weight_decay} must not be negative.')
  inner = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  def update(updates, state, params=None):
    if params is None:
      raise Error('adamw: weight decay needs the parameters.')
    step, state = inner.update(wide(updates), state, wide(params))
    return _steps(step, updates), state

  return optax.GradientTransformation(
    lambda params: inner.init(wide(params)), update
  )


def fed_yogi(
  learning_rate: optax.ScalarOrSchedule = 1e-2,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
) -> ServerOptimizer:
  """Returns Yogi on the server: v follows delta^2 by steps of delta^2, not v.

      m <- b1 m + (1 - b1) delta
      v <- v - (1 - b2) delta^2 sign(v - delta^2),   v_0 = tau^2
      x <- x + eta m / (sqrt(v) + tau)

  Reddi et al. 2021 (arXiv 2003.00295), algorithm 2; the defaults come from
  where those of `fed_adam` do.

  Raises:
    Error: `learning_rate` or `tau` is not positive, or a decay not in [0, 1).

  >>> server, x = fed_yogi(1.0, b1=0.5, b2=0.0, tau=1.0), jnp.float32(0)
  >>> step, _ = server.update(jnp.float32(-3.0), server.init(x))
  >>> round(float(step), 4)  # (3 / 2) / (sqrt(1 + 9) + 1)
  0.3604
  """
  _check_decay('fed_yogi', 'b2', b2)
  return _adaptive(
    'fed_yogi', learning_rate, b1, tau,
    lambda v, square: v - (1 - b2) * square * jnp.sign(v - square),
  )  # fmt: skip
