"""Reads safetensors files into a tree of stacked arrays, and writes them."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import reading
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families, quantised
from fedjax_llm.models.config import Config
from fedjax_llm.models.families import images
from fedjax_llm.types import Base, Error

_READABLE = {'F32', 'BF16', 'F16'}
_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_LFS = b'version https://git-lfs.github.com'  # first bytes of a pointer file

# (path, shape) of a leaf of the base -> its sharding.
Place = Callable[[families.Path, tuple[int, ...]], jax.sharding.Sharding]
Bounds = tuple[tuple[int, int], ...]  # (start, end) of every axis

# ----------------------------------------------------------------- reading --


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Any]:
  import safetensors

  try:
    with open(file, 'rb') as start:
      if start.read(len(_LFS)) == _LFS:
        raise Error(
          f'{file} is a Git LFS pointer, not the weights: fetch them with '
          '`git lfs pull`.'
        )
    with safetensors.safe_open(str(file), 'numpy') as handle:
      yield handle
  except (safetensors.SafetensorError, OSError) as error:
    raise Error(f'{file} cannot be read (damaged or cut off?): {error}.') from (
      error
    )


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the file of each tensor of a checkpoint."""
  single, index = directory / _SINGLE, directory / _INDEX
  if single.is_file():
    with _open(single) as handle:
      return dict.fromkeys(handle.keys(), single)
  if not index.is_file():
    others = sorted(p.name for p in directory.glob('*.bin'))
    hint = f' ({others[0]} is not read: only safetensors)' if others else ''
    raise Error(
      f'{directory} has no weights: neither {_SINGLE} nor {_INDEX}{hint}.'
    )
  try:
    weight_map = reading.read(index)['weight_map']
    outside = [f for f in weight_map.values() if pathlib.Path(f).name != f]
    if outside:
      raise Error(f'{index} names {outside[0]!r}, which is no file beside it.')
    where = {name: directory / file for name, file in weight_map.items()}
  except Error:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise Error(f'{index} has no readable weight_map: {error}.') from error
  held = {}
  for file in sorted(set(where.values())):
    if not file.is_file():
      raise Error(f'{index} names {file.name}, which is not in the directory.')
    with _open(file) as handle:
      held.update(dict.fromkeys(handle.keys(), file))
  for name, file in where.items():
    if held.get(name) != file:
      raise Error(f'{index} says that {file.name} holds {name}; it does not.')
  return held


def _some(names: Sequence[str]) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


# Modules that a checkpoint with another head may lack.
_CLASSIFIER = ('pooler', 'classifier', 'score')


def _stored(directory, config, files, may_lack) -> dict[str, str]:
  """Returns the name of each tensor in the checkpoint, and checks them all.

  Names, shapes and dtypes are checked before any weight is read.
  """
  table = {t.name: t for t in families.tensors(config)}
  stored = {}
  for name in table:
    for spelling in families.spellings(name, config):
      if spelling in files:
        stored[name] = spelling
        break
  missing = [n for n in table if n not in stored]
  if missing := [n for n in missing if table[n].path[0] not in may_lack]:
    raise Error(f'{directory} lacks the tensors {_some(missing)}.')
  held, again = set(stored.values()), families.copies(config)
  unknown = [
    name
    for name in files
    if name not in held
    and name not in again
    and not families.says_nothing(name, config)
  ]
  if unknown:
    raise Error(
      f'{directory} holds tensors that a {config.family} model with this '
      f'config.json does not have: {_some(unknown)}.'
    )
  by_file: dict[pathlib.Path, list[str]] = {}
  for name, spelling in stored.items():
    by_file.setdefault(files[spelling], []).append(name)
  for file, names in by_file.items():
    with _open(file) as handle:
      for name in names:
        entry = handle.get_slice(stored[name])
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != table[name].shape:
          raise Error(
            f'{file}: {stored[name]} has shape {list(shape)}, but config.json '
            f'asks for {list(table[name].shape)}.'
          )
        if dtype not in _READABLE:
          raise Error(
            f'{file}: {stored[name]} is stored as {dtype}; only '
            f'{", ".join(sorted(_READABLE))} are read.'
          )
  return stored


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an empty array, aligned to 64 bytes so that jax never copies it."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def _is_finite(array: np.ndarray, size: int = 2**24) -> bool:
  """Returns True if all values are finite, reading `size` of them at a time."""
  flat = array.reshape(-1)
  return all(
    bool(np.isfinite(flat[start : start + size]).all())
    for start in range(0, flat.size, size)
  )


