"""Selective tuning: a part of the base's own weights is trained.

`bitfit`, `norms`, `heads` and `layers` return an `Adapter`; `dense` trains any
modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import dense, saved_beside
from fedjax_llm.nodes import Dense
from fedjax_llm.nodes.chosen import Chosen
from fedjax_llm.types import Adapter, Base, Error, Key, Params

_HEADS = (
  *('pooler', 'classifier', 'score', 'lm_head', 'head_dense', 'head_norm'),
)


def bitfit(modules_to_save: str | Sequence[str] = ()) -> Adapter:
  """Returns BitFit: every bias of the model is trained, and nothing else.

  Ben Zaken et al. 2022, arXiv 2106.10199. The biases of norms are among them.

  Args:
    modules_to_save: modules that are trained whole, such as the head of a
      classifier, whose biases are then theirs: see `dense`.

  Raises:
    Error: from `init`, a model without biases.

  >>> base = {'q': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
  >>> bitfit().init(jax.random.key(0), base)
  {'q': {'bias': Dense(value=Array([1., 1., 1.], dtype=float32))}}
  """

  def start(key: Key, base: Base) -> Params:
    whole = {}
    if modules_to_save:
      whole = dense(modules_to_save).init(key, base)
    params = _tree(base, lambda path: path[-1] == 'bias', _value, whole)
    if not params:
      raise Error(
        'the model has no biases, so adapter.name=bitfit has nothing to train: '
        'take norms, ia3 or lora.'
      )
    return params

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def norms(modules_to_save: str | Sequence[str] = ()) -> Adapter:
  """Returns an adapter that trains the scales and biases of all norms.

  Args:
    modules_to_save: see `bitfit`.

  Raises:
    Error: from `init`, a model without norms.

  >>> base = {'norm': {'scale': jnp.ones(2)}, 'q': {'kernel': jnp.ones((2, 3))}}
  >>> sorted(norms().init(jax.random.key(0), base))
  ['norm']
  """

  def start(key: Key, base: Base) -> Params:
    del key  # it starts as the base
    params = _tree(base, lambda path: 'scale' in _at(base, path[:-1]), _value)
    if not params:
      raise Error('the model has no norms to train.')
    return params

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def heads() -> Adapter:
  """Returns an adapter that trains the head: the modules behind the layers.

  A classifier and its pooler, or the output matrix of a language model.

  Raises:
    Error: from `init`, a model without a head of its own; a tied output matrix
      is the embedding, which an adapter cannot represent.

  >>> base = {'lm_head': {'kernel': jnp.ones((2, 5))}, 'norm': {}}
  >>> sorted(heads().init(jax.random.key(0), base))
  ['lm_head']
  """

  def start(key: Key, base: Base) -> Params:
    here = [name for name in _HEADS if base.get(name)]
    if not here:
      raise Error(
        'the model has no head of its own to train (its output matrix is the '
        'embedding): take adapter.name=layers, norms or lora.'
      )
    return dense(here).init(key, base)

  return Adapter(start, merge, fold)


def layers(
  which: Sequence[int] = (-1,), modules_to_save: str | Sequence[str] = ()
) -> Adapter:
  """Returns an adapter that trains all weights of some layers.

  Each weight gets a change [C, ...] for the C chosen layers, zeros at the
  start; nothing of the others is trained or sent. The products with the base
  stay those of all clients together.

  Args:
    which: numbers of layers, from 0; negative ones count from the end.
    modules_to_save: see `bitfit`.

  Raises:
    Error: no layer, a layer twice; from `init`, a number that the model does
      not have.

  >>> base = {'layers': {'q': {'kernel': jnp.ones((4, 2, 3))}}}
  >>> params = layers([-1]).init(jax.random.key(0), base)
  >>> params['layers']['q']['kernel'].delta.shape
  (1, 2, 3)
  """
  if not len(which):
    raise Error('adapter.which is empty: name at least one layer.')

  def start(key: Key, base: Base) -> Params:
    del key  # it starts as the base
    stacked = jax.tree.leaves(base.get('layers', {}))
    if not stacked:
      raise Error('the model has no layers to train.')
    number = stacked[0].shape[0]
    for layer in which:
      if not -number <= layer < number:
        raise Error(
          f'adapter.which names the layer {layer}; the model has the layers 0 '
          f'to {number - 1}.'
        )
    chosen = [layer % number for layer in which]
    if len(set(chosen)) < len(chosen):
      raise Error(f'adapter.which names a layer twice: {list(which)}.')

    def node(weight):
      return Chosen(
        delta=jnp.zeros((len(chosen), *weight.shape[1:]), jnp.float32),
        layers=jnp.asarray(chosen, jnp.int32),
        like=jnp.zeros(number, jnp.int8),
      )

    return {'layers': _tree(base['layers'], lambda path: True, node)}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def _value(weight: Any) -> Dense:
  # A copy: programs donate the buffers of the parameters.
  return Dense(jnp.array(weight, jnp.float32))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def _tree(
  base: Any,
  select: Callable[[tuple[str, ...]], bool],
  node: Callable[[Any], Any],
  without: Any = None,
  path: tuple[str, ...] = (),
) -> dict[str, Any]:
  """Returns nodes at the selected weights, but not at those of `without`."""
  tree: dict[str, Any] = {}
  for name, child in base.items():
    inner = without.get(name) if isinstance(without, Mapping) else None
    if isinstance(child, Mapping):
      below = _tree(child, select, node, inner, (*path, name))
      if below:
        tree[name] = below
    elif inner is None and select((*path, name)):
      tree[name] = node(child)
  return tree
