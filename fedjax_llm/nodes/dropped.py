"""A node whose input is dropped at random, for training."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes import protocol
from fedjax_llm.nodes.dense import times
from fedjax_llm.nodes.dora import Dora
from fedjax_llm.nodes.low_rank import LowRank
from fedjax_llm.types import Error


class Dropped(NamedTuple):
  """A `LowRank` or `Dora` with dropout on the input of the factor a.

      y' = y + scale * (x * mask / (1 - rate)) @ a @ b,  mask ~ B(1 - rate)

  as `lora_dropout` of PEFT: the product with the frozen weight sees x as it is.
  In a DoRA the whole change sees the dropped input, as in PEFT. A loss makes
  these nodes for one step (`local.dropout`); no parameters hold them.

  >>> low = LowRank(jnp.ones((2, 1)), jnp.ones((1, 1)), jnp.float32(1))
  >>> node = Dropped(low, jax.random.key(1), jnp.float32(0.5))
  >>> y = node.act(jnp.ones((8, 2)), jnp.zeros((8, 1)), None)
  >>> sorted(set(y[:, 0].tolist()))  # of two inputs, 0, 1 or 2 are kept
  [0.0, 2.0, 4.0]
  """

  node: Any  # a `LowRank` or a `Dora`
  key: Any  # a typed key, [L] over layers
  rate: Any  # the probability of a zero, [L] over layers

  def act(self, x, y, weight) -> jax.Array:
    dropped = thinned(x, self.key, self.rate)
    if isinstance(self.node, LowRank):
      y = self.node._replace(residual=None).act(dropped, y)
      residual = self.node.residual
      return y if residual is None else y + times(x, residual, y.dtype)
    # y + (m / ||V|| - 1) x' W + m / ||V|| scale x' a b, with x' dropped
    own = times(dropped, weight, y.dtype)
    return y + self.node.act(dropped, own, weight).astype(y.dtype) - own

  def weight_shape(self) -> tuple[int, ...]:
    return self.node.weight_shape()


def thinned(x: jax.Array, key: Any, rate: Any) -> jax.Array:
  """Returns x [..., T, D] with entries dropped and the others scaled up.

  The mask of a position does not depend on the positions after it: columns of
  padding change nothing.

  >>> x = jnp.ones((1, 3, 4))
  >>> wide = jnp.ones((1, 5, 4))
  >>> both = [thinned(z, jax.random.key(0), 0.5) for z in (x, wide)]
  >>> bool((both[0] == both[1][:, :3]).all())
  True
  """
  *rows, length, width = x.shape
  mask = jax.random.bernoulli(key, 1 - rate, (length, *rows, width))
  mask = jnp.moveaxis(mask, 0, -2)
  scaled = x / jnp.asarray(1 - rate, x.dtype)
  return jnp.where(mask, scaled, jnp.zeros_like(x))


def drop(params: Any, rate: float, key: jax.Array) -> Any:
  """Returns the parameters with a `Dropped` in place of each low-rank node.

  Raises:
    Error: a node of another kind than `LowRank`, `Dora` and whole weights.

  >>> low = LowRank(jnp.ones((3, 2, 1)), jnp.ones((3, 1, 1)), jnp.ones(3))
  >>> drop({'q_proj': low}, 0.1, jax.random.key(0))['q_proj'].key.shape
  (3,)
  """

  def node(path, x):
    if not isinstance(x, LowRank | Dora):
      if protocol.is_node(x) and not protocol.replacement(x)[0]:
        raise Error(
          f'adapter.lora_dropout: a {protocol.kind(x)} node has no dropout; '
          'leave it out, or take another method.'
        )
      return x
    low = x.direction if isinstance(x, Dora) else x
    lead = jnp.shape(low.a)[:-2]
    own = jax.random.fold_in(key, _number(path))
    keys = jax.random.split(own, lead) if lead else own
    return Dropped(x, keys, jnp.full(lead, rate, jnp.float32))

  return jax.tree_util.tree_map_with_path(
    node, params, is_leaf=protocol.is_node
  )


def _number(path: Any) -> int:
  """Returns a number of 32 bits for a place: no node changes another's mask."""
  return zlib.crc32(jax.tree_util.keystr(path).encode())
