"""LoRA adapters as PEFT directories: what other tools load, and back.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. There
A is (R, D) and B is (F, R), one pair a layer, under the name of the module in
the Hugging Face model; here A is [L, D, R] and B is [L, R, F] at a path of our
tree. The two ways of naming belong to a model family, so they are arguments:

    module_name(path, layer) -> name     ('layers', 'self_attn', 'q_proj'), 3
    path_of(name) -> (path, layer)       'model.layers.3.self_attn.q_proj'

`layer` is `None` where a weight is not stacked over layers (an output head).
Where several targets lie in one module, it is named for each of them, `path_of`
gives all of their paths, and a third argument says where they lie:

    fused(path) -> (features, total)    of the module's output, or None

Modules that are trained whole (`Dense` leaves: PEFT's `modules_to_save`) go by
the names of their tensors, which two more arguments translate:

    to_tensors({path of a leaf: our array}) -> {name: array}, and from_tensors
"""

import collections
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.adapters import fused as fused_lib
from fedjax_llm.adapters import peft_dora, peft_whole
from fedjax_llm.adapters.fused import Factors
from fedjax_llm.adapters.peft_whole import FromTensors, ToTensors
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
ModuleName = Callable[[Path, int | None], str]
PathOf = Callable[[str], tuple[Path | tuple[Path, ...], int | None]]
Fused = Callable[[Path], tuple[np.ndarray, int] | None]

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'

# Fields of a config that do not change what the adapter computes, or that are
# read below. Any other field must be unset: its meaning would be lost.
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
# Ways to start that leave the base as it is; the others rewrite it.
_STARTS = (None, True, False, 'gaussian', 'eva', 'orthogonal')


# -------------------------------------------------------------------- save --


def save(
  directory: str | os.PathLike,
  params: Params,
  *,
  module_name: ModuleName,
  fused: Fused = lambda path: None,
  to_tensors: ToTensors | None = None,
  base_model: str,
  task_type: str = 'CAUSAL_LM',
  use_rslora: bool = False,
) -> None:
  """Writes an adapter as a PEFT directory, in float32.

  The scale is kept through alpha = scale * R, or scale * sqrt(R) with
  `use_rslora`; where ranks or alphas differ, the config's `r` and `lora_alpha`
  are the most frequent ones and patterns tell the rest. The directory appears
  at once or not at all; in one that exists the two files are replaced, others
  are left alone, and it never holds files of two adapters that look like one.

  Args:
    directory: where to write; its parents are made.
    params: nested dicts of nodes, each of which says how it leaves as PEFT
      (`nodes.protocol`): as factors, as factors with a magnitude, or whole.
    module_name, fused, to_tensors: see above.
    base_model: name or directory of the base, for who loads the adapter.
    task_type: as PEFT names them.
    use_rslora: how the scale is told, not what it is.

  Raises:
    Error: there is no low-rank adapter in `params`, or something that has no
      place in PEFT's files (residuals, changes that are added to a weight), or
      the disk refuses.
  """
  params, whole = peft_whole.split(params)
  params, magnitudes = peft_dora.split(params)
  modules: dict[str, Factors] = {}
  parts: dict[str, list[Any]] = collections.defaultdict(list)
  for path, node in _nodes(params):
    if node.residual is not None:
      raise Error(
        f'The residual of {"/".join(path)} cannot be told by a PEFT adapter: '
        'fold it into the base and save that, or save without residuals.'
      )
    a, b, scale = (np.asarray(x, np.float32) for x in node[:3])
    place = fused(path)
    for layer in range(a.shape[0]) if a.ndim == 3 else [None]:
      name = module_name(path, layer)
      at = () if layer is None else layer
      one = Factors(a[at], b[at], scale[at])
      if place is not None:
        parts[name].append((place, one))
      elif name in modules:
        raise Error(
          f'{"/".join(path)} is not the only target in {name}, and `fused` '
          'does not say where it lies.'
        )
      else:
        modules[name] = one
  for name, members in parts.items():
    total = members[0][0][1]
    modules[name] = fused_lib.join(
      [(place[0], one) for place, one in members], total
    )
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for name, (a, b, scale) in modules.items():
    tensors[f'{_PREFIX}{name}.lora_A.weight'] = np.ascontiguousarray(a.T)
    tensors[f'{_PREFIX}{name}.lora_B.weight'] = np.ascontiguousarray(b.T)
    ranks[name] = a.shape[1]
    alphas[name] = _alpha(float(scale), _divisor(ranks[name], use_rslora))
  if not tensors:
    raise Error(
      'There is no low-rank adapter to save: the parameters hold none.'
    )

  named = peft_dora.named(magnitudes, module_name, fused)
  tensors |= {f'{_PREFIX}{name}': value for name, value in named.items()}
  named = peft_whole.named(whole, to_tensors)
  tensors |= {f'{_PREFIX}{name}': value for name, value in named.items()}

  rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
  config = {
    'alpha_pattern': {n: x for n, x in alphas.items() if x != alpha},
    'auto_mapping': None,
    'base_model_name_or_path': base_model,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'layers_pattern': None,
    'layers_to_transform': None,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'modules_to_save': peft_whole.modules(named, task_type) or None,
    'peft_type': 'LORA',
    'r': rank,
    'rank_pattern': {n: x for n, x in ranks.items() if x != rank},
    'revision': None,
    'target_modules': _target_modules(ranks),
    'task_type': task_type,
    'use_dora': bool(magnitudes),
    'use_rslora': use_rslora,
  }
  try:
    _write(pathlib.Path(directory), config, tensors)
  except OSError as error:
    raise Error(
      f'{directory}: the adapter could not be saved ({error.strerror}).'
    ) from error


