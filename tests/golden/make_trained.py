"""Writes what PEFT makes of adapters that a federated round has trained.

    PYTHONPATH=. python tests/golden/make_trained.py

Needs torch, transformers and peft beside jax; the tests that read the files
need only jax. Every directory of `tests/golden/trained` is an adapter that
PEFT made (`adapters`), after one round of FedAvg and our export, with
`logits.npz` beside it: `tokens` [B, T] and `logits` [B, T, V] by PEFT.
"""

import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from references_peft import (  # noqa: E402
  federated_round,
  in_peft,
  saving,
  texts,
)

from fedjax_llm.adapters import peft  # noqa: E402

ADAPTERS = {'lora': 'llama', 'gpt2': 'gpt2'}


def main() -> None:
  for name, of in ADAPTERS.items():
    directory = HERE / 'trained' / name
    shutil.rmtree(directory, ignore_errors=True)
    loaded, _, params = federated_round(name, of)
    peft.save(
      directory, params, base_model=f'models/{of}', **saving(loaded.config)
    )
    batch = texts(np.arange(3, 27).reshape(2, 12), np.array([12, 12]))
    logits = in_peft(HERE / 'models' / of, directory, batch)
    tokens = np.asarray(batch.tokens, np.int32)
    np.savez_compressed(directory / 'logits.npz', tokens=tokens, logits=logits)
    print(name, np.abs(logits).max())


if __name__ == '__main__':
  main()
