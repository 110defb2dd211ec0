"""LA-LoRA without noise: local steps take turns, on smoothed gradients.

arXiv 2602.19926 (2026).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.types import Error, FederatedAlgorithm, Loss

# What the config of each method changes.
NEEDS = {
  'la_lora': {},
}

TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def la_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  smooth: bool = True,
  scaled: bool = False,
  **parts: Any,
) -> FederatedAlgorithm:
  """LA-LoRA without noise: local steps take turns, on smoothed gradients.

      step 1, 3, ...: b alone,   step 2, 4, ...: a alone, with the gradients
      convolved with (1, 4, 6, 4, 1) / 16 along inputs and outputs,
      server: a <- sum_k w_k a_k,   b <- sum_k w_k b_k

  arXiv 2602.19926 (2026). The paper's clients also clip the gradient of every
  example and add noise; this is the method without privacy. RoLoRA takes turns
  by rounds instead, and is exact on the server. Settings as in `in_turns`.

  >>> from fedjax_llm import local
  >>> method = la_lora(None, local.optimizer('adamw'))
  >>> method.init_client({'w': jnp.ones(2)})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  turns = in_turns(optimizer, smooth=smooth, scaled=scaled)
  return fed_avg(loss, turns, **parts)


def in_turns(
  optimizer: LocalOptimizer,
  *,
  smooth: bool = True,
  scaled: bool = False,
  damping: float = 1e-6,
) -> LocalOptimizer:
  """Returns an optimizer whose steps move the factors b and a in turn, b first.

  Each factor has moments of its own, which rest while the other moves. Leaves
  outside of `LowRank` nodes move in every step.

  Args:
    smooth: gradients are convolved with the paper's five taps, a's along its
      inputs and b's along its outputs, with the borders mirrored.
    scaled: gradients are those of the change itself, projected: s^-2 (a'a)^-1
      g_b and s^-2 g_a (b b')^-1, before they are smoothed. The scale s is left
      to the learning rate.
    damping: a multiple of the identity that is added to a'a and b b', relative
      to their mean diagonal, as b starts at zero.

  Raises:
    Error: a damping that is not positive.

  >>> from fedjax_llm import local
  >>> node = LowRank(jnp.ones((5, 1)), jnp.ones((1, 5)), None)
  >>> turns = in_turns(local.optimizer('sgd', 1.0), smooth=False)
  >>> step, state = turns.update(node, turns.init(node), node, 0)
  >>> step.a[0].tolist(), step.b[0, 0].item()
  ([0.0], -1.0)
  >>> step, state = turns.update(node, state, node, 1)
  >>> step.a[0].tolist(), step.b[0, 0].item()
  ([-1.0], 0.0)
  """
  if not damping > 0:
    raise Error(f'in_turns: damping={damping} must be positive.')

  def init(params):
    return jnp.int32(0), tuple(map(optimizer.init, _parts(params)))

  def update(grads, state, params, step):
    count, inner = state
    if scaled:
      grads = _by_node(lambda g, p: _projected(g, p, damping), grads, params)
    if smooth:
      grads = _by_node(lambda g, _: _smoothed(g), grads, params)
    now = [count % 2 == 0, count % 2 == 1, jnp.bool_(True)]
    steps, states = [], []
    for turn, g, old, p in zip(now, _parts(grads), inner, _parts(params)):
      moved, new = optimizer.update(g, old, p, step)
      pick = functools.partial(jnp.where, turn)
      still = tree.zeros_like(moved)
      steps.append(jax.tree.map(pick, moved, still))
      states.append(jax.tree.map(pick, new, old))
    return tree.merge(*steps), (count + 1, tuple(states))

  return optimizer._replace(init=init, update=update)


def _is_node(x: Any) -> bool:
  return isinstance(x, LowRank)


def _by_node(change, grads, params):
  return jax.tree.map(
    lambda g, p: change(g, p) if _is_node(g) else g,
    grads,
    params,
    is_leaf=lambda x: x is None or _is_node(x),
  )


def _parts(params: Any) -> tuple[Any, Any, Any]:
  """Returns the factors b, the factors a, and the leaves outside of nodes."""
  is_leaf = lambda x: x is None or _is_node(x)
  none = LowRank(None, None, None)
  part = lambda of: jax.tree.map(of, params, is_leaf=is_leaf)
  return (
    part(lambda x: none._replace(b=x.b) if _is_node(x) else None),
    part(lambda x: none._replace(a=x.a) if _is_node(x) else None),
    part(lambda x: none if _is_node(x) else x),
  )


def _smoothed(grads: LowRank) -> LowRank:
  def along(x, axis):
    if x is None:
      return None
    x = jnp.moveaxis(x, axis, -1)
    wide = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(2, 2)], mode='symmetric')
    size = x.shape[-1]
    done = sum(t * wide[..., i : i + size] for i, t in enumerate(TAPS))
    return jnp.moveaxis(done, -1, axis)

  return grads._replace(a=along(grads.a, -2), b=along(grads.b, -1))


def _projected(grads: LowRank, node: LowRank, damping: float) -> LowRank:
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def over(rows, g):
    gram = jnp.matmul(rows, t(rows), precision=jax.lax.Precision.HIGHEST)
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    extra = damping * jnp.maximum(size / gram.shape[-1], 1.0)
    return linalg.solve(gram + extra * jnp.eye(gram.shape[-1]), g)

  if grads.a is None or grads.b is None:
    raise Error(
      'la_lora: scaled gradients of one factor need the other, so both must be '
      'trained.'
    )
  return grads._replace(
    a=t(over(node.b, t(grads.a))), b=over(t(node.a), grads.b)
  )
