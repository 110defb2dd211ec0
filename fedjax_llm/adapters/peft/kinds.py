"""PEFT directories of adapters without factors: prompts, prefixes, (IA)3.

Prompts have one tensor, `prompt_embeddings`:

    PROMPT_TUNING, P_TUNING   [P, D], the rows of the prompt; those of a model
                              that scales its embeddings are scaled already
    PREFIX_TUNING             [P, 2 L F], for each layer the keys and the values

and (IA)3 has one for each module, `NAME.ia3_l`: [F, 1] where it scales the
outputs, [1, D] where it scales the inputs (the config's `feedforward_modules`).
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import patterns, reading
from fedjax_llm.adapters.peft import whole as peft_whole
from fedjax_llm.nodes import Prefix, Prompt, Scaled, is_node, protocol
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
PROMPTS = ('PROMPT_TUNING', 'P_TUNING', 'PREFIX_TUNING')
KINDS = (*PROMPTS, 'IA3')
ROWS = 'prompt_embeddings'


def front(kind: str) -> str:
  """Returns the first part of the names of tensors, before the module's.

  PEFT wraps the network only where it changes modules.
  """
  return 'base_model.' if kind in PROMPTS else 'base_model.model.'


def split(
  config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the tensors of the adapter, and by module those saved whole."""
  own, beside = {}, {}
  first = front(config['peft_type'])
  for key, value in tensors.items():
    name = key.removeprefix(first)
    saved = config.get('modules_to_save') or ()
    if name != key and peft_whole.is_saved(name, saved):
      beside[name] = value.astype(np.float32)
    else:
      own[key] = value
  return own, beside


class Contents(NamedTuple):
  """The tensors and the config fields of one kind."""

  kind: str
  tensors: dict[str, np.ndarray]
  fields: dict[str, Any]


def forms(params: Params) -> dict[Path, protocol.Peft]:
  """Returns the forms of all nodes whose kind is not LoRA, by path.

  Raises:
    Error: a node has no form in PEFT; two kinds in one adapter, or two prompts.

  >>> list(forms({'inputs': Prompt(jnp.ones((2, 3)))}))
  [('inputs',)]
  """
  result: dict[Path, protocol.Peft] = {}
  kinds: dict[str, str] = {}
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_node):
    names = tuple(getattr(key, 'key', key) for key in path)
    if protocol.replacement(leaf)[0]:
      continue
    try:
      form = protocol.peft(leaf)
    except Error as error:
      raise Error(f'{"/".join(names)}: {error}') from error
    kind = 'LORA' if form is None else form.kind
    kinds.setdefault(kind, '/'.join(names))
    if form is not None and kind != 'LORA':
      result[names] = form
  if len(kinds) > 1:
    both = ' and '.join(f'{at} ({kind})' for kind, at in kinds.items())
    raise Error(
      f'a PEFT directory holds one kind of adapter, and this one has {both}.'
    )
  return result


def _prompt(form: protocol.Peft, network: Any) -> Contents:
  values = form.values
  fields = {
    **form.fields,
    'num_attention_heads': network.num_heads,
    'num_layers': network.num_layers,
    'num_transformer_submodules': 1,
    'token_dim': network.hidden_size,
  }
  if form.kind == 'PREFIX_TUNING':
    pair = (np.asarray(values.keys), np.asarray(values.values))
    both = np.stack(pair, 1).astype(np.float32)  # [L, 2, P, F]
    layers, _, length, features = both.shape
    rows = np.moveaxis(both, 2, 0).reshape(length, 2 * layers * features)
    fields['token_dim'] = features
    fields['num_attention_heads'] = network.num_kv_heads
  else:
    rows = np.asarray(values, np.float32) * np.float32(network.embedding_scale)
    length = len(rows)
  fields['num_virtual_tokens'] = length
  return Contents(form.kind, {ROWS: np.ascontiguousarray(rows)}, fields)


