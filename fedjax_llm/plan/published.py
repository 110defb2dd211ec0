"""The shapes of well-known models, as their authors published them.

They are fields of `config.json`: with them a plan needs no download.
"""

from typing import Any

_LLAMA3: dict[str, Any] = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 128256,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'rope_scaling': {
    'rope_type': 'llama3',
    'factor': 32.0,  # 8.0 of Llama 3.1
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  },
}
_LLAMA2: dict[str, Any] = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'max_position_embeddings': 4096,
  'rms_norm_eps': 1e-5,
}
_MISTRAL: dict[str, Any] = {
  'model_type': 'mistral',
  'architectures': ['MistralForCausalLM'],
  'max_position_embeddings': 32768,
  'rms_norm_eps': 1e-5,
  'rope_theta': 1000000.0,
  'sliding_window': None,
}
_SMOL: dict[str, Any] = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 49152,
  'max_position_embeddings': 8192,
  'rms_norm_eps': 1e-5,
  'rope_theta': 100000.0,
  'tie_word_embeddings': True,
}
_QWEN25: dict[str, Any] = {
  'model_type': 'qwen2',
  'architectures': ['Qwen2ForCausalLM'],
  'max_position_embeddings': 32768,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000000.0,
}


def _sizes(shared, width, inner, layers, heads, kv_heads, **more):
  return {
    **shared,
    'hidden_size': width,
    'intermediate_size': inner,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    **more,
  }


# A name without the ending of a tuned copy ('-Instruct', '-Chat ...').
CONFIGS: dict[str, dict[str, Any]] = {
  'meta-llama/Llama-3.2-1B': _sizes(
    _LLAMA3, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True
  ),
  'meta-llama/Llama-3.2-3B': _sizes(
    _LLAMA3, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True
  ),
  'meta-llama/Llama-3.1-8B': _sizes(_LLAMA3, 4096, 14336, 32, 32, 8),
  'meta-llama/Llama-3.1-70B': _sizes(_LLAMA3, 8192, 28672, 80, 64, 8),
  'meta-llama/Llama-2-7b-hf': _sizes(
    _LLAMA2, 4096, 11008, 32, 32, 32, vocab_size=32000
  ),
  'mistralai/Mistral-7B-v0.3': _sizes(
    _MISTRAL, 4096, 14336, 32, 32, 8, vocab_size=32768
  ),
  'HuggingFaceTB/SmolLM2-135M': _sizes(_SMOL, 576, 1536, 30, 9, 3),
  'HuggingFaceTB/SmolLM2-360M': _sizes(_SMOL, 960, 2560, 32, 15, 5),
  'HuggingFaceTB/SmolLM2-1.7B': _sizes(_SMOL, 2048, 8192, 24, 32, 32),
  'Qwen/Qwen2.5-0.5B': _sizes(
    _QWEN25, 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True
  ),
  'Qwen/Qwen2.5-1.5B': _sizes(
    _QWEN25, 1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True
  ),
  'Qwen/Qwen2.5-7B': _sizes(_QWEN25, 3584, 18944, 28, 28, 4, vocab_size=152064),
}


def find(name: str) -> dict[str, Any] | None:
  """Returns the fields of a hub model, or of the model it was tuned from.

  A local path that ends in the model's name is accepted. None: unknown.

  >>> find('meta-llama/Llama-3.2-1B-Instruct')['num_hidden_layers']
  16
  >>> find('somebody/else')
  """
  name = name.rstrip('/').removesuffix('-Instruct')
  for known, fields in CONFIGS.items():
    if name == known or name.rsplit('/', 1)[-1] == known.split('/')[1]:
      return fields
  return None
