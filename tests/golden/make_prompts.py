"""Writes golden adapters without factors: prompts, prefixes and (IA)3 of PEFT.

    python tests/golden/make_prompts.py [NAME ...]

Needs torch, transformers and peft; the tests that read the files need none of
them. Each directory of `tests/golden/adapters` is an adapter of one of `models`
as PEFT itself saves it, with `logits.npz` beside it: `tokens` [B, T] and
`logits` of the adapted model, in float32. Those of an encoder of P-tuning or of
a prefix hold the tensors of the encoder too, which PEFT does not save.
"""

import pathlib
import shutil
import sys

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = pathlib.Path(__file__).parent
LM, CLASSES = 'CAUSAL_LM', 'SEQ_CLS'

ADAPTERS = {
  'prompt_tuning': ('llama', peft.PromptTuningConfig, LM, {}),
  'prompt_tuning_gemma': ('gemma', peft.PromptTuningConfig, LM, {}),
  'prompt_tuning_gpt2': ('gpt2', peft.PromptTuningConfig, LM, {}),
  'prefix_tuning': ('llama', peft.PrefixTuningConfig, LM, {}),
  'prefix_tuning_gpt2': ('gpt2', peft.PrefixTuningConfig, LM, {}),
  'prefix_projection': (
    'llama',
    peft.PrefixTuningConfig,
    LM,
    dict(prefix_projection=True, encoder_hidden_size=6),
  ),
  'p_tuning': (
    'llama', peft.PromptEncoderConfig, LM, dict(encoder_hidden_size=6),
  ),
  'p_tuning_lstm': (
    'llama',
    peft.PromptEncoderConfig,
    LM,
    dict(
      encoder_hidden_size=5,
      encoder_reparameterization_type='LSTM',
      encoder_num_layers=2,
      encoder_dropout=0.0,
    ),
  ),
  'ia3': (
    'llama',
    peft.IA3Config,
    LM,
    dict(
      target_modules=['k_proj', 'v_proj', 'down_proj'],
      feedforward_modules=['down_proj'],
    ),
  ),
  'ia3_gpt2': (
    'gpt2',
    peft.IA3Config,
    LM,
    dict(
      target_modules=['c_attn', 'mlp.c_proj'],
      feedforward_modules=['mlp.c_proj'],
      fan_in_fan_out=True,
    ),
  ),
  'ia3_bert': (
    'bert_classifier',
    peft.IA3Config,
    CLASSES,
    dict(
      target_modules=['key', 'value', 'output.dense'],
      feedforward_modules=['output.dense'],
    ),
  ),
}  # fmt: skip


def main() -> None:
  for seed, (name, (of, kind, task, settings)) in enumerate(ADAPTERS.items()):
    if sys.argv[1:] and name not in sys.argv[1:]:
      continue
    torch.manual_seed(seed)
    folder = HERE / 'models' / of
    auto = transformers.AutoModelForCausalLM
    if task == CLASSES:
      auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(3, base.config.vocab_size, (2, 10))
    with torch.no_grad():
      plain = base.eval()(tokens).logits
    prompt = kind is not peft.IA3Config
    size = dict(num_virtual_tokens=3) if prompt else {}
    config = kind(task_type=task, **size, **settings)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
      for value in model.parameters():
        if value.requires_grad:
          value.add_(torch.randn_like(value) * 0.3)
      logits = model(tokens).logits
    directory = HERE / 'adapters' / name
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config['default'].base_model_name_or_path = f'models/{of}'
    model.save_pretrained(directory)
    (directory / 'README.md').unlink()
    encoder = {}
    if kind is peft.PromptEncoderConfig or settings.get('prefix_projection'):
      encoder = {
        key: value.detach().numpy()
        for key, value in model.prompt_encoder['default'].named_parameters()
      }
    np.savez_compressed(
      directory / 'logits.npz',
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
      **encoder,
    )
    move = (logits[:, -plain.shape[1] :] - plain).abs().max()
    print(f'{name}: {tuple(logits.shape)} moves the logits by {move:.2f}')


if __name__ == '__main__':
  main()
