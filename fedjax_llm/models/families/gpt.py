"""GPT-2, OPT, GPT-NeoX (Pythia) and Phi: layer norms and plain perceptrons."""

from fedjax_llm.models.families.tables import (
  FIELDS,
  Family,
  Module,
  layer_modules,
)
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

_ALL_BIASES = {'qkv_bias': True, 'output_bias': True, 'mlp_bias': True}
_PLAIN = {'norm': 'layer', 'gated': False, **_ALL_BIASES}

# -------------------------------------------------------------------- gpt2 --


def _read_gpt2(hf, head):
  return {
    **_PLAIN,
    'rope': Rope('none'),
    'intermediate_size': hf.n_inner or 4 * hf.n_embd,
    'num_learned_positions': hf.n_positions,
  }


GPT2 = Family(
  {
    'GPT2LMHeadModel': 'lm',
    'GPT2ForSequenceClassification': 'score',
  },
  (
    Module(('embed_tokens',), 'transformer.wte', 'embedding'),
    Module(('embed_positions',), 'transformer.wpe', 'embedding'),
    *layer_modules(
      'transformer.h',
      {
        'input_layernorm': ('ln_1', 'norm'),
        'self_attn/q_proj': ('attn.c_attn', 'conv1d stacked'),
        'self_attn/k_proj': ('attn.c_attn', 'conv1d stacked'),
        'self_attn/v_proj': ('attn.c_attn', 'conv1d stacked'),
        'self_attn/o_proj': ('attn.c_proj', 'conv1d'),
        'post_attention_layernorm': ('ln_2', 'norm'),
        'mlp/up_proj': ('mlp.c_fc', 'conv1d'),
        'mlp/down_proj': ('mlp.c_proj', 'conv1d'),
      },
    ),
    Module(('norm',), 'transformer.ln_f', 'norm'),
    Module(('lm_head',), 'lm_head', 'linear'),
  ),
  _read_gpt2,
  lambda c: {'n_inner': c.intermediate_size},
  fields={
    **FIELDS,
    'hidden_size': 'n_embd',
    'intermediate_size': None,
    'num_layers': 'n_layer',
    'num_heads': 'n_head',
    'num_kv_heads': None,
    'head_dim': None,
    'max_positions': 'n_positions',
    'activation': 'activation_function',
    'norm_eps': 'layer_norm_epsilon',
    'rope_theta': None,
  },
  prefix='transformer.',
  unread=r'.*\.attn\.(masked_)?bias',
)

# --------------------------------------------------------------------- opt --

_OPT_OFFSET = 2  # the first rows of the table are for padding


def _read_opt(hf, head):
  if hf.word_embed_proj_dim != hf.hidden_size:
    raise Error(
      f'word_embed_proj_dim={hf.word_embed_proj_dim} is not supported; '
      f'supported: hidden_size, {hf.hidden_size}.'
    )
  return {
    **_PLAIN,
    'norm_eps': 1e-5,
    'rope': Rope('none'),
    'num_learned_positions': hf.max_position_embeddings + _OPT_OFFSET,
    'first_position': _OPT_OFFSET,
  }


OPT = Family(
  {
    'OPTForCausalLM': 'lm',
    'OPTForSequenceClassification': 'score',
  },
  (
    Module(('embed_tokens',), 'model.decoder.embed_tokens', 'embedding'),
    Module(('embed_positions',), 'model.decoder.embed_positions', 'embedding'),
    *layer_modules(
      'model.decoder.layers',
      {
        'input_layernorm': ('self_attn_layer_norm', 'norm'),
        'self_attn/q_proj': ('self_attn.q_proj', 'linear'),
        'self_attn/k_proj': ('self_attn.k_proj', 'linear'),
        'self_attn/v_proj': ('self_attn.v_proj', 'linear'),
        'self_attn/o_proj': ('self_attn.out_proj', 'linear'),
        'post_attention_layernorm': ('final_layer_norm', 'norm'),
        'mlp/up_proj': ('fc1', 'linear'),
        'mlp/down_proj': ('fc2', 'linear'),
      },
    ),
    Module(('norm',), 'model.decoder.final_layer_norm', 'norm'),
    Module(('lm_head',), 'lm_head', 'linear'),
  ),
  _read_opt,
  lambda c: {'word_embed_proj_dim': c.hidden_size},
  fields={
    **FIELDS,
    'intermediate_size': 'ffn_dim',
    'num_kv_heads': None,
    'head_dim': None,
    'activation': 'activation_function',
    'norm_eps': None,
    'rope_theta': None,
  },
)

