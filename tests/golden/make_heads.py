"""Writes golden adapters with heads: PEFT's own, of classifiers.

    python tests/golden/make_heads.py

Needs torch, transformers and peft; the tests that read the files need none of
them. Each directory is random LoRA on one of `models` with its head saved whole
beside it, and `logits.npz` as `make_peft.py` has it: `logits` are [B, labels].
"""

import pathlib
import shutil

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = pathlib.Path(__file__).parent

# As PEFT has it: `classifier` is saved of every classifier, and all that ends
# so or is in it.
HEADS = {
  'bert_classifier': dict(
    target_modules=['query', 'value'], modules_to_save=['bert.pooler.dense']
  ),
  'roberta_classifier': dict(target_modules=['query', 'value']),
  'distilbert_classifier': dict(target_modules=['q_lin', 'v_lin']),
}


def main() -> None:
  for seed, (name, settings) in enumerate(HEADS.items()):
    torch.manual_seed(seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
      HERE / 'models' / name, dtype=torch.float32
    )
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type='SEQ_CLS', **settings)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
      for key, value in model.named_parameters():
        if value.requires_grad:
          value.add_(torch.randn_like(value) * (0.3 if 'lora_' in key else 1))
      tokens = torch.randint(3, base.config.vocab_size, (3, 10))
      logits = model(tokens).logits
    directory = HERE / 'adapters' / name
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config['default'].base_model_name_or_path = f'models/{name}'
    model.save_pretrained(directory)
    (directory / 'README.md').unlink()
    np.savez_compressed(
      directory / 'logits.npz',
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
    )
    print(name, logits.numpy().round(2).tolist())


if __name__ == '__main__':
  main()
