"""Checkpoints of the server: orbax arrays, a JSON of the rest, checksums.

    DIR/round_00000012/state/         the leaves of the state, written by orbax
    DIR/round_00000012/meta.json      what else the program wants to know
    DIR/round_00000012/manifest.json  the leaves, and SHA-256 of every file

A checkpoint is written into a directory of another name and renamed when all of
it is on the disk: what is not called round_* never counted and is removed. The
manifest tells whether a checkpoint is still what was written; one that is not
is named and the one before it is used.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error

_MARGIN = 1 << 16  # bytes for names, shapes and checksums
_PART = 'part_'  # begins the name of what is not a checkpoint (yet, or again)


class Restored(NamedTuple):
  round: int
  state: Any  # of the template's structure
  meta: dict[str, Any]
  notices: list[str]  # a sentence about each checkpoint that was passed over


class Checkpointer(NamedTuple):
  """The functions of an open directory of checkpoints.

  `save(round, state, meta={})` returns when the checkpoint counts. `state` is
  any pytree of arrays, numbers, typed PRNG keys and None; `meta` is JSON.
  Older rounds than are kept go, and so do later ones, which were undone.
  Error on a full disk, with the checkpoints before it intact.
  `restore(template, newest=None) -> Restored` of the newest undamaged
  checkpoint, of those up to round `newest` if it is given, bit for bit, or None
  if there is no checkpoint; `template` is a state, or its
  `jax.ShapeDtypeStruct`s. Error if all are damaged, or are of another state.
  `rounds()` gives the rounds that are kept, ascending, without those that
  `restore` found damaged.
  """

  save: Callable[..., None]
  restore: Callable[..., Restored | None]
  rounds: Callable[[], list[int]]


def open(
  directory: str | os.PathLike,
  *,
  max_to_keep: int = 2,
  mine: bool = True,
  read_only: bool = False,
) -> Checkpointer:
  """Opens a directory of checkpoints; the first `save` creates it.

  What an interrupted `save` left behind is removed.

  Args:
    directory: of these checkpoints alone.
    max_to_keep: how many rounds are kept; with 2 a damaged one can be passed
      over.
    mine: False in a process that leaves the checkpoints to another one: it
      saves nothing and finds nothing. What a round computes is whole on every
      device, so one process can write all of it.
    read_only: nothing is removed, and `save` may not be called.

  Raises:
    Error: `max_to_keep` is below 1.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   checkpointer = open(directory)
  ...   state = {'params': jnp.ones(2), 'key': jax.random.key(0), 'none': None}
  ...   checkpointer.save(3, state, {'config': 'tiny'})
  ...   restored = checkpointer.restore(state)
  >>> restored.round, restored.state['params'].tolist(), restored.meta
  (3, [1.0, 1.0], {'config': 'tiny'})
  """
  if max_to_keep < 1:
    raise Error(f'max_to_keep is {max_to_keep}: one checkpoint must be kept.')
  if not mine:
    return Checkpointer(lambda *_: None, lambda *_: None, lambda: [])
  folder = pathlib.Path(directory).absolute()
  for left in [] if read_only else folder.glob(f'{_PART}*'):
    shutil.rmtree(left)
  damaged: set[int] = set()

  def place(round: int) -> pathlib.Path:
    return folder / f'round_{round:08d}'

  def present() -> list[int]:
    names = (re.fullmatch(r'round_(\d+)', p.name) for p in folder.glob('*'))
    return sorted(int(name[1]) for name in names if name)

  def rounds() -> list[int]:
    return [r for r in present() if r not in damaged]

  def save(round: int, state: Any, meta: dict[str, Any] | None = None) -> None:
    if read_only:
      raise Error(f'{folder} was opened to be read only.')
    round = int(round)
    path = place(round)
    part = path.with_name(_PART + path.name)
    shutil.rmtree(part, ignore_errors=True)
    try:
      with _writing(path):
        part.mkdir(parents=True)
        _write(part, round, state, meta or {})
        if path.exists():
          # Saved before, and found damaged or undone: this one replaces it.
          path.rename(path.with_name(f'{_PART}old_{path.name}'))
        part.rename(path)
        _sync(folder)
    except Exception:
      shutil.rmtree(part, ignore_errors=True)
      raise
    damaged.discard(round)
    kept = [r for r in rounds() if r <= round][-max_to_keep:]
    for r in present():
      if r not in kept:
        # Renamed first: half a checkpoint must not look like a damaged one.
        place(r).rename(place(r).with_name(f'{_PART}old_{place(r).name}'))
    for left in folder.glob(f'{_PART}*'):
      shutil.rmtree(left, ignore_errors=True)

  def restore(template: Any, newest: int | None = None) -> Restored | None:
    notices = []
    for round in reversed(present()):
      if newest is not None and round > newest:
        continue
      path = place(round)
      try:
        manifest = _verified(path)
      except _Damage as e:
        damaged.add(round)
        notices.append(f'the checkpoint {path} is damaged ({e}): left out.')
        continue
      state = _read(path, manifest, template)
      meta = json.loads((path / 'meta.json').read_text())
      return Restored(round, state, meta, notices)
    if notices:
      raise Error(f'no checkpoint in {folder} is usable: {" ".join(notices)}')
    return None

  return Checkpointer(save, restore, rounds)


# ------------------------------------------------------------------ leaves --


def _is_key(x: Any) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/') or 'state'


def _kind(x: Any) -> tuple[str, list[int]]:
  """dtype and shape."""
  if _is_key(x):
    return 'key', list(x.shape)
  if not hasattr(x, 'dtype'):
    x = np.asarray(x)
  return str(np.dtype(x.dtype)), list(x.shape)


def _like(value: np.ndarray, template: Any, impl: str | None) -> Any:
  """`value` as the kind of thing that the template holds there."""
  if _is_key(template):
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


# ------------------------------------------------------------------- files --


def _write(
  path: pathlib.Path, round: int, state: Any, meta: dict[str, Any]
) -> None:
  listed, arrays = [], {}
  for i, (names, x) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
    dtype, shape = _kind(x)
    value = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    name = _name(names)
    # Orbax takes no empty arrays and no slashes.
    key = f'{i:05d}.' + re.sub(r'[^\w.-]', '.', name)
    if value.size:
      arrays[key] = value
    listed.append(
      {
        'name': name,
        'dtype': dtype,
        'shape': shape,
        'impl': str(jax.random.key_impl(x)) if _is_key(x) else None,
        'file_key': key if value.size else None,
        'file_kind': _kind(value),
      }
    )
  # Asked beforehand: a write that fails halfway leaves orbax's threads behind.
  needed = sum(x.nbytes for x in arrays.values()) + _MARGIN
  if shutil.disk_usage(path).free < needed:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  (path / 'meta.json').write_text(json.dumps(meta, indent=1))
  if arrays:
    with _quiet() as ocp, _alone(ocp) as checkpointer:
      checkpointer.save(path / 'state', arrays)
  files = {}
  for file in sorted(p for p in path.rglob('*') if p.is_file()):
    _sync(file)
    files[file.relative_to(path).as_posix()] = {
      'bytes': file.stat().st_size,
      'sha256': _sha256(file),
    }
  manifest = {'round': round, 'leaves': listed, 'files': files}
  (path / 'manifest.json').write_text(json.dumps(manifest, indent=1))
  _sync(path / 'manifest.json')
  for folder in (p for p in path.rglob('*') if p.is_dir()):
    _sync(folder)
  _sync(path)


class _Damage(Exception):
  pass


def _verified(path: pathlib.Path) -> dict[str, Any]:
  """The manifest of a checkpoint that is what was written."""
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    files = [
      (name, entry['bytes'], entry['sha256'])
      for name, entry in manifest['files'].items()
    ]
    if not isinstance(manifest['leaves'], list):
      raise TypeError
  except FileNotFoundError:
    raise _Damage('manifest.json is missing') from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise _Damage('manifest.json is no manifest') from None
  for name, num_bytes, sha256 in files:
    file = path / name
    if not file.is_file():
      raise _Damage(f'{name} is missing')
    if file.stat().st_size != num_bytes:
      raise _Damage(
        f'{name} has {file.stat().st_size} bytes instead of {num_bytes}'
      )
    if _sha256(file) != sha256:
      raise _Damage(f'{name} was altered')
  return manifest


def _read(path: pathlib.Path, manifest: dict[str, Any], template: Any) -> Any:
  leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
  stored = manifest['leaves']
  found, wanted = (
    [x['name'] for x in stored],
    [_name(name) for name, _ in leaves],
  )
  for name in wanted:
    if name not in found:
      raise Error(f'{path} has no {name}, which this run needs.')
  for name in found:
    if name not in wanted:
      raise Error(f'{path} has {name}, which this run does not have.')
  for x, name, (_, leaf) in zip(stored, wanted, leaves, strict=True):
    dtype, shape = _kind(leaf)
    if (name, dtype, shape) != (x['name'], x['dtype'], x['shape']):
      raise Error(
        f'{path} has {x["name"]} as {x["dtype"]}{x["shape"]}, this run needs '
        f'{name} as {dtype}{shape}.'
      )
  full = [x['file_key'] for x in stored if x['file_key']]
  arrays: Any = {}
  if full:
    with _quiet() as ocp, _alone(ocp) as checkpointer:
      as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
      arrays = checkpointer.restore(
        path / 'state', restore_args=dict.fromkeys(full, as_numpy)
      )
  values = []
  for x, (_, leaf) in zip(stored, leaves):
    if x['file_key']:
      value = arrays[x['file_key']]
    else:
      dtype, shape = x['file_kind']
      value = np.zeros(shape, jnp.dtype(dtype))
    values.append(_like(value, leaf, x['impl']))
  return jax.tree.unflatten(treedef, values)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(path: pathlib.Path) -> None:
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
  """Orbax, whose log lines and tracebacks are not for the user's screen."""
  import absl.logging
  import orbax.checkpoint

  before = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.FATAL)
  try:
    yield orbax.checkpoint
  finally:
    absl.logging.set_verbosity(before)


def _alone(ocp: Any) -> Any:
  """Orbax in this process, whatever other processes there are."""
  options = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(), active_processes={jax.process_index()}
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
  return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Tells an error of the disk in a sentence."""
  before = sys.excepthook

  def hook(kind, error, traceback):
    if 'Event loop is closed' not in str(error):
      before(kind, error, traceback)

  # After a failure orbax's threads go on, and tell about a loop that is closed.
  sys.excepthook = hook
  try:
    yield
    sys.excepthook = before
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise Error(f'{path} cannot be saved: the disk is full.') from e
    raise Error(f'{path} cannot be saved: {e.strerror or e}.') from e
  except ValueError as e:
    # Orbax tells errors of the disk as text.
    for words in ('No space left on device', 'Disk quota exceeded'):
      if words in str(e):
        raise Error(f'{path} cannot be saved: the disk is full.') from e
    if 'os_error_code' in str(e):
      raise Error(f'{path} cannot be saved: {e}') from e
    raise