def _sliced(tensor: families.Tensor, bounds: Bounds):
  """Returns the slices of a file's tensor for these bounds of our leaf.

  Also returns the tensor with `rows` relative to the slices.
  """
  if tensor.flat is not None:  # its axes are not ours: it is read whole
    return tuple(slice(None) for _ in tensor.shape), tensor
  slices = [slice(*pair) for pair in bounds]
  if tensor.rows is not None:
    rows = tensor.rows[slices[-1]]
    first, last = int(rows.min()), int(rows.max())
    slices[-1] = slice(first, last + 1)
    tensor = tensor._replace(rows=rows - first)
  return tuple(slices[::-1] if tensor.transpose else slices), tensor


class _Reader:
  """Reads slices of tensors, opening the file for each read.

  Pages read from a mapped file use memory until the file is closed.
  """

  def __init__(self, files: dict[str, pathlib.Path]):
    self.files = files

  def shape(self, name: str) -> tuple[int, ...]:
    with _open(self.files[name]) as handle:
      return tuple(handle.get_slice(name).get_shape())

  def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    with _open(self.files[name]) as handle:
      # A slice of a single number is not possible.
      return (
        handle.get_slice(name)[slices] if slices else (handle.get_tensor(name))
      )

  def equal(self, one: str, other: str, rows: int = 8192) -> bool:
    """Returns True if two tensors are equal, reading a few rows at a time."""
    shape = self.shape(one)
    return shape == self.shape(other) and all(
      np.array_equal(self.read(one, part), self.read(other, part))
      for start in range(0, shape[0], rows)
      for part in [(slice(start, min(start + rows, shape[0])),)]
    )


def _on_devices(
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
  part: Callable[[Bounds], np.ndarray],
) -> jax.Array:
  """Builds a sharded array, reading each part once for all its devices."""
  owners: dict[Bounds, list[Any]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape))
    owners.setdefault(bounds, []).append(device)
  arrays = []
  for bounds, devices in owners.items():
    value = part(bounds)
    # Only one part at a time is in host memory.
    arrays += jax.block_until_ready([jax.device_put(value, d) for d in devices])
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_base(
  directory: pathlib.Path,
  config: Config,
  dtype: np.dtype,
  *,
  seed: int | None = None,
  place: Place | None = None,
  change: Callable[[families.Path, jax.Array], Any] | None = None,
) -> Base:
  """Reads the weights of a checkpoint into a tree of stacked arrays.

  With a `seed` the weights of a classifier may be missing and are drawn.
  `place` returns the sharding of each leaf: then only the shards of this
  process are read, one at a time. `change(path, leaf)` replaces a leaf as soon
  as it is read (quantisation).
  """
  files = _files(directory)
  stored = _stored(
    directory, config, files, () if seed is None else _CLASSIFIER
  )
  reader = _Reader(files)
  for name, first in families.copies(config).items():
    if name in files and not reader.equal(stored[first], name):
      raise Error(
        f'{directory}: config.json ties {name} to {stored[first]} '
        '(tie_word_embeddings), but it differs.'
      )
  parts: dict[families.Path, list[families.Tensor]] = {}
  for tensor in families.tensors(config):
    parts.setdefault(tensor.path, []).append(tensor)

  def drawn(path, shape):
    if path[-1] == 'bias':
      return np.zeros(shape)
    draw = np.random.default_rng((seed or 0, _CLASSIFIER.index(path[0])))
    return 0.02 * draw.standard_normal(shape)

  base: dict[str, Any] = {}
  for path, group in parts.items():
    node = base
    shape: Any = config_lib.shapes(config)
    for name in path[:-1]:
      node = node.setdefault(name, {})
    for name in path:
      shape = shape[name]

    def part(bounds, path=path, group=group, shape=shape):
      out = _aligned(tuple(end - start for start, end in bounds), dtype)
      for tensor in group:
        inner, row = bounds, out
        if tensor.layer is not None:
          (first, end), *inner = bounds
          if not first <= tensor.layer < end:
            continue
          row = out[tensor.layer - first]
        if tensor.name in stored:
          slices, tensor = _sliced(tensor, tuple(inner))
          name = stored[tensor.name]
          with np.errstate(over='ignore'):  # raises an `Error` below
            value = families.ours(tensor, reader.read(name, slices))
            if tensor.flat is not None:
              value = value[tuple(slice(*pair) for pair in inner)]
            row[...] = value
          if not _is_finite(row):
            raise Error(
              f'{files[name]}: {name} holds values that are not finite.'
            )
        else:
          row[...] = drawn(path, shape)[tuple(slice(*b) for b in inner)]
      return out

    if place is None:
      leaf = jax.device_put(part(tuple((0, n) for n in shape)))
    else:
      leaf = _on_devices(shape, place(path, shape), part)
    node[path[-1]] = leaf if change is None else change(path, leaf)
  return base