def _nodes(params: Any, path: Path = ()) -> Iterator[tuple[Path, LowRank]]:
  if isinstance(params, LowRank):
    yield path, params
  elif isinstance(params, Mapping):
    for name in sorted(params):
      yield from _nodes(params[name], (*path, name))
  elif params is not None:
    raise Error(
      f'{"/".join(path) or "The tree"} holds {type(params).__name__}, and a '
      'PEFT adapter only tells low-rank nodes and weights that are saved whole.'
    )


# Names that several modules of a network end in.
_COMMON = {'dense', 'c_proj', 'out_proj'}


def _target_modules(names: Iterable[str]) -> list[str] | str:
  """The ends of the names, or a regular expression where they are common.

  >>> _target_modules(['h.0.attn.c_proj', 'h.1.attn.c_proj'])
  'h\\\\.\\\\d+\\\\.attn\\\\.c_proj'
  """
  ends = sorted({name.split('.')[-1] for name in names})
  if not _COMMON & set(ends):
    return ends
  digits = re.compile(r'\\\.\d+\\\.')
  return '|'.join(
    sorted({digits.sub(r'\\.\\d+\\.', re.escape(n)) for n in names})
  )


def _divisor(rank: int, use_rslora: bool) -> float:
  return math.sqrt(rank) if use_rslora else rank


def _alpha(scale: float, divisor: float) -> float:
  """The simplest alpha with float32(alpha / divisor) == scale.

  >>> _alpha(float(np.float32(16 / 3)), 3), _alpha(0.25, 4)
  (16, 1)
  """
  exact = scale * divisor
  short = float(str(np.float32(exact)))
  for alpha in (round(exact), short):
    if np.float32(alpha / divisor) == np.float32(scale):
      return alpha
  return exact


def _most_frequent(values: Mapping[str, Any]) -> Any:
  return collections.Counter(values.values()).most_common(1)[0][0]


