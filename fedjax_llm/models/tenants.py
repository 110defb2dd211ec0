"""Runs a model on a batch with a different adapter for each row.

The rows are a `vmap` over adapters that shares the base, so that the product
with a weight of the base stays one matmul of all rows, and only the small
products differ from row to row.

`stack` puts the adapters on axis 1 below 'layers', where axis 0 is that of
`lax.scan`, and on axis 0 elsewhere, so that nothing is transposed later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import adapters as adapters_lib
from fedjax_llm.adapters import as_low_rank, picked
from fedjax_llm.models.network import prompts
from fedjax_llm.models.network.decoding import Cache, Decoder
from fedjax_llm.models.network.layers import Places
from fedjax_llm.nodes import Dense, LowRank, Prefix, Prompt, protocol
from fedjax_llm.types import Base, Error, Model, Params

Path = tuple[str, ...]


def check(base: Base, params: Params, name: str) -> None:
  """Raises `Error` naming the module that an adapter does not fit.

  >>> base = {'q_proj': {'kernel': jnp.ones([4, 6])}}
  >>> node = LowRank(jnp.ones([4, 2]), jnp.ones([2, 5]), 1.0)
  >>> check(base, {'q_proj': node}, 'ann')
  Traceback (most recent call last):
  fedjax_llm.types.Error: ann is of another base: its q_proj is [4, 5], that \
