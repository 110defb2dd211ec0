"""Converts config.json to `Config` and back.

A value that the network does not implement raises an `Error` that names it.
Fields for training (dropout, initial ranges) are not read: dropout is never
applied.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm import reading
from fedjax_llm.models.config import Config
from fedjax_llm.models.families import images, ropes, schema
from fedjax_llm.models.families.names import FAMILIES, family
from fedjax_llm.models.families.tables import Family
from fedjax_llm.models.network import layers
from fedjax_llm.types import Error

# Switches of other networks with the values that are allowed here, unless a
# family lists them in `handled`.
_ONLY = {
  'is_encoder_decoder': (False,),
  'is_decoder': (False,),
  'add_cross_attention': (False,),
  'quantization_config': (),
  'position_embedding_type': ('absolute',),
  'use_bidirectional_attention': (False,),
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
  'scale_attn_weights': (True,),
  'scale_attn_by_inverse_layer_idx': (False,),
  'reorder_and_upcast_attn': (False,),
  'do_layer_norm_before': (True,),
  '_remove_final_layer_norm': (False,),
  'enable_bias': (True,),
  'layer_norm_elementwise_affine': (True,),
  'sinusoidal_pos_embds': (False,),
}


def read_config(
  directory: str | pathlib.Path,
  *,
  labels: Sequence[str] | None = None,
) -> Config:
  """Reads the `Config` of a Hugging Face directory.

  With `labels` the head is a classifier of these classes, whatever head the
  checkpoint has; of a causal network it reads the last token ('score').

  Raises `Error` for a directory without a readable config.json, an
  architecture outside `FAMILIES`, and any value that is not implemented.
  """
  file = pathlib.Path(directory) / 'config.json'
  if not file.is_file():
    raise Error(
      f'{directory} has no config.json, so it is no model directory.'
      f'{_what_it_is(file.parent)}'
    )
  raw = reading.read(file, schema.CONFIG)
  for field in ('rope_parameters', 'rope_scaling'):
    ropes.check(raw.get(field) or {}, f'{file}: {field}')
  for field in ('text_config', 'vision_config'):
    reading.check(raw.get(field) or {}, schema.CONFIG, f'{file}: {field}')
  kind = raw.get('model_type')
  named = raw.get('architectures') or []
  supported = {name: k for k, f in FAMILIES.items() for name in f.heads}
  architecture = str(named[0]) if named else ''
  if kind not in FAMILIES or (named and supported.get(architecture) != kind):
    raise Error(
      f'{file}: the architecture {architecture or "(none)"} with '
      f'model_type {kind!r} is not supported; supported: '
      f'{", ".join(supported)}.'
    )
  try:
    hf = _auto_config().from_pretrained(
      str(file.parent), trust_remote_code=False
    )
  except Exception as error:  # the type depends on the transformers version
    text = ' '.join(str(error).split()).rstrip('.')
    raise Error(f'{file} is not a valid {kind} config: {text}.') from error
  try:
    config = from_hf(hf, raw, labels=labels)
  except Error as error:
    raise Error(f'{file}: {error}') from error
  except Exception as error:  # for values that the schema allows
    raise Error(
      f'{file} does not fit together: {type(error).__name__}: {error}'
    ) from error
  return images.normalised(file.parent, config)


def _what_it_is(directory: pathlib.Path) -> str:
  """Returns a hint about a directory that is no model directory, or ''."""
  if (directory / 'adapter_config.json').is_file():
    return (
      ' It is an adapter of PEFT: name the model that it was trained on, and '
      'this directory as the adapter.'
    )
  files = sorted(p.name for p in directory.glob('*.gguf'))
  if files:
    return (
      f' It holds {files[0]}: fedjax_llm.models.gguf.convert makes a model '
      'directory of a GGUF file.'
    )
  return ''


def from_hf(
  hf: Any,
  raw: Mapping[str, Any] | None = None,
  *,
  labels: Sequence[str] | None = None,
) -> Config:
  """Converts a transformers config object to a `Config`.

  `raw` is the content of its file, for fields that the object does not keep.
  """
  raw = {} if raw is None else raw
  if hf.model_type not in FAMILIES:  # transformers may change the model_type
    raise Error(
      f'model_type {hf.model_type!r} is not supported; supported: '
      f'{", ".join(FAMILIES)}.'
    )
  kind = FAMILIES[hf.model_type]
  _check_switches(hf, raw, kind)
  if kind.whole is not None:
    return _whole(hf, raw, kind, labels)
  head = _head(hf, kind, labels)
  token = lambda name: getattr(hf, f'{name}_token_id', None)
  eos = token('eos')
  fields = {
    **_common(hf, kind),
    'head': head,
    'bos_id': token('bos'),
    'eos_ids': () if eos is None else tuple(eos if _is_list(eos) else [eos]),
    'pad_id': token('pad'),
    **kind.read(hf, head),
  }
  if head == 'score':
    fields['labels'] = tuple(str(hf.id2label[i]) for i in range(hf.num_labels))
  if labels is not None:
    fields['labels'] = tuple(labels)
  config = Config(family=hf.model_type, **fields)
  _check(config, kind)
  return config


def _check_switches(hf: Any, raw: Mapping[str, Any], kind: Family) -> None:
  for field, allowed in _ONLY.items():
    value = raw.get(field, getattr(hf, field, None))
    if value is None or value in allowed or field in kind.handled:
      continue
    raise Error(
      f'{field}={value!r} is not supported; supported: '
      f'{", ".join(map(repr, (None, *allowed)))}.'
    )


def _whole(
  hf: Any,
  raw: Mapping[str, Any],
  kind: Family,
  labels: Sequence[str] | None,
) -> Config:
  """Reads a family with two towers; the classes may be in its file."""
  for name in ('text_config', 'vision_config'):
    own = getattr(hf, name)
    try:
      _check_switches(own, raw.get(name) or {}, kind)
    except Error as error:
      raise Error(f'{name}: {error}') from error
  if labels is None and 'id2label' in raw:
    labels = [str(hf.id2label[i]) for i in range(hf.num_labels)]
  _check_labels(labels or ())
  assert kind.whole is not None
  return kind.whole(hf, labels)


def _check_labels(labels: Sequence[str]) -> None:
  if len(set(labels)) != len(labels):
    raise Error(f'labels={list(labels)} must name each class once.')


def _head(hf: Any, kind: Family, labels: Sequence[str] | None) -> str:
  named = getattr(hf, 'architectures', None) or list(kind.heads)
  if labels is None:
    return kind.heads[named[0]]
  ways = set(kind.heads.values()) & {'classifier', 'score'}
  if not ways:
    raise Error(
      f'labels={list(labels)} asks for a classifier, which a '
      f'{hf.model_type} model does not have here.'
    )
  _check_labels(labels)
  if len(labels) < 1:
    raise Error(f'labels={list(labels)} must name each class once.')
  return ways.pop()


def _common(hf: Any, kind: Family) -> dict[str, Any]:
  """Reads the fields that all families share, by the family's names."""
  values: dict[str, Any] = {}
  for ours, theirs in kind.fields.items():
    if theirs is None or ours in ('rope_theta', 'partial_rotary'):
      continue
    values[ours] = getattr(hf, theirs, None)
  values['tied'] = bool(values.get('tied'))
  if 'norm_eps' in values:
    values['norm_eps'] = float(values['norm_eps'])
  width, heads = values['hidden_size'], values['num_heads']
  if values.get('num_kv_heads') is None:
    values['num_kv_heads'] = heads
  values.setdefault('intermediate_size', 0)  # where the family reads it
  if values.get('head_dim') is None:
    if width % heads:
      raise Error(
        f'{kind.fields["hidden_size"]}={width} is no multiple of '
        f'{kind.fields["num_heads"]}={heads}.'
      )
    values['head_dim'] = width // heads
  if kind.fields['rope_theta'] is None:
    return values
  rope = hf.rope_parameters
  if 'rope_theta' in rope:  # otherwise per kind of layer: the family reads it
    partial = kind.fields['partial_rotary'] is not None
    values['rope'] = ropes.read(rope, values['max_positions'], partial=partial)
    if partial:
      values['partial_rotary'] = float(rope.get('partial_rotary_factor') or 1.0)
  return values


