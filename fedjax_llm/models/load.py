"""Weights in and out: Hugging Face directories and random networks."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models import families, transformer
from fedjax_llm.models.transformer import Config, Decoder
from fedjax_llm.types import Base, Error, Model

DTYPES = ('float32', 'bfloat16', 'float16')
_READABLE = {'F32', 'BF16', 'F16'}
_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'


class LoadedModel(NamedTuple):
  """A network, its frozen weights, and where they came from."""

  config: Config
  model: Model
  decoder: Decoder
  base: Base
  name: str  # as asked for; what an exported adapter names as its base
  directory: pathlib.Path | None = None  # config and tokenizer; None if random


def assemble(
  config: Config,
  base: Base,
  *,
  name: str,
  directory: pathlib.Path | None = None,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = jnp.float32,
  attention: str = 'auto',
) -> LoadedModel:
  """A base that is already there, with the functions that read it."""
  dtype = _dtype(compute_dtype, 'compute_dtype')
  model = transformer.build(
    config,
    remat=remat,
    unroll=unroll,
    compute_dtype=dtype,
    attention=attention,
  )
  decoder = transformer.decoder(config, compute_dtype=dtype)
  return LoadedModel(config, model, decoder, base, name, directory)


def random(
  *,
  seed: int = 0,
  vocab_size: int = 256,
  hidden_size: int = 64,
  intermediate_size: int = 128,
  num_layers: int = 2,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  max_positions: int = 2048,
  tied: bool = False,
  eos_ids: Sequence[int] = (),
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = 'float32',
  attention: str = 'auto',
) -> LoadedModel:
  """A tiny Llama-type network with random weights.

  >>> loaded = random(num_layers=3)
  >>> loaded.base['layers']['mlp']['up_proj']['kernel'].shape
  (3, 64, 128)
  """
  sizes = {
    'vocab_size': vocab_size,
    'hidden_size': hidden_size,
    'intermediate_size': intermediate_size,
    'num_layers': num_layers,
    'num_heads': num_heads,
    'num_kv_heads': num_kv_heads,
    'max_positions': max_positions,
  }
  for field, size in sizes.items():
    if size < 1:
      raise Error(f'{field}={size} must be at least 1.')
  if hidden_size % (2 * num_heads):
    raise Error(f'{hidden_size=} is no multiple of 2 * {num_heads=}.')
  if num_heads % num_kv_heads:
    raise Error(f'{num_heads=} is no multiple of {num_kv_heads=}.')
  config = Config(
    family='llama',
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=hidden_size // num_heads,
    max_positions=max_positions,
    tied=tied,
    eos_ids=tuple(eos_ids),
  )
  return assemble(
    config,
    transformer.init(config, jax.random.key(seed), _dtype(dtype)),
    name=f'random-{seed}',
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    attention=attention,
  )


def pretrained(
  path: str | os.PathLike,
  *,
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = 'float32',
  attention: str = 'auto',
) -> LoadedModel:
  """The network of a Hugging Face directory, or of a name on the hub.

  `dtype` is that of the weights in memory, `compute_dtype` that of the
  activations. Tensors are read one at a time into stacked arrays, so that
  memory grows by little more than the parameters.

  Raises `Error` for a directory without config.json or safetensors, an
  architecture or value that is not implemented, and tensors that are missing,
  unknown or of another shape.
  """
  wanted = _dtype(dtype)
  directory = _find(path)
  config = families.read_config(directory)
  return assemble(
    config,
    read_base(directory, config, wanted),
    name=os.fspath(path),
    directory=directory,
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    attention=attention,
  )


# ----------------------------------------------------------------- reading --


def _dtype(name: Any, field: str = 'dtype') -> np.dtype:
  try:
    dtype = jnp.dtype(name)
  except TypeError:
    dtype = None
  if dtype is None or dtype.name not in DTYPES:
    raise Error(f'{field}={name!r} is not one of {", ".join(DTYPES)}.')
  return dtype


def _find(path: str | os.PathLike) -> pathlib.Path:
  """A directory that exists, or the hub's copy of it."""
  directory = pathlib.Path(path).expanduser()
  if directory.is_dir():
    return directory
  name = os.fspath(path)
  is_hub_name = name.count('/') == 1 and not name.startswith(('.', '~', '/'))
  if directory.exists() or not is_hub_name or name.endswith('/'):
    raise Error(
      f'{name} is neither a directory nor a name such as owner/model.'
    )
  try:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
      name,
      allow_patterns=['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja'],
    )
  except Exception as error:  # offline, unknown, gated: many kinds
    text = ' '.join(str(error).split())[:200]
    raise Error(
      f'{name} is no directory here and could not be fetched from the hub: '
      f'{type(error).__name__}: {text}'
    ) from error
  return pathlib.Path(found)


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Any]:
  import safetensors

  try:
    with safetensors.safe_open(str(file), 'numpy') as handle:
      yield handle
  except (safetensors.SafetensorError, OSError) as error:
    raise Error(f'{file} cannot be read (damaged or cut off?): {error}.') from (
      error
    )


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Where each tensor of a checkpoint lies."""
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
    weight_map = json.loads(index.read_text())['weight_map']
    where = {name: directory / file for name, file in weight_map.items()}
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


def _check(directory, config, files) -> None:
  """Names, shapes and dtypes, before any weight is read."""
  table = {t.name: t for t in families.tensors(config)}
  if missing := [name for name in table if name not in files]:
    raise Error(f'{directory} lacks the tensors {_some(missing)}.')
  unknown = [n for n in files if n not in table and not _harmless(n, config)]
  if unknown:
    raise Error(
      f'{directory} holds tensors that a {config.family} model with this '
      f'config.json does not have: {_some(unknown)}.'
    )
  by_file: dict[pathlib.Path, list[str]] = {}
  for name in table:
    by_file.setdefault(files[name], []).append(name)
  for file, names in by_file.items():
    with _open(file) as handle:
      for name in names:
        entry = handle.get_slice(name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != table[name].shape:
          raise Error(
            f'{file}: {name} has shape {list(shape)}, but config.json asks for '
            f'{list(table[name].shape)}.'
          )
        if dtype not in _READABLE:
          raise Error(
            f'{file}: {name} is stored as {dtype}; only '
            f'{", ".join(sorted(_READABLE))} are read.'
          )


def _harmless(name: str, config: Config) -> bool:
  # Old checkpoints carry the rope frequencies, which the config determines;
  # a tied head may be written a second time (compared in `read_base`).
  return name.endswith('rotary_emb.inv_freq') or (
    config.tied and name == 'lm_head.weight'
  )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An empty array at a multiple of 64 bytes: jax on CPU takes it as it is."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def read_base(directory: pathlib.Path, config: Config, dtype: np.dtype) -> Base:
  """The weights of a checkpoint as our tree of stacked arrays."""
  files = _files(directory)
  _check(directory, config, files)

  def read(name):
    # Opened anew for each tensor: the pages of a mapped file that were read
    # count as memory until the file is closed.
    with _open(files[name]) as handle:
      return handle.get_tensor(name)

  parts: dict[families.Path, list[families.Tensor]] = {}
  for tensor in families.tensors(config):
    parts.setdefault(tensor.path, []).append(tensor)
  if config.tied and 'lm_head.weight' in files:
    embedding = parts['embed_tokens', 'embedding'][0].name
    if not np.array_equal(read(embedding), read('lm_head.weight')):
      raise Error(
        f'{directory}: config.json ties the head to the embedding '
        '(tie_word_embeddings), but lm_head.weight differs from it.'
      )

  base: dict[str, Any] = {}
  for path, group in parts.items():
    node = base
    for name in path[:-1]:
      node = node.setdefault(name, {})
    shape: Any = transformer.shapes(config)
    for name in path:
      shape = shape[name]
    leaf = _aligned(shape, dtype)
    for tensor in group:
      value = read(tensor.name)
      row = leaf if tensor.layer is None else leaf[tensor.layer]
      row[...] = value.T if tensor.transpose else value
    node[path[-1]] = jax.device_put(leaf)
  return base


# ----------------------------------------------------------------- writing --


def save(directory: str | os.PathLike, config: Config, base: Base) -> None:
  """Writes a Hugging Face directory that transformers loads.

  config.json and model.safetensors, in the dtype of the base. Files appear
  whole or not at all.
  """
  from safetensors.numpy import save_file

  directory = pathlib.Path(directory)
  weights = {}
  for tensor in families.tensors(config):
    leaf = base
    for name in tensor.path:
      leaf = leaf[name]
    value = np.asarray(leaf)
    value = value if tensor.layer is None else value[tensor.layer]
    value = value.T if tensor.transpose else value
    if value.shape != tensor.shape:
      raise Error(
        f'{tensor.name} has shape {list(value.shape)}, but the config asks for '
        f'{list(tensor.shape)}.'
      )
    weights[tensor.name] = np.ascontiguousarray(value)
  dtype = str(next(iter(weights.values())).dtype)
  text = json.dumps({**families.to_hf(config), 'torch_dtype': dtype}, indent=2)

  files = {name: directory / name for name in (_SINGLE, 'config.json')}
  drafts = {n: f.with_name(f'.{n}.{os.getpid()}') for n, f in files.items()}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(drafts[_SINGLE]), metadata={'format': 'pt'})
    drafts['config.json'].write_text(text + '\n')
    # safetensors writes files that only their owner may read.
    drafts[_SINGLE].chmod(drafts['config.json'].stat().st_mode)
    for name, file in files.items():
      os.replace(drafts[name], file)
  except Exception as error:
    for draft in drafts.values():
      draft.unlink(missing_ok=True)
    raise Error(f'{directory} could not be written: {error}.') from error
