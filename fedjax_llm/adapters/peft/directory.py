"""Writes LoRA adapters as PEFT directories for other tools, and reads them.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. There
A is (R, D) and B is (F, R), one pair a layer, under the name of the module in
the Hugging Face model; here A is [L, D, R] and B is [L, R, F] at a path of our
tree. The two ways of naming belong to a model family, so they are arguments:

    module_name(path, layer) -> name     ('layers', 'self_attn', 'q_proj'), 3
    path_of(name) -> (path, layer)       'model.layers.3.self_attn.q_proj'

`layer` is `None` where a weight is not stacked over layers (an output head).
Where one module holds several targets, `module_name` returns it for each of
them, `path_of` returns all of their paths, and a third argument returns the
features of each:

    fused(path) -> (features, total)    of the module's output, or None

Modules that are trained whole (`Dense` leaves: PEFT's `modules_to_save`) are
saved under the names of their tensors, which two more arguments translate:

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

from fedjax_llm.adapters import picked
from fedjax_llm.adapters.peft import (
  config as peft_config,
)
from fedjax_llm.adapters.peft import (
  dora as peft_dora,
)
from fedjax_llm.adapters.peft import fused as fused_lib
from fedjax_llm.adapters.peft import kinds as peft_kinds
from fedjax_llm.adapters.peft import (
  whole as peft_whole,
)
from fedjax_llm.adapters.peft.fused import Factors
from fedjax_llm.adapters.peft.whole import FromTensors, ToTensors
from fedjax_llm.nodes import LowRank, protocol
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
ModuleName = Callable[[Path, int | None], str]
PathOf = Callable[[str], tuple[Path | tuple[Path, ...], int | None]]
Fused = Callable[[Path], tuple[np.ndarray, int] | None]
# (tensors) -> True if they equal an embedding or a head of the base
OfBase = Callable[[Mapping[str, np.ndarray]], bool]

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'

# -------------------------------------------------------------------- save --


def refusal(params: Params, network: Any = None) -> str | None:
  """Returns the reason why PEFT has no form for a node of an adapter, or None.

  `network` is the config of the model: PEFT reads labels of encoders from their
  prompts.

  >>> from fedjax_llm.nodes import Bottleneck
  >>> print(refusal({'q': Bottleneck(np.ones((3, 2)), np.ones((2, 3)))}))
  q: PEFT has no bottleneck adapters, so there are no files for it.
  """
  try:
    made = peft_kinds.forms(protocol.plain(params, keep='peft'))
    if made:
      return peft_kinds.refusal(made, network)
    rest, whole = peft_whole.split(protocol.plain(params))
    rest, _ = peft_dora.split(rest)
  except Error as error:
    return str(error)
  leaves = jax.tree.leaves_with_path(rest, is_leaf=protocol.is_node)
  if not any(isinstance(leaf, LowRank) for _, leaf in leaves):
    paths = [*whole, *(tuple(k.key for k in path) for path, _ in leaves)]
    if paths:
      return (
        f'{"/".join(min(paths))} is trained alone: PEFT has no files for '
        "weights of the base without an adapter's factors beside them."
      )
  return None


def kind(params: Params) -> str:
  """Returns PEFT's name of the kind of an adapter, its `peft_type`.

  Raises:
    Error: a node has no form in PEFT, or the adapter has nodes of two kinds.

  >>> from fedjax_llm.nodes import Prompt
  >>> kind({'inputs': Prompt(np.ones((2, 3)))}), kind({})
  ('PROMPT_TUNING', 'LORA')
  """
  made = peft_kinds.forms(protocol.plain(params, keep='peft'))
  return next((form.kind for form in made.values()), 'LORA')


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
  lora_dropout: float = 0.0,
  network: Any = None,
) -> None:
  """Writes an adapter as a PEFT directory, in float32.

  Prompts, prefixes and (IA)3 have files of their own kind (`peft.kinds`).

  The scale is saved as alpha = scale * R, or scale * sqrt(R) with `use_rslora`;
  where ranks or alphas differ, the config's `r` and `lora_alpha` are the most
  frequent ones and its patterns hold the others. The directory is created
  atomically; in an existing one the two files are replaced, others are kept,
  and an interrupted save never leaves a mixture of two adapters.

  Args:
    directory: where to write; its parents are created.
    params: nested dicts of nodes; each node's `peft` method (`nodes.protocol`)
      returns its form: factors, factors with a magnitude, or a whole weight.
    module_name, fused, to_tensors: see above.
    base_model: name or directory of the base, saved for loading the adapter.
    task_type: PEFT's name of the task.
    use_rslora: how alpha encodes the scale; the scale itself does not change.
    lora_dropout: the rate that the adapter was trained with, for the config.
    network: the config of the model, for prompts and prefixes.

  Raises:
    Error: `params` holds no low-rank adapter, or a node without a form in PEFT
      (residuals, changes that are added to a weight), or the directory cannot
      be written.
  """
  made = peft_kinds.forms(protocol.plain(params, keep='peft'))
  chosen = picked.of(params)  # of `layers`; None: all
  if chosen is not None:
    chosen = np.asarray(chosen)
    below = {k: v for k, v in params['layers'].items() if k != picked.NAME}
    params = {**params, 'layers': below}
  params, whole = peft_whole.split(protocol.plain(params))
  if made:
    of = peft_kinds.contents(
      made, module_name=module_name, fused=fused, network=network
    )
    named = peft_whole.named(whole, to_tensors)
    config = {
      'auto_mapping': None,
      'base_model_name_or_path': base_model,
      'inference_mode': True,
      'modules_to_save': peft_whole.modules(named, task_type) or None,
      'peft_type': of.kind,
      'revision': None,
      'task_type': task_type,
      **of.fields,
    }
    front = peft_kinds.front(of.kind)
    beside = {f'{front}{name}': value for name, value in named.items()}
    _written(directory, dict(sorted(config.items())), of.tensors | beside)
    return
  params, magnitudes = peft_dora.split(params)
  modules: dict[str, Factors] = {}
  parts: dict[str, list[Any]] = collections.defaultdict(list)
  for path, node in _nodes(params):
    if node.residual is not None:
      raise Error(
        f'The residual of {"/".join(path)} has no place in a PEFT adapter: '
        'fold it into the base and save that, or save without residuals.'
      )
    a, b, scale = (np.asarray(x, np.float32) for x in node[:3])
    place = fused(path)
    for at in range(a.shape[0]) if a.ndim == 3 else [()]:
      layer = at if isinstance(at, int) else None
      if layer is not None and chosen is not None:
        layer = int(chosen[layer])
      name = module_name(path, layer)
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
    'layers_to_transform': None if chosen is None else chosen.tolist(),
    'lora_alpha': alpha,
    'lora_dropout': lora_dropout,
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
  _written(directory, config, tensors)


def _written(
  directory: str | os.PathLike,
  config: Mapping[str, Any],
  tensors: dict[str, np.ndarray],
) -> None:
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
      'PEFT adapter holds only low-rank nodes and weights that are saved whole.'
    )


# Last names that several modules of one network share.
_COMMON = {'dense', 'c_proj', 'out_proj'}


def _target_modules(names: Iterable[str]) -> list[str] | str:
  """Returns the last names, or a regular expression if they are ambiguous.

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
  """Returns the simplest alpha with float32(alpha / divisor) == scale.

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
      # A directory without its config is no adapter: an interruption between
      # these lines leaves no adapter rather than a mixture.
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
  of_base: OfBase | None = None,
  num_layers: int | None = None,
  template: Params | None = None,
  network: Any = None,
) -> Params:
  """Reads a PEFT LoRA directory as nested dicts of `LowRank`, in float32.

  Prompts, prefixes and (IA)3 become nodes `Prompt`, `Prefix` and `Scaled`; they
  need `network`, the config of the model, and ignore a template.

  Modules of `modules_to_save` become `Dense` leaves; nodes of a DoRA are
  `Dora`.

  If the layers of a target differ in rank, they are padded with zeros to the
  largest rank, which does not change the result; layers that the config leaves
  out get zeros. `num_layers` is that of the model, by default as many as any
  target has. PEFT may add an embedding or a head of the base to an adapter: it
  is left out where `of_base(tensors)` is True. With a `template` (for example
  the result of `Adapter.init`, or its shapes) targets, layers and shapes must
  be those of the template.

  Raises:
    Error: a file is missing or cannot be read, the adapter is neither LoRA nor
      DoRA or uses an unsupported option, a tensor is missing, superfluous or of
      a wrong shape, or the adapter does not fit the template.
  """
  directory = pathlib.Path(directory)
  config = peft_config.read(directory / CONFIG, peft_kinds.KINDS)
  if config['peft_type'] in peft_kinds.KINDS:
    tensors = _tensors(directory / WEIGHTS)
    own, beside = peft_kinds.split(config, tensors)
    params = peft_kinds.read(
      config,
      own,
      file=directory / WEIGHTS,
      path_of=path_of,
      fused=fused,
      num_layers=num_layers,
      network=network,
    )
    return peft_whole.put(
      params, peft_whole.read(beside, from_tensors, directory)
    )
  rank_of = peft_config.by_pattern(config, 'rank_pattern', 'r')
  alpha_of = peft_config.by_pattern(config, 'alpha_pattern', 'lora_alpha')
  modules, beside, vectors = _read_modules(
    directory / WEIGHTS,
    config.get('modules_to_save') or (),
    bool(config.get('use_dora')),
    of_base,
  )
  whole = peft_whole.read(beside, from_tensors, directory)
  layers: dict[Any, dict[int | None, Any]] = collections.defaultdict(dict)
  for name, pair in modules.items():
    a, b = pair['A'], pair['B']
    rank = rank_of(name)
    if a.ndim != 2 or b.ndim != 2 or {a.shape[0], b.shape[1]} != {rank}:
      raise Error(
        f'{directory / WEIGHTS}: {name} has A {a.shape} and B {b.shape}, but '
        f'{CONFIG} says rank {rank}.'
      )
    scale = alpha_of(name) / _divisor(rank, config.get('use_rslora', False))
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
  known = [k for rows in layers.values() for k in rows if k is not None]
  num = num_layers or 1 + max(known, default=0)
  if vectors and any(
    None not in rows and len(rows) < num for rows in layers.values()
  ):
    raise Error(f'{directory}: a DoRA of some layers only is not supported.')
  for path in sorted(layers):
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = _stack(layers[path], path, num, config, directory)
  if template is not None:
    _check_template(params, bare, directory)
    peft_whole.check(whole, wanted_whole, directory)
    if bool(wanted_lengths) != bool(vectors):
      kind = lambda has: 'a DoRA' if has else 'a LoRA without magnitudes'
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
  """Returns the factors of each target, splitting those of fused modules.

  A part with factors of zero that `wanted` does not name gets no entry.
  """
  targets: dict[Path, dict[int | None, Factors]] = {}
  for paths, group in layers.items():
    if len(paths) == 1:
      targets[paths[0]] = dict(group)
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
    used = sorted(used or paths)  # the order in which they were joined
    ranks = [wanted[p].a.shape[-1] for p in used if p in wanted]
    parts = fused_lib.split(
      list(group.values()),
      [rows[p] for p in used],
      ranks if len(ranks) == len(used) else None,
    )
    for path, factors in zip(used, parts, strict=True):
      targets[path] = dict(zip(group, factors, strict=True))
  return targets


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file, which are finite floating point numbers."""
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
  except (safetensors.SafetensorError, TypeError, ValueError) as error:
    raise Error(f'{path} is not a safetensors file ({error}).') from error
  for key, tensor in tensors.items():
    if tensor.dtype.kind != 'f' and tensor.dtype.name != 'bfloat16':
      raise Error(f'{path}: {key} is stored as {tensor.dtype.name}.')
    if not np.isfinite(tensor.astype(np.float32)).all():
      raise Error(f'{path}: {key} holds values that are not finite.')
  return tensors


