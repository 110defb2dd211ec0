"""Scopes: what a client trains, shares and keeps, as a label a leaf.

Leaves have names, 'layers/self_attn/q_proj/a': dictionary keys, list places and
fields joined by '/'. `leaf_paths` lists them, patterns select them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  Error,
  Frozen,
  Label,
  LowRank,
  Params,
  Private,
  Scope,
  Shared,
)

__all__ = ['all_private', 'everything', 'frozen', 'labelled', 'private']


def leaf_paths(params: Params) -> list[str]:
  """The name of every leaf, in the order of `jax.tree.leaves`.

  >>> leaf_paths({'q': LowRank(a=1, b=2, scale=3), 'bias': [4, 5]})
  ['bias/0', 'bias/1', 'q/a', 'q/b', 'q/scale']
  """
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]


def _everything_labels(params: Params) -> Any:
  """Shared on floating leaves; Frozen on the rest, scales and residuals."""

  def trainable(x):
    return Shared if jnp.issubdtype(_dtype(x), jnp.floating) else Frozen

  def node(x):
    if not isinstance(x, LowRank):
      return trainable(x)
    labels = jax.tree.map(trainable, x)
    still = jax.tree.map(lambda _: Frozen, x)
    return labels._replace(scale=still.scale, residual=still.residual)

  return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, LowRank))


def _dtype(x: Any) -> Any:
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


def _scope(labels) -> Scope:
  def mask(start, profile, state, round, key):
    del profile, state, round, key  # every client holds everything, always
    return tree.full_masks(start, labels(start))

  return Scope(labels=labels, mask=mask)


def everything() -> Scope:
  """Everything that can be trained is trained, sent and aggregated.

  That is every floating leaf but the `scale` and the `residual` of `LowRank`
  nodes, which nobody trains.

  >>> node = LowRank(a=1.0, b=2.0, scale=3.0)
  >>> [label.value for label in everything().labels(node)[:3]]
  ['shared', 'shared', 'frozen']
  """
  return _scope(_everything_labels)


def labelled(
  patterns: Mapping[str, Label | str] | Iterable[tuple[str, Label | str]],
) -> Scope:
  """Labels by regular expression on the names of the leaves.

  A pattern may match anywhere in a name (`re.search`); the first pattern that
  matches decides, and a leaf that none matches is shared. Leaves that cannot be
  trained (see `everything`) stay frozen whatever matches.

  Args:
    patterns: pattern -> label, a `Label` or its value ('shared', 'private',
      'frozen'), in order of precedence.

  Raises:
    Error: no pattern, a pattern that is no regular expression, an unknown
      label; from `labels`, a pattern that decides no leaf (the leaves are
      listed).

  >>> params = {'q': LowRank(a=1.0, b=2.0, scale=3.0)}
  >>> labels = labelled({'/a$': 'frozen', '/b$': Private}).labels(params)
  >>> [label.value for label in labels['q'][:3]]
  ['frozen', 'private', 'frozen']
  """
  listed: Any = patterns.items() if isinstance(patterns, Mapping) else patterns
  rules = [(p, _compiled(p), _label(label)) for p, label in listed]
  if not rules:
    raise Error('labelled needs at least one pattern.')

  def labels(params):
    default, treedef = jax.tree.flatten(_everything_labels(params))
    names = leaf_paths(params)
    decided = [0] * len(rules)
    chosen = []
    for name, label in zip(names, default):
      if label is Shared:
        for i, (_, regex, wanted) in enumerate(rules):
          if regex.search(name):
            decided[i] += 1
            label = wanted
            break
      chosen.append(label)
    for count, (pattern, regex, _) in zip(decided, rules):
      if not count:
        can = [n for n, label in zip(names, default) if label is Shared]
        why = (
          'is decided by the patterns before it'
          if any(map(regex.search, can))
          else 'matches no leaf that can be trained'
        )
        raise Error(
          f'the pattern {pattern!r} {why}; the leaves are: {", ".join(can)}.'
        )
    return jax.tree.unflatten(treedef, chosen)

  return _scope(labels)


def private(pattern: str) -> Scope:
  """Leaves that match are kept by each client; the rest is shared.

  `private('/b$')` shares the factors a and keeps the factors b.

  >>> private('b$').labels({'a': 1.0, 'b': 2.0})['b'].value
  'private'
  """
  return labelled({pattern: Private})


def frozen(pattern: str) -> Scope:
  """Leaves that match are trained by nobody; the rest is shared.

  `frozen('/a$')` trains the factors b alone (FFA-LoRA, arXiv 2403.12313).

  >>> frozen('a$').labels({'a': 1.0, 'b': 2.0})['a'].value
  'frozen'
  """
  return labelled({pattern: Frozen})


def all_private() -> Scope:
  """Each client keeps all that it trains: federated learning without sharing.

  >>> all_private().labels({'a': 1.0})['a'].value
  'private'
  """

  def labels(params):
    return jax.tree.map(
      lambda label: Private if label is Shared else label,
      _everything_labels(params),
    )

  return _scope(labels)


def _compiled(pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as e:
    raise Error(
      f'the pattern {pattern!r} is no regular expression: {e}.'
    ) from None


def _label(label: Label | str) -> Label:
  try:
    return Label(label)
  except ValueError:
    raise Error(
      f'{label!r} is no label; there are {", ".join(x.value for x in Label)}.'
    ) from None
