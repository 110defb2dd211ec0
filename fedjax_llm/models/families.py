"""Hugging Face checkpoints and ours: the same network in two vocabularies.

A family says how its `config.json` becomes a `Config` and back; the table of
modules says which tensor of a checkpoint is which leaf of the base. A value
that the network does not implement is refused by name. What training alone
uses (dropout, initial ranges) is not read: dropout is never applied.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.models import layers, transformer
from fedjax_llm.models.layers import Rope
from fedjax_llm.models.transformer import Config
from fedjax_llm.types import Error

Path = tuple[str, ...]

# ----------------------------------------------------------------- tensors --


class Module(NamedTuple):
  """One module: our path, their name ('{}' is the layer), and its kind."""

  path: Path
  name: str
  kind: str  # 'linear' | 'norm' | 'embedding'


class Tensor(NamedTuple):
  """One tensor of a checkpoint and where it lives in the base."""

  name: str  # 'model.layers.3.self_attn.q_proj.weight'
  path: Path  # ('layers', 'self_attn', 'q_proj', 'kernel')
  layer: int | None  # row of the stacked leaf
  transpose: bool  # torch keeps matrices as (out, in), we as (in, out)
  shape: tuple[int, ...]  # as the checkpoint has it


_DECODER = (
  Module(('embed_tokens',), 'model.embed_tokens', 'embedding'),
  *(
    Module(('layers', *path), 'model.layers.{}.' + '.'.join(path), kind)
    for path, kind in (
      (('input_layernorm',), 'norm'),
      (('self_attn', 'q_proj'), 'linear'),
      (('self_attn', 'k_proj'), 'linear'),
      (('self_attn', 'v_proj'), 'linear'),
      (('self_attn', 'o_proj'), 'linear'),
      (('post_attention_layernorm',), 'norm'),
      (('mlp', 'gate_proj'), 'linear'),
      (('mlp', 'up_proj'), 'linear'),
      (('mlp', 'down_proj'), 'linear'),
    )
  ),
  Module(('norm',), 'model.norm', 'norm'),
  Module(('lm_head',), 'lm_head', 'linear'),
)

_LEAVES = {
  'linear': (('kernel', 'weight'), ('bias', 'bias')),
  'norm': (('scale', 'weight'),),
  'embedding': (('embedding', 'weight'),),
}


def modules(config: Config) -> tuple[Module, ...]:
  """The modules of this network, in the order of the computation."""
  tree = transformer.shapes(config)
  return tuple(m for m in family(config).modules if m.path[0] in tree)


def tensors(config: Config) -> Iterator[Tensor]:
  """Every tensor that a checkpoint of this network holds."""
  tree = transformer.shapes(config)
  for module in modules(config):
    node = tree
    for part in module.path:
      node = node[part]
    stacked = module.path[0] == 'layers'
    for ours, theirs in _LEAVES[module.kind]:
      if ours not in node:
        continue
      transpose = ours == 'kernel'
      shape = node[ours][1:] if stacked else node[ours]
      shape = shape[::-1] if transpose else shape
      for layer in range(config.num_layers) if stacked else (None,):
        name = f'{module.name.format(layer)}.{theirs}'
        yield Tensor(name, (*module.path, ours), layer, transpose, shape)


def hf_module_name(
  path: str | Sequence[str], layer: int | None, config: Config
) -> str:
  """What transformers (and PEFT) call the module at `path`.

  `path` is a tuple or 'layers/self_attn/q_proj'; `layer` is None outside the
  layers.

  >>> from fedjax_llm import models
  >>> config = models.random().config
  >>> hf_module_name('layers/self_attn/q_proj', 3, config)
  'model.layers.3.self_attn.q_proj'
  """
  wanted = tuple(path.split('/') if isinstance(path, str) else path)
  for module in modules(config):
    if module.path == wanted:
      return module.name.format(layer)
  have = ', '.join('/'.join(m.path) for m in modules(config))
  raise Error(f'{"/".join(wanted)} is no module of the model; it has {have}.')


def our_path(name: str, config: Config) -> tuple[Path, int | None]:
  """The inverse of `hf_module_name`: (path, layer).

  >>> from fedjax_llm import models
  >>> our_path('model.layers.1.mlp.up_proj', models.random().config)
  (('layers', 'mlp', 'up_proj'), 1)
  """
  for module in modules(config):
    rows = range(config.num_layers) if module.path[0] == 'layers' else (None,)
    for layer in rows:
      if module.name.format(layer) == name:
        return module.path, layer
  raise Error(
    f'{name} is no module of this {config.family} model of '
    f'{config.num_layers} layers.'
  )


# ---------------------------------------------------------------- families --


class Family(NamedTuple):
  """`read(values) -> Config fields`; `write(config) -> config.json fields`."""

  architecture: str
  modules: tuple[Module, ...]
  read: Callable[[Any], dict[str, Any]]
  write: Callable[[Config], dict[str, Any]]


_WINDOW_TYPES = ('full_attention', 'sliding_attention')


def _read_llama(hf):
  return {
    'qkv_bias': bool(hf.attention_bias),
    'output_bias': bool(hf.attention_bias),
    'mlp_bias': bool(hf.mlp_bias),
  }


def _write_llama(c):
  if c.qkv_bias != c.output_bias or any(c.windows):
    raise Error(
      'A llama checkpoint has biases on all four attention projections or on '
      'none, and no sliding window.'
    )
  return {'attention_bias': c.qkv_bias, 'mlp_bias': c.mlp_bias}


def _read_mistral(hf):
  window = hf.sliding_window
  types = set(getattr(hf, 'layer_types', None) or ())
  if len(types) > 1 or (types and types != {_WINDOW_TYPES[bool(window)]}):
    raise Error(
      f'layer_types={sorted(types)} is not supported for mistral with '
      f'sliding_window={window}: its layers are all alike.'
    )
  return {'windows': (window,) * hf.num_hidden_layers if window else ()}


def _write_mistral(c):
  if len(set(c.windows)) > 1 or c.qkv_bias or c.output_bias or c.mlp_bias:
    raise Error('A mistral checkpoint has one window for all and no biases.')
  return {'sliding_window': (c.windows or (None,))[0] or None}


def _read_qwen2(hf):
  window = hf.sliding_window or 0
  known = dict(zip(_WINDOW_TYPES, (0, window)))
  types = hf.layer_types
  for kind in types:
    if kind not in known:
      raise Error(
        f'layer_types has {kind!r}, which is not supported; supported: '
        f'{", ".join(_WINDOW_TYPES)}.'
      )
  if len(types) != hf.num_hidden_layers:
    raise Error(
      f'layer_types has {len(types)} entries for {hf.num_hidden_layers} layers.'
    )
  if 'sliding_attention' in types and not window:
    raise Error('layer_types has sliding_attention but sliding_window is null.')
  windows = tuple(known[kind] for kind in types)
  return {'qkv_bias': True, 'windows': windows if any(windows) else ()}


def _write_qwen2(c):
  sizes = {w for w in c.windows if w}
  if not c.qkv_bias or c.output_bias or c.mlp_bias or len(sizes) > 1:
    raise Error(
      'A qwen2 checkpoint has biases on q, k and v alone and one window size.'
    )
  windows = c.windows or (0,) * c.num_layers
  first = next((i for i, w in enumerate(windows) if w), c.num_layers)
  return {
    'use_sliding_window': bool(sizes),
    'sliding_window': sizes.pop() if sizes else None,
    'max_window_layers': first,
    'layer_types': [_WINDOW_TYPES[bool(w)] for w in windows],
  }


FAMILIES = {
  'llama': Family('LlamaForCausalLM', _DECODER, _read_llama, _write_llama),
  'mistral': Family(
    'MistralForCausalLM', _DECODER, _read_mistral, _write_mistral
  ),
  'qwen2': Family('Qwen2ForCausalLM', _DECODER, _read_qwen2, _write_qwen2),
}


def family(config: Config) -> Family:
  if config.family not in FAMILIES:
    raise Error(
      f'The family {config.family!r} is not supported; supported: '
      f'{", ".join(FAMILIES)}.'
    )
  return FAMILIES[config.family]


# ------------------------------------------------------------- config.json --

# Switches that other networks have: here they have one value or none.
_ONLY = {
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
  'quantization_config': (),
  'rope_interleaved': (False,),
  'partial_rotary_factor': (1.0,),
  'attn_logit_softcapping': (),
  'final_logit_softcapping': (),
  'logit_scale': (1.0,),
  'logits_scaling': (1.0,),
  'attention_multiplier': (),
  'embedding_multiplier': (1.0,),
  'residual_multiplier': (1.0,),
  'use_qk_norm': (False,),
  'qk_layernorm': (False,),
  'parallel_attn': (False,),
  'no_rope_layers': (),
  'num_experts': (0, 1),
  'num_local_experts': (0, 1),
}

_ROPE = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}


def read_config(directory: str | pathlib.Path) -> Config:
  """The `Config` of a Hugging Face directory.

  Raises `Error` for a directory without a readable config.json, an
  architecture outside `FAMILIES`, and any value that is not implemented.
  """
  file = pathlib.Path(directory) / 'config.json'
  if not file.is_file():
    raise Error(f'{directory} has no config.json, so it is no model directory.')
  try:
    raw = json.loads(file.read_text())
    if not isinstance(raw, dict):
      raise ValueError('it is no JSON object')
  except ValueError as error:
    raise Error(f'{file} cannot be read: {error}.') from error

  kind = raw.get('model_type')
  named = raw.get('architectures') or []
  supported = {f.architecture: k for k, f in FAMILIES.items()}
  architecture = str(named[0]) if named else ''
  if kind not in FAMILIES or (named and supported.get(architecture) != kind):
    raise Error(
      f'{file}: the architecture {architecture or "(none)"} with '
      f'model_type {kind!r} is not supported; supported: '
      f'{", ".join(supported)}.'
    )
  # On import the library advises to install a framework that is not needed.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(str(file.parent))
  except Exception as error:  # of many kinds, by the version of transformers
    text = ' '.join(str(error).split()).rstrip('.')
    raise Error(f'{file} is not a valid {kind} config: {text}.') from error
  try:
    return from_hf(hf, raw)
  except Error as error:
    raise Error(f'{file}: {error}') from error


def from_hf(hf: Any, raw: Mapping[str, Any] | None = None) -> Config:
  """A transformers config object to ours.

  `raw` is its file, for the fields that the object does not keep.
  """
  raw = {} if raw is None else raw
  if hf.model_type not in FAMILIES:  # transformers may read it as another
    raise Error(
      f'model_type {hf.model_type!r} is not supported; supported: '
      f'{", ".join(FAMILIES)}.'
    )
  for field, allowed in _ONLY.items():
    value = raw.get(field, getattr(hf, field, None))
    if value is not None and value not in allowed:
      raise Error(
        f'{field}={value!r} is not supported; supported: '
        f'{", ".join(map(repr, (None, *allowed)))}.'
      )
  if hf.hidden_act not in layers.ACTIVATIONS:
    raise Error(
      f'hidden_act={hf.hidden_act!r} is not supported; supported: '
      f'{", ".join(layers.ACTIVATIONS)}.'
    )
  head_dim = getattr(hf, 'head_dim', None)
  if head_dim is None:
    head_dim = hf.hidden_size // hf.num_attention_heads
  if head_dim < 2 or head_dim % 2:
    raise Error(f'head_dim={head_dim} is not supported; it must be even.')
  if hf.num_attention_heads % hf.num_key_value_heads:
    raise Error(
      f'num_attention_heads={hf.num_attention_heads} is no multiple of '
      f'num_key_value_heads={hf.num_key_value_heads}.'
    )
  eos = hf.eos_token_id
  return Config(
    family=hf.model_type,
    vocab_size=hf.vocab_size,
    hidden_size=hf.hidden_size,
    intermediate_size=hf.intermediate_size,
    num_layers=hf.num_hidden_layers,
    num_heads=hf.num_attention_heads,
    num_kv_heads=hf.num_key_value_heads,
    head_dim=head_dim,
    max_positions=hf.max_position_embeddings,
    activation=hf.hidden_act,
    norm_eps=float(hf.rms_norm_eps),
    rope=_read_rope(hf.rope_parameters),
    tied=bool(hf.tie_word_embeddings),
    bos_id=hf.bos_token_id,
    eos_ids=() if eos is None else tuple(eos if _is_list(eos) else [eos]),
    pad_id=hf.pad_token_id,
    **FAMILIES[hf.model_type].read(hf),
  )


def to_hf(config: Config) -> dict[str, Any]:
  """The config.json of a network, read alike by old and new transformers."""
  c = config
  rope = {}
  if c.rope.kind != 'default':
    rope = {'rope_type': c.rope.kind, 'factor': c.rope.factor}
  if c.rope.kind == 'llama3':
    rope['low_freq_factor'] = c.rope.low_freq_factor
    rope['high_freq_factor'] = c.rope.high_freq_factor
    rope['original_max_position_embeddings'] = c.rope.original_max_positions
  eos = list(c.eos_ids)
  return {
    'architectures': [family(c).architecture],
    'model_type': c.family,
    'vocab_size': c.vocab_size,
    'hidden_size': c.hidden_size,
    'intermediate_size': c.intermediate_size,
    'num_hidden_layers': c.num_layers,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'max_position_embeddings': c.max_positions,
    'hidden_act': c.activation,
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope.theta,
    'rope_scaling': rope or None,
    'tie_word_embeddings': c.tied,
    'bos_token_id': c.bos_id,
    'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
    'pad_token_id': c.pad_id,
    **family(c).write(c),
  }


def _is_list(x: Any) -> bool:
  return isinstance(x, list | tuple)


def _read_rope(values: Mapping[str, Any]) -> Rope:
  kind = values.get('rope_type', 'default')
  if kind not in _ROPE:
    raise Error(
      f'rope type {kind!r} is not supported; supported: {", ".join(_ROPE)}.'
    )
  known = {'rope_type', 'type', 'rope_theta', *_ROPE[kind]}
  for name, value in values.items():
    if name in known or value is None:
      continue
    if name == 'partial_rotary_factor' and value == 1.0:
      continue
    raise Error(
      f'rope_parameters.{name}={value!r} is not supported with rope type '
      f'{kind!r}.'
    )
  for name in ('rope_theta', *_ROPE[kind]):
    number = values.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float):
      raise Error(f'rope_parameters.{name}={number!r} is no number.')
  return Rope(
    kind,
    float(values['rope_theta']),
    float(values.get('factor') or 1.0),
    float(values.get('low_freq_factor') or 1.0),
    float(values.get('high_freq_factor') or 4.0),
    int(values.get('original_max_position_embeddings') or 8192),
  )
