"""Writes the golden adapters: PEFT directories of random LoRA on golden models.

    python tests/golden/make_peft.py [NAME ...]

Needs torch, transformers and peft; the tests that read the files need none of
them. Each directory of `tests/golden/adapters` is an adapter of one of `models`
as PEFT itself saves it, with `logits.npz` beside it: `tokens` [B, T] and
`logits` [B, T, V] of the adapted model, computed in float32.
"""

import pathlib
import shutil
import sys

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = pathlib.Path(__file__).parent

ADAPTERS = {
  'lora': dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj']),
  'rslora': dict(
    r=3, lora_alpha=5, target_modules='all-linear', use_rslora=True
  ),
  # Another rank for one target, another alpha for one module.
  'patterns': dict(
    r=2,
    lora_alpha=4,
    target_modules=['k_proj', 'o_proj', 'down_proj'],
    rank_pattern={'o_proj': 5},
    alpha_pattern={'down_proj': 3, 'layers.1.self_attn.k_proj': 7},
  ),
  # Modules that hold several of ours.
  'gpt2': dict(
    r=3,
    lora_alpha=6,
    target_modules=['c_attn', 'c_proj'],
    fan_in_fan_out=True,
  ),
  'phi3': dict(r=3, lora_alpha=6, target_modules=['qkv_proj', 'gate_up_proj']),
  'gpt_neox': dict(r=3, lora_alpha=6, target_modules=['query_key_value']),
  'roberta_masked_lm': dict(
    r=3,
    lora_alpha=6,
    target_modules=['query', 'value', 'intermediate.dense', 'output.dense'],
    task_type=None,
  ),
  'gemma3': dict(
    r=3, lora_alpha=6, target_modules=['q_proj', 'k_proj', 'down_proj']
  ),
  'dora': dict(
    r=3, lora_alpha=5, target_modules=['q_proj', 'down_proj'], use_dora=True
  ),
}
LLAMA = ('lora', 'rslora', 'patterns', 'dora')


def main() -> None:
  for seed, (name, settings) in enumerate(ADAPTERS.items()):
    if sys.argv[1:] and name not in sys.argv[1:]:
      continue
    torch.manual_seed(seed)
    of = 'llama' if name in LLAMA else name
    base = HERE / 'models' / of
    found = transformers.AutoConfig.from_pretrained(base)
    architecture = found.architectures or ['']
    base = getattr(transformers, architecture[0]).from_pretrained(
      base, dtype=torch.float32
    )
    config = peft.LoraConfig(**{'task_type': 'CAUSAL_LM', **settings})
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
      for key, value in model.named_parameters():
        if 'lora_' in key:
          value.copy_(torch.randn_like(value) * 0.3)
      tokens = torch.randint(3, base.config.vocab_size, (2, 12))
      logits = model(tokens).logits
      plain = model.base_model
      model.disable_adapter_layers()
      change = (logits - plain(tokens).logits).abs().max()
      model.enable_adapter_layers()
    directory = HERE / 'adapters' / name
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config['default'].base_model_name_or_path = f'models/{of}'
    model.save_pretrained(directory)
    (directory / 'README.md').unlink()  # a model card without content
    np.savez_compressed(
      directory / 'logits.npz',
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
    )
    print(f'{name}: the adapter moves the logits by {change:.2f}')


if __name__ == '__main__':
  main()