def _read_modules(
  path: pathlib.Path,
  saved: Iterable[str],
  dora: bool,
  of_base: OfBase | None,
) -> tuple[
  dict[str, dict[str, np.ndarray]],
  dict[str, np.ndarray],
  dict[str, np.ndarray],
]:
  """Reads the tensors of an adapter file.

  Returns the factors {'A': [R, D], 'B': [F, R]} by module, the tensors of
  modules that are saved whole, and for a DoRA the magnitude [F] by module.
  """
  tensors = _tensors(path)
  modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  beside, vectors = {}, {}
  for key in sorted(tensors):
    match = re.fullmatch(re.escape(_PREFIX) + r'(.+)\.lora_([AB])\.weight', key)
    name = key.removeprefix(_PREFIX)
    if match is None and peft_whole.is_saved(name, saved) and name != key:
      beside[name] = tensors[key].astype(np.float32)
      continue
    if match is None and of_base is not None and name != key:
      plain = name.replace('.base_layer.', '.')
      if of_base({plain: tensors[key]}):
        continue  # PEFT may add embeddings of the base to an adapter
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


def _stack(
  layers: Mapping[int | None, Any],
  path: Path,
  num_layers: int,
  config: Mapping[str, Any],
  directory: pathlib.Path,
) -> LowRank:
  """Stacks one target's layers into one node, padding to the largest rank.

  A layer without an adapter gets factors of zeros.
  """
  if None in layers:
    return LowRank(*layers[None])
  rows = {layer: x for layer, x in layers.items() if layer is not None}
  peft_config.check_layers(config, path, rows, num_layers, directory / WEIGHTS)
  shapes = {(a.shape[0], b.shape[1]) for a, b, _ in rows.values()}
  if len(shapes) > 1:
    raise Error(
      f'{directory / WEIGHTS}: the layers of {"/".join(path)} differ in '
      f'shape: {sorted(shapes)}.'
    )
  ((d, f),) = shapes
  rank = max(a.shape[1] for a, _, _ in rows.values())
  some_scale = next(iter(rows.values())).scale
  a = np.zeros((num_layers, d, rank), np.float32)
  b = np.zeros((num_layers, rank, f), np.float32)
  scale = np.full(num_layers, some_scale, np.float32)
  for layer, one in rows.items():
    a[layer, :, : one.a.shape[1]] = one.a
    b[layer, : one.b.shape[0]] = one.b
    scale[layer] = one.scale
  return LowRank(a, b, scale)


def _check_template(
  params: Params, template: Params, directory: pathlib.Path
) -> None:
  nodes, wanted = dict(_nodes(params)), dict(_nodes(template))
  for paths, what in [
    (wanted.keys() - nodes.keys(), 'has no adapter for'),
    (nodes.keys() - wanted.keys(), 'has an adapter too many, for'),
  ]:
    if paths:
      names = ', '.join(sorted('/'.join(path) for path in paths))
      raise Error(f'{directory} {what} {names}.')
  for path, node in nodes.items():
    for field in ('a', 'b'):
      here = getattr(node, field).shape
      there = tuple(getattr(wanted[path], field).shape)
      if here != there:
        raise Error(
          f'{directory}: {field} of {"/".join(path)} is {here}, and {there} is '
          'needed (layers, then the sides with the rank).'
        )