# ---------------------------------------------------------------- gpt_neox --


def _read_neox(hf, head):
  bias = bool(hf.attention_bias)
  return {
    **_PLAIN,
    'qkv_bias': bias,
    'output_bias': bias,
    'residual': 'parallel' if hf.use_parallel_residual else 'pre',
  }


GPT_NEOX = Family(
  {
    'GPTNeoXForCausalLM': 'lm',
    'GPTNeoXForSequenceClassification': 'score',
  },
  (
    Module(('embed_tokens',), 'gpt_neox.embed_in', 'embedding'),
    *layer_modules(
      'gpt_neox.layers',
      {
        'input_layernorm': ('input_layernorm', 'norm'),
        'self_attn/q_proj': ('attention.query_key_value', 'linear by_head'),
        'self_attn/k_proj': ('attention.query_key_value', 'linear by_head'),
        'self_attn/v_proj': ('attention.query_key_value', 'linear by_head'),
        'self_attn/o_proj': ('attention.dense', 'linear'),
        'post_attention_layernorm': ('post_attention_layernorm', 'norm'),
        'mlp/up_proj': ('mlp.dense_h_to_4h', 'linear'),
        'mlp/down_proj': ('mlp.dense_4h_to_h', 'linear'),
      },
    ),
    Module(('norm',), 'gpt_neox.final_layer_norm', 'norm'),
    Module(('lm_head',), 'embed_out', 'linear'),
  ),
  _read_neox,
  lambda c: {
    'attention_bias': c.qkv_bias,
    'use_parallel_residual': c.residual == 'parallel',
  },
  fields={
    **FIELDS,
    'num_kv_heads': None,
    'head_dim': None,
    'norm_eps': 'layer_norm_eps',
    'partial_rotary': 'rotary_pct',
    'rope_theta': 'rotary_emb_base',
  },
  prefix='gpt_neox.',
  spellings=((r'^embed_out\.', 'lm_head.'),),
  unread=r'.*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)',
)

# --------------------------------------------------------------------- phi --

PHI = Family(
  {
    'PhiForCausalLM': 'lm',
    'PhiForSequenceClassification': 'score',
  },
  (
    Module(('embed_tokens',), 'model.embed_tokens', 'embedding'),
    *layer_modules(
      'model.layers',
      {
        'input_layernorm': ('input_layernorm', 'norm'),
        'self_attn/q_proj': ('self_attn.q_proj', 'linear'),
        'self_attn/k_proj': ('self_attn.k_proj', 'linear'),
        'self_attn/v_proj': ('self_attn.v_proj', 'linear'),
        'self_attn/o_proj': ('self_attn.dense', 'linear'),
        'mlp/up_proj': ('mlp.fc1', 'linear'),
        'mlp/down_proj': ('mlp.fc2', 'linear'),
      },
    ),
    Module(('norm',), 'model.final_layernorm', 'norm'),
    Module(('lm_head',), 'lm_head', 'linear'),
  ),
  lambda hf, head: {**_PLAIN, 'residual': 'shared', 'head_bias': True},
  lambda c: {},
  fields={
    **FIELDS,
    'head_dim': None,
    'norm_eps': 'layer_norm_eps',
    'partial_rotary': 'partial_rotary_factor',
  },
  handled=frozenset(['partial_rotary_factor']),
)
