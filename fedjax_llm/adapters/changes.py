"""Applies an adapter's tree to a base: merges, folds, overlays and checks it.

A leaf has the path of the weight or of the place that it changes; how it
changes it is defined by its node (`nodes.protocol`). The functions here walk
both trees.
"""

from collections.abc import Mapping
from typing import Any

import jax

from fedjax_llm.adapters import picked
from fedjax_llm.nodes import protocol
from fedjax_llm.nodes.dense import Amended as Amended
from fedjax_llm.nodes.dense import Dense as Dense
from fedjax_llm.nodes.dense import add as add
from fedjax_llm.nodes.dora import Dora as Dora
from fedjax_llm.nodes.protocol import factors as factors
from fedjax_llm.nodes.protocol import is_node as is_node
from fedjax_llm.types import Base, Error, Params

Path = tuple[str, ...]


def as_low_rank(params: Params) -> Params:
  """Replaces every node that has low-rank factors by these factors.

  >>> from fedjax_llm.adapters.low_rank import lora
  >>> base = {'q': {'kernel': jax.numpy.ones((4, 3))}}
  >>> params = lora(rank=2, targets=['q']).init(jax.random.key(0), base)
  >>> as_low_rank(params)['q'] is params['q']  # LoRA has factors already
  True
  """

  def node(x):
    low = factors(x)
    return x if low is None else low

  return jax.tree.map(node, params, is_leaf=is_node)


def product(leaf: Any) -> jax.Array:
  """Computes scale * a @ b + residual of a low-rank change, [..., D, F].

  >>> from fedjax_llm.nodes import LowRank
  >>> one = jax.numpy.ones((1, 1))
  >>> node = LowRank(2 * one, 3 * one, jax.numpy.float32(5))
  >>> product(node).tolist()
  [[30.0]]
  """
  node = factors(leaf)
  assert node is not None
  return node.change()


def merge(base: Base, params: Params) -> Base:
  """Writes every change into the weights of the base and returns it.

  A node at a module's 'output' is written into its kernel and bias, a node at
  its 'input' into the rows of the kernel.

  Raises:
    Error: a node that cannot be written into a weight, with its reason.

  >>> from fedjax_llm.nodes import LowRank
  >>> jnp = jax.numpy
  >>> base = {'layers': {'q_proj': {'kernel': jnp.ones((1, 2, 2))}}}
  >>> node = LowRank(jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2)), jnp.ones(1))
  >>> merge(base, {'layers': {'q_proj': node}})['layers']['q_proj']['kernel']
  Array([[[2., 2.],
          [2., 2.]]], dtype=float32)
  >>> head = {'score': {'kernel': jnp.ones((2, 1)), 'bias': jnp.ones(1)}}
  >>> merge(head, {'score': {'bias': Dense(jnp.zeros(1))}})['score']['bias']
  Array([0.], dtype=float32)
  """
  return _merged(base, picked.spread(protocol.plain(params), base), ())


def unmerged(base: Base, params: Params) -> str | None:
  """Returns the reason why `merge` refuses an adapter, or None.

  >>> from fedjax_llm.nodes import Prompt
  >>> table = {'embed_tokens': {'embedding': jax.numpy.ones((5, 4))}}
  >>> unmerged(table, {'inputs': Prompt(jax.numpy.ones((2, 4)))})[:40]
  'inputs: a soft prompt stands in front of'
  """
  try:
    jax.eval_shape(merge, base, params)
  except Error as error:
    return str(error)
  return None


def _merged(base: Any, params: Any, path: Path) -> Any:
  if params is None:
    return base
  if not isinstance(params, Mapping):
    name = _main(base)
    try:
      if name is None:
        return protocol.write(params, base)
      return {**base, name: protocol.write(params, base[name])}
    except Error as error:
      raise Error(f'{"/".join(path)}: {error}') from error
  done = dict(base)
  for name, leaf in params.items():
    if name in base:
      done[name] = _merged(base[name], leaf, (*path, name))
  for name, leaf in sorted(params.items()):  # inputs before outputs
    if name not in base and leaf is not None:
      done = _merged_beside(done, leaf, (*path, name))
  return done


def _merged_beside(module: dict[str, Any], leaf: Any, path: Path) -> Any:
  """Writes a node at a module's 'input' or 'output' into its weights."""
  kernel, place = module.get('kernel'), path[-1]
  try:
    if place == 'input' and kernel is not None:
      turned = protocol.write(leaf, kernel.mT if _plain(kernel) else kernel)
      return {**module, 'kernel': turned.mT}
    if place == 'output' and kernel is not None:
      written = {
        name: protocol.write(leaf, module[name])
        for name in ('kernel', 'bias')
        if name in module
      }
      return {**module, **written}
    if is_node(leaf):
      protocol.write(leaf, kernel)  # raises the node's own reason
  except Error as error:
    raise Error(f'{"/".join(path)}: {error}') from error
  raise Error(f'The adapter has {"/".join(path)}, which the model lacks.')


def _plain(kernel: Any) -> bool:
  return hasattr(kernel, 'mT')


def fold(base: Base, params: Params) -> tuple[Base, Params]:
  """Moves the residuals into the base, once a round, outside `vmap`.

  >>> from fedjax_llm.nodes import LowRank
  >>> one = jax.numpy.ones((1, 1))
  >>> node = LowRank(one, one, scale=1.0, residual=4 * one)
  >>> base, params = fold({'q': {'kernel': one}}, {'q': node})
  >>> base['q']['kernel'].tolist(), params['q'].residual
  ([[5.0]], None)
  """
  index = picked.of(params)
  base, params = _folded(base, picked.spread(params, base))
  return base, picked.gather(params, index)