def _write(
  directory: pathlib.Path,
  config: Mapping[str, Any],
  tensors: dict[str, np.ndarray],
) -> None:
  import safetensors.numpy

  directory = directory.absolute()
  # A sibling: a rename within one file system is atomic.
  partial = directory.with_name(f'.{directory.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    contents = {
      WEIGHTS: safetensors.numpy.save(tensors, metadata={'format': 'pt'}),
      CONFIG: (json.dumps(config, indent=2) + '\n').encode(),
    }
    for name, content in contents.items():
      with open(partial / name, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if directory.is_dir():
      # Without its config a directory is no adapter, so a kill between these
      # lines leaves none rather than a mixture.
      (directory / CONFIG).unlink(missing_ok=True)
      for name in (WEIGHTS, CONFIG):
        os.replace(partial / name, directory / name)
    else:
      partial.rename(directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


# -------------------------------------------------------------------- load --


def load(
  directory: str | os.PathLike,
  *,
  path_of: PathOf,
  fused: Fused = lambda path: None,
  from_tensors: FromTensors | None = None,
  template: Params | None = None,
) -> Params:
  """Reads a PEFT LoRA directory as nested dicts of `LowRank`, in float32.

  What it saves beside, `modules_to_save`, becomes `Dense` leaves; nodes of a
  DoRA are `Dora`.

  Layers of one target whose ranks differ are padded with zeros to the largest
  rank, which computes the same. With a `template` (say, of `Adapter.init`, or
  its shapes) targets, layers and shapes must be those of the template.

  Raises:
    Error: a file is missing or cannot be read, the adapter is of another kind
      than LoRA or uses something that LoRA and DoRA do not have, a tensor is
      missing, superfluous or of a wrong shape, or it does not fit the template.
  """
  directory = pathlib.Path(directory)
  config = _read_config(directory / CONFIG)
  modules, beside, vectors = _read_modules(
    directory / WEIGHTS,
    config.get('modules_to_save') or (),
    bool(config.get('use_dora')),
  )
  whole = peft_whole.read(beside, from_tensors, directory)
  layers: dict[Any, dict[int | None, Any]] = collections.defaultdict(dict)
  for name, pair in modules.items():
    a, b = pair['A'], pair['B']
    rank = _by_pattern(config, 'rank_pattern', 'r', name)
    if a.ndim != 2 or b.ndim != 2 or {a.shape[0], b.shape[1]} != {rank}:
      raise Error(
        f'{directory / WEIGHTS}: {name} has A {a.shape} and B {b.shape}, but '
        f'{CONFIG} says rank {rank}.'
      )
    alpha = _by_pattern(config, 'alpha_pattern', 'lora_alpha', name)
    scale = alpha / _divisor(rank, config.get('use_rslora', False))
    path, layer = path_of(name)
    path = path if isinstance(path[0], tuple) else (path,)
    if layer in layers[path]:
      raise Error(f'{directory / WEIGHTS}: {name} appears twice.')
    layers[path][layer] = Factors(a.T, b.T, np.float32(scale))

  bare, wanted_whole = peft_whole.split(template)
  bare, wanted_lengths = peft_dora.split(bare)
  wanted = {} if template is None else dict(_nodes(bare))
  layers = _split(layers, fused, wanted)
  params: dict[str, Any] = {}
  for path in sorted(layers):
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = _stack(layers[path], path, layers, directory)
  if template is not None:
    _check_template(params, bare, directory)
    peft_whole.check(whole, wanted_whole, directory)
    if bool(wanted_lengths) != bool(vectors):
      kind = lambda found: 'a DoRA' if found else 'a LoRA without magnitudes'
      raise Error(
        f'{directory} is {kind(vectors)}, and {kind(wanted_lengths)} is needed.'
      )
  params = jax.tree.map(jnp.asarray, params)
  params = peft_dora.put(params, peft_dora.stacked(vectors, path_of, fused))
  return peft_whole.put(params, whole)


def _split(
  layers: Mapping[tuple[Path, ...], Mapping[int | None, Factors]],
  fused: Fused,
  wanted: Mapping[Path, LowRank],
) -> dict[Path, dict[int | None, Factors]]:
  """One entry a target: those of fused modules get their parts.

  A part that the adapter leaves alone, and that is not wanted, gets none.
  """
  found: dict[Path, dict[int | None, Factors]] = {}
  for paths, group in layers.items():
    if len(paths) == 1:
      found[paths[0]] = dict(group)
      continue
    rows = {}
    for path in paths:
      place = fused(path)
      if place is None:
        raise Error(f'`fused` does not say where {"/".join(path)} lies.')
      rows[path] = place[0]
    used = [
      path
      for path in paths
      if path in wanted or any(x.b[:, rows[path]].any() for x in group.values())
    ]
    used = sorted(used or paths)  # as they were joined
    ranks = [wanted[p].a.shape[-1] for p in used if p in wanted]
    parts = fused_lib.split(
      list(group.values()),
      [rows[p] for p in used],
      ranks if len(ranks) == len(used) else None,
    )
    for path, factors in zip(used, parts, strict=True):
      found[path] = dict(zip(group, factors, strict=True))
  return found


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise Error(f'{path} cannot be read ({error.strerror}).') from error
  except ValueError as error:
    raise Error(f'{path} is not valid JSON ({error}).') from error
  if not isinstance(config, dict):
    raise Error(f'{path} must hold a JSON object.')
  if config.get('peft_type') != 'LORA':
    raise Error(
      f"{path}: peft_type is {config.get('peft_type')!r}; supported is 'LORA'."
    )
  for field in ('r', 'lora_alpha'):
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise Error(f'{path}: {field} must be a number, got {value!r}.')
  for field in ('rank_pattern', 'alpha_pattern'):
    if not isinstance(config.get(field) or {}, dict):
      raise Error(f'{path}: {field} must be an object, got {config[field]!r}.')
  start = config.get('init_lora_weights')
  if start not in _STARTS:
    raise Error(
      f'{path}: init_lora_weights is {start!r}, which changes the base model '
      'too; convert the adapter to a plain LoRA first.'
    )
  others = {k: v for k, v in config.items() if k not in _UNDERSTOOD}
  others.pop('init_lora_weights', None)
  if others.get('bias') == 'none':
    del others['bias']
  for field, value in others.items():
    # A configuration block whose entries are all unset says nothing.
    entries = value.values() if isinstance(value, dict) else [value]
    if any(entries):
      raise Error(f'{path}: {field} = {value!r} is not supported.')
  return config


def _read_modules(
  path: pathlib.Path, saved: Iterable[str], dora: bool
) -> tuple[
  dict[str, dict[str, np.ndarray]],
  dict[str, np.ndarray],
  dict[str, np.ndarray],
]:
  """Module name -> {'A': [R, D], 'B': [F, R]}; what is saved beside; and of a
  DoRA the magnitude [F] of every module."""
  import safetensors
  import safetensors.numpy

  if not path.exists() and (path.parent / 'adapter_model.bin').exists():
    raise Error(
      f'{path.parent} holds pickled weights (adapter_model.bin), which could '
      f'run anything: save it as {WEIGHTS}.'
    )
  try:
    tensors = safetensors.numpy.load_file(path)
  except OSError as error:
    raise Error(
      f'{path} cannot be read ({error.strerror or "no such file"}).'
    ) from error
  except safetensors.SafetensorError as error:
    raise Error(f'{path} is not a safetensors file ({error}).') from error
  modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  beside, vectors = {}, {}
  for key in sorted(tensors):
    match = re.fullmatch(re.escape(_PREFIX) + r'(.+)\.lora_([AB])\.weight', key)
    name = key.removeprefix(_PREFIX)
    if match is None and peft_whole.is_saved(name, saved) and name != key:
      beside[name] = tensors[key].astype(np.float32)
      continue
    module, _, last = name.rpartition('.')
    if dora and last == peft_dora.SUFFIX:
      vectors[module] = tensors[key].astype(np.float32)
      continue
    if match is None:
      raise Error(f'{path}: the tensor {key!r} is no part of a plain LoRA.')
    modules[match[1]][match[2]] = tensors[key].astype(np.float32)
  for name, pair in modules.items():
    if len(pair) == 1:
      missing = 'B' if 'A' in pair else 'A'
      raise Error(f'{path}: {_PREFIX}{name}.lora_{missing}.weight is missing.')
  if not modules:
    raise Error(f'{path} holds no tensor of a LoRA.')
  if saved and not beside:
    raise Error(
      f'{path} holds no tensor of modules_to_save={list(saved)}, which '
      f'{CONFIG} names.'
    )
  for name in modules.keys() ^ vectors.keys() if dora else ():
    lacks = 'factors' if name in vectors else 'a magnitude'
    raise Error(f'{path}: {name} lacks {lacks}, which a DoRA has.')
  for name, vector in vectors.items():
    if vector.shape != modules[name]['B'].shape[:1]:
      raise Error(
        f'{path}: the magnitude of {name} is {vector.shape}, but its B is '
        f'{modules[name]["B"].shape}.'
      )
  return modules, beside, vectors


def _by_pattern(
  config: Mapping[str, Any], patterns: str, default: str, name: str
) -> Any:
  """The first pattern that matches the end of a module's name, as in PEFT."""
  for pattern, value in (config.get(patterns) or {}).items():
    try:
      if re.match(rf'(.*\.)?({pattern})$', name):
        return value
    except re.error as error:
      raise Error(
        f'{CONFIG}: {pattern!r} in {patterns} is no regular expression '
        f'({error}).'
      ) from error
  return config[default]


def _stack(
  layers: Mapping[int | None, Any],
  path: Path,
  everything: Mapping[Path, Mapping[int | None, Any]],
  directory: pathlib.Path,
) -> LowRank:
  """One target's layers as one node, ranks padded to the largest."""
  if None in layers:
    return LowRank(*layers[None])
  # As many layers as any target has.
  num = 1 + max(
    k for found in everything.values() for k in found if k is not None
  )
  missing = [layer for layer in range(num) if layer not in layers]
  if missing:
    raise Error(
      f'{directory / WEIGHTS}: {"/".join(path)} has no adapter in the layers '
      f'{missing}; every one of the {num} layers must have one.'
    )
  shapes = {(a.shape[0], b.shape[1]) for a, b, _ in layers.values()}
  if len(shapes) > 1:
    raise Error(
      f'{directory / WEIGHTS}: the layers of {"/".join(path)} differ in '
      f'shape: {sorted(shapes)}.'
    )
  rank = max(a.shape[1] for a, _, _ in layers.values())
  pad = lambda x, axis: np.pad(
    x, [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)]
  )
  ordered = [layers[layer] for layer in range(num)]
  return LowRank(
    a=np.stack([pad(a, 1) for a, _, _ in ordered]),
    b=np.stack([pad(b, 0) for _, b, _ in ordered]),
    scale=np.stack([scale for _, _, scale in ordered]),
  )


def _check_template(
  params: Params, template: Params, directory: pathlib.Path
) -> None:
  found, wanted = dict(_nodes(params)), dict(_nodes(template))
  for paths, what in [
    (wanted.keys() - found.keys(), 'has no adapter for'),
    (found.keys() - wanted.keys(), 'has an adapter too many, for'),
  ]:
    if paths:
      names = ', '.join(sorted('/'.join(path) for path in paths))
      raise Error(f'{directory} {what} {names}.')
  for path, node in found.items():
    for field in ('a', 'b'):
      here = getattr(node, field).shape
      there = tuple(getattr(wanted[path], field).shape)
      if here != there:
        raise Error(
          f'{directory}: {field} of {"/".join(path)} is {here}, and {there} is '
          'needed (layers, then the sides with the rank).'
        )
