"""Reads PEFT's adapter_config.json: allowed fields, ranks and alphas."""

import functools
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fedjax_llm import patterns, reading
from fedjax_llm.types import Error

# Fields that are read, or that do not change what the adapter computes. Any
# other field must be unset, as it would be ignored.
_UNDERSTOOD = frozenset(
  [
    'alpha_pattern', 'auto_mapping', 'base_model_name_or_path',
    'exclude_modules', 'fan_in_fan_out', 'inference_mode', 'layers_pattern',
    'layers_to_transform', 'lora_alpha', 'lora_dropout', 'megatron_config',
    'megatron_core', 'modules_to_save', 'peft_type', 'peft_version',
    'qalora_group_size', 'r',
    'rank_pattern', 'revision', 'target_modules', 'task_type', 'use_dora',
    'use_rslora',
  ]
)  # fmt: skip
# Initialisations that leave the base as it is; the others rewrite it.
_STARTS = (None, True, False, 'gaussian', 'eva', 'orthogonal')

_SWITCH = reading.optional(reading.boolean())
_NAMES = reading.optional(
  reading.text(patterns.MAX_LENGTH),
  reading.listed(reading.text(patterns.MAX_LENGTH)),
)
_SCHEMA: reading.Schema = {
  'alpha_pattern': reading.optional(reading.mapped(reading.number())),
  'exclude_modules': _NAMES,
  'fan_in_fan_out': _SWITCH,
  'inference_mode': _SWITCH,
  'layers_pattern': _NAMES,
  'layers_to_transform': reading.optional(
    reading.integer(0), reading.listed(reading.integer(0))
  ),
  'lora_alpha': reading.number(),
  'lora_dropout': reading.optional(reading.number(0, 1)),
  'modules_to_save': reading.optional(
    reading.listed(reading.text(patterns.MAX_LENGTH))
  ),
  'r': reading.integer(1, 2**20),
  'rank_pattern': reading.optional(reading.mapped(reading.integer(1, 2**20))),
  'target_modules': _NAMES,
  'use_dora': _SWITCH,
  'use_rslora': _SWITCH,
}


def read(path: pathlib.Path, kinds: Sequence[str] = ()) -> dict[str, Any]:
  """Reads and checks the config of a LoRA or a DoRA.

  That of an adapter of the other `kinds` is returned unchecked but for its
  `modules_to_save`.

  Raises:
    Error: the file cannot be read, a field has an invalid or unsupported value,
      or the adapter is of another kind.
  """
  config = reading.read(path)
  kind = config.get('peft_type')
  if kind in kinds:
    reading.check(
      {k: v for k, v in config.items() if k == 'modules_to_save'},
      _SCHEMA,
      str(path),
    )
    return config
  if kind != 'LORA':
    names = ' or '.join(repr(name) for name in ('LORA', *kinds))
    raise Error(
      f'{path}: peft_type is {reading.short(kind)}; supported is {names}.'
    )
  for field in ('r', 'lora_alpha'):
    if field not in config:
      raise Error(f'{path}: there is no {field!r}.')
  reading.check(config, _SCHEMA, str(path))
  start = config.get('init_lora_weights')
  if not (start is None or isinstance(start, bool | str)) or (
    start not in _STARTS
  ):
    raise Error(
      f'{path}: init_lora_weights is {reading.short(start)}, which changes the '
      'base model too; convert the adapter to a plain LoRA first.'
    )
  others = {k: v for k, v in config.items() if k not in _UNDERSTOOD}
  others.pop('init_lora_weights', None)
  if others.get('bias') == 'none':
    del others['bias']
  for field, value in others.items():
    # A block with all entries unset has no effect.
    entries = value.values() if isinstance(value, dict) else [value]
    if any(entries):
      raise Error(f'{path}: {field} = {reading.short(value)} is not supported.')
  return config


def by_pattern(
  config: Mapping[str, Any], field: str, default: str
) -> Callable[[str], Any]:
  """Returns a function from a module's name to its rank or alpha.

  It is the value of the first pattern in `field` that matches the end of the
  name, as in PEFT, else the value of the config's field `default`.

  >>> config = {'r': 4, 'rank_pattern': {'mlp.*': 8}}
  >>> rank = by_pattern(config, 'rank_pattern', 'r')
  >>> rank('layers.0.mlp.up_proj'), rank('layers.0.self_attn.q_proj')
  (8, 4)
  """
  rows = [
    (
      patterns.matcher(
        pattern, f'adapter_config.json: {field}', within=r'(.*\.)?({})'
      ),
      value,
    )
    for pattern, value in (config.get(field) or {}).items()
  ]

  @functools.cache
  def value(name: str) -> Any:
    return next((v for matches, v in rows if matches(name)), config[default])

  return value


def check_layers(
  config: Mapping[str, Any],
  path: Sequence[str],
  layers: Collection[int],
  num_layers: int,
  file: pathlib.Path,
) -> None:
  """Raises an `Error` if a layer lacks an adapter that it should have.

  Layers that `layers_to_transform` or a `target_modules` with layer numbers
  leaves out need none.
  """
  missing = [i for i in range(num_layers) if i not in layers]
  wanted = config.get('layers_to_transform')
  wanted = [wanted] if isinstance(wanted, int) else wanted
  if wanted:
    differ = set(wanted) ^ set(layers)
    if differ:
      raise Error(
        f'{file}: {"/".join(path)} has an adapter in the layers '
        f'{sorted(layers)}, but layers_to_transform is {list(wanted)}.'
      )
    return
  names = config.get('target_modules') or ()
  some = isinstance(names, str) or any(
    part.isdecimal() for name in names for part in name.split('.')
  )
  if missing and not some and not config.get('exclude_modules'):
    raise Error(
      f'{file}: {"/".join(path)} has no adapter in the layers {missing}; every '
      f'one of the {num_layers} layers must have one.'
    )