def prompt_refusal(network: Any) -> str | None:
  """Returns the reason why PEFT computes otherwise with prompts of a network.

  >>> prompt_refusal(None) is None
  True
  """
  if network is None or network.causal:
    return None
  return (
    f'a {network.family} model is an encoder: PEFT reads its label from the '
    'first row of the prompt, and this project from the first token of the '
    'text, so there are no PEFT files for it.'
  )


def refusal(
  made: Mapping[Path, protocol.Peft], network: Any = None
) -> str | None:
  """Returns the reason why these forms have no PEFT files, or None.

  >>> refusal(forms({'q': Scaled(jnp.ones(2))}))
  "q: PEFT scales inputs and outputs only: put (IA)3 at 'input' or 'output'."
  """
  for path, form in sorted(made.items()):
    where = '/'.join(path)
    if form.kind != 'IA3' and path[0] not in ('inputs', 'layers', 'generator'):
      return f'{where}: PEFT has no prompts of a part of a network.'
    if form.kind == 'IA3' and path[-1] not in ('input', 'output'):
      return (
        f'{where}: PEFT scales inputs and outputs only: put (IA)3 at '
        "'input' or 'output'."
      )
    if form.kind == 'IA3' or network is None:
      continue
    if reason := prompt_refusal(network):
      return f'{where}: {reason}'
    if len(made) > 1:
      return (
        'a PEFT directory holds one prompt, and this adapter has several: '
        f'{", ".join("/".join(path) for path in sorted(made))}.'
      )
  return None


def contents(
  made: Mapping[Path, protocol.Peft],
  *,
  module_name: Callable[..., str],
  fused: Callable[[Path], Any],
  network: Any,
) -> Contents:
  """Returns the tensors and fields of `forms`; `network` is the model's config.

  Raises:
    Error: prompts without the config of a network, or of an encoder; a module
      that is scaled on both sides.
  """
  if reason := refusal(made, network):
    raise Error(reason)
  kinds = {form.kind for form in made.values()}
  if kinds != {'IA3'}:
    if network is None:
      raise Error('a prompt is written with the config of its `network`.')
    return _prompt(next(iter(made.values())), network)
  tensors: dict[str, np.ndarray] = {}
  inside: set[str] = set()
  for (*path, place), form in made.items():
    values = np.asarray(form.values, np.float32)
    rows = None if place == 'input' else fused(tuple(path))
    for layer in range(len(values)) if values.ndim == 2 else [None]:
      one = values if layer is None else values[layer]
      name = module_name(tuple(path), layer)
      key = f'base_model.model.{name}.ia3_l'
      if place == 'input':
        inside.add(name)
        one = one[None]
        if key in tensors and not np.array_equal(tensors[key], one):
          raise Error(f'{name} has two vectors, and PEFT wants one.')
        tensors[key] = one
        continue
      if rows is None:
        if key in tensors:
          raise Error(f'{name} has two vectors, and PEFT wants one.')
        tensors[key] = one[:, None]
        continue
      features, total = rows
      whole = tensors.setdefault(key, np.ones((total, 1), np.float32))
      whole[features, 0] = one
  named = sorted(
    k.removeprefix('base_model.model.').removesuffix('.ia3_l') for k in tensors
  )
  fields = {
    'exclude_modules': None,
    'fan_in_fan_out': False,
    'feedforward_modules': sorted(inside),
    'init_ia3_weights': True,
    'target_modules': named,
  }
  return Contents('IA3', tensors, fields)


# -------------------------------------------------------------------- read --

_SCHEMA: reading.Schema = {
  'num_virtual_tokens': reading.optional(reading.integer(1, 2**20)),
  'num_layers': reading.optional(reading.integer(1, 2**16)),
  'token_dim': reading.optional(reading.integer(1, 2**24)),
}


