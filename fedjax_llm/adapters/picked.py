"""Adapters of some layers: the nodes of the others do not exist.

The leaf 'layers/picked' [M] holds the numbers of the layers, ascending; each
low-rank node below 'layers' is stacked over these M layers instead of all L.
`spread` puts zeros in the other layers where the adapter meets its base.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import patterns
from fedjax_llm.types import Base, Error, Params

NAME = 'picked'


def numbers(layers: int | str | Sequence[int], num_layers: int) -> list[int]:
  """Returns the numbers of layers that a config names, ascending.

  Args:
    layers: a number, a list of numbers from 0, or a regular expression that
      matches the whole number of a layer.
    num_layers: L.

  Raises:
    Error: a number that no layer has, a pattern that matches none, or nothing.

  >>> numbers([3, 1], 4), numbers('[0-2]', 4), numbers('1|3', 4), numbers(2, 4)
  ([1, 3], [0, 1, 2], [1, 3], [2])
  """
  if isinstance(layers, str):
    matches = patterns.matcher(layers, 'adapter.layers')
    chosen = [i for i in range(num_layers) if matches(str(i))]
  else:
    listed = [layers] if isinstance(layers, int) else list(layers)
    wrong = [i for i in listed if not 0 <= i < num_layers]
    if wrong:
      raise Error(
        f'adapter.layers names the layer {wrong[0]}; the model has the layers '
        f'0 to {num_layers - 1}.'
      )
    chosen = sorted(set(listed))
  if not chosen:
    raise Error(
      f'adapter.layers: {layers!r} names none of the layers 0 to '
      f'{num_layers - 1}.'
    )
  return chosen


def pick(
  params: Params, base: Base, layers: int | str | Sequence[int]
) -> Params:
  """Returns an adapter of all layers cut down to some of them.

  Raises:
    Error: as in `numbers`; targets that lie in no layer.

  >>> from fedjax_llm.nodes import LowRank
  >>> node = LowRank(jnp.ones((3, 2, 1)), jnp.ones((3, 1, 2)), jnp.ones(3))
  >>> base = {'layers': {'q_proj': {'kernel': jnp.ones((3, 2, 2))}}}
  >>> some = pick({'layers': {'q_proj': node}}, base, [0, 2])['layers']
  >>> some['picked'].tolist(), some['q_proj'].a.shape
  ([0, 2], (2, 2, 1))
  """
  outside = sorted(set(params) - {'layers'})
  if outside or 'layers' not in params:
    raise Error(
      'adapter.layers: the target '
      f'{outside[0] if outside else "of this adapter"} lies in no layer; name '
      'targets within the layers.'
    )
  chosen = numbers(layers, _num_layers(base))
  index = np.asarray(chosen, np.int32)
  inner = _on_nodes(params['layers'], lambda x: x[index])
  return {**params, 'layers': {**inner, NAME: jnp.asarray(index)}}


def of(params: Params) -> Any:
  """Returns the numbers of the picked layers, [M], or None for all layers.

  >>> of({'layers': {'picked': 3}}), of({'layers': {}}), of(None)
  (3, None, None)
  """
  inner = params.get('layers') if isinstance(params, Mapping) else None
  return inner.get(NAME) if isinstance(inner, Mapping) else None


def spread(params: Params, base: Base) -> Params:
  """Returns the same adapter over all L layers, with zeros in the others.

  >>> from fedjax_llm.nodes import LowRank
  >>> node = LowRank(jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2)), jnp.ones(1))
  >>> some = {'layers': {'q_proj': node, 'picked': jnp.array([1])}}
  >>> base = {'layers': {'q_proj': {'kernel': jnp.ones((2, 2, 2))}}}
  >>> whole = spread(some, base)['layers']
  >>> list(whole), whole['q_proj'].scale.tolist()
  (['q_proj'], [0.0, 1.0])
  """
  index = of(params)
  if index is None:
    return params
  num = _num_layers(base)

  def widen(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(
        widen(jax.random.key_data(x)), impl=jax.random.key_impl(x)
      )
    return jnp.zeros((num, *x.shape[1:]), x.dtype).at[index].set(x)

  inner = {k: x for k, x in params['layers'].items() if k != NAME}
  return {**params, 'layers': _on_nodes(inner, widen)}


def gather(params: Params, index: Any) -> Params:
  """Returns the picked layers of a spread adapter; index None: all of it.

  >>> from fedjax_llm.nodes import LowRank
  >>> node = LowRank(jnp.ones((2, 2, 1)), jnp.ones((2, 1, 2)), jnp.ones(2))
  >>> gather({'layers': {'q': node}}, jnp.array([1]))['layers']['q'].scale
  Array([1.], dtype=float32)
  """
  if index is None:
    return params
  inner = _on_nodes(params['layers'], lambda x: x[index])
  return {**params, 'layers': {**inner, NAME: index}}


def _num_layers(base: Base) -> int:
  return jax.tree.leaves(base['layers'])[0].shape[0]


def _on_nodes(tree: Any, change: Any) -> Any:
  """Maps `change` over the arrays of low-rank nodes, dropped ones too."""
  is_low = lambda x: hasattr(x, 'weight_shape')
  apply = lambda x: jax.tree.map(change, x) if is_low(x) else x
  return jax.tree.map(apply, tree, is_leaf=is_low)
