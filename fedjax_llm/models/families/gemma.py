"""Gemma 1, 2, 3 (text), VaultGemma: scaled embeddings, norms of 1 + scale."""

from fedjax_llm.models.families import ropes
from fedjax_llm.models.families.llama import LLAMA_MODULES, decoder_modules
from fedjax_llm.models.families.tables import (
  FIELDS,
  Family,
  read_windows,
  write_windows,
)

_SANDWICH = decoder_modules(
  {
    'input_layernorm': ('input_layernorm', 'norm'),
    'self_attn/q_proj': ('self_attn.q_proj', 'linear'),
    'self_attn/k_proj': ('self_attn.k_proj', 'linear'),
    'self_attn/v_proj': ('self_attn.v_proj', 'linear'),
    'self_attn/q_norm': ('self_attn.q_norm', 'norm'),
    'self_attn/k_norm': ('self_attn.k_norm', 'norm'),
    'self_attn/o_proj': ('self_attn.o_proj', 'linear'),
    'attention_output_norm': ('post_attention_layernorm', 'norm'),
    'post_attention_layernorm': ('pre_feedforward_layernorm', 'norm'),
    'mlp/gate_proj': ('mlp.gate_proj', 'linear'),
    'mlp/up_proj': ('mlp.up_proj', 'linear'),
    'mlp/down_proj': ('mlp.down_proj', 'linear'),
    'mlp_output_norm': ('post_feedforward_layernorm', 'norm'),
  }
)


def _read_gemma(hf, head):
  bias = bool(hf.attention_bias)
  return {
    'norm': 'rms_plus_one',
    'embedding_scale': hf.hidden_size**0.5,
    'qkv_bias': bias,
    'output_bias': bias,
  }


def _write_gemma(c):
  return {'attention_bias': c.qkv_bias}


GEMMA = Family(
  {
    'GemmaForCausalLM': 'lm',
    'GemmaForSequenceClassification': 'score',
  },
  LLAMA_MODULES,
  _read_gemma,
  _write_gemma,
)


def _read_gemma2(hf, head):
  return {
    **_read_gemma(hf, head),
    'residual': 'sandwich',
    'windows': read_windows(hf),
    'score_scale': hf.query_pre_attn_scalar**-0.5,
    'score_cap': float(hf.attn_logit_softcapping or 0),
    'logit_cap': float(hf.final_logit_softcapping or 0),
  }


def _write_gemma2(c):
  scale = c.score_scale or c.head_dim**-0.5
  return {
    **_write_gemma(c),
    **write_windows(c),
    'query_pre_attn_scalar': round(scale**-2),
    'attn_logit_softcapping': c.score_cap or None,
    'final_logit_softcapping': c.logit_cap or None,
  }


GEMMA2 = Family(
  {
    'Gemma2ForCausalLM': 'lm',
    'Gemma2ForSequenceClassification': 'score',
  },
  _SANDWICH,
  _read_gemma2,
  _write_gemma2,
  fields={**FIELDS, 'activation': 'hidden_activation'},
  handled=frozenset(['attn_logit_softcapping', 'final_logit_softcapping']),
)


# Gemma 2 without the norms after attention and MLP (Google 2025, VaultGemma: A
# Differentially Private Gemma Model).
VAULTGEMMA = Family(
  {'VaultGemmaForCausalLM': 'lm'},
  tuple(
    m._replace(name=m.name.replace('post_attention', 'pre_feedforward'))
    for m in LLAMA_MODULES
  ),
  lambda hf, head: {**_read_gemma2(hf, head), 'residual': 'pre'},
  _write_gemma2,
  fields={**FIELDS, 'activation': 'hidden_activation'},
  handled=frozenset(['attn_logit_softcapping', 'final_logit_softcapping']),
)


def _read_gemma3(hf, head):
  windows = read_windows(hf)
  each = {
    name: ropes.read(hf.rope_parameters[name], hf.max_position_embeddings)
    for name in ('full_attention', 'sliding_attention')
  }
  return {
    **_read_gemma(hf, head),
    'residual': 'sandwich',
    'qk_norm': True,
    'windows': windows,
    'rope': each['full_attention'],
    'layer_ropes': tuple(each[name] for name in hf.layer_types),
    'score_scale': hf.query_pre_attn_scalar**-0.5,
    'logit_cap': float(hf.final_logit_softcapping or 0),
  }


def _write_gemma3(c):
  windows = c.windows or (0,) * c.num_layers
  local = [r for r, w in zip(c.layer_ropes, windows) if w]
  fields = _write_gemma2(c)
  if local:
    fields['rope_local_base_freq'] = local[0].theta
  return fields


GEMMA3 = Family(
  {
    'Gemma3ForCausalLM': 'lm',
    'Gemma3TextForSequenceClassification': 'score',
  },
  _SANDWICH,
  _read_gemma3,
  _write_gemma3,
  fields={**FIELDS, 'activation': 'hidden_activation'},
  handled=frozenset(['final_logit_softcapping']),
)
