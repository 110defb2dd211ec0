"""The files of one checkpoint: written, summed up, verified and read."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.run import versions
from fedjax_llm.run.checkpoint import leaves
from fedjax_llm.run.checkpoint.leaves import Writers
from fedjax_llm.types import Error

_MARGIN = 1 << 16  # bytes for names, shapes and checksums


def write(
  path: pathlib.Path,
  round: int,
  state: Any,
  meta: dict[str, Any],
  writers: Writers,
) -> None:
  """Writes a checkpoint into `path`, without the final rename.

  Writer 0 writes meta.json, the manifest and its share of the leaves; the other
  writers write their shares.
  """
  first, folder = writers.index == 0, leaves.folder(writers.index)
  writers.meet()  # the folder exists
  if not path.is_dir():
    raise Error(
      f'checkpoint_writers=all: process {writers.index} does not see {path}: '
      'put the workdir where all see it, or let the first write alone.'
    )
  listed, arrays = leaves.dealt(state, writers)
  # Checked before: a write that fails halfway leaves orbax's threads behind.
  needed = sum(x.nbytes for x in arrays.values()) + _MARGIN
  if shutil.disk_usage(path).free < needed:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  if first:
    (path / 'meta.json').write_text(json.dumps(meta, indent=1))
  if arrays and first:
    with _quiet() as ocp, _alone(ocp) as checkpointer:
      checkpointer.save(path / folder, arrays)
  elif arrays:  # orbax writes NumPy arrays in process 0 only
    (path / folder).mkdir()
    for key, value in arrays.items():
      (path / folder / key).write_bytes(value.tobytes())
  files = _summed(path, [folder, 'meta.json'] if first else [folder])
  if not first:
    _put(path / f'files_{writers.index}.json', files)
  writers.meet()  # all shares are written
  if not first:
    return
  for index in range(1, writers.count):
    record = path / f'files_{index}.json'
    if not record.is_file():
      raise Error(
        f'checkpoint_writers=all: process {index} has written to another disk '
        f'than that of {path}.'
      )
    files |= json.loads(record.read_text())
    record.unlink()
  manifest = {'round': round, 'leaves': listed, 'files': files}
  manifest['sha256'] = _content_sum(manifest)
  _put(path / 'manifest.json', manifest)
  sync(path)


def _content_sum(manifest: dict[str, Any]) -> str:
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _summed(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
  """Syncs files and folders to disk; returns bytes and SHA-256 of each file."""
  files = {}
  for top in (path / name for name in names):
    inside = [top, *top.rglob('*')]
    for file in sorted(p for p in inside if p.is_file()):
      sync(file)
      files[file.relative_to(path).as_posix()] = {
        'bytes': file.stat().st_size,
        'sha256': _sha256(file),
      }
    for folder in (p for p in inside if p.is_dir()):
      sync(folder)
  return files


def _put(file: pathlib.Path, value: Any) -> None:
  file.write_text(json.dumps(value, indent=1))
  sync(file)


class Damage(Exception):
  """The error of a checkpoint that was changed since it was written."""


_LEAF = {
  'name': str,
  'dtype': str,
  'shape': list,
  'impl': str | None,
  'file_key': str | None,
  'file_kind': list,
}


def verified(path: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest of a checkpoint and compares every file with it.

  Raises:
    Damage: the manifest or a file is missing or was changed.
  """
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    sha256 = manifest.pop('sha256', None)
    if sha256 is not None and sha256 != _content_sum(manifest):
      raise Damage('manifest.json was altered')
    if set(manifest) != {'round', 'leaves', 'files'}:
      raise KeyError
    files = [
      (name, entry['bytes'], entry['sha256'])
      for name, entry in manifest['files'].items()
    ]
    for leaf in manifest['leaves']:
      if not all(isinstance(leaf[k], kind) for k, kind in _LEAF.items()):
        raise TypeError
    if path.name != f'round_{manifest["round"]:08d}':
      raise Damage(f'it is of round {manifest["round"]}')
    inside = [path.joinpath(name).resolve() for name, *_ in files]
    if not all(file.is_relative_to(path.resolve()) for file in inside):
      raise ValueError
  except FileNotFoundError:
    raise Damage('manifest.json is missing') from None
  except OSError as error:
    raise Damage(f'manifest.json: {error.strerror or error}') from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise Damage('manifest.json is no manifest') from None
  for name, num_bytes, sha256 in files:
    file = path / name
    if not file.is_file():
      raise Damage(f'{name} is missing')
    if file.stat().st_size != num_bytes:
      raise Damage(
        f'{name} has {file.stat().st_size} bytes instead of {num_bytes}'
      )
    if _sha256(file) != sha256:
      raise Damage(f'{name} was altered')
  return manifest


