"""Maps the tensors of checkpoints to leaves of the base, and module names.

"Theirs" is the name in transformers, "ours" the path in the base.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.models import config as config_lib
from fedjax_llm.models.config import Config
from fedjax_llm.models.families import clip, encoders, gemma, gpt, images, llama
from fedjax_llm.models.families.tables import LEAVES, Family, Module, Path
from fedjax_llm.types import Error

FAMILIES: Mapping[str, Family] = {
  'llama': llama.LLAMA,
  'mistral': llama.MISTRAL,
  'qwen2': llama.QWEN2,
  'qwen3': llama.QWEN3,
  'smollm3': llama.SMOLLM3,
  'phi3': llama.PHI3,
  'gemma': gemma.GEMMA,
  'gemma2': gemma.GEMMA2,
  'gemma3_text': gemma.GEMMA3,
  'vaultgemma': gemma.VAULTGEMMA,
  'gpt2': gpt.GPT2,
  'opt': gpt.OPT,
  'gpt_neox': gpt.GPT_NEOX,
  'phi': gpt.PHI,
  'bert': encoders.BERT,
  'roberta': encoders.ROBERTA,
  'distilbert': encoders.DISTILBERT,
  'mpnet': encoders.MPNET,
  'vit': images.VIT,
  'dinov2': images.DINOV2,
  'clip': clip.CLIP,
}

# The head of causal networks that score whole texts, the same in all families.
_SCORE = Module(('score',), 'score', 'linear')

# The family of a user's own network: tensors have the names of its base.
OWN = 'own'


def family(config: Config) -> Family:
  if config.family not in FAMILIES:
    raise Error(
      f'The family {config.family!r} is not supported; supported: '
      f'{", ".join(FAMILIES)}.'
    )
  return FAMILIES[config.family]


# ----------------------------------------------------------------- modules --


def _node(tree: Any, path: Path) -> Any:
  for name in path:
    if name not in tree:
      return None
    tree = tree[name]
  return tree


def modules(config: Config) -> tuple[Module, ...]:
  """Returns the modules of this network, in the order of the computation."""
  tree, kind = config_lib.shapes(config), family(config)
  everything = (*kind.modules, _SCORE)
  table = [m for m in everything if _node(tree, m.path) is not None]
  if config.head == 'none':  # then the body is the whole model
    table = [m._replace(name=m.name.removeprefix(kind.prefix)) for m in table]
  return tuple(table)


def hf_module_name(
  path: str | Sequence[str],
  layer: int | None,
  config: Config,
  *,
  part: bool = False,
) -> str:
  """Returns the name of the module at `path` in transformers (and PEFT).

  `path` is a tuple or 'layers/self_attn/q_proj'; `layer` is None outside the
  layers. With `part` the path may also be one of several in one fused module:
  `fused_rows` returns its features.

  >>> from fedjax_llm import models
  >>> config = models.random().config
  >>> hf_module_name('layers/self_attn/q_proj', 3, config)
  'model.layers.3.self_attn.q_proj'
  """
  wanted = tuple(path.split('/') if isinstance(path, str) else path)
  if config.family == OWN:
    return '.'.join((*wanted, *([] if layer is None else [str(layer)])))
  for module in modules(config):
    if module.path != wanted:
      continue
    name = module.name.format(layer)
    if module.fused and not part:
      raise Error(f'{"/".join(wanted)} is only a part of the module {name}.')
    return name
  have = ', '.join('/'.join(m.path) for m in modules(config))
  raise Error(f'{"/".join(wanted)} is no module of the model; it has {have}.')


def our_paths(name: str, config: Config) -> tuple[tuple[Path, ...], int | None]:
  """Returns (paths, layer) of a module name; several paths if it is fused.

  The inverse of `hf_module_name`.
  """
  by_name: dict[str, list[Path]] = {}
  for module in modules(config):
    by_name.setdefault(module.name, []).append(module.path)
  for theirs, paths in by_name.items():
    stacked, num = 'layers' in paths[0], config_lib.num_layers(config, paths[0])
    for layer in range(num) if stacked else (None,):
      if theirs.format(layer) == name:
        return tuple(paths), layer
  raise Error(
    f'{name} is no module of this {config.family} model of '
    f'{config.num_layers} layers.'
  )


def our_path(name: str, config: Config) -> tuple[Path, int | None]:
  """Returns (path, layer) of a name that is exactly one of our modules.

  >>> from fedjax_llm import models
  >>> our_path('model.layers.1.mlp.up_proj', models.random().config)
  (('layers', 'mlp', 'up_proj'), 1)
  """
  (path, *others), layer = our_paths(name, config)
  if others:
    paths = ', '.join('/'.join(p) for p in (path, *others))
    raise Error(f'{name} is not one module of ours but {paths}.')
  return path, layer


def fused_rows(config: Config, path: Path) -> tuple[np.ndarray, int] | None:
  """Returns (features of `path` in its fused module, features of the module).

  None if the module at `path` is not part of a fused one.
  """
  table = () if config.family == OWN else modules(config)
  module = next((m for m in table if m.path == path), None)
  if module is None or not module.fused:
    return None
  group = [m.path for m in table if m.name == module.name]
  tree = config_lib.shapes(config)
  sizes = [_node(tree, p)['kernel'][-1] for p in group]
  index, total = group.index(path), sum(sizes)
  if module.fused == 'stacked':
    start = sum(sizes[:index])
    return np.arange(start, start + sizes[index]), total
  heads = np.arange(total).reshape(config.num_heads, len(group), -1)
  return heads[:, index].ravel(), total


# ----------------------------------------------------------------- tensors --


class Tensor(NamedTuple):
  """A tensor of a checkpoint, or a part of one, and its place in the base.

  `rows` are the features of a fused tensor that belong to `path` (None: all).
  """

  name: str  # 'model.layers.3.self_attn.q_proj.weight'
  path: Path  # ('layers', 'self_attn', 'q_proj', 'kernel')
  layer: int | None  # row of the stacked leaf
  transpose: bool  # torch stores matrices as (out, in), the base as (in, out)
  shape: tuple[int, ...]  # in the checkpoint
  rows: Any = None
  flat: Any = None  # its shape as a matrix, where the checkpoint has more axes


def tensors(config: Config) -> Iterator[Tensor]:
  """Yields every tensor that a checkpoint of this network holds."""
  tree = config_lib.shapes(config)
  for module in modules(config):
    node = _node(tree, module.path)
    stacked = 'layers' in module.path
    num = config_lib.num_layers(config, module.path)
    fused = fused_rows(config, module.path)
    for ours, theirs in LEAVES[module.kind]:
      if ours not in node:
        continue
      shape = node[ours][1:] if stacked else node[ours]
      if fused is not None:
        shape = (*shape[:-1], fused[1])
      transpose = ours == 'kernel' and module.kind != 'conv1d'
      shape = shape[::-1] if transpose else shape
      flat = None
      if ours == 'kernel' and module.kind == 'conv':
        image = (config.vision or config).image
        assert image is not None
        sides = (image.channels, image.patch, image.patch)
        flat, shape = shape, (shape[0], *sides)
      elif module.kind in ('rows', 'vector'):
        flat, shape = shape, (1, *shape)[2 * (module.kind == 'vector') :]
      for layer in range(num) if stacked else (None,):
        yield Tensor(
          module.name.format(layer) + (f'.{theirs}' if theirs else ''),
          (*module.path, ours),
          layer,
          transpose,
          shape,
          None if fused is None else fused[0],
          flat,
        )


def ours(tensor: Tensor, value: np.ndarray) -> np.ndarray:
  """Returns our leaf (of one layer) from the checkpoint's tensor."""
  if tensor.flat is not None:
    value = value.reshape(tensor.flat)
  value = value.T if tensor.transpose else value
  return value if tensor.rows is None else value[..., tensor.rows]


