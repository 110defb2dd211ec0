"""Loads models from Hugging Face directories, and builds random ones.

`pretrained`, `random` and `assemble` return a `LoadedModel`.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import reading
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families, quantised
from fedjax_llm.models.config import Config
from fedjax_llm.models.files.weights import Place as Place
from fedjax_llm.models.files.weights import read_base as read_base
from fedjax_llm.models.files.weights import save as save
from fedjax_llm.models.network import decoding, dual, transformer, vision
from fedjax_llm.models.network.decoding import Decoder
from fedjax_llm.models.network.dual import Dual
from fedjax_llm.types import Base, Error, Model

DTYPES = ('float32', 'bfloat16', 'float16')


class LoadedModel(NamedTuple):
  """A network, its frozen weights, and their source.

  >>> loaded = random(num_layers=3)
  >>> loaded.config.num_layers, loaded.directory
  (3, None)
  """

  config: Config
  model: Model
  decoder: Decoder
  base: Base
  name: str  # as requested; an exported adapter names it as its base
  directory: pathlib.Path | None = None  # config and tokenizer; None if random
  dual: Dual | None = None  # both towers of a dual encoder


def assemble(
  config: Config,
  base: Base,
  *,
  name: str,
  directory: pathlib.Path | None = None,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = 'auto',
  logits_dtype: Any = 'float32',
  attention: str = 'auto',
) -> LoadedModel:
  """Returns a `LoadedModel` of an existing base with its functions."""
  if compute_dtype == 'auto':
    compute_dtype = 'float32' if _on_cpu() else 'bfloat16'
  dtype = _dtype(compute_dtype, 'compute_dtype', 'auto')
  if unroll < 1:
    raise Error(f'model.unroll is {unroll}, but must be at least 1.')
  settings: Any = {
    'remat': remat,
    'unroll': unroll,
    'compute_dtype': dtype,
    'logits_dtype': _dtype(logits_dtype, 'logits_dtype'),
    'attention': attention,
  }
  no_cache: Any = None  # these networks write no text
  if config.vision is not None:
    model, towers = dual.build(config, **settings)
    return LoadedModel(config, model, no_cache, base, name, directory, towers)
  if config.image is not None:
    model = vision.build(config, **settings)
    return LoadedModel(config, model, no_cache, base, name, directory)
  model = transformer.build(config, **settings)
  decoder = decoding.decoder(config, compute_dtype=dtype)
  return LoadedModel(config, model, decoder, base, name, directory)


def random(
  *,
  labels: Sequence[str] | None = None,
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
  compute_dtype: Any = 'auto',
  logits_dtype: Any = 'float32',
  quantisation: str | None = None,
  attention: str = 'auto',
) -> LoadedModel:
  """Builds a tiny Llama-type network with random weights.

  With `labels` it has a score of a text for each of them in place of the output
  matrix. Precision, quantisation and attention are as in `pretrained`.

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
    head='lm' if labels is None else 'score',
    labels=() if labels is None else tuple(labels),
  )
  quantised.check(quantisation)
  base = config_lib.init(config, jax.random.key(seed), _dtype(dtype))
  return assemble(
    config,
    quantised.base(base, quantisation),
    name=f'random-{seed}',
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    logits_dtype=logits_dtype,
    attention=attention,
  )