def read(
  path: pathlib.Path,
  manifest: dict[str, Any],
  template: Any,
  conf: Mapping[str, Any] | None = None,
) -> tuple[Any, bool]:
  """Reads the state of a checkpoint, with the template's types of leaves.

  Args:
    path: of the checkpoint.
    manifest: its verified manifest.
    template: a state of this run, or its shapes.
    conf: the config of the run, for states of earlier versions.

  Returns:
    The state, and True if an earlier version wrote it in another structure.

  Raises:
    Error: it is the state of another run.
    Damage: it cannot be read.
  """
  try:
    earlier = versions.earlier_state(
      template, [leaf['name'] for leaf in manifest['leaves']], conf
    )
    if earlier is None:
      return _read(path, manifest, template), False
    return earlier.upgrade(_read(path, manifest, earlier.template)), True
  except Error:
    raise
  except Exception as error:  # any error of orbax and NumPy on damaged files
    words = ' '.join(str(error).split())[:200]
    raise Damage(f'{type(error).__name__}: {words}') from error


def _read(path: pathlib.Path, manifest: dict[str, Any], template: Any) -> Any:
  asked, treedef = jax.tree_util.tree_flatten_with_path(template)
  stored = manifest['leaves']
  own, wanted = (
    [x['name'] for x in stored],
    [leaves.name_of(name) for name, _ in asked],
  )
  for name in wanted:
    if name not in own:
      raise Error(f'{path} has no {name}, which this run needs.')
  for name in own:
    if name not in wanted:
      raise Error(f'{path} has {name}, which this run does not have.')
  for x, name, (_, leaf) in zip(stored, wanted, asked, strict=True):
    dtype, shape = leaves.kind(leaf)
    if (name, dtype, shape) != (x['name'], x['dtype'], x['shape']):
      raise Error(
        f'{path} has {x["name"]} as {x["dtype"]}{x["shape"]}, this run needs '
        f'{name} as {dtype}{shape}.'
      )
  first = leaves.folder(0)
  folders = {x['file_key']: x.get('folder', first) for x in stored}
  keys = [key for key, folder in folders.items() if key and folder == first]
  arrays: dict[str, Any] = {}
  if keys:
    with _quiet() as ocp, _alone(ocp) as checkpointer:
      as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
      arrays = checkpointer.restore(
        path / first, restore_args=dict.fromkeys(keys, as_numpy)
      )
  values = []
  for x, (_, leaf) in zip(stored, asked):
    key, (dtype, shape) = x['file_key'], x['file_kind']
    if key in arrays:
      value = arrays[key]
    else:  # of another writer, or without an entry
      content = (path / folders[key] / key).read_bytes() if key else b''
      value = np.frombuffer(bytearray(content), jnp.dtype(dtype)).reshape(shape)
    values.append(leaves.like(value, leaf, x['impl']))
  return jax.tree.unflatten(treedef, values)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def sync(path: pathlib.Path) -> None:
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
  """Returns the orbax module as a context that hides its log lines."""
  import absl.logging
  import orbax.checkpoint

  before = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.FATAL)
  try:
    yield orbax.checkpoint
  finally:
    absl.logging.set_verbosity(before)


def _alone(ocp: Any) -> Any:
  """Returns an orbax checkpointer of this process only."""
  options = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(), active_processes={jax.process_index()}
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
  return ocp.Checkpointer(handler, multiprocessing_options=options)