def _check(config: Config, kind: Family) -> None:
  name = kind.fields
  if config.activation not in layers.ACTIVATIONS:
    raise Error(
      f'{name["activation"]}={config.activation!r} is not supported; '
      f'supported: {", ".join(layers.ACTIVATIONS)}.'
    )
  if name['rope_theta'] is not None:
    size = config.rotary_dim
    if config.head_dim < 2 or size < 2 or size % 2 or size > config.head_dim:
      what = '' if size == config.head_dim else f', of which {size} rotate,'
      raise Error(
        f'head_dim={config.head_dim}{what} is not supported; it must be even.'
      )
    for rope in {config.rope, *config.layer_ropes}:
      if rope.kind == 'longrope' and 2 * len(rope.short) != size:
        raise Error(
          f'rope_parameters.short_factor has {len(rope.short)} numbers for '
          f'{size // 2} frequencies.'
        )
  if config.num_heads % config.num_kv_heads:
    raise Error(
      f'num_attention_heads={config.num_heads} is no multiple of '
      f'num_key_value_heads={config.num_kv_heads}.'
    )


def to_hf(config: Config) -> dict[str, Any]:
  """Returns the config.json of a network, for old and new transformers.

  Raises `Error` if the family's fields cannot describe the network.
  """
  c, kind = config, family(config)
  values: dict[str, Any] = {
    'architectures': [next(a for a, h in kind.heads.items() if h == c.head)],
    'model_type': c.family,
  }
  for ours, theirs in kind.fields.items():
    if theirs is not None and ours != 'rope_theta':
      values[theirs] = getattr(c, ours)
  theta = kind.fields.get('rope_theta')
  if theta is not None:
    values[theta] = c.rope.theta
    values['rope_scaling'] = ropes.write(c.rope)
  eos = list(c.eos_ids)
  if c.image is None and c.vision is None:
    values |= {
      'bos_token_id': c.bos_id,
      'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
      'pad_token_id': c.pad_id,
    }
  values |= kind.write(c)
  if c.head == 'score':
    values['id2label'] = dict(enumerate(c.labels))
    values['label2id'] = {name: i for i, name in enumerate(c.labels)}
  _check_written(config, values)
  return values


def _auto_config() -> Any:
  # Hides the library's advice on import to install an unneeded framework.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  from transformers import AutoConfig

  return AutoConfig


def _check_written(config: Config, values: Mapping[str, Any]) -> None:
  rest = {k: v for k, v in values.items() if k != 'model_type'}
  if rest.get('rope_scaling'):  # transformers changes its arguments
    rest['rope_scaling'] = dict(rest['rope_scaling'])
  again = from_hf(_auto_config().for_model(config.family, **rest), values)
  again = images.like(again, config)  # they have a file of their own
  if again != config:
    differ = [
      name
      for name, x, y in zip(config._fields, config, again, strict=True)
      if x != y
    ]
    raise Error(
      f'A {config.family} config.json cannot say {", ".join(differ)} of this '
      'network.'
    )


def _is_list(x: Any) -> bool:
  return isinstance(x, list | tuple)
