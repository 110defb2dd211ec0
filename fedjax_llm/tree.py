"""Algebra on parameter trees and on stacks of them, [K, ...].

`None` marks an absent leaf throughout: see `types`. Sums run in float32 and
come back in the leaf's own dtype.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.types import Label, Masks, Params, Uploads

Tree = Any


def _is_none(x: Any) -> bool:
  return x is None


# ---------------------------------------------------------- absent leaves --


def map_present(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
  """Maps `fn` over trees; a leaf is `None` if it is absent from any tree.

  The trees share one structure once `None` counts as a leaf.

  >>> map_present(lambda x, y: x + y, {'a': 1, 'b': 2}, {'a': 10, 'b': None})
  {'a': 11, 'b': None}
  """

  def leaf(*xs):
    return None if any(x is None for x in xs) else fn(*xs)

  return jax.tree.map(leaf, tree, *rest, is_leaf=_is_none)


def merge(*trees: Tree) -> Tree:
  """Returns the first leaf that is present, leaf by leaf.

  >>> merge({'a': None, 'b': 2}, {'a': 1, 'b': 9})
  {'a': 1, 'b': 2}
  """

  def leaf(*xs):
    return next((x for x in xs if x is not None), None)

  return jax.tree.map(leaf, *trees, is_leaf=_is_none)


def like(tree: Tree, template: Tree) -> Tree:
  """Returns `tree` restricted to the leaves that `template` has.

  >>> like({'a': 1, 'b': 2}, {'a': 'x', 'b': None})
  {'a': 1, 'b': None}
  """
  return map_present(lambda x, _: x, tree, template)


def select(tree: Tree, labels: Tree, *wanted: Label) -> Tree:
  """Returns `tree` restricted to the leaves with a label in `wanted`.

  >>> labels = {'a': Label.SHARED, 'b': Label.FROZEN}
  >>> select({'a': 1, 'b': 2}, labels, Label.SHARED, Label.PRIVATE)
  {'a': 1, 'b': None}
  """
  return jax.tree.map(
    lambda x, label: x if label in wanted else None,
    tree,
    labels,
    is_leaf=_is_none,
  )


def named(tree: Tree) -> dict[str, Any]:
  """Returns the leaves by name: keys, places and fields joined by '/'.

  >>> named({'q': [1, 2], 'bias': None})
  {'q/0': 1, 'q/1': 2}
  """
  return {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def path_name(path: Any) -> str:
  """Returns a leaf's name from its path in `jax.tree_util`'s functions.

  >>> jax.tree_util.tree_map_with_path(lambda at, x: path_name(at), {'q': [7]})
  {'q': ['q/0']}
  """
  return jax.tree_util.keystr(path, simple=True, separator='/')


# ----------------------------------------------------------- largest entries --


def largest_places(flat: jax.Array, num: int) -> jax.Array:
  """Returns the places of the `num` largest entries of [P], ascending, [num].

  >>> largest_places(jnp.array([3, 9, 1, 5]), 2).tolist()
  [1, 3]
  """
  return jnp.sort(jax.lax.top_k(flat, num)[1])


def largest(tree: Tree, num: int) -> Tree:
  """Returns True at the `num` largest entries of all leaves together.

  Of equal entries the first in the order of `jax.tree.leaves` is taken.

  >>> x = {'a': jnp.array([1.0, 4.0]), 'b': jnp.array([[3.0], [2.0]])}
  >>> jax.tree.map(lambda m: m.tolist(), largest(x, 2))
  {'a': [False, True], 'b': [[True], [False]]}
  """
  leaves, treedef = jax.tree.flatten(tree)
  flat = jnp.concatenate([x.ravel() for x in leaves])
  chosen = jnp.zeros(flat.size, bool).at[largest_places(flat, num)].set(True)
  return jax.tree.unflatten(treedef, split_flat(chosen, leaves))


def split_flat(flat: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
  """Cuts a vector [P] into the shapes of the leaves, in their order.

  >>> like = [jnp.ones((2, 2)), jnp.ones(1)]
  >>> [x.shape for x in split_flat(jnp.arange(5), like)]
  [(2, 2), (1,)]
  """
  parts, at = [], 0
  for x in leaves:
    parts.append(flat[at : at + x.size].reshape(x.shape))
    at += x.size
  return parts


# ------------------------------------------------------------------ stacks --


def take(stack: Tree, index: Any) -> Tree:
  """Returns the row or rows `index` of every leaf.

  >>> take({'w': jnp.array([[1, 2], [3, 4]])}, 1)['w'].tolist()
  [3, 4]
  """
  return jax.tree.map(lambda x: x[index], stack)


def stack(trees: list[Tree]) -> Tree:
  """Stacks K trees of [...] to one tree of [K, ...].

  >>> stack([{'w': jnp.array([1, 2])}, {'w': jnp.array([3, 4])}])['w'].tolist()
  [[1, 2], [3, 4]]
  """
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def broadcast(tree: Tree, num: int) -> Tree:
  """Repeats a tree of [...] to [K, ...] (free inside a jitted program).

  >>> broadcast({'w': jnp.array([1, 2])}, 3)['w'].tolist()
  [[1, 2], [1, 2], [1, 2]]
  """
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), tree)


def rows(mask: jax.Array, leaf: jax.Array) -> jax.Array:
  """Reshapes a stacked mask [K, ...] to broadcast against a stacked leaf.

  Masks broadcast to their parameter from the right, so the missing axes go in
  between: [K, R] against [K, L, D, R] becomes [K, 1, 1, R].

  >>> rows(jnp.ones((5, 2), bool), jnp.ones((5, 3, 4, 2))).shape
  (5, 1, 1, 2)
  """
  missing = leaf.ndim - mask.ndim
  return mask.reshape(mask.shape[:1] + (1,) * missing + mask.shape[1:])


def where(rows_valid: jax.Array, new: Tree, old: Tree) -> Tree:
  """Returns `new` in valid rows [K], `old` elsewhere (NaN cannot leak).

  >>> valid = jnp.array([True, False])
  >>> new, old = jnp.array([1.0, jnp.nan]), jnp.array([8.0, 9.0])
  >>> where(valid, {'w': new}, {'w': old})['w'].tolist()
  [1.0, 9.0]
  """
  return map_present(
    lambda n, o: jnp.where(
      rows_valid.reshape((-1,) + (1,) * (jnp.ndim(n) - 1)), n, o
    ),
    new,
    old,
  )


def weighted_sum(stack: Tree, weight: jax.Array) -> Tree:
  """Returns sum_k w_k x_k over the leading axis, in float32.

  One contraction of the weights with the stack: on a CPU it runs at the memory
  bandwidth, where `jnp.mean(x, 0)` reaches a fiftieth of it.

  >>> clients = {'w': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  >>> weighted_sum(clients, jnp.array([1.0, 2.0]))['w'].tolist()
  [7.0, 10.0]
  """

  def leaf(x):
    # HIGHEST: accelerators would round the updates to TF32 or bfloat16.
    return jnp.tensordot(
      weight.astype(jnp.float32),
      x.astype(jnp.float32),
      axes=1,
      precision=jax.lax.Precision.HIGHEST,
    )

  return jax.tree.map(leaf, stack)


def normalise(weight: jax.Array) -> jax.Array:
  """Returns weights scaled to sum to one; all zero where the sum is zero.

  >>> normalise(jnp.array([3.0, 1.0])).tolist()
  [0.75, 0.25]
  """
  total = jnp.sum(weight)
  return weight / jnp.where(total > 0, total, 1.0)


def weighted_mean(stack: Tree, weight: jax.Array) -> Tree:
  """Returns sum_k w_k x_k / sum_k w_k over the leading axis, in leaves' dtypes.

  >>> clients = {'w': jnp.array([1.0, 5.0])}
  >>> float(weighted_mean(clients, jnp.array([3.0, 1.0]))['w'])
  2.0
  """
  mean = weighted_sum(stack, normalise(weight))
  return jax.tree.map(lambda m, x: m.astype(x.dtype), mean, stack)


# -------------------------------------------------------------- whole tree --


def add(x: Tree, y: Tree) -> Tree:
  """Returns x + y where both are present, elsewhere the one that is present.

  >>> one = jnp.float32(1)
  >>> jax.tree.map(float, add({'a': one, 'b': one}, {'a': one, 'b': None}))
  {'a': 2.0, 'b': 1.0}
  """
  return merge(map_present(lambda a, b: (a + b).astype(a.dtype), x, y), x, y)


def sub(x: Tree, y: Tree) -> Tree:
  """Returns x - y where both are present.

  >>> sub({'a': 5, 'b': 2}, {'a': 3, 'b': None})
  {'a': 2, 'b': None}
  """
  return map_present(operator.sub, x, y)


def scale(tree: Tree, factor: Any) -> Tree:
  """Returns the whole tree times a number, each leaf in its dtype.

  >>> scale({'w': jnp.array([1.0, 2.0])}, 3)['w'].tolist()
  [3.0, 6.0]
  """
  return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def zeros_like(tree: Tree, dtype: Any = None) -> Tree:
  """Returns zeros of the same shapes, in `dtype` or each leaf's own.

  >>> zeros_like({'w': jnp.ones(2, jnp.int8)})['w']
  Array([0, 0], dtype=int8)
  """
  return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), dtype or x.dtype), tree)


def dot(x: Tree, y: Tree) -> jax.Array:
  """Returns the inner product of two trees, float32.

  >>> x = {'w': jnp.array([1.0, 2.0]), 'b': jnp.float32(3)}
  >>> float(dot(x, x))
  14.0
  """
  parts = jax.tree.leaves(
    map_present(
      lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), x, y
    )
  )
  return functools.reduce(operator.add, parts, jnp.float32(0.0))


def norm(tree: Tree) -> jax.Array:
  """Returns the Euclidean norm of the whole tree, float32.

  >>> float(norm({'w': jnp.float32(3), 'b': jnp.float32(4)}))
  5.0
  """
  return root(dot(tree, tree))


def root(square: jax.Array) -> jax.Array:
  """Returns the square root; its gradient at zero is zero, not infinite.

  >>> float(jax.grad(root)(0.0)), float(jax.grad(root)(4.0))
  (0.0, 0.25)
  """
  none = square == 0
  return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, square)))


def all_finite(tree: Tree) -> jax.Array:
  """Returns True if no leaf holds a NaN or an infinity.

  >>> bool(all_finite({'w': jnp.array([1.0, jnp.inf])}))
  False
  """
  parts = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, parts, jnp.bool_(True))


def ravel(stack: Tree) -> jax.Array:
  """Flattens leaves [K, ...] to one float32 matrix [K, P], P entries a client.

  >>> ravel({'b': jnp.ones((2, 1)), 'w': jnp.zeros((2, 1, 2))}).tolist()
  [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
  """
  return jnp.concatenate(
    [
      x.reshape(x.shape[0], -1).astype(jnp.float32)
      for x in jax.tree.leaves(stack)
    ],
    axis=1,
  )


def squared_distances(stack: Tree) -> jax.Array:
  """Returns ||x_i - x_j||^2 over the whole tree, [K, K], symmetric, float32.

  Distances come from inner products, |x_i|^2 + |x_j|^2 - 2 x_i'x_j: one matrix
  product. Rounding spoils small distances: a row with a pair closer than an
  eighth of its length is compared by differences, a pass over the stack a row.

  >>> squared_distances({'w': jnp.array([[0.0, 0.0], [3.0, 4.0]])}).tolist()
  [[0.0, 25.0], [25.0, 0.0]]
  """
  leaves = [
    x.reshape(x.shape[0], -1).astype(jnp.float32)
    for x in jax.tree.leaves(stack)
  ]
  highest = jax.lax.Precision.HIGHEST
  grams = [jnp.matmul(x, x.T, precision=highest) for x in leaves]
  gram = functools.reduce(operator.add, grams)
  square = jnp.diagonal(gram)
  lengths = square[:, None] + square
  same = jnp.eye(len(square), dtype=bool)
  near = jnp.where(same, 0.0, lengths - (gram + gram.T))
  # False for infinities and NaN.
  precise = same | (lengths == 0) | (near > lengths / 64)

  def from_row(row):
    parts = [jnp.sum(jnp.square(x - x[row]), axis=1) for x in leaves]
    return functools.reduce(operator.add, parts)

  def exactly(row):
    poor = ~jnp.all(precise[row])
    return jax.lax.cond(poor, from_row, lambda row: near[row], row)

  exact = jax.lax.map(exactly, jnp.arange(len(square)))
  return jnp.where(precise, near, exact)


# ----------------------------------------------------------------- uploads --


def apply_mask(tree: Tree, mask: Tree) -> Tree:
  """Returns `tree`, zero outside the mask; leaves without a mask unchanged.

  >>> x, mask = jnp.array([1, 2]), jnp.array([True, False])
  >>> apply_mask({'w': x, 'b': x}, {'w': mask, 'b': None})['w'].tolist()
  [1, 0]
  """
  return jax.tree.map(
    lambda x, m: x if m is None or x is None else jnp.where(m, x, 0),
    tree,
    mask,
    is_leaf=_is_none,
  )


def whole(uploads: Uploads) -> Params:
  """Returns the clients' trained parameters: held * (start + update), [K, ...].

  Frozen leaves (the scales of `LowRank` nodes) come from the start.

  >>> held = {'w': jnp.array([[True, True], [True, False]])}
  >>> uploads = Uploads(
  ...   update={'w': jnp.ones((2, 2))}, start={'w': jnp.full((2, 2), 4.0)},
  ...   masks=Masks(held, held), weight=jnp.ones(2), valid=jnp.ones(2, bool))
  >>> whole(uploads)['w'].tolist()
  [[5.0, 5.0], [5.0, 0.0]]
  """
  end = add(uploads.start, uploads.update)
  held = map_present(rows, uploads.masks.held, like(end, uploads.masks.held))
  return apply_mask(end, held)


def full_masks(params: Params, labels: Tree) -> Masks:
  """Returns masks that hold and train every leaf that is not frozen.

  >>> labels = {'a': Label.SHARED, 'b': Label.FROZEN}
  >>> full_masks({'a': jnp.ones(2), 'b': jnp.ones(2)}, labels).trained
  {'a': Array(True, dtype=bool), 'b': None}
  """
  mask = map_present(
    lambda _: jnp.bool_(True),
    select(params, labels, Label.SHARED, Label.PRIVATE),
  )
  return Masks(held=mask, trained=mask)
