"""Llama and close variants: Mistral, Qwen 2 and 3, SmolLM3 and Phi-3."""

from fedjax_llm.models.families import ropes
from fedjax_llm.models.families.tables import (
  FIELDS,
  Family,
  Module,
  layer_modules,
  read_one_window,
  read_windows,
  write_windows,
)
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

_ATTENTION = {
  'input_layernorm': ('input_layernorm', 'norm'),
  'self_attn/q_proj': ('self_attn.q_proj', 'linear'),
  'self_attn/k_proj': ('self_attn.k_proj', 'linear'),
  'self_attn/v_proj': ('self_attn.v_proj', 'linear'),
  'self_attn/q_norm': ('self_attn.q_norm', 'norm'),
  'self_attn/k_norm': ('self_attn.k_norm', 'norm'),
  'self_attn/o_proj': ('self_attn.o_proj', 'linear'),
}
_MLP = {
  'mlp/gate_proj': ('mlp.gate_proj', 'linear'),
  'mlp/up_proj': ('mlp.up_proj', 'linear'),
  'mlp/down_proj': ('mlp.down_proj', 'linear'),
}


def decoder_modules(layer) -> tuple[Module, ...]:
  return (
    Module(('embed_tokens',), 'model.embed_tokens', 'embedding'),
    *layer_modules('model.layers', layer),
    Module(('norm',), 'model.norm', 'norm'),
    Module(('lm_head',), 'lm_head', 'linear'),
  )


LLAMA_MODULES = decoder_modules(
  {
    **_ATTENTION,
    'post_attention_layernorm': ('post_attention_layernorm', 'norm'),
    **_MLP,
  }
)

# ------------------------------------------------------------------- llama --


def _read_biases(hf):
  bias = bool(hf.attention_bias)
  return {'qkv_bias': bias, 'output_bias': bias}


def _write_biases(c):
  return {'attention_bias': c.qkv_bias}


LLAMA = Family(
  {
    'LlamaForCausalLM': 'lm',
    'LlamaForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  lambda hf, head: {**_read_biases(hf), 'mlp_bias': bool(hf.mlp_bias)},
  lambda c: {**_write_biases(c), 'mlp_bias': c.mlp_bias},
)

# ----------------------------------------------------------------- mistral --

MISTRAL = Family(
  {
    'MistralForCausalLM': 'lm',
    'MistralForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  lambda hf, head: {'windows': read_one_window(hf)},
  lambda c: {'sliding_window': (c.windows or (None,))[0]},
)

# -------------------------------------------------------------------- qwen --


def _write_qwen(c):
  first = next((i for i, w in enumerate(c.windows) if w), c.num_layers)
  return {
    **write_windows(c),
    'use_sliding_window': any(c.windows),
    'max_window_layers': first,
  }


QWEN2 = Family(
  {
    'Qwen2ForCausalLM': 'lm',
    'Qwen2ForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  lambda hf, head: {'qkv_bias': True, 'windows': read_windows(hf)},
  _write_qwen,
)

QWEN3 = Family(
  {
    'Qwen3ForCausalLM': 'lm',
    'Qwen3ForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  lambda hf, head: {
    **_read_biases(hf),
    'qk_norm': True,
    'windows': read_windows(hf),
  },
  lambda c: {**_write_qwen(c), **_write_biases(c)},
)

# ----------------------------------------------------------------- smollm3 --


def _read_smollm3(hf, head):
  rotated = hf.no_rope_layers  # 1: the layer rotates, despite the name
  if len(rotated) != hf.num_hidden_layers or not set(rotated) <= {0, 1}:
    raise Error(
      f'no_rope_layers={rotated} must have a 0 or 1 for each of the '
      f'{hf.num_hidden_layers} layers.'
    )
  windows = read_windows(hf)
  if windows and not hf.use_sliding_window:
    raise Error(
      'layer_types has sliding_attention but use_sliding_window is false.'
    )
  rope = ropes.read(hf.rope_parameters, hf.max_position_embeddings)
  each = tuple(rope if on else Rope('none') for on in rotated)
  return {
    **_read_biases(hf),
    'mlp_bias': bool(hf.mlp_bias),
    'windows': windows,
    'layer_ropes': () if all(rotated) else each,
  }


def _write_smollm3(c):
  each = c.layer_ropes or (c.rope,) * c.num_layers
  return {
    **_write_biases(c),
    **write_windows(c),
    'mlp_bias': c.mlp_bias,
    'use_sliding_window': any(c.windows),
    'no_rope_layers': [int(r.kind != 'none') for r in each],
  }


SMOLLM3 = Family(
  {
    'SmolLM3ForCausalLM': 'lm',
    'SmolLM3ForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  _read_smollm3,
  _write_smollm3,
  handled=frozenset(['no_rope_layers']),
)

# -------------------------------------------------------------------- phi3 --

PHI3 = Family(
  {
    'Phi3ForCausalLM': 'lm',
    'Phi3ForSequenceClassification': 'score',
  },
  decoder_modules(
    {
      'input_layernorm': ('input_layernorm', 'norm'),
      'self_attn/q_proj': ('self_attn.qkv_proj', 'linear stacked'),
      'self_attn/k_proj': ('self_attn.qkv_proj', 'linear stacked'),
      'self_attn/v_proj': ('self_attn.qkv_proj', 'linear stacked'),
      'self_attn/o_proj': ('self_attn.o_proj', 'linear'),
      'post_attention_layernorm': ('post_attention_layernorm', 'norm'),
      'mlp/gate_proj': ('mlp.gate_up_proj', 'linear stacked'),
      'mlp/up_proj': ('mlp.gate_up_proj', 'linear stacked'),
      'mlp/down_proj': ('mlp.down_proj', 'linear'),
    }
  ),
  lambda hf, head: {'windows': read_one_window(hf)},
  lambda c: {
    'sliding_window': (c.windows or (None,))[0],
    'original_max_position_embeddings': (
      c.rope.original_max_positions
      if c.rope.kind == 'longrope'
      else c.max_positions
    ),
  },
  fields={**FIELDS, 'partial_rotary': 'partial_rotary_factor'},
  handled=frozenset(['partial_rotary_factor']),
)
