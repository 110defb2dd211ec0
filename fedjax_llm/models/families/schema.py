"""The allowed values of the fields of a model's config.json.

Fields that no family reads are not checked. One schema serves all families,
since a field has the same meaning in each.
"""

from fedjax_llm import reading

_LARGEST = 2**31 - 1
_COUNT = reading.integer(1, _LARGEST)
_MAYBE_COUNT = reading.optional(_COUNT)
_LAYERS = reading.integer(1, 10_000)
_EPSILON = reading.number(0, 1)
_ABOVE_ZERO = reading.number(above=0)
_MAYBE_ABOVE_ZERO = reading.optional(_ABOVE_ZERO)
_SHARE = reading.optional(reading.number(0, 1))
_SWITCH = reading.optional(reading.boolean())
_TOKEN = reading.optional(reading.integer(-1, _LARGEST))
_WORD = reading.text(200)

CONFIG: reading.Schema = {
  # Sizes.
  **dict.fromkeys(
    (
      *('vocab_size', 'hidden_size', 'n_embd', 'dim', 'hidden_dim', 'ffn_dim'),
      *('intermediate_size', 'num_attention_heads', 'n_head', 'n_heads'),
      *('max_position_embeddings', 'n_positions', 'word_embed_proj_dim'),
      *('type_vocab_size', 'relative_attention_num_buckets'),
      *('num_channels', 'projection_dim'),
    ),
    _COUNT,
  ),
  **dict.fromkeys(('num_hidden_layers', 'n_layer', 'n_layers'), _LAYERS),
  **dict.fromkeys(('num_key_value_heads', 'head_dim', 'n_inner'), _MAYBE_COUNT),
  'original_max_position_embeddings': _MAYBE_COUNT,
  # Images; some checkpoints have a pair of sizes, which is refused by name.
  **dict.fromkeys(
    ('image_size', 'patch_size'),
    reading.either(_COUNT, reading.listed(_COUNT, most=2)),
  ),
  'mlp_ratio': reading.number(above=0),
  **dict.fromkeys(
    ('text_config', 'vision_config'),
    reading.optional(reading.mapped(reading.anything())),
  ),
  # Numbers of the blocks.
  **dict.fromkeys(
    ('rms_norm_eps', 'layer_norm_eps', 'layer_norm_epsilon'), _EPSILON
  ),
  **dict.fromkeys(
    ('rope_theta', 'rope_local_base_freq', 'rotary_emb_base'),
    _MAYBE_ABOVE_ZERO,
  ),
  **dict.fromkeys(('partial_rotary_factor', 'rotary_pct'), _SHARE),
  **dict.fromkeys(
    ('attn_logit_softcapping', 'final_logit_softcapping'), _MAYBE_ABOVE_ZERO
  ),
  'query_pre_attn_scalar': _ABOVE_ZERO,
  'sliding_window': reading.optional(reading.integer(0, _LARGEST)),
  'max_window_layers': reading.optional(reading.integer(0, _LARGEST)),
  # Switches and words.
  **dict.fromkeys(
    (
      *('tie_word_embeddings', 'attention_bias', 'mlp_bias'),
      *('use_sliding_window', 'use_parallel_residual', 'is_decoder'),
      *('is_encoder_decoder', 'add_cross_attention', 'qk_layernorm'),
      *('qkv_bias', 'use_swiglu_ffn'),
    ),
    _SWITCH,
  ),
  **dict.fromkeys(
    (
      *('hidden_act', 'hidden_activation', 'activation_function'),
      *('activation', 'position_embedding_type'),
    ),
    reading.optional(_WORD),
  ),
  'model_type': _WORD,
  'architectures': reading.optional(reading.listed(_WORD)),
  'layer_types': reading.optional(reading.listed(_WORD, most=10_000)),
  'no_rope_layers': reading.optional(
    reading.listed(reading.integer(0, 1), most=10_000)
  ),
  'rope_parameters': reading.optional(reading.mapped(reading.anything())),
  'rope_scaling': reading.optional(reading.mapped(reading.anything())),
  'id2label': reading.optional(reading.mapped(reading.text())),
  'label2id': reading.optional(reading.mapped(reading.integer(0))),
  # Tokens.
  **dict.fromkeys(('bos_token_id', 'pad_token_id'), _TOKEN),
  'eos_token_id': reading.optional(
    reading.integer(-1, _LARGEST),
    reading.listed(reading.integer(0, _LARGEST), most=1000),
  ),
}

_FACTORS = reading.optional(reading.listed(_ABOVE_ZERO, most=10_000))

# Of one `rope_parameters`.
ROPE: reading.Schema = {
  'rope_type': _WORD,
  'rope_theta': _ABOVE_ZERO,
  'partial_rotary_factor': _SHARE,
  'factor': _MAYBE_ABOVE_ZERO,
  'original_max_position_embeddings': _MAYBE_COUNT,
  'low_freq_factor': _MAYBE_ABOVE_ZERO,
  'high_freq_factor': _MAYBE_ABOVE_ZERO,
  'attention_factor': _MAYBE_ABOVE_ZERO,
  'beta_fast': _MAYBE_ABOVE_ZERO,
  'beta_slow': _MAYBE_ABOVE_ZERO,
  'mscale': reading.optional(reading.number(0)),
  'mscale_all_dim': reading.optional(reading.number(0)),
  'truncate': _SWITCH,
  'short_factor': _FACTORS,
  'long_factor': _FACTORS,
}
