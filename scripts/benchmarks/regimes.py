"""The workloads of the comparison: the same numbers for every framework.

A workload is a folder: `model/` and `adapter/` (Hugging Face and PEFT
directories, random weights from one seed), `data.npz` (tokens [K, S, B, T] and
the loss mask) and `work.json`. The second half of every row has a loss, like a
reply.
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np


class Regime(NamedTuple):
  clients: int  # K
  batch: int  # B
  length: int  # T
  steps: int  # S
  shape: dict[str, Any] | str  # a random model, or a directory
  rank: int = 8
  alpha: float = 16.0


_TINY = {
  'vocab_size': 8192,
  'hidden_size': 256,
  'intermediate_size': 688,
  'num_layers': 4,
  'num_heads': 4,
  'num_kv_heads': 4,
}
_SMALL = {
  'vocab_size': 2048,
  'hidden_size': 64,
  'intermediate_size': 172,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 4,
}
# Shapes are fixed: no regime is tuned to win.
REGIMES = {
  'overhead': Regime(64, 1, 64, 4, _SMALL),
  'many': Regime(64, 1, 64, 4, _TINY),
  'middle': Regime(16, 4, 128, 4, _TINY),
  'long': Regime(4, 8, 512, 2, _TINY),
  'smollm2': Regime(8, 2, 96, 2, 'SmolLM2-135M-Instruct'),
}


def make(
  name: str,
  folder: pathlib.Path,
  seed: int = 0,
  regime: Regime | None = None,
) -> None:
  """Writes the workload `name`, or `regime` under it, unless it is there.

  Raises:
    FileNotFoundError: its model has not been fetched.
  """
  import jax

  from fedjax_llm import adapters, models
  from fedjax_llm.adapters import peft
  from fedjax_llm.models import families

  if (folder / 'work.json').exists():
    return
  shutil.rmtree(folder, ignore_errors=True)  # of a start that was stopped
  regime = regime or REGIMES[name]
  rng = np.random.default_rng(seed)
  if isinstance(regime.shape, str):
    import os

    cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
    directory = pathlib.Path(cache).expanduser() / regime.shape
    if not directory.exists():
      raise FileNotFoundError(
        f'{name} is left out: {directory} is missing, see scripts/fetch_smollm2'
      )
    folder.mkdir(parents=True)
    loaded = models.pretrained(str(directory))
    (folder / 'model').symlink_to(directory)
  else:
    folder.mkdir(parents=True)
    positions = max(512, regime.length)
    loaded = models.random(seed=seed, max_positions=positions, **regime.shape)
    models.save(folder / 'model', loaded.config, loaded.base)
  key = jax.random.key(seed)
  params = adapters.lora(regime.rank, regime.alpha).init(key, loaded.base)
  # B starts away from zero, so that the first step already moves A.
  params = jax.tree.map(
    lambda x: x if np.any(x) else rng.normal(0, 0.02, x.shape).astype('f4'),
    params,
  )
  peft.save(
    folder / 'adapter',
    params,
    module_name=lambda path, layer: families.hf_module_name(
      path, layer, loaded.config, part=True
    ),
    fused=lambda path: families.fused_rows(loaded.config, path),
    base_model=str(folder / 'model'),
  )
  shape = (regime.clients, regime.steps, regime.batch, regime.length)
  tokens = rng.integers(0, loaded.config.vocab_size, shape).astype(np.int32)
  mask = np.broadcast_to(np.arange(regime.length) >= regime.length // 2, shape)
  np.savez(folder / 'data.npz', tokens=tokens, mask=mask)
  work = {'name': name, 'seed': seed, **regime._asdict()}
  (folder / 'work.json').write_text(json.dumps(work, indent=2) + '\n')
