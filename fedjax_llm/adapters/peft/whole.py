"""The modules that a PEFT directory saves whole beside its low-rank factors.

PEFT writes them under the names that they have in the model, without the name
of the adapter: `base_model.model.classifier.weight`.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.nodes import Dense, is_node, protocol
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
Leaves = Mapping[Path, Any]
ToTensors = Callable[[Leaves], Mapping[str, np.ndarray]]
FromTensors = Callable[[Mapping[str, np.ndarray]], Leaves]

# Modules of a classifier that PEFT always saves whole, with all their content.
_HEADS = {'SEQ_CLS': ('classifier', 'score')}


def split(params: Params) -> tuple[Params, dict[Path, Any]]:
  """Splits the tree into its other leaves and the values of `Dense` by path.

  >>> split({'q': jnp.ones(3), 'score': {'bias': Dense(4)}})[1]
  {('score', 'bias'): 4}
  """
  whole: dict[Path, Any] = {}

  def take(path, leaf):
    replaces, value = protocol.replacement(leaf)
    if not replaces:
      return leaf
    if value is not None:
      whole[tuple(key.key for key in path)] = value
    return None

  return jax.tree_util.tree_map_with_path(take, params, is_leaf=is_node), whole


def put(params: Params, whole: Leaves) -> Params:
  """Puts whole weights back as `Dense` leaves: the inverse of `split`."""
  for path, value in whole.items():
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = Dense(jnp.asarray(value, jnp.float32))
  return params


def named(whole: Leaves, to_tensors: ToTensors | None) -> dict[str, np.ndarray]:
  """Returns the tensors of these leaves by their PEFT names, in float32."""
  if not whole:
    return {}
  if to_tensors is None:
    raise Error(
      f'{"/".join(min(whole))} is trained whole, but `to_tensors` does not say '
      'its name in PEFT.'
    )
  wide = {path: np.asarray(x, np.float32) for path, x in whole.items()}
  return dict(to_tensors(wide))


def modules(tensors: Iterable[str], task_type: str | None) -> list[str]:
  """Returns the module names for PEFT's `modules_to_save`.

  >>> modules(['classifier.dense.bias', 'bert.pooler.dense.bias'], 'SEQ_CLS')
  ['bert.pooler.dense', 'classifier']
  """
  heads = _HEADS.get(task_type or '', ())
  names = {name.rpartition('.')[0] for name in tensors}
  first = lambda name: name.partition('.')[0]
  return sorted({first(n) if first(n) in heads else n for n in names})


def is_saved(name: str, saved: Iterable[str]) -> bool:
  """Returns True if a tensor belongs to a module of `modules_to_save`.

  PEFT saves every module with a name that ends in a saved one, and its content.

  >>> is_saved('classifier.dense.bias', ['classifier', 'score'])
  True
  """
  parts = name.split('.')
  inside = ('.'.join(parts[:i]) for i in range(1, len(parts)))
  return any(module.endswith(tuple(saved)) for module in inside)


def read(
  tensors: Mapping[str, np.ndarray],
  from_tensors: FromTensors | None,
  directory: pathlib.Path,
) -> Leaves:
  if not tensors:
    return {}
  if from_tensors is None:
    raise Error(
      f'{directory} saves {min(tensors)} whole, but `from_tensors` does not '
      'say its path in the model.'
    )
  try:
    return from_tensors(tensors)
  except Error as error:
    raise Error(f'{directory}: {error}') from error


def check(leaves: Leaves, wanted: Leaves, directory: pathlib.Path) -> None:
  """Raises an `Error` unless both have the same leaves of the same shapes."""
  for path in sorted(leaves.keys() ^ wanted.keys()):
    what = 'does not save' if path in wanted else 'also saves'
    raise Error(f'{directory} {what} {"/".join(path)} whole.')
  for path, value in leaves.items():
    if tuple(value.shape) != tuple(wanted[path].shape):
      raise Error(
        f'{directory}: {"/".join(path)} is {tuple(value.shape)}, and '
        f'{tuple(wanted[path].shape)} is needed.'
      )