# ----------------------------------------------------------------- writing --


def _layer(leaf: Any, layer: int | None) -> np.ndarray:
  """Returns one layer of a leaf, dequantised if it is quantised."""
  if isinstance(leaf, np.ndarray | jax.Array):
    value = np.asarray(leaf)
    return value if layer is None else value[layer]
  row = jax.tree.map(lambda x: x if layer is None else x[layer], leaf)
  return np.asarray(quantised.dense(row, jnp.float32))


def save(directory: str | os.PathLike, config: Config, base: Base) -> None:
  """Writes a Hugging Face directory that transformers loads.

  config.json and model.safetensors, in the dtype of the base; quantised
  matrices are dequantised to float32. Files are written atomically. Leaves of a
  user's own network are written unchanged, named by their paths with dots.

  >>> import tempfile
  >>> from fedjax_llm.models.own import own
  >>> network = own(lambda weights, x: weights['w'] * x, {'w': jnp.ones(2)})
  >>> made = network.loaded(None, vocab_size=4, max_positions=8)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save(folder, made.config, made.base)
  ...   sorted(os.listdir(folder))
  ['config.json', 'model.safetensors']
  """
  from safetensors.numpy import save_file

  directory = pathlib.Path(directory)
  weights: dict[str, np.ndarray] = {}
  known = () if config.family == families.OWN else families.tensors(config)
  if not known:
    for path, leaf in jax.tree.leaves_with_path(base):
      weights['.'.join(key.key for key in path)] = np.asarray(leaf)
    fields: Any = {'model_type': families.OWN}
  else:
    fields = families.to_hf(config)
  for tensor in known:
    leaf = base
    for name in tensor.path:
      leaf = leaf[name]
    value = _layer(leaf, tensor.layer)
    families.put(tensor, value, weights)
    if weights[tensor.name].shape != tensor.shape:
      raise Error(
        f'{tensor.name} has shape {list(weights[tensor.name].shape)}, but the '
        f'config asks for {list(tensor.shape)}.'
      )
  weights = {n: np.asarray(w, order='C') for n, w in weights.items()}
  dtype = str(next(iter(weights.values())).dtype)
  text = json.dumps({**fields, 'torch_dtype': dtype}, indent=2)

  contents = {'config.json': text + '\n'}
  if (values := images.preprocessor(config)) is not None:
    contents[images.PREPROCESSOR] = values
  files = {name: directory / name for name in (_SINGLE, *contents)}
  drafts = {n: f.with_name(f'.{n}.{os.getpid()}') for n, f in files.items()}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(drafts[_SINGLE]), metadata={'format': 'pt'})
    for name, content in contents.items():
      drafts[name].write_text(content)
    # safetensors writes files that only their owner may read.
    drafts[_SINGLE].chmod(drafts['config.json'].stat().st_mode)
    for name, file in files.items():
      os.replace(drafts[name], file)
  except Exception as error:
    for draft in drafts.values():
      draft.unlink(missing_ok=True)
    raise Error(f'{directory} could not be written: {error}.') from error