of the model is [4, 6].
  """
  who = f'{name} is of another base'
  try:
    over = adapters_lib.overlay(base, params)
  except Error as error:
    raise Error(f'{who}: {error}') from error
  adapters_lib.check(*over, places=protocol.BESIDE, who=who)


def stack(base: Base, adapters: Sequence[Params]) -> Params:
  """Stacks M adapters and an empty one into a tree of M + 1 adapters.

  Ranks are padded with zeros to the largest. A weight that only some adapters
  change gets a zero change, or itself as the replacement, in the others, so
  that every adapter computes the same as alone. Prompts and prefixes need the
  same number of rows in all adapters, and the empty adapter gets zeros: no
  request with prompts in its batch may select it.

  Raises:
    Error: two adapters change a weight in ways that do not stack (a low-rank
      node and a dense change), or weights of different shapes; a DoRA; an
      adapter without a prompt among others.

  >>> node = lambda rank: LowRank(
  ...   jnp.ones([1, 4, rank]), jnp.ones([1, rank, 6]), jnp.ones(1)
  ... )
  >>> both = stack({}, [{'layers': {'q': node(2)}}, {'layers': {'q': node(3)}}])
  >>> both['layers']['q'].a.shape
  (1, 3, 4, 3)
  """
  plain = [
    as_low_rank(picked.spread(protocol.plain(x), base)) for x in adapters
  ]
  for leaf in jax.tree.leaves(plain, is_leaf=protocol.is_node):
    if protocol.is_node(leaf) and not _stacks(leaf):
      raise Error(
        f'a {protocol.kind(leaf)} node is no sum of factors, so it shares no '
        'batch with others: read it alone, or merge it into a base of its own.'
      )
  return _join(base, [*plain, None], ()) or {}


def _join(base: Any, trees: Sequence[Any], path: Path) -> Any:
  present = [tree for tree in trees if tree is not None]
  if not present:
    return None
  kinds = {
    Mapping
    if isinstance(x, Mapping)
    else type(x)
    if protocol.is_node(x)
    else None
    for x in present
  }
  if len(kinds) > 1:
    raise Error(
      f'The adapters change {"/".join(path)} in different ways, so they are '
      'not of one batch.'
    )
  if isinstance(present[0], Mapping):
    names = dict.fromkeys(name for tree in present for name in tree)
    return {
      name: _join(
        base.get(name) if isinstance(base, Mapping) else None,
        [None if x is None else x.get(name) for x in trees],
        (*path, name),
      )
      for name in names
    }
  if isinstance(present[0], Dense):
    values = [None if x is None else x.value for x in trees]
    return Dense(_rows(values, path, base))
  if not isinstance(present[0], LowRank):
    if not protocol.is_node(present[0]):
      return _rows(trees, path)
    return _alike(trees, path)
  rank = max(node.b.shape[-2] for node in present)

  def padded(x, axis):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, rank - x.shape[axis])
    return jnp.pad(x, pad)

  def field(name, change=lambda x: x):
    values = [None if x is None else getattr(x, name) for x in trees]
    values = [None if x is None else change(jnp.asarray(x)) for x in values]
    return _rows(values, path)

  return LowRank(
    a=field('a', lambda x: padded(x, x.ndim - 1)),
    b=field('b', lambda x: padded(x, x.ndim - 2)),
    scale=field('scale'),
    residual=field('residual'),
  )


def _stacks(leaf: Any) -> bool:
  kinds = LowRank | Dense | Prompt | Prefix
  return isinstance(leaf, kinds) or hasattr(leaf, 'neutral')


def _alike(nodes: Sequence[Any], path: Path) -> Any:
  """Stacks nodes of one kind; absent ones are neutral."""
  first = next(node for node in nodes if node is not None)
  where = '/'.join(path)
  if hasattr(first, 'neutral'):
    absent = first.neutral()
  else:
    absent = jax.tree.map(jnp.zeros_like, first)
    if any(node is None for node in nodes[:-1]):  # the last is the empty one
      raise Error(
        f'Only some of the adapters have a {protocol.kind(first)} at {where}: '
        'the others are of another batch.'
      )
  treedef = jax.tree.structure(absent)
  fields = []
  for node in nodes:
    own, tree = jax.tree.flatten(absent if node is None else node)
    if tree != treedef:
      raise Error(
        f'The adapters change {where} in different ways, so they are not of '
        'one batch.'
      )
    fields.append(own)
  return jax.tree.unflatten(treedef, [_rows(x, path) for x in zip(*fields)])


def _rows(leaves: Sequence[Any], path: Path, absent: Any = None) -> Any:
  present = [x for x in leaves if x is not None]
  if not present:
    return None
  shapes = sorted({jnp.shape(x) for x in present})
  if len(shapes) > 1:
    raise Error(
      f'The adapters are of different bases: at {"/".join(path)} they are '
      f'{" and ".join(str(list(s)) for s in shapes)}.'
    )
  if absent is None:
    absent = jnp.zeros_like(present[0])
  whole = [absent if x is None else x for x in leaves]
  return jnp.stack(whole, axis=_axis(path[0] if path else ''))


def _axis(top: str) -> int:
  return 1 if top == 'layers' else 0


def _axes(params: Params) -> Any:
  if not isinstance(params, Mapping):
    return 0
  return {name: _axis(name) for name in params}


def rows(stacked: Params, which: jax.Array) -> Params:
  """Returns the adapters of the rows, `which` [B] in the stack; -1 is none."""
  # -1 wraps around to the last adapter of the stack, which changes nothing.
  pick = lambda axis, part: jax.tree.map(
    lambda x: jnp.take(x, which, axis=axis, mode='wrap'), part
  )
  return {name: pick(_axis(name), part) for name, part in stacked.items()}


def model(network: Model) -> Model:
  """Returns the network with separate parameters for every row (`rows`)."""

  def hidden(base, params, batch):
    def one(own, row):
      row = jax.tree.map(lambda x: x[None], row)
      return network.hidden(base, own, row)[0]

    return jax.vmap(one, in_axes=(_axes(params), 0))(params, batch)

  def logits(base, params, hidden):
    one = lambda own, row: network.logits(base, own, row)
    return jax.vmap(one, in_axes=(_axes(params), 0))(params, hidden)

  return Model(hidden, logits)


def decoder(plain: Decoder) -> Decoder:
  """Returns the decoder with separate parameters for every row (`rows`)."""
  of_cache = Cache(1, 1, Places(0, 0))

  def alone(x: Cache, change) -> Cache:
    places = jax.tree.map(lambda y: change(y, 0), x.places)
    return Cache(change(x.keys, 1), change(x.values, 1), places)

  def extend(base, params, batch, cache, slot):
    def one(own, row, kept):
      row = jax.tree.map(lambda x: x[None], row)
      kept = alone(kept, jnp.expand_dims)
      hidden, kept = plain.extend(base, own, row, kept, slot)
      return hidden[0], alone(kept, jnp.squeeze)

    return jax.vmap(
      one, in_axes=(_axes(params), 0, of_cache), out_axes=(0, of_cache)
    )(params, batch, cache)

  def begin(base, params, batch_size, slots):
    if not prompts.front(params).length:
      return plain.empty(batch_size, slots)

    def one(own):
      return alone(plain.begin(base, own, 1, slots), jnp.squeeze)

    return jax.vmap(one, in_axes=(_axes(params),), out_axes=of_cache)(params)

  return Decoder(plain.empty, extend, begin)
