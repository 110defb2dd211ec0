"""Scopes: labels of the leaves that a client trains, shares and keeps.

Builders return a `Scope`. Leaves have names, 'layers/self_attn/q_proj/a':
dictionary keys, list places and fields joined by '/'. `leaf_paths` lists them,
patterns select them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import (
  Error,
  Frozen,
  Label,
  Masks,
  Params,
  Private,
  Scope,
  Shared,
)

__all__ = [
  'all_private',
  'alternating',
  'everything',
  'frozen',
  'in_turn',
  'labelled',
  'layers',
  'private',
  'ranks',
  'untrained',
]


def leaf_paths(params: Params) -> list[str]:
  """Returns the name of every leaf, in the order of `jax.tree.leaves`.

  >>> leaf_paths({'q': LowRank(a=1, b=2, scale=3), 'bias': [4, 5]})
  ['bias/0', 'bias/1', 'q/a', 'q/b', 'q/scale']
  """
  return list(tree.named(params))


def _everything_labels(params: Params) -> Any:
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
  return _scope(_everything_labels)


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
      _everything_labels(params),
    )

  return _scope(labels)


# ------------------------------------------- differences between clients --


def alternating(*patterns: str) -> Scope:
  """Returns a scope: round t trains the leaves of `patterns[t % n]`.

  The leaves of the other patterns are held as received and not sent up. Leaves
  that no pattern matches are trained in every round. All are shared, and the
  round is a traced number, so one program serves every turn.

  `alternating('/b$', '/a$')` is the schedule of RoLoRA (arXiv 2409.02346).

  Raises:
    Error: fewer than two patterns, or one that is no regular expression; from
      `mask`, a pattern that matches no leaf that can be trained.

  >>> from fedjax_llm.types import Context
  >>> scope, params = alternating('b$', 'a$'), {'a': 1.0, 'b': 2.0, 'c': 3.0}
  >>> trained = scope.mask(params, None, Context(round=3)).trained
  >>> [name for name in params if trained[name]]
  ['a', 'c']
  """
  if len(patterns) < 2:
    raise Error(f'alternating needs two patterns or more, got {patterns}.')
  turns = [_compiled(p) for p in patterns]
  labels = _everything_labels

  def mask(start, state, context):
    del state
    masks = tree.full_masks(start, labels(start))
    names = leaf_paths(masks.trained)
    for turn in turns:
      _check_match(turn, names)

    def leaf(path, m):
      name = tree.path_name(path)
      mine = [i for i, turn in enumerate(turns) if turn.search(name)]
      if not mine:
        return m
      return m & jnp.any(context.round % len(turns) == jnp.array(mine))

    trained = jax.tree_util.tree_map_with_path(leaf, masks.trained)
    return masks._replace(trained=trained)

  return Scope(labels=labels, mask=mask)


def in_turn(pattern: str) -> Scope:
  """Returns a scope: each round trains one part of every node, the last first.

  The pattern's group is a part's number: `in_turn('/cores/([0-9]+)$')` trains
  core n - 1 - t % n of a tensor train of n cores in round t. Leaves that do not
  match are trained in every round.

  Raises:
    Error: a pattern that is no regular expression, or without one group; from
      `mask`, one that matches no leaf that can be trained.

  >>> from fedjax_llm.types import Context
  >>> scope, params = in_turn('([0-9])$'), {'c0': 1.0, 'c1': 2.0}
  >>> trained = scope.mask(params, None, Context(round=2)).trained
  >>> [name for name in params if trained[name]]
  ['c1']
  """
  regex = _compiled(pattern)
  if regex.groups != 1:
    raise Error(f'the pattern {pattern!r} needs one group, that of a number.')

  def mask(start, state, context):
    del state
    masks = tree.full_masks(start, _everything_labels(start))
    names = leaf_paths(masks.trained)
    _check_match(regex, names)
    places = {n: int(m[1]) for n in names if (m := regex.search(n))}
    num = 1 + max(places.values())

    def leaf(path, m):
      name = tree.path_name(path)
      if name not in places:
        return m
      return m & (context.round % num == num - 1 - places[name])

    trained = jax.tree_util.tree_map_with_path(leaf, masks.trained)
    return masks._replace(trained=trained)

  return Scope(labels=_everything_labels, mask=mask)


def layers(inner: Scope | None = None) -> Scope:
  """Returns a scope: a client holds and trains layers drawn in every round.

  The client's profile, `Cohort.profiles` or its entry 'layers', is the number
  of layers to draw from the L over which leaves under 'layers/' are stacked.
  `inner` decides on the rest. FedRA's allocation (arXiv 2311.11227).

  Raises:
    Error: from `mask`, clients without that number in their profile, or
      parameters without leaves that are stacked over layers.

  >>> from fedjax_llm.types import Context
  >>> params = {'layers': {'a': jnp.ones((3, 2))}, 'head': jnp.ones(2)}
  >>> mine = Context(key=jax.random.key(0), profile=jnp.int32(2))
  >>> held = layers().mask(params, None, mine).held
  >>> held['layers']['a'].shape, int(held['layers']['a'].sum())
  ((3, 1), 2)
  """
  inner = everything() if inner is None else inner

  def mask(start, state, context):
    size = of_profile(context.profile, 'layers', 'number of layers')
    masks = inner.mask(start, state, context)
    below = jax.tree.leaves(start.get('layers', ()))
    if not below:
      raise Error('this method needs leaves that are stacked over layers.')
    num = below[0].shape[0]
    order = jnp.argsort(jax.random.uniform(context.key, (num,)))
    keep = jnp.argsort(order) < size

    def narrow(masks):
      def leaf(x, m):
        return m & keep.reshape(-1, *[1] * (x.ndim - 1))

      some = tree.map_present(leaf, start['layers'], masks['layers'])
      return {**masks, 'layers': some}

    return Masks(*map(narrow, masks))

  return Scope(inner.labels, mask)


def untrained(pattern: str) -> Scope:
  """Returns a scope: clients hold the matching leaves but do not train them.

  Unlike frozen leaves they are sent down, and a rule may write them. The rest
  is trained.

  Raises:
    Error: a pattern that is no regular expression; from `mask`, one that
      matches no leaf that can be trained.

  >>> masks = untrained('a$').mask({'a': 1.0, 'b': 2.0}, None, None)
  >>> bool(masks.held['a']), bool(masks.trained['a'])
  (True, False)
  """
  regex = _compiled(pattern)

  def mask(start, state, context):
    del state, context
    masks = tree.full_masks(start, _everything_labels(start))
    _check_match(regex, leaf_paths(masks.trained))

    def leaf(path, m):
      name = tree.path_name(path)
      return jnp.bool_(False) if regex.search(name) else m

    trained = jax.tree_util.tree_map_with_path(leaf, masks.trained)
    return masks._replace(trained=trained)

  return Scope(labels=_everything_labels, mask=mask)


def _check_match(regex: re.Pattern, names: list[str]) -> None:
  if not any(map(regex.search, names)):
    raise Error(
      f'the pattern {regex.pattern!r} matches no leaf that can be trained; '
      f'the leaves are: {", ".join(names)}.'
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
