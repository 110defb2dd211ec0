"""Scopes: labels of the leaves that a client trains, shares and keeps.

Builders return a `Scope`. Leaves have names, 'layers/self_attn/q_proj/a':
dictionary keys, list places and fields joined by '/'. `leaf_paths` lists them,
patterns select them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import patterns as expressions
from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import (
  Error,
  Frozen,
  Label,
  Params,
  Private,
  Scope,
  Shared,
)


def leaf_paths(params: Params) -> list[str]:
  """Returns the name of every leaf, in the order of `jax.tree.leaves`.

  >>> leaf_paths({'q': LowRank(a=1, b=2, scale=3), 'bias': [4, 5]})
  ['bias/0', 'bias/1', 'q/a', 'q/b', 'q/scale']
  """
  return list(tree.named(params))


def shared_labels(params: Params) -> Any:
  """Returns Shared on floating leaves, Frozen on the rest.

  Frozen are also the scales and residuals of `LowRank` nodes, and the fields
  that a node of another kind lists in `FROZEN`.
  """

  def trainable(x):
    return Shared if jnp.issubdtype(_dtype(x), jnp.floating) else Frozen

  def node(x):
    if not is_node(x):
      return trainable(x)
    still = getattr(x, 'FROZEN', ('scale', 'residual'))
    labels = jax.tree.map(trainable, x)
    frozen = jax.tree.map(lambda _: Frozen, x)
    return labels._replace(**{name: getattr(frozen, name) for name in still})

  is_node = lambda x: isinstance(x, LowRank) or hasattr(x, 'FROZEN')
  return jax.tree.map(node, params, is_leaf=is_node)


def _dtype(x: Any) -> Any:
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


def _scope(labels) -> Scope:
  def mask(start, state, context):
    del state, context  # every client holds everything, always
    return tree.full_masks(start, labels(start))

  return Scope(labels=labels, mask=mask)


def everything() -> Scope:
  """Returns a scope: every trainable leaf is trained, sent and aggregated.

  Trainable is every floating leaf but the `scale` and the `residual` of
  `LowRank` nodes, which are frozen.

  >>> node = LowRank(a=1.0, b=2.0, scale=3.0)
  >>> [label.value for label in everything().labels(node)[:3]]
  ['shared', 'shared', 'frozen']
  """
  return _scope(shared_labels)


def labelled(
  patterns: Mapping[str, Label | str] | Iterable[tuple[str, Label | str]],
) -> Scope:
  """Returns a scope with labels by regular expressions on the leaves' names.

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
  rules = [(p, compiled(p), _label(label)) for p, label in listed]
  if not rules:
    raise Error('labelled needs at least one pattern.')

  def labels(params):
    default, treedef = jax.tree.flatten(shared_labels(params))
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
  """Returns a scope: clients keep the matching leaves and share the rest.

  `private('/b$')` shares the factors a and keeps the factors b.

  >>> private('b$').labels({'a': 1.0, 'b': 2.0})['b'].value
  'private'
  """
  return labelled({pattern: Private})


def frozen(pattern: str) -> Scope:
  """Returns a scope: the matching leaves are not trained, the rest is shared.

  `frozen('/a$')` trains the factors b alone (FFA-LoRA, arXiv 2403.12313).

  >>> frozen('a$').labels({'a': 1.0, 'b': 2.0})['a'].value
  'frozen'
  """
  return labelled({pattern: Frozen})


def all_private() -> Scope:
  """Returns a scope: each client keeps all that it trains and shares nothing.

  >>> all_private().labels({'a': 1.0})['a'].value
  'private'
  """

  def labels(params):
    return jax.tree.map(
      lambda label: Private if label is Shared else label,
      shared_labels(params),
    )

  return _scope(labels)


def check_match(regex: expressions.Search, names: list[str]) -> None:
  """Raises an `Error` if no name of a trainable leaf matches the pattern."""
  if not any(map(regex.search, names)):
    raise Error(
      f'the pattern {regex.pattern!r} matches no leaf that can be trained; '
      f'the leaves are: {", ".join(names)}.'
    )


def compiled(pattern: str) -> expressions.Search:
  """Returns the search for a pattern; an `Error` says what is wrong with it."""
  return expressions.searcher(pattern, "the scope's pattern")


def _label(label: Label | str) -> Label:
  try:
    return Label(label)
  except ValueError:
    raise Error(
      f'{label!r} is no label; there are {", ".join(x.value for x in Label)}.'
    ) from None
