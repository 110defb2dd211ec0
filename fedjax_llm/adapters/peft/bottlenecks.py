"""Bottleneck adapters in the files of the library `adapters`, for BERT's kind.

PEFT has none. A directory holds `adapter_config.json` with the entry `config`
and `adapter.safetensors`, where the module that a bottleneck is behind or
beside, without its last name, is the first part of a tensor's name:

    bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight   [R, F]
    bert.encoder.layer.0.output.adapters.NAME.adapter_up.weight       [F, R]

The library computes the same where the norm follows the sum with the residual
(Houlsby's and the parallel form), so other networks and its Pfeiffer form are
refused.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_llm import reading
from fedjax_llm.nodes import Activation, Bottleneck, Parallel
from fedjax_llm.types import Error, Params

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter.safetensors'
FAMILIES = ('bert', 'roberta')
NAMES = {
  'silu': 'swish',
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_new',
  'tanh': 'tanh',
}
_PLACES = {
  ('mlp', 'down_proj'): 'output',
  ('self_attn', 'o_proj'): 'attention',
}
# The entries that must have these values for the same function.
_SAME = {
  'adapter_residual_before_ln': False,
  'cross_adapter': False,
  'inv_adapter': None,
  'leave_out': [],
  'ln_after': False,
  'ln_before': False,
  'original_ln_after': True,
  'original_ln_before': False,
  'phm_layer': False,
  'use_gating': False,
}
_PART = re.compile(
  r'(.+)\.adapters\.([^.]+)\.adapter_(down\.0|up)\.(weight|bias)'
)


def _nodes(params: Params) -> dict[tuple[str, str], tuple[Bottleneck, bool]]:
  """Returns (bottleneck, whether it is parallel) by module of the layers."""
  layers = dict(params).pop('layers', {})
  nodes: dict[tuple[str, str], tuple[Bottleneck, bool]] = {}
  for name, module in _PLACES:
    part = layers.get(name) or {}
    behind = (part.get(module) or {}).get('output')
    if isinstance(behind, Bottleneck):
      nodes[name, module] = behind, False
    if isinstance(part.get('parallel'), Parallel) and name == 'mlp':
      nodes[name, module] = part['parallel'].bottleneck, True
  return nodes


def _check(network: Any) -> None:
  if network.family not in FAMILIES:
    raise Error(
      f'a {network.family} model: the files of the library `adapters` are '
      f'written and read for {" and ".join(FAMILIES)} only.'
    )


def save(
  directory: str | os.PathLike,
  params: Params,
  *,
  module_name: Callable[..., str],
  network: Any,
  base_model: str = '',
  name: str = 'federated',
) -> None:
  """Writes bottlenecks of all layers as an adapter called `name`.

  Args:
    directory: where to write; its parents are created.
    params: the adapter, with bottlenecks in Houlsby's or the parallel form.
    module_name: (path, layer) -> the module's name in transformers.
    network: the config of the model.
    base_model: the name of the base.
    name: of the adapter.

  Raises:
    Error: another family, nodes of other kinds, bottlenecks that differ in
      size, activation or scale, the Pfeiffer form, or an activation without a
      name in the library.
  """
  _check(network)
  nodes = _nodes(params)
  parallel = {beside for _, beside in nodes.values()}
  heads = [node for node, _ in nodes.values()]
  both = len(nodes) == 2 and parallel == {False}
  if not (both or (len(nodes) == 1 and parallel == {True})):
    raise Error(
      'the library `adapters` computes the same with bottlenecks behind '
      'attention and perceptron (form=houlsby) or beside the perceptron '
      '(form=parallel) only.'
    )
  first = heads[0]
  kind = first.activation.value
  scales = {
    1.0 if x.scale is None else float(np.max(np.asarray(x.scale)))
    for x in heads
  }
  sizes = {np.shape(x.down)[-1] for x in heads}
  alike = {x.activation for x in heads} == {first.activation}
  if len(scales) > 1 or len(sizes) > 1 or not alike:
    raise Error(
      'the bottlenecks differ in size, scale or activation: one adapter of '
      'the library `adapters` has one of each.'
    )
  if kind not in NAMES:
    raise Error(f'the library `adapters` has no activation {kind!r}.')
  tensors: dict[str, np.ndarray] = {}
  for path, (node, _) in nodes.items():
    for layer in range(np.shape(node.down)[0]):
      module = module_name(('layers', *path), layer).rpartition('.')[0]
      front = f'{module}.adapters.{name}.adapter'
      parts = {
        'down.0': (node.down, node.down_bias),
        'up': (node.up, node.up_bias),
      }
      for part, (matrix, bias) in parts.items():
        one = np.asarray(matrix, np.float32)[layer].T
        tensors[f'{front}_{part}.weight'] = np.ascontiguousarray(one)
        zeros = np.zeros(len(one), np.float32)
        vector = zeros if bias is None else np.asarray(bias, np.float32)[layer]
        tensors[f'{front}_{part}.bias'] = vector
  config = {
    'config': {
      **_SAME,
      'dropout': 0.0,
      'init_weights': 'bert',
      'is_parallel': parallel == {True},
      'mh_adapter': both,
      'non_linearity': NAMES[kind],
      'output_adapter': True,
      'reduction_factor': network.hidden_size / next(iter(sizes)),
      'residual_before_ln': True,
      'scaling': next(iter(scales)),
    },
    'hidden_size': network.hidden_size,
    'model_name': base_model,
    'model_type': network.family,
    'name': name,
  }
  import safetensors.numpy

  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, folder / WEIGHTS, {'format': 'pt'})
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def load(
  directory: str | os.PathLike,
  *,
  path_of: Callable[[str], Any],
  network: Any,
) -> Params:
  """Reads bottlenecks that `save` or the library `adapters` has written.

  Args:
    directory: the folder.
    path_of: a module's name in transformers -> (paths, layer).
    network: the config of the model.

  Raises:
    Error: another family, a file that cannot be read, an option that changes
      what is computed, a tensor too many or too few.
  """
  _check(network)
  folder = pathlib.Path(directory)
  config: Any = reading.read(folder / CONFIG).get('config')
  if not isinstance(config, Mapping):
    raise Error(f"{folder / CONFIG}: there is no 'config' of a bottleneck.")
  for field, value in _SAME.items():
    if config.get(field, value) != value:
      raise Error(
        f'{folder / CONFIG}: {field} = {reading.short(config[field])} is not '
        'supported.'
      )
  kinds = {theirs: ours for ours, theirs in NAMES.items()}
  kind, scale = config.get('non_linearity'), config.get('scaling', 1.0)
  if kind not in kinds or not isinstance(scale, float | int):
    raise Error(
      f'{folder / CONFIG}: non_linearity = {reading.short(kind)} with scaling '
      f'= {reading.short(scale)} is not supported.'
    )
  import safetensors.numpy

  try:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  except (OSError, ValueError, TypeError) as error:
    raise Error(f'{folder / WEIGHTS} cannot be read ({error}).') from error
  rows: dict[Any, dict[str, dict[int, np.ndarray]]] = {}
  for key, value in sorted(tensors.items()):
    match = _PART.fullmatch(key)
    if match is None:
      raise Error(f'{folder / WEIGHTS}: {key!r} is no part of a bottleneck.')
    paths, layer = path_of(f'{match[1]}.dense')
    field = {'down.0': 'down', 'up': 'up'}[match[3]]
    field += '_bias' if match[4] == 'bias' else ''
    one = value.astype(np.float32)
    rows.setdefault(paths[0][1:], {}).setdefault(field, {})[layer] = (
      one if match[4] == 'bias' else one.T
    )
  layers: dict[str, Any] = {}
  for (name, module), fields in rows.items():
    stacks = {}
    for field in ('down', 'up', 'down_bias', 'up_bias'):
      by_layer = fields.get(field, {})
      if sorted(by_layer) != list(range(network.num_layers)):
        raise Error(
          f'{folder / WEIGHTS}: {name}/{module} has {field} in the layers '
          f'{sorted(by_layer)}, and the model has {network.num_layers}.'
        )
      stacks[field] = jnp.asarray(
        np.stack([by_layer[i] for i in range(network.num_layers)])
      )
    node = Bottleneck(
      **stacks,
      scale=None if scale == 1 else jnp.full(network.num_layers, float(scale)),
      activation=Activation(kinds[kind]),
    )
    if config.get('is_parallel'):
      layers[name] = {'parallel': Parallel(node)}
    else:
      layers[name] = {module: {'output': node}}
  return {'layers': layers}
