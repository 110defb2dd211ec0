"""Types for model families: names of modules, fields of configs.

"Ours" is the name in this project, "theirs" the name in transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_llm.models.config import Config
from fedjax_llm.types import Error

Path = tuple[str, ...]


class Module(NamedTuple):
  """One module: our path, their name ('{}' is the layer), and its kind.

  If one of their modules holds several of ours, `fused` is the order of their
  features: one module after the other ('stacked') or head by head ('by_head'),
  in the order of the table.
  """

  path: Path
  name: str
  kind: str  # a key of LEAVES
  fused: str = ''


# Our leaf and their tensor. Torch stores matrices of 'linear' as (out, in).
LEAVES = {
  'linear': (('kernel', 'weight'), ('bias', 'bias')),
  'conv1d': (('kernel', 'weight'), ('bias', 'bias')),
  'norm': (('scale', 'weight'), ('bias', 'bias')),
  'embedding': (('embedding', 'weight'),),
  'weight': (('kernel', 'weight'),),
  'bias': (('bias', 'bias'),),
  # Of images: a convolution over patches, (out, channels, patch, patch); tables
  # of rows, (1, rows, width), or one row, (width,); layer scales; one number.
  'conv': (('kernel', 'weight'), ('bias', 'bias')),
  'rows': (('embedding', ''),),
  'vector': (('embedding', ''),),
  'gain': (('gain', 'lambda1'),),
  'scalar': (('value', ''),),
}

# Our field and theirs. A family replaces the names that differ, and sets fields
# that it lacks to None.
FIELDS: Mapping[str, str | None] = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'max_positions': 'max_position_embeddings',
  'activation': 'hidden_act',
  'norm_eps': 'rms_norm_eps',
  'tied': 'tie_word_embeddings',
  'partial_rotary': None,
  'rope_theta': 'rope_theta',  # None: no rotation
}


class Family(NamedTuple):
  """One model family: its architectures, modules and config fields.

  `heads` maps an architecture to our kind of head, the default first.
  `read(hf, head)` returns `Config` fields that are not in `fields`,
  `write(config)` such fields of config.json.
  """

  heads: Mapping[str, str]
  modules: tuple[Module, ...]
  read: Callable[[Any, str], dict[str, Any]]
  write: Callable[[Config], dict[str, Any]]
  fields: Mapping[str, str | None] = FIELDS
  handled: frozenset[str] = frozenset()  # switches that `read` understands
  prefix: str = 'model.'  # of the body; checkpoints of the body alone lack it
  spellings: tuple[tuple[str, str], ...] = ()  # (pattern, older name)
  unread: str = r'.*rotary_emb\.inv_freq'  # names of tensors that are ignored
  # Reads the whole `Config` of a family with two towers: (hf, labels).
  whole: Callable[[Any, Any], Config] | None = None


def layer_modules(
  prefix: str, table: Mapping[str, tuple[str, str]]
) -> tuple[Module, ...]:
  """Returns the modules of a layer from {our path: (their name, kind)}.

  A kind may be followed by a space and the value of `Module.fused`.
  """
  modules = []
  for path, (name, kind) in table.items():
    kind, _, fused = kind.partition(' ')
    path = ('layers', *path.split('/'))
    modules.append(Module(path, f'{prefix}.{{}}.{name}', kind, fused))
  return tuple(modules)


# ------------------------------------------------------------------ windows --

WINDOW_TYPES = ('full_attention', 'sliding_attention')


def read_windows(hf: Any) -> tuple[int, ...]:
  """Reads `Config.windows` from layer_types and sliding_window."""
  window = hf.sliding_window or 0
  known = dict(zip(WINDOW_TYPES, (0, window)))
  types = hf.layer_types
  for kind in types:
    if kind not in known:
      raise Error(
        f'layer_types has {kind!r}, which is not supported; supported: '
        f'{", ".join(WINDOW_TYPES)}.'
      )
  if len(types) != hf.num_hidden_layers:
    raise Error(
      f'layer_types has {len(types)} entries for {hf.num_hidden_layers} layers.'
    )
  if 'sliding_attention' in types and not window:
    raise Error('layer_types has sliding_attention but sliding_window is null.')
  windows = tuple(known[kind] for kind in types)
  return windows if any(windows) else ()


def write_windows(config: Config) -> dict[str, Any]:
  windows = config.windows or (0,) * config.num_layers
  return {
    'sliding_window': max(windows) or None,
    'layer_types': [WINDOW_TYPES[bool(w)] for w in windows],
  }


def read_one_window(hf: Any) -> tuple[int, ...]:
  """Reads `Config.windows` of a family with one window for all layers."""
  window = hf.sliding_window
  types = set(getattr(hf, 'layer_types', None) or ())
  if len(types) > 1 or (types and types != {WINDOW_TYPES[bool(window)]}):
    raise Error(
      f'layer_types={sorted(types)} is not supported for {hf.model_type} with '
      f'sliding_window={window}: its layers are all alike.'
    )
  return (window,) * hf.num_hidden_layers if window else ()
