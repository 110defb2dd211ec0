"""Reads a PEFT directory as nodes of an adapter: `load`.

`adapters.peft.directory` describes the files and the names of modules.
"""

import collections
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from fedjax_llm.adapters.peft.directory import (
  CONFIG,
  PREFIX,
  WEIGHTS,
  Fused,
  OfBase,
  Path,
  PathOf,
  divisor,
  nodes_of,
)
from fedjax_llm.adapters.peft.fused import Factors
from fedjax_llm.adapters.peft.whole import FromTensors
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error, Params


def load(
  directory: str | os.PathLike,
  *,
  path_of: PathOf,
  fused: Fused = lambda path: None,
  from_tensors: FromTensors | None = None,
  of_base: OfBase | None = None,
  num_layers: int | Callable[[Path], int] | None = None,
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
  out get zeros. `num_layers` is that of the model, or a function of a target's
  path; by default as many as any target has. PEFT may add an embedding or a
  head of the base to an adapter: it is left out where `of_base(tensors)` is
  True. With a `template` (for example
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
      num_layers=None if callable(num_layers) else num_layers,
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
    scale = alpha_of(name) / divisor(rank, config.get('use_rslora', False))
    path, layer = path_of(name)
    path = path if isinstance(path[0], tuple) else (path,)
    if layer in layers[path]:
      raise Error(f'{directory / WEIGHTS}: {name} appears twice.')
    layers[path][layer] = Factors(a.T, b.T, np.float32(scale))

  bare, wanted_whole = peft_whole.split(template)
  bare, wanted_lengths = peft_dora.split(bare)
  wanted = {} if template is None else dict(nodes_of(bare))
  layers = _split(layers, fused, wanted)
  params: dict[str, Any] = {}
  known = [k for rows in layers.values() for k in rows if k is not None]
  of: Any = num_layers or 1 + max(known, default=0)

  def num(path: Path) -> int:
    return of(path) if callable(of) else of  # type: ignore

  if vectors and any(
    None not in rows and len(rows) < num(path) for path, rows in layers.items()
  ):
    raise Error(f'{directory}: a DoRA of some layers only is not supported.')
  for path in sorted(layers):
    node = params
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = _stack(layers[path], path, num(path), config, directory)
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
    match = re.fullmatch(re.escape(PREFIX) + r'(.+)\.lora_([AB])\.weight', key)
    name = key.removeprefix(PREFIX)
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
      raise Error(f'{path}: {PREFIX}{name}.lora_{missing}.weight is missing.')
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
  nodes, wanted = dict(nodes_of(params)), dict(nodes_of(template))
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
