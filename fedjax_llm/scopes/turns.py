"""Scopes that train other leaves in other rounds, or leave some untrained."""

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.scopes.labels import (
  check_match,
  compiled,
  leaf_paths,
  shared_labels,
)
from fedjax_llm.types import (
  Error,
  Scope,
)


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
  turns = [compiled(p) for p in patterns]
  labels = shared_labels

  def mask(start, state, context):
    del state
    masks = tree.full_masks(start, labels(start))
    names = leaf_paths(masks.trained)
    for turn in turns:
      check_match(turn, names)

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
  regex = compiled(pattern)
  if regex.groups != 1:
    raise Error(f'the pattern {pattern!r} needs one group, that of a number.')

  def mask(start, state, context):
    del state
    masks = tree.full_masks(start, shared_labels(start))
    names = leaf_paths(masks.trained)
    check_match(regex, names)
    groups = {n: m[1] for n in names if (m := regex.search(n))}
    places = {n: int(x) for n, x in groups.items() if x and x.isdecimal()}
    if len(places) < len(groups):
      raise Error(
        f'the pattern {pattern!r} finds {min(groups.keys() - places)} without '
        'a number in its group.'
      )
    num = 1 + max(places.values())

    def leaf(path, m):
      name = tree.path_name(path)
      if name not in places:
        return m
      return m & (context.round % num == num - 1 - places[name])

    trained = jax.tree_util.tree_map_with_path(leaf, masks.trained)
    return masks._replace(trained=trained)

  return Scope(labels=shared_labels, mask=mask)


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
  regex = compiled(pattern)

  def mask(start, state, context):
    del state, context
    masks = tree.full_masks(start, shared_labels(start))
    check_match(regex, leaf_paths(masks.trained))

    def leaf(path, m):
      name = tree.path_name(path)
      return jnp.bool_(False) if regex.search(name) else m

    trained = jax.tree_util.tree_map_with_path(leaf, masks.trained)
    return masks._replace(trained=trained)

  return Scope(labels=shared_labels, mask=mask)
