"""Gradient assembly: factors that look harmless and have a harmful product.

`assembled` returns an `Adversary`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.adversary.malicious import attack
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Adversary, Error, known


def assembled(
  *,
  radius: float = 1.0,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns an attack whose factors are near those of honest clients.

  With m_a, m_b the means of the honest clients' factors, r_a, r_b the median
  distances of these clients' factors to them, and the honest change of the
  product G = mean_k(a_k b_k) - a b,

      a_k <- m_a - radius r_a (G m_b') / ||G m_b'||
      b_k <- m_b - radius r_b (m_a' G) / ||m_a' G||

  for malicious clients k, norms and distances over all nodes together: the
  steps of a given length in each factor that turn the product of the means
  furthest from what the honest clients learned. With radius 1 each factor is as
  near to the mean as the median honest one, so a rule that judges a and b
  separately sees nothing, while both steps add up in the server's product. It
  is one attack of this kind, with knowledge of all updates, not that of a
  particular paper. Other leaves get the honest mean.

  Raises:
    Error: a negative radius; as `malicious.ids`; from the round, updates
      without low-rank nodes of which both factors are sent.

  >>> from fedjax_llm.aggregators import received
  >>> node = lambda b: LowRank(*jnp.float32([[[1]], [[b]]]), jnp.float32(1))
  >>> sent = received(node(0.0), [node(b) for b in (1.0, 2.0, 3.0, 9.0)])
  >>> sent = sent._replace(ids=jnp.arange(4))
  >>> assembled(clients=[3])(sent, None).update.b.ravel().tolist()  # 2 - 1
  [1.0, 2.0, 3.0, 1.0]
  """
  if known(radius) and radius < 0:
    raise Error(f'assembled: radius={radius} must be 0 or more.')
  is_node = lambda x: isinstance(x, LowRank)
  exact = jax.lax.Precision.HIGHEST
  dot = lambda x, y: jnp.matmul(x, y, precision=exact)
  turn = lambda x: jnp.swapaxes(x, -1, -2)

  def act(uploads, side, key):
    del key
    share = tree.normalise(side.honest.astype(jnp.float32))
    sent, treedef = jax.tree.flatten(uploads.update, is_leaf=is_node)
    places = [
      i
      for i, x in enumerate(sent)
      if is_node(x) and x.a is not None and x.b is not None
    ]
    if not places:
      raise Error(
        'assembled needs the low-rank factors of clients, both a and b, and '
        'these updates have none.'
      )
    ends = treedef.flatten_up_to(tree.whole(uploads))
    starts = treedef.flatten_up_to(uploads.start)
    mean = tree.weighted_sum(uploads.update, share)
    centres = treedef.flatten_up_to(mean)
    steps: dict[str, dict[int, Any]] = {'a': {}, 'b': {}}
    for i in places:
      end, start = ends[i], starts[i]
      first = jax.tree.map(lambda x: x[0], start)
      middle = lambda x: tree.weighted_sum(x.astype(jnp.float32), share)
      a, b = middle(end.a), middle(end.b)
      # G m_b' and m_a' G from thin products: G is never formed.
      left = dot(end.a, dot(end.b, turn(b))) - dot(
        start.a, dot(start.b, turn(b))
      )
      right = dot(dot(turn(a), end.a), end.b) - dot(
        dot(turn(a), start.a), start.b
      )
      scale = first.scale[..., None, None].astype(jnp.float32)
      steps['a'][i] = scale * middle(left)
      steps['b'][i] = scale * middle(right)
    new = list(centres)
    for factor, step in steps.items():
      stack = {i: getattr(sent[i], factor) for i in places}
      centre = {i: getattr(centres[i], factor) for i in places}
      away = jax.tree.map(lambda x, m: x.astype(jnp.float32) - m, stack, centre)
      apart = jax.vmap(tree.norm)(away)  # [K]
      middle = jnp.nanmedian(jnp.where(side.honest, apart, jnp.nan))
      size = tree.norm(step)
      length = radius * jnp.nan_to_num(middle) / jnp.where(size > 0, size, 1.0)
      for i in places:
        moved = centre[i] - length * step[i]
        new[i] = new[i]._replace(**{factor: moved})
    row = jax.tree.unflatten(treedef, new)
    wide = lambda m, u: jnp.broadcast_to(m, u.shape).astype(u.dtype)
    return jax.tree.map(wide, row, uploads.update)

  return attack('assembled', act, clients, fraction, seed, num_clients)
