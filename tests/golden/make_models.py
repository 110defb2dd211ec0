"""Writes the golden models: tiny random networks and the logits of torch.

    python tests/golden/make_models.py [NAME ...]

Needs torch and transformers; the tests that read the files need neither. Each
directory of `tests/golden/models` is an ordinary Hugging Face model in
bfloat16 with `logits.npz` beside it: `tokens` [B, T], `lengths` [B] (rows are
padded on the right) and `logits` [B, T, V], computed in float32.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / 'models'
NUM_TOKENS = 24

TINY = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=2,
)

LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)

MODELS = {
  'llama': ('LlamaForCausalLM', dict(TINY)),
  'llama_linear': (
    'LlamaForCausalLM',
    dict(
      TINY,
      rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=2.5),
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'llama3_tied': (
    'LlamaForCausalLM',
    dict(TINY, rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=16),
  ),
  'mistral': (
    'MistralForCausalLM',
    dict(TINY, sliding_window=7, head_dim=16),
  ),
  'qwen2': ('Qwen2ForCausalLM', dict(TINY, tie_word_embeddings=True)),
  'qwen2_windows': (
    'Qwen2ForCausalLM',
    dict(TINY, use_sliding_window=True, sliding_window=5, max_window_layers=1),
  ),
}


def randomise(model, generator):
  """Weights large enough that every part of the block moves the logits."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if 'norm' in name and name.endswith('weight'):
        parameter.copy_(1 + 0.3 * noise)
      elif parameter.ndim == 1:
        parameter.copy_(0.3 * noise)
      else:
        parameter.copy_(noise / parameter.shape[1] ** 0.5)


def make(name):
  architecture, settings = MODELS[name]
  family = getattr(transformers, architecture)
  config = family.config_class(**settings)
  generator = torch.Generator().manual_seed(sum(name.encode()))
  model = family(config).eval()
  randomise(model, generator)
  model = model.to(torch.bfloat16)
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory)
  # Read back, not cast back: the rope frequencies were rounded as well.
  model = family.from_pretrained(directory, dtype=torch.float32).eval()

  lengths = np.array([NUM_TOKENS, NUM_TOKENS - 9], np.int32)
  tokens = torch.randint(
    3, config.vocab_size, (2, NUM_TOKENS), generator=generator
  )
  mask = torch.arange(NUM_TOKENS)[None] < torch.tensor(lengths)[:, None]
  with torch.no_grad():
    logits = model(tokens, attention_mask=mask.long()).logits
  np.savez_compressed(
    directory / 'logits.npz',
    tokens=tokens.numpy().astype(np.int32),
    lengths=lengths,
    logits=logits.numpy() * mask[..., None].numpy(),
  )
  (directory / 'generation_config.json').unlink(missing_ok=True)


if __name__ == '__main__':
  for name in sys.argv[1:] or MODELS:
    make(name)