def put(tensor: Tensor, leaf: np.ndarray, weights: dict[str, np.ndarray]):
  """Writes our leaf (of one layer) into the checkpoint's tensors."""
  if tensor.rows is None:
    leaf = leaf.T if tensor.transpose else leaf
    if tensor.flat is not None:
      leaf = leaf.reshape(tensor.shape)
    weights[tensor.name] = leaf
    return
  if tensor.name not in weights:
    weights[tensor.name] = np.zeros(tensor.shape, leaf.dtype)
  whole = weights[tensor.name]
  (whole.T if tensor.transpose else whole)[..., tensor.rows] = leaf


def spellings(name: str, config: Config) -> list[str]:
  """Returns all names of a tensor in checkpoints of this family."""
  kind = family(config)
  names = [name]
  for pattern, other in kind.spellings:
    if re.search(pattern, name):
      names.append(re.sub(pattern, other, name))
  for known in tuple(names):
    if known.startswith(kind.prefix):
      names.append(known.removeprefix(kind.prefix))
    else:
      names.append(kind.prefix + known)
  return names


def copies(config: Config) -> dict[str, str]:
  """Returns tensors that a checkpoint may repeat: copy's name -> original."""
  if config.head not in ('lm', 'masked_lm'):
    return {}
  named = {t.path: t.name for t in tensors(config)}
  repeated = {}
  for module in family(config).modules:
    if module.path != ('lm_head',):
      continue
    if config.tied:
      repeated[f'{module.name}.weight'] = named['embed_tokens', 'embedding']
    if config.head_bias:
      repeated[f'{module.name}.bias'] = named['lm_head', 'bias']
  known = set(named.values())
  return {
    spelling: first
    for name, first in repeated.items()
    if name not in known
    for spelling in spellings(name, config)
  }


def says_nothing(name: str, config: Config) -> bool:
  """Returns True for a tensor of a checkpoint that may be ignored.

  A network with scores ignores the output matrix of the language model from
  which it starts.
  """
  if config.head == 'score':
    for module in family(config).modules:
      if module.path == ('lm_head',):
        for leaf in ('weight', 'bias'):
          if name in spellings(f'{module.name}.{leaf}', config):
            return True
  return re.fullmatch(family(config).unread, name) is not None
