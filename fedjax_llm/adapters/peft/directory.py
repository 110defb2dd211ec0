"""Writes adapters as PEFT directories for other tools: `save`.

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
import numpy as np

from fedjax_llm.adapters import picked
from fedjax_llm.adapters.peft import (
  dora as peft_dora,
)
from fedjax_llm.adapters.peft import fused as fused_lib
from fedjax_llm.adapters.peft import kinds as peft_kinds
from fedjax_llm.adapters.peft import (
  whole as peft_whole,
)
from fedjax_llm.adapters.peft.fused import Factors
from fedjax_llm.adapters.peft.whole import ToTensors
from fedjax_llm.nodes import LowRank, protocol
from fedjax_llm.types import Error, Params

Path = tuple[str, ...]
ModuleName = Callable[[Path, int | None], str]
PathOf = Callable[[str], tuple[Path | tuple[Path, ...], int | None]]
Fused = Callable[[Path], tuple[np.ndarray, int] | None]
# (tensors) -> True if they equal an embedding or a head of the base
OfBase = Callable[[Mapping[str, np.ndarray]], bool]

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'


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
  task_type: str | None = 'CAUSAL_LM',
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
  for path, node in nodes_of(params):
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
    tensors[f'{PREFIX}{name}.lora_A.weight'] = np.ascontiguousarray(a.T)
    tensors[f'{PREFIX}{name}.lora_B.weight'] = np.ascontiguousarray(b.T)
    ranks[name] = a.shape[1]
    alphas[name] = _alpha(float(scale), divisor(ranks[name], use_rslora))
  if not tensors:
    raise Error(
      'There is no low-rank adapter to save: the parameters hold none.'
    )

  named = peft_dora.named(magnitudes, module_name, fused)
  tensors |= {f'{PREFIX}{name}': value for name, value in named.items()}
  named = peft_whole.named(whole, to_tensors)
  tensors |= {f'{PREFIX}{name}': value for name, value in named.items()}

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


def nodes_of(params: Any, path: Path = ()) -> Iterator[tuple[Path, LowRank]]:
  """Yields (path, node) of low-rank nodes; raises `Error` for other leaves."""
  if isinstance(params, LowRank):
    yield path, params
  elif isinstance(params, Mapping):
    for name in sorted(params):
      yield from nodes_of(params[name], (*path, name))
  elif params is not None:
    raise Error(
      f'{"/".join(path) or "The tree"} holds {type(params).__name__}, and a '
      'PEFT adapter holds only low-rank nodes and weights that are saved whole.'
    )


# Last names that several modules of one network share.
_COMMON = {'dense', 'c_proj', 'out_proj'}
# First names of the towers of a dual encoder, which share their last names.
_TOWERS = {'text_model', 'vision_model'}


def _target_modules(names: Iterable[str]) -> list[str] | str:
  """Returns the last names, or a regular expression if they are ambiguous.

  >>> _target_modules(['h.0.attn.c_proj', 'h.1.attn.c_proj'])
  'h\\\\.\\\\d+\\\\.attn\\\\.c_proj'
  """
  names = list(names)
  ends = sorted({name.split('.')[-1] for name in names})
  towers = _TOWERS & {name.split('.')[0] for name in names}
  if not _COMMON & set(ends) and not towers:
    return ends
  digits = re.compile(r'\\\.\d+\\\.')
  return '|'.join(
    sorted({digits.sub(r'\\.\\d+\\.', re.escape(n)) for n in names})
  )


def divisor(rank: int, use_rslora: bool) -> float:
  """Returns the number that divides alpha: scale = alpha / divisor."""
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
