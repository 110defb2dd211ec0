"""Converts GGUF files of Llama models to ordinary Hugging Face directories.

A GGUF file holds a quantised model with its tokenizer. `convert` dequantises it
with NumPy (no torch) and writes `config.json`, `generation_config.json`,
`model.safetensors`, `tokenizer.json` and `tokenizer_config.json`, which other
tools load too.

The layout of the file is described by the GGUF specification (ggml,
docs/gguf.md).
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_llm.models.files.gguf_tokenizer import tokenizer_of
from fedjax_llm.types import Error

# GGUF name -> Hugging Face name; norms are vectors, everything else [F, D].
_TOP = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
}
_BLOCK = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_ROPE_FACTORS = 'rope_freqs.weight'  # [head_dim / 2], Llama 3.1 and later

_DTYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}


def convert(
  gguf_path: str | os.PathLike,
  out_dir: str | os.PathLike,
  *,
  dtype: str = 'float32',
) -> None:
  """Writes the model of a GGUF file as a Hugging Face directory.

  `out_dir` must exist; files of the same names are overwritten. Weights pass
  through memory one at a time. A quantised number is a product of a half
  precision scale and an integer, plus an offset, which neither float16 nor
  bfloat16 can represent: `dtype='float32'` keeps every weight exactly.

  Raises `Error` if the file is no GGUF file, has another architecture than
  'llama', or holds anything that the written files cannot represent.
  """
  if dtype not in _DTYPES:
    raise Error(f'dtype must be one of {", ".join(_DTYPES)}, got {dtype!r}.')
  part = re.search(r'-(\d{5})-of-(\d{5})\.gguf$', os.fspath(gguf_path))
  if part is not None and int(part[2]) > 1:
    raise Error(
      f'{gguf_path} is part {int(part[1])} of {int(part[2])} of a model: join '
      'the parts first (llama-gguf-split --merge).'
    )
  reader = _open(gguf_path)
  out_dir = pathlib.Path(out_dir)
  fields = _Fields(reader, str(gguf_path))
  shapes = {
    t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors
  }
  config = _config(fields, shapes, reader, dtype)
  tokenizer, tokenizer_config, generation = tokenizer_of(fields, config)

  _write_json(out_dir / 'config.json', config)
  _write_json(out_dir / 'generation_config.json', generation)
  tokenizer.save(str(out_dir / 'tokenizer.json'))
  _write_json(out_dir / 'tokenizer_config.json', tokenizer_config)
  _write_weights(out_dir / 'model.safetensors', reader, config, dtype, fields)


def _open(path: str | os.PathLike) -> Any:
  try:
    import gguf
  except ImportError:
    raise Error(
      "Reading a GGUF file needs the package 'gguf': "
      "python -m pip install 'fedjax_llm[gguf]'."
    ) from None
  if not os.path.isfile(path):
    raise Error(f'{path}: there is no such file.')
  try:
    return gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError) as error:
    raise Error(f'{path} is not a readable GGUF file ({error}).') from None


class _Fields:
  """The metadata of a file; an absent field is an `Error` or the default."""

  _required = object()

  def __init__(self, reader: Any, path: str):
    self.reader, self.path = reader, path

  def get(self, name: str, default: Any = _required) -> Any:
    field = self.reader.get_field(name)
    if field is not None:
      return field.contents()
    if default is self._required:
      raise Error(f'{self.path}: the field {name!r} is missing.')
    return default

  def refuse(self, what: str) -> Error:
    return Error(f'{self.path}: {what}')


# ------------------------------------------------------------------ config --


def _config(
  fields: _Fields,
  shapes: Mapping[str, tuple[int, ...]],
  reader: Any,
  dtype: str,
) -> dict[str, Any]:
  arch = fields.get('general.architecture')
  if arch != 'llama':
    raise fields.refuse(
      f'the architecture {arch!r} is not supported; supported is: llama.'
    )
  get = lambda name, *default: fields.get(f'llama.{name}', *default)
  if get('expert_count', 0):
    raise fields.refuse('mixtures of experts are not supported.')
  if get('attention.sliding_window', 0):
    raise fields.refuse('sliding window attention is not supported.')
  width, heads = get('embedding_length'), get('attention.head_count')
  kv_heads = get('attention.head_count_kv', heads)
  if not (isinstance(heads, int) and isinstance(kv_heads, int)):
    raise fields.refuse(
      'a number of heads that differs by layer is not supported.'
    )
  head_dim = get('attention.key_length', width // heads)
  for name in ('attention.value_length', 'rope.dimension_count'):
    if get(name, head_dim) != head_dim:
      raise fields.refuse(
        f'llama.{name} must be the head dimension {head_dim}, got {get(name)}.'
      )

  rope: dict[str, Any] = {'rope_type': 'default'}
  scaling = get('rope.scaling.type', 'none')
  if scaling == 'linear':
    rope = {'rope_type': 'linear', 'factor': get('rope.scaling.factor')}
  elif scaling != 'none':
    raise fields.refuse(f'the rope scaling {scaling!r} is not supported.')
  theta = _short(get('rope.freq_base', 10000.0))
  for tensor in reader.tensors:
    if tensor.name == _ROPE_FACTORS:
      rope = _llama3_rope(np.asarray(tensor.data), theta, head_dim, fields)

  # A chat model may end a turn with another token than its end of text.
  ends = [fields.get('tokenizer.ggml.eos_token_id')]
  turn = fields.get('tokenizer.ggml.eot_token_id', ends[0])
  ends += [turn] if turn != ends[0] else []
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'attention_bias': 'blk.0.attn_q.bias' in shapes,
    'attention_dropout': 0.0,
    'bos_token_id': fields.get('tokenizer.ggml.bos_token_id', None),
    'dtype': dtype,
    'eos_token_id': ends if len(ends) > 1 else ends[0],
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'hidden_size': width,
    'initializer_range': 0.02,
    'intermediate_size': get('feed_forward_length'),
    'max_position_embeddings': get('context_length'),
    'mlp_bias': 'blk.0.ffn_gate.bias' in shapes,
    'num_attention_heads': heads,
    'num_hidden_layers': get('block_count'),
    'num_key_value_heads': kv_heads,
    'pad_token_id': fields.get('tokenizer.ggml.padding_token_id', None),
    'rms_norm_eps': _short(get('attention.layer_norm_rms_epsilon')),
    # Both spellings: before transformers 5, and since.
    'rope_theta': theta,
    'rope_scaling': None if rope['rope_type'] == 'default' else rope,
    'rope_parameters': {'rope_theta': theta, **rope},
    'tie_word_embeddings': 'output.weight' not in shapes,
    'use_cache': True,
    'vocab_size': shapes['token_embd.weight'][0],
  }


def _short(x: float) -> float:
  """Returns the shortest decimal of a float32: 1e-05, not 9.99...e-06.

  >>> _short(9.999999747378752e-06)
  1e-05
  """
  return float(str(np.float32(x)))


def _llama3_rope(
  factors: np.ndarray, theta: float, head_dim: int, fields: _Fields
) -> dict[str, Any]:
  """Returns Llama 3's rope scaling with the divisors `factors` [head_dim / 2].

  The file holds only the divisors. The largest is the factor; the other three
  numbers are the same in every Llama 3 model, which is checked against all
  divisors.
  """
  rope = {
    'rope_type': 'llama3',
    'factor': _short(float(factors.max())),
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  inverse = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  turns = 8192 * inverse / (2 * np.pi)  # rotations in the original context
  smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
  expected = 1 / (smooth + (1 - smooth) / rope['factor'])
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-4
  ):
    raise fields.refuse(f'{_ROPE_FACTORS} is not a rope scaling of Llama 3.')
  return rope


# ----------------------------------------------------------------- weights --


def _hf_name(name: str) -> str | None:
  """Returns the Hugging Face name of a tensor, None if there is none.

  >>> _hf_name('blk.3.attn_q.weight')
  'model.layers.3.self_attn.q_proj.weight'
  """
  match = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
  if match is None:
    return None
  layer, stem, kind = match.groups()
  module = (_TOP if layer is None else _BLOCK).get(stem)
  if module is None:
    return None
  prefix = '' if layer is None else f'model.layers.{layer}.'
  return f'{prefix}{module}.{kind}'


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows of q or k [heads * head_dim, ...] as Hugging Face does.

  GGUF files of this architecture interleave the two halves of every head,
  which rotary embeddings rotate against each other.

  >>> _unpermute(np.array([0, 3, 1, 4, 2, 5]), heads=1)
  array([0, 1, 2, 3, 4, 5])
  """
  head_dim = w.shape[0] // heads
  halves = w.reshape(heads, head_dim // 2, 2, *w.shape[1:])
  return halves.swapaxes(1, 2).reshape(w.shape)


def _weights(
  reader: Any, config: Mapping[str, Any], fields: _Fields
) -> Iterator[tuple[str, tuple[int, ...], Any]]:
  """Yields (Hugging Face name, shape, function that reads the array).

  The function returns float32.
  """
  import gguf

  for tensor in reader.tensors:
    if tensor.name == _ROPE_FACTORS:
      continue  # written into the config
    name = _hf_name(tensor.name)
    if name is None:
      raise fields.refuse(f'the tensor {tensor.name!r} is not known.')
    shape = tuple(int(n) for n in tensor.shape[::-1])  # innermost axis first

    def read(tensor=tensor, name=name, shape=shape):
      w = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
      if '.q_proj.' in name:
        w = _unpermute(w, config['num_attention_heads'])
      elif '.k_proj.' in name:
        w = _unpermute(w, config['num_key_value_heads'])
      return w

    yield name, shape, read


def _write_weights(
  path: pathlib.Path,
  reader: Any,
  config: Mapping[str, Any],
  dtype: str,
  fields: _Fields,
) -> None:
  """Writes model.safetensors, one tensor in memory at a time.

  The format: the header's length as 8 little-endian bytes, a JSON header with
  the dtype, shape and place of every tensor, then their bytes.
  """
  import ml_dtypes

  kind = np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)
  weights = sorted(_weights(reader, config, fields), key=lambda w: w[0])
  _check_names({name for name, _, _ in weights}, config, fields)
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  start = 0
  for name, shape, _ in weights:
    end = start + int(np.prod(shape)) * kind.itemsize
    header[name] = {
      'dtype': _DTYPES[dtype],
      'shape': list(shape),
      'data_offsets': [start, end],
    }
    start = end
  head = json.dumps(header, separators=(',', ':')).encode()
  head += b' ' * (-len(head) % 8)
  with open(path, 'wb') as file:
    file.write(len(head).to_bytes(8, 'little'))
    file.write(head)
    for _, _, read in weights:
      # As bytes: NumPy has no buffers of bfloat16.
      w = np.ascontiguousarray(read().astype(kind, copy=False))
      file.write(w.view(np.uint8).data)


def _check_names(
  names: set[str], config: Mapping[str, Any], fields: _Fields
) -> None:
  biased = {'self_attn': 'attention_bias', 'mlp': 'mlp_bias'}
  wanted = {'model.embed_tokens.weight', 'model.norm.weight'}
  if not config['tie_word_embeddings']:
    wanted.add('lm_head.weight')
  for layer in range(config['num_hidden_layers']):
    for module in _BLOCK.values():
      wanted.add(f'model.layers.{layer}.{module}.weight')
      if config.get(biased.get(module.split('.')[0], '')):
        wanted.add(f'model.layers.{layer}.{module}.bias')
  if names != wanted:
    missing, extra = sorted(wanted - names), sorted(names - wanted)
    raise fields.refuse(
      f'the weights do not fit a Llama of {config["num_hidden_layers"]} layers '
      f'(missing: {missing[:3]}, unexpected: {extra[:3]}).'
    )


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
  )
