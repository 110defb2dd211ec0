"""Writes the golden models: tiny random networks and the logits of torch.

    python tests/golden/make_models.py [NAME ...]

Needs torch and transformers; the tests that read the files need neither. Each
directory of `tests/golden/models` is an ordinary Hugging Face model in
bfloat16 with `logits.npz` beside it: `tokens` [B, T], `lengths` [B] (rows are
padded on the right) and `logits`, computed in float32: [B, T, V], of a
classifier [B, labels], of a model without a head its states [B, T, D].
"""

import pathlib
import shutil
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
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

YARN = dict(
  rope_type='yarn',
  rope_theta=500.0,
  factor=4.0,
  original_max_position_embeddings=16,
)

LONGROPE = dict(
  rope_type='longrope',
  rope_theta=500.0,
  short_factor=[1.0, 1.25, 1.5],
  long_factor=[1.0, 2.0, 4.0],
  original_max_position_embeddings=32,
  partial_rotary_factor=0.75,
)

GEMMA2 = dict(
  TINY,
  num_hidden_layers=3,
  head_dim=16,
  tie_word_embeddings=True,
  sliding_window=5,
  query_pre_attn_scalar=24,
)

GPT2 = dict(
  vocab_size=97,
  n_embd=32,
  n_layer=2,
  n_head=4,
  n_positions=32,
  bos_token_id=1,
  eos_token_id=2,
)

# Families without groups of heads.
PLAIN = {k: v for k, v in TINY.items() if k != 'num_key_value_heads'}

BERT = dict(
  PLAIN,
  max_position_embeddings=32,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=0,
)
ROBERTA = dict(BERT, pad_token_id=2, max_position_embeddings=30)
DISTILBERT = dict(
  vocab_size=97,
  dim=32,
  hidden_dim=48,
  n_layers=2,
  n_heads=4,
  max_position_embeddings=32,
  pad_token_id=0,
)
MPNET = dict(ROBERTA, pad_token_id=1)
CLASSES = {'id2label': {0: 'sad', 1: 'neutral', 2: 'glad'}}

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
  'llama_dynamic': (
    'LlamaForCausalLM',
    dict(
      TINY,
      rope_parameters=dict(rope_type='dynamic', rope_theta=500.0, factor=2.0),
    ),
  ),
  'llama_yarn': ('LlamaForCausalLM', dict(TINY, rope_parameters=YARN)),
  'qwen3': ('Qwen3ForCausalLM', dict(TINY, head_dim=16, attention_bias=True)),
  'smollm3': (
    'SmolLM3ForCausalLM',
    dict(
      TINY,
      num_hidden_layers=3,
      no_rope_layers=[1, 0, 1],
      use_sliding_window=True,
      sliding_window=5,
      pad_token_id=0,
      tie_word_embeddings=True,
    ),
  ),
  'phi3': (
    'Phi3ForCausalLM',
    dict(TINY, sliding_window=7, pad_token_id=0),
  ),
  'phi3_longrope': (
    'Phi3ForCausalLM',
    dict(
      TINY,
      rope_parameters=LONGROPE,
      original_max_position_embeddings=32,
      pad_token_id=0,
    ),
  ),
  'gemma': (
    'GemmaForCausalLM',
    dict(TINY, head_dim=16, tie_word_embeddings=True),
  ),
  'gemma2': (
    'Gemma2ForCausalLM',
    dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
  ),
  'gemma3': (
    'Gemma3ForCausalLM',
    dict(
      GEMMA2,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      rope_parameters={
        'sliding_attention': dict(rope_type='default', rope_theta=50.0),
        'full_attention': dict(
          rope_type='linear', rope_theta=1000.0, factor=4.0
        ),
      },
    ),
  ),
  'vaultgemma': (
    'VaultGemmaForCausalLM',
    dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
  ),
  'gpt2': ('GPT2LMHeadModel', dict(GPT2)),
  'opt': (
    'OPTForCausalLM',
    dict(
      {k: v for k, v in PLAIN.items() if k != 'intermediate_size'},
      ffn_dim=48,
      max_position_embeddings=32,
      word_embed_proj_dim=32,
      pad_token_id=1,
    ),
  ),
  'gpt_neox': (
    'GPTNeoXForCausalLM',
    dict(PLAIN, rotary_pct=0.25, rotary_emb_base=100),
  ),
  'gpt_neox_serial': (
    'GPTNeoXForCausalLM',
    dict(
      PLAIN, use_parallel_residual=False, attention_bias=False, rotary_pct=1.0
    ),
  ),
  'phi': ('PhiForCausalLM', dict(TINY, partial_rotary_factor=0.5)),
  'bert_masked_lm': ('BertForMaskedLM', dict(BERT)),
  'bert_classifier': ('BertForSequenceClassification', dict(BERT, **CLASSES)),
  'minilm': ('BertModel', dict(BERT)),
  'roberta_masked_lm': ('RobertaForMaskedLM', dict(ROBERTA)),
  'roberta_classifier': (
    'RobertaForSequenceClassification',
    dict(ROBERTA, **CLASSES),
  ),
  'distilbert_masked_lm': ('DistilBertForMaskedLM', dict(DISTILBERT)),
  'distilbert_classifier': (
    'DistilBertForSequenceClassification',
    dict(DISTILBERT, **CLASSES),
  ),
  'mpnet': ('MPNetModel', dict(MPNET)),
  'mpnet_masked_lm': ('MPNetForMaskedLM', dict(MPNET)),
}


def randomise(model, generator):
  """Weights large enough that every part of the block moves the logits."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 1 and name.endswith('weight'):  # of a norm
        one = 0 if 'Gemma' in type(model).__name__ else 1  # 1 + weight there
        parameter.copy_(one + 0.3 * noise)
      elif parameter.ndim < 2:
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
  tokens = torch.where(mask, tokens, config.pad_token_id or 0)
  if config.pad_token_id and config.pad_token_id == config.eos_token_id:
    tokens[0, -1] = config.eos_token_id  # a text that ends in a padding token
  with torch.no_grad():
    out = model(tokens, attention_mask=mask.long())
  if architecture.endswith('SequenceClassification'):
    logits = out.logits
  else:
    logits = (out.logits if 'logits' in out else out.last_hidden_state) * mask[
      ..., None
    ]
  np.savez_compressed(
    directory / 'logits.npz',
    tokens=tokens.numpy().astype(np.int32),
    lengths=lengths,
    logits=logits.numpy(),
  )
  (directory / 'generation_config.json').unlink(missing_ok=True)


if __name__ == '__main__':
  for name in sys.argv[1:] or MODELS:
    make(name)