def read(
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  file: pathlib.Path,
  path_of: Callable[[str], Any],
  fused: Callable[[Path], Any],
  num_layers: int | None,
  network: Any,
) -> Params:
  """Returns the nodes in the tensors of one of `KINDS`.

  Raises:
    Error: a tensor is missing, superfluous or of a wrong shape, or the model is
      one whose prompts PEFT computes otherwise.
  """
  reading.check(dict(config), _SCHEMA, str(file.parent / 'adapter_config.json'))
  if config['peft_type'] == 'IA3':
    return _scales(config, tensors, file, path_of, fused, num_layers)
  if reason := prompt_refusal(network):
    raise Error(f'{file.parent}: {reason}')
  if set(tensors) != {ROWS}:
    raise Error(
      f'{file}: a prompt has one tensor, {ROWS}, and this file has '
      f'{", ".join(sorted(tensors)) or "none"}.'
    )
  rows = np.asarray(tensors[ROWS], np.float32)
  length = config.get('num_virtual_tokens')
  if rows.ndim != 2 or length not in (None, len(rows)):
    raise Error(
      f'{file}: {ROWS} is {list(rows.shape)}, and adapter_config.json says '
      f'num_virtual_tokens={length}.'
    )
  if config['peft_type'] != 'PREFIX_TUNING':
    scale = 1.0 if network is None else network.embedding_scale
    return {'inputs': Prompt(jnp.asarray(rows / np.float32(scale)))}
  layers = num_layers or config.get('num_layers')
  if not layers or rows.shape[1] % (2 * layers):
    raise Error(
      f'{file}: {ROWS} is {list(rows.shape)}, which is no keys and values of '
      f'{layers} layers.'
    )
  both = np.moveaxis(rows.reshape(len(rows), layers, 2, -1), 0, 2)
  node = Prefix(jnp.asarray(both[:, 0]), jnp.asarray(both[:, 1]))
  return {'layers': {'self_attn': {'prefix': node}}}


def _scales(config, tensors, file, path_of, fused, num_layers) -> Params:
  feedforward = config.get('feedforward_modules') or ()
  matches = lambda name: _ends(name, feedforward)
  if isinstance(feedforward, str):
    where = 'adapter_config.json: feedforward_modules'
    matches = patterns.matcher(feedforward, where)
  rows: dict[Path, dict[int | None, np.ndarray]] = {}
  for key in sorted(tensors):
    name = key.removeprefix('base_model.model.').removesuffix('.ia3_l')
    value = np.asarray(tensors[key], np.float32)
    sides = value.shape if value.ndim == 2 else (0, 0)
    if key != f'base_model.model.{name}.ia3_l' or 1 not in sides:
      raise Error(
        f'{file}: the tensor {key!r} {list(value.shape)} is no part of (IA)3.'
      )
    inside = matches(name)
    if sides[0 if inside else 1] != 1:
      raise Error(
        f'{file}: {name} is {list(value.shape)}, which contradicts '
        'feedforward_modules.'
      )
    paths, layer = path_of(name)
    paths = paths if isinstance(paths[0], tuple) else (paths,)
    for path in paths:
      part = None if inside or len(paths) == 1 else fused(path)
      one = value.ravel() if part is None else value.ravel()[part[0]]
      place = 'input' if inside else 'output'
      rows.setdefault((*path, place), {})[layer] = one
  params: dict[str, Any] = {}
  for path, by_layer in sorted(rows.items()):
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    if None in by_layer:
      scale = by_layer[None]
    else:
      ones = np.ones_like(next(iter(by_layer.values())))
      number = num_layers or 1 + max(k for k in by_layer if k is not None)
      scale = np.stack([by_layer.get(i, ones) for i in range(number)])
    node[path[-1]] = Scaled(jnp.asarray(scale))
  if not params:
    raise Error(f'{file} holds no tensor of (IA)3.')
  return params


def _ends(name: str, ends: Any) -> bool:
  """Returns True if a module's name is one of `ends` or has it as its end."""
  return any(name == end or name.endswith(f'.{end}') for end in ends)
