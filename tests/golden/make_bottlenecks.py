"""Writes golden bottleneck adapters as the library `adapters` saves them.

    python tests/golden/make_bottlenecks.py

Needs torch and adapters; the tests that read the files need neither. Each
directory of `tests/golden/adapters` is an adapter of one of `models`, with
`logits.npz` beside it: `tokens` [B, T] and `logits` of the adapted model.
"""

import importlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

# The folder beside this file has the same name, so it is named by a string.
adapters: Any = importlib.import_module('adapters')

HERE = pathlib.Path(__file__).parent
CONFIGS = {
  'bottleneck_houlsby': adapters.DoubleSeqBnConfig(
    reduction_factor=8, non_linearity='swish'
  ),
  'bottleneck_parallel': adapters.ParBnConfig(
    reduction_factor=8, non_linearity='relu', scaling=4.0
  ),
}


def main() -> None:
  for seed, (name, config) in enumerate(CONFIGS.items()):
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      HERE / 'models' / 'bert_classifier', dtype=torch.float32
    ).eval()
    tokens = torch.randint(3, model.config.vocab_size, (2, 10))
    with torch.no_grad():
      plain = model(tokens).logits
    adapters.init(model)
    model.add_adapter('federated', config=config)
    model.set_active_adapters('federated')
    model.eval()
    with torch.no_grad():
      for key, value in model.named_parameters():
        if '.adapters.' in key:
          value.add_(torch.randn_like(value) * 0.3)
      logits = model(tokens).logits
    folder = HERE / 'adapters' / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_adapter(folder, 'federated', use_safetensors=True)
    for head in ('head_config.json', 'model_head.safetensors'):
      (folder / head).unlink()  # the base's own
    file = folder / 'adapter_config.json'
    config_of = json.loads(file.read_text())
    config_of['model_name'] = 'models/bert_classifier'
    file.write_text(json.dumps(config_of, indent=2, sort_keys=True))
    np.savez_compressed(
      folder / 'logits.npz',
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
    )
    print(f'{name}: {float((logits - plain).abs().max()):.2f}')


if __name__ == '__main__':
  main()