def pretrained(
  path: str | os.PathLike,
  *,
  labels: Sequence[str] | None = None,
  seed: int = 0,
  place: Place | None = None,
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = 'auto',
  logits_dtype: Any = 'float32',
  quantisation: str | None = None,
  attention: str = 'auto',
) -> LoadedModel:
  """Loads the network of a Hugging Face directory, or of a name on the hub.

  `dtype` is that of the weights in memory, `compute_dtype` that of activations
  and products ('auto': bfloat16 on accelerators, float32 on CPU) and
  `logits_dtype` that of the head's products, forwards and backwards. Norms,
  rotations, softmax and losses are always computed in float32, and adapters are
  stored in float32.

  `quantisation` ('int8', 'int4', 'nf4') stores the matrices of the layers in
  few bits, each quantised as soon as it is read (`quantised`). `attention` is
  the implementation (`attention.choose`).

  Tensors are read one at a time into stacked arrays, so that memory grows by
  little more than the parameters. `place(path, shape)` returns the sharding of
  each leaf (`sharding.placement(mesh)`): every device then gets its shard as it
  is read, without a whole copy on the host.

  A network has the head of its checkpoint. With `labels` the head is a
  classifier of these classes: weights that the checkpoint lacks are drawn with
  `seed` from N(0, 0.02^2), with zero biases. That of a causal network, `score`,
  reads the last token of a text.

  Raises `Error` for a directory without config.json or safetensors, an
  architecture or value that is not implemented, tensors that are missing,
  unknown or of a wrong shape, files that are damaged or missing, and a
  tokenizer with more tokens than the embedding.

  >>> pretrained('./nowhere')  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ./nowhere is neither a directory nor ...
  """
  wanted = _dtype(dtype)
  directory = _find(path)
  quantised.check(quantisation)
  config = families.read_config(directory, labels=labels)
  _check_tokenizer(directory, config)
  return assemble(
    config,
    read_base(
      directory,
      config,
      wanted,
      seed=None if labels is None else seed,
      place=place,
      change=functools.partial(quantised.leaf, kind=quantisation),
    ),
    name=os.fspath(path),
    directory=directory,
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    logits_dtype=logits_dtype,
    attention=attention,
  )


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


# Roles of the special tokens that a tokenizer adds to texts.
_ROLES = ('bos', 'eos', 'pad', 'unk', 'sep', 'cls', 'mask')


def _check_tokenizer(directory: pathlib.Path, config: Config) -> None:
  """Raises `Error` if a token of the tokenizer has no row in the embedding.

  Special tokens without a role in texts may lie outside (Gemma 3 has one for
  pictures).
  """
  file, settings = directory / 'tokenizer.json', 'tokenizer_config.json'
  if not file.is_file():
    return
  try:
    content, roles = reading.read(file), {}
    if (directory / settings).is_file():
      roles = reading.read(directory / settings)
    used = [roles.get(f'{role}_token') for role in _ROLES]
    used = [x['content'] if isinstance(x, dict) else x for x in used]
    vocab = content['model']['vocab']  # a dict, or a list in order of the ids
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    for token in content.get('added_tokens') or ():
      if token['content'] in used or not token.get('special'):
        ids.append(token['id'])
    largest = max(ids, default=-1)
  except Error:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise Error(f'{file} cannot be read: {error!r}.') from error
  if largest >= config.vocab_size:
    raise Error(
      f'{file} has tokens up to number {largest}, but the embedding has only '
      f'{config.vocab_size} rows (vocab_size): they do not belong together.'
    )


def _dtype(name: Any, field: str = 'dtype', *others: str) -> np.dtype:
  try:
    dtype = jnp.dtype(name)
  except (TypeError, ValueError):  # a surrogate is no text
    dtype = None
  if dtype is None or dtype.name not in DTYPES:
    known = ', '.join((*others, *DTYPES))
    raise Error(f'{field}={name!r} is not one of {known}.')
  return dtype


def _find(path: str | os.PathLike) -> pathlib.Path:
  """Returns an existing directory, or a downloaded copy from the hub."""
  directory = pathlib.Path(path).expanduser()
  if directory.is_dir():
    return directory
  name = os.fspath(path)
  is_hub_name = name.count('/') == 1 and not name.startswith(('.', '~', '/'))
  if directory.exists() or not is_hub_name or name.endswith('/'):
    hint = reading.fetched_by(name)
    if directory.is_file() and directory.suffix == '.gguf':
      hint = ' fedjax_llm.models.gguf.convert makes a model directory of it.'
    raise Error(
      f'{name} is neither a directory nor a name such as owner/model.{hint}'
    )
  try:
    from huggingface_hub import snapshot_download

    copy = snapshot_download(
      name,
      allow_patterns=['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja'],
    )
  except Exception as error:  # offline, unknown or gated: many types
    text = ' '.join(str(error).split())[:200]
    raise Error(
      f'{name} is no directory here and could not be fetched from the hub: '
      f'{type(error).__name__}: {text}'
    ) from error
  return pathlib.Path(copy)
