"""The leaves of a state: their names, types, and division among writers."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error


class Writers(NamedTuple):
  """Processes that write a checkpoint together, each its share of the leaves.

  >>> Writers().count  # one alone
  1
  """

  index: int = 0  # the index of this process; 0 completes the checkpoint
  count: int = 1
  meet: Callable[[], None] = lambda: None  # returns when all have called it


def is_key(x: Any) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def name_of(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/') or 'state'


def kind(x: Any) -> tuple[str, list[int]]:
  """Returns dtype and shape."""
  if is_key(x):
    return 'key', list(x.shape)
  if not hasattr(x, 'dtype'):
    x = np.asarray(x)
  return str(np.dtype(x.dtype)), list(x.shape)


def like(value: np.ndarray, template: Any, impl: str | None) -> Any:
  """Returns `value` with the type of the template's leaf."""
  if is_key(template):
    key = jax.random.wrap_key_data(jnp.array(value), impl=impl)
    if key.dtype != template.dtype:
      raise Error(
        f'the checkpoint has keys of {key.dtype}, this run needs '
        f'{template.dtype}.'
      )
    return key
  if isinstance(template, np.ndarray | np.generic):
    return np.asarray(value)
  if not hasattr(template, 'dtype'):
    return value.item()
  if getattr(template, 'committed', False):
    return jax.device_put(value, template.sharding)
  return jnp.array(value)  # a copy: it may be donated


def folder(writer: int) -> str:
  """Returns the name of a writer's folder of leaves."""
  return f'state_{writer}' if writer else 'state'


def dealt(
  state: Any, writers: Writers
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
  """Returns the manifest's entry of every leaf, and this writer's arrays.

  Each leaf goes to the writer with the fewest bytes so far.
  """
  listed, arrays, load = [], {}, [0] * writers.count
  for i, (names, x) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
    dtype, shape = kind(x)
    value = jax.random.key_data(x) if is_key(x) else x
    stored = kind(value)
    size = math.prod(stored[1]) * jnp.dtype(stored[0]).itemsize
    name, writer = name_of(names), load.index(min(load))
    load[writer] += size
    # Orbax takes no empty arrays and no slashes.
    key = f'{i:05d}.' + re.sub(r'[^\w.-]', '.', name)
    if size and writer == writers.index:
      arrays[key] = np.asarray(value)
    listed.append(
      {
        'name': name,
        'dtype': dtype,
        'shape': shape,
        'impl': str(jax.random.key_impl(x)) if is_key(x) else None,
        'folder': folder(writer),
        'file_key': key if size else None,
        'file_kind': stored,
      }
    )
  return listed, arrays
