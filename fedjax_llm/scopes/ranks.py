"""Scopes of clients that hold some ranks of low-rank factors, and profiles."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.scopes.labels import everything
from fedjax_llm.types import (
  Error,
  Frozen,
  Masks,
  Params,
  Scope,
)


def ranks(inner: Scope | None = None) -> Scope:
  """Returns a scope: a client of capacity r holds and trains the first r ranks.

  These are column i of a and row i of b of every `LowRank` node, i < r, inside
  buffers of the server's rank: one program for clients of all sizes, and a
  client of rank r trains exactly as it would with factors of that rank and the
  same scale.

  r is the client's profile, `Cohort.profiles` [K], or its entry 'rank' where
  profiles are mappings. `inner` decides on the rest (all shared if None).

  Raises:
    Error: from `labels`, a factor that `inner` freezes; from `mask`, clients
      without a rank in their profile, or parameters without low-rank factors.

  >>> from fedjax_llm.types import Context
  >>> node = LowRank(jnp.ones((5, 4)), jnp.ones((4, 3)), jnp.ones(()))
  >>> masks = ranks().mask({'q': node}, None, Context(profile=jnp.int32(2)))
  >>> masks.held['q'].a.tolist(), masks.held['q'].b.shape
  ([True, True, False, False], (4, 1))
  """
  inner = everything() if inner is None else inner

  def mask(start, state, context):
    rank = rank_of(context.profile)
    is_node = lambda x: isinstance(x, LowRank)
    if not any(map(is_node, jax.tree.leaves(start, is_leaf=is_node))):
      raise Error('ranks of clients need low-rank factors: adapter.name=lora.')
    masks = inner.mask(start, state, context)
    return hold_columns(
      masks, start, lambda node: jnp.arange(node.a.shape[-1]) < rank
    )

  return Scope(both_trained(inner), mask)


def both_trained(inner: Scope) -> Callable[[Params], Any]:
  """Returns the labels of `inner`; they must not freeze a low-rank factor.

  A mask restricts the ranks that a client trains, and masks do not reach frozen
  factors: such a factor would arrive whole, beside ranks that the client does
  not have.

  Raises:
    Error: from the labels, a factor that `inner` freezes.
  """
  is_node = lambda x: isinstance(x, LowRank)

  def labels(params: Params) -> Any:
    chosen = inner.labels(params)
    nodes = jax.tree_util.tree_leaves_with_path(chosen, is_leaf=is_node)
    for path, node in nodes:
      if not is_node(node):
        continue
      for name, label in (('a', node.a), ('b', node.b)):
        if label is Frozen:
          where = tree.path_name(path)
          raise Error(
            f'{where}/{name} is frozen, so it cannot be masked: ranks that '
            'differ between clients need both factors trained.'
          )
    return chosen

  return labels


def rank_of(profile: Any) -> Any:
  """Returns a client's rank: its profile, or the profile's entry 'rank'."""
  return of_profile(profile, 'rank', 'rank')


def of_profile(profile: Any, name: str, what: str) -> Any:
  """Returns a profile's entry, or the profile itself if it is an array.

  Raises:
    Error: no such entry, or no array; it calls the entry `what`.
  """
  value = profile.get(name) if isinstance(profile, Mapping) else profile
  if not hasattr(value, 'shape'):
    raise Error(
      f'this method needs the {what} of every client in Cohort.profiles: give '
      f'the cohort profiles, an array [N] or a mapping with the entry {name}.'
    )
  return value


def hold_columns(masks: Masks, start: Params, keep: Any) -> Masks:
  """Returns masks restricted to columns of `LowRank` nodes.

  `keep(node)` returns booleans [R], or [..., R] where they differ by layer.
  """

  def node(x, m):
    if not isinstance(x, LowRank):
      return m
    columns = keep(x)
    lead = columns.ndim > 1
    of_a = columns[..., None, :] if lead else columns
    return LowRank(
      None if m.a is None else m.a & of_a,
      None if m.b is None else m.b & columns[..., :, None],
      m.scale,
      m.residual,
    )

  is_leaf = lambda x: x is None or isinstance(x, LowRank)
  apply = lambda mask: jax.tree.map(node, start, mask, is_leaf=is_leaf)
  return Masks(held=apply(masks.held), trained=apply(masks.trained))
