"""What transformers and PEFT make of a golden model and an adapter directory.

torch is imported inside of the functions that need it.
"""

import importlib.util
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, models, recipes
from fedjax_llm.adapters import peft
from fedjax_llm.adapters.peft import directory
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families
from fedjax_llm.models.config import Config
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Cohort

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = sorted(p.name for p in (GOLDEN / 'models').iterdir())


def generator(name: str) -> types.ModuleType:
  """A program of tests/golden as a module; most of them import torch."""
  path = GOLDEN / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def saving(config: Config) -> dict[str, Any]:
  """Keywords of `peft.save`."""
  return dict(
    module_name=lambda path, layer: families.hf_module_name(
      path, layer, config, part=True
    ),
    fused=lambda path: families.fused_rows(config, path),
    task_type=TASKS[config.head],
  )


def loading(config: Config) -> dict[str, Any]:
  """Keywords of `peft.load`."""
  return dict(
    path_of=lambda name: families.our_paths(name, config),
    fused=lambda path: families.fused_rows(config, path),
  )


# PEFT has no name for a masked LM: None is a plain model.
TASKS: dict[str, Any] = {
  'lm': 'CAUSAL_LM',
  'masked_lm': None,
  'classifier': None,
  'none': 'FEATURE_EXTRACTION',
}


def random_adapter(config: Config, seed: int = 0) -> dict[str, Any]:
  """Factors on every matrix of the layers, large enough to be seen.

  Ranks differ between attention and MLP, scales also from layer to layer, so
  that the directory needs rank_pattern and alpha_pattern.
  """
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  out: dict[str, Any] = {}
  for group, rank, scale in (('self_attn', 3, 0.7), ('mlp', 2, 1.3)):
    for target, leaves in config_lib.shapes(config)['layers'][group].items():
      if 'kernel' in leaves:
        layers, d, f = leaves['kernel']
        scales = scale + 0.4 * np.arange(layers)
        out.setdefault(group, {})[target] = LowRank(
          draw(layers, d, rank) / d**0.5,
          0.3 * draw(layers, rank, f),
          jnp.asarray(scales, jnp.float32),
        )
  return {'layers': out}


def texts(tokens: np.ndarray, lengths: np.ndarray) -> Batch:
  """Rows padded on the right."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  inside = positions < lengths[:, None]
  return Batch(tokens, inside, inside.astype(np.int32), positions)


def outputs(loaded: Any, base: Any, params: Any, batch: Batch) -> Any:
  """Logits, of a classifier [B, labels], of a model without a head states."""
  hidden = loaded.model.hidden(base, params, batch)
  if loaded.config.head == 'none':
    return hidden
  if loaded.config.head == 'classifier':
    return loaded.model.logits(base, params, hidden[:, 0])
  return loaded.model.logits(base, params, hidden)


def in_peft(
  model: pathlib.Path, adapter: pathlib.Path, batch: Batch
) -> np.ndarray:
  """What PEFT computes with this adapter on this model: as `outputs`."""
  import peft as theirs  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]

  plain = generator('make_training').load(model)
  adapted = theirs.PeftModel.from_pretrained(plain, adapter).eval()
  tokens, segments = (
    torch.tensor(np.asarray(x)).long() for x in (batch.tokens, batch.segments)
  )
  with torch.no_grad():
    out = adapted(input_ids=tokens, attention_mask=segments)
  return (out.logits if 'logits' in out else out.last_hidden_state).numpy()


def relative(found: Any, wanted: Any, batch: Batch) -> float:
  """max |found - wanted| / max |wanted| over tokens that are no padding."""
  found, wanted = np.asarray(found), np.asarray(wanted)
  if wanted.ndim == 3:
    inside = np.asarray(batch.segments)[..., None] > 0
    found, wanted = found * inside, wanted * inside
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def as_peft(gradient: Any, config: Config) -> dict[str, np.ndarray]:
  """A gradient of `peft.load`'s factors under the names of PEFT's tensors.

  Where one module holds several of our targets they had one A, so what they
  say about it adds up; each has its own features of B.
  """
  out: dict[str, np.ndarray] = {}
  for path, node in directory.nodes_of(gradient):
    rows, total = families.fused_rows(config, path) or (..., node.b.shape[-1])
    for layer in range(node.a.shape[0]):
      module = families.hf_module_name(path, layer, config, part=True)
      a, b = (
        out.setdefault(
          f'base_model.model.{module}.lora_{x}.weight',
          np.zeros(shape, np.float32),
        )
        for x, shape in (
          ('A', node.a[layer].T.shape),
          ('B', (total, node.b.shape[1])),
        )
      )
      a += np.asarray(node.a[layer]).T
      b[rows] += np.asarray(node.b[layer]).T
  return out


def federated_round(name: str, of: str) -> tuple[Any, Any, Any]:
  """(model, adapter of PEFT, the same after a round of FedAvg).

  Three clients take two steps each on texts of their own.
  """
  loaded = models.pretrained(GOLDEN / 'models' / of)
  start = peft.load(GOLDEN / 'adapters' / name, **loading(loaded.config))
  shape = (3, 2, 2, 12)  # [K, S, B, T]
  tokens = np.random.default_rng(0).integers(3, 97, shape).astype(np.int32)
  ones = np.ones(shape, np.int32)
  places = np.broadcast_to(np.arange(12, dtype=np.int32), shape)
  cohort = Cohort(
    ids=np.arange(3, dtype=np.int32),
    batches=Batch(tokens, places > 0, ones, places),
    weight=np.array([1.0, 2.0, 3.0], np.float32),
    valid=np.ones(3, bool),
  )
  algorithm = recipes.fed_avg(
    local.causal_lm(loaded.model), local.optimizer('sgd', 0.1)
  )
  state = algorithm.init(jax.random.key(0), start)
  state, _, _ = jax.jit(algorithm.round)(state, cohort, loaded.base)
  return loaded, start, state.params