def _folded(base: Any, params: Any) -> tuple[Any, Any]:
  if params is None:
    return base, None
  if isinstance(params, Mapping):
    base, done = dict(base), dict(params)
    for name in params:
      if name in base:
        base[name], done[name] = _folded(base[name], params[name])
    return base, done
  name = _main(base)
  if name is None:
    return protocol.fold(params, base)
  weight, params = protocol.fold(params, base[name])
  return {**base, name: weight}, params


def overlay(base: Base, params: Params) -> tuple[Base, Params]:
  """Moves every leaf that replaces its weight from the params into the base.

  For the forward pass: other nodes stay in the params, those that are computed
  (`nodes.protocol.plain`) as their results, those of some layers with zeros in
  the others (`picked.spread`).

  Raises:
    Error: a leaf without a weight of its shape in the base.

  >>> ones, zeros = jax.numpy.ones(2), jax.numpy.zeros(2)
  >>> overlay({'bias': ones}, {'bias': Dense(zeros)})
  ({'bias': Array([0., 0.], dtype=float32)}, {'bias': None})
  """
  params = protocol.plain(params)
  whole = []

  def take(path, leaf):
    replaces, value = protocol.replacement(leaf)
    if not replaces:
      return leaf
    if value is not None:
      whole.append((tuple(key.key for key in path), value))
    return None

  params = picked.spread(params, base)
  rest = jax.tree_util.tree_map_with_path(take, params, is_leaf=is_node)
  for path, value in whole:
    base = _put(base, path, path, value)
  return base, rest


def _put(base: Any, path: tuple, left: tuple, value: Any) -> Any:
  if not left:
    if getattr(base, 'shape', None) != value.shape:
      raise Error(
        f'The adapter has {list(value.shape)} at {"/".join(path)}, but the '
        f'model has {list(getattr(base, "shape", []))} there.'
      )
    return value
  if not isinstance(base, Mapping) or left[0] not in base:
    raise Error(f'The adapter has {"/".join(path)}, which the model lacks.')
  return {**base, left[0]: _put(base[left[0]], path, left[1:], value)}


def check(
  base: Base,
  params: Params,
  *,
  places: tuple[str, ...] = (),
  who: str = 'the adapter does not fit the model',
) -> None:
  """Raises `Error` where an adapter does not fit the base, after `overlay`.

  Args:
    base: the weights, arrays or their shapes.
    params: the adapter.
    places: the names of `protocol.BESIDE` that the network supports.
    who: the first words of the error message.

  >>> kernel = jax.numpy.ones((4, 6))
  >>> check({'q': {'kernel': kernel}}, {'q': kernel[:, :5]})
  Traceback (most recent call last):
  fedjax_llm.types.Error: the adapter does not fit the model: its q is [4, 5], \
that of the model is [4, 6].
  """
  try:
    _check(base, picked.spread(params, base), (), places)
  except Error as error:
    raise Error(f'{who}: {error}') from error


def _check(base: Any, params: Any, path: Path, places: tuple[str, ...]) -> None:
  if params is None:
    return
  if not isinstance(base, Mapping):
    protocol.check(params, tuple(base.shape), path)
  elif isinstance(params, Mapping):
    for name, child in params.items():
      below = (*path, name)
      if name in base:
        _check(base[name], child, below, places)
        continue
      shape = beside(base, name) if name in places else None
      if shape is None:
        have = ', '.join(sorted(base))
        raise Error(
          f'it has {"/".join(below)}, but the model has only {have} there.'
        )
      if child is not None:
        protocol.check(child, shape, below)
  else:
    name = _main(base)
    if name is None:
      where = '/'.join(path) or 'the top'
      raise Error(
        f'it has a leaf of the kind {protocol.kind(params)} at {where}, which '
        'is no weight.'
      )
    _check(base[name], params, (*path, name), places)


def beside(base: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
  """Returns the shape of the activations at a place that is no weight.

  None if the module has no such place.

  >>> kernel = jax.ShapeDtypeStruct((2, 4, 6), 'float32')
  >>> beside({'kernel': kernel}, 'input'), beside({'kernel': kernel}, 'output')
  ((2, 4), (2, 6))
  """
  if name == 'inputs' and 'embed_tokens' in base:
    return tuple(base['embed_tokens']['embedding'].shape[1:])
  if name == 'inputs' and 'embed_class' in base:
    return tuple(base['embed_class']['embedding'].shape[1:])
  if name == 'prefix' and 'k_proj' in base:
    *lead, _, features = base['k_proj']['kernel'].shape
    return (*lead, features)
  if name == 'parallel' and ('up_proj' in base or 'q_proj' in base):
    inner = 'up_proj' if 'up_proj' in base else 'q_proj'
    return tuple(base[inner]['kernel'].shape[:-1])
  if name in ('input', 'output') and 'kernel' in base:
    *lead, inputs, features = base['kernel'].shape
    return (*lead, inputs if name == 'input' else features)
  return None


def _main(base: Any) -> str | None:
  """Returns the name of the weight that a leaf without a name changes."""
  if not isinstance(base, Mapping):
    return None
  return next((name for name in protocol.MAIN if name in base), None)
