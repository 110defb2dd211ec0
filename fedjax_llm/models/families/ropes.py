"""Converts the rope fields of a config.json to `Rope` and back."""

import math
from collections.abc import Mapping
from typing import Any

from fedjax_llm import reading
from fedjax_llm.models.families import schema
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

_ORIGINAL = 'original_max_position_embeddings'
_NEEDS = {
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', _ORIGINAL),
  'yarn': ('factor', _ORIGINAL),
  'longrope': (_ORIGINAL,),
}
_MAY_HAVE = {
  'dynamic': (_ORIGINAL,),  # not used there
  'yarn': (
    *('attention_factor', 'beta_fast', 'beta_slow', 'truncate'),
    *('mscale', 'mscale_all_dim'),
  ),
  'longrope': ('factor', 'attention_factor', 'short_factor', 'long_factor'),
}


def check(values: Mapping[str, Any], where: str) -> None:
  """Checks the numbers of a rotation, or of one for each kind of layer.

  Raises:
    Error: a field has a value outside its range; the message names it.
  """
  if any(isinstance(value, Mapping) for value in values.values()):
    for kind, inner in values.items():
      if not isinstance(inner, Mapping):
        raise Error(f'{where}.{kind} is {inner!r}, but must be an object.')
      reading.check(inner, schema.ROPE, f'{where}.{kind}')
    return
  reading.check(values, schema.ROPE, where)


def read(
  values: Mapping[str, Any], max_positions: int, *, partial: bool = False
) -> Rope:
  """Reads the `Rope` of one `rope_parameters`.

  `partial` is True if the family reads partial_rotary_factor. Raises `Error`
  for a type or a field that is not implemented.
  """
  if not isinstance(values, Mapping):
    raise Error(f'rope_parameters is {values!r}, but must be an object.')
  reading.check(values, schema.ROPE, 'rope_parameters')
  kind = values.get('rope_type', 'default')
  if kind not in _NEEDS:
    raise Error(
      f'rope type {kind!r} is not supported; supported: {", ".join(_NEEDS)}.'
    )
  known = {'rope_type', 'type', 'rope_theta'}
  known |= {*_NEEDS[kind], *_MAY_HAVE.get(kind, ())}
  for name, value in values.items():
    if name in known or value is None:
      continue
    if name == 'partial_rotary_factor' and (partial or value == 1.0):
      continue
    raise Error(
      f'rope_parameters.{name}={value!r} is not supported with rope type '
      f'{kind!r}.'
    )
  for name in ('rope_theta', *_NEEDS[kind]):
    number = values.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float):
      raise Error(f'rope_parameters.{name}={number!r} is no number.')
  rope = Rope(kind, theta=float(values['rope_theta']))
  if kind == 'default':
    return rope
  original = values.get(_ORIGINAL)
  if kind == 'dynamic':
    original = None
  if original is not None:
    rope = rope._replace(original_max_positions=int(original))
  if values.get('factor') is not None:
    rope = rope._replace(factor=float(values['factor']))
  if kind == 'llama3':
    return rope._replace(
      low_freq_factor=float(values['low_freq_factor']),
      high_freq_factor=float(values['high_freq_factor']),
    )
  if kind == 'yarn':
    return rope._replace(
      attention_factor=_yarn_attention(values, rope.factor),
      beta_fast=float(values.get('beta_fast') or 32),
      beta_slow=float(values.get('beta_slow') or 1),
      truncate=bool(values.get('truncate', True)),
    )
  if kind == 'longrope':
    return _read_longrope(values, rope, max_positions)
  return rope


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
  """Returns attention_factor, by default 0.1 ln(factor) + 1.

  arXiv:2309.00071, equation 22.
  """
  attention = values.get('attention_factor')
  if attention is not None:
    return float(attention)

  def temperature(weight):
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

  one, all_dim = values.get('mscale'), values.get('mscale_all_dim')
  if one and all_dim:
    return temperature(one) / temperature(all_dim)
  return temperature(1.0)


def _read_longrope(values, rope: Rope, max_positions: int) -> Rope:
  lists = {}
  for name in ('short_factor', 'long_factor'):
    entries = values.get(name)
    if not isinstance(entries, list | tuple) or not entries:
      raise Error(f'rope_parameters.{name}={entries!r} is no list of numbers.')
    lists[name] = tuple(float(x) for x in entries)
  original = rope.original_max_positions
  factor, attention = values.get('factor'), values.get('attention_factor')
  factor = max_positions / original if factor is None else float(factor)
  if attention is None:
    attention = 1.0
    if factor > 1:
      attention = math.sqrt(1 + math.log(factor) / math.log(original))
  return rope._replace(
    factor=factor,
    attention_factor=float(attention),
    short=lists['short_factor'],
    long=lists['long_factor'],
  )


def write(rope: Rope) -> dict[str, Any] | None:
  """Returns `rope_scaling` of a config.json; None for unscaled rotations."""
  if rope.kind in ('default', 'none'):
    return None
  values: dict[str, Any] = {'rope_type': rope.kind, 'factor': rope.factor}
  if rope.kind in ('llama3', 'yarn', 'longrope'):
    values[_ORIGINAL] = rope.original_max_positions
  if rope.kind == 'llama3':
    values['low_freq_factor'] = rope.low_freq_factor
    values['high_freq_factor'] = rope.high_freq_factor
  if rope.kind in ('yarn', 'longrope'):
    values['attention_factor'] = rope.attention_factor
  if rope.kind == 'yarn':
    values['beta_fast'] = rope.beta_fast
    values['beta_slow'] = rope.beta_slow
    values['truncate'] = rope.truncate
  if rope.kind == 'longrope':
    values['short_factor'] = list(rope.short)
    values['long_factor'] = list(rope.long)
  return values
