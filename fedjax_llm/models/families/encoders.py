"""BERT (and MiniLM), RoBERTa and DistilBERT, with their heads.

A classifier reads the state of a text's first token: `logits` computes
W2 act(W1 h) for every token, and only the first token's are used.
"""

from fedjax_llm.models.families.tables import (
  FIELDS,
  Family,
  Module,
  layer_modules,
)
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

SHAPE = {
  'norm': 'layer',
  'gated': False,
  'residual': 'post',
  'final_norm': False,
  'causal': False,
  'rope': Rope('none'),
  'qkv_bias': True,
  'output_bias': True,
  'mlp_bias': True,
  'embedding_norm': True,
  'head_bias': True,
}
_FIELDS = {
  **FIELDS,
  'num_kv_heads': None,
  'head_dim': None,
  'norm_eps': 'layer_norm_eps',
  'rope_theta': None,
}


def _body(prefix):
  names = {
    'embed_tokens': ('word_embeddings', 'embedding'),
    'embed_positions': ('position_embeddings', 'embedding'),
    'embed_types': ('token_type_embeddings', 'embedding'),
    'embed_norm': ('LayerNorm', 'norm'),
  }
  return tuple(
    Module((path,), f'{prefix}.embeddings.{name}', kind)
    for path, (name, kind) in names.items()
  )


_LAYER = {
  'self_attn/q_proj': ('attention.self.query', 'linear'),
  'self_attn/k_proj': ('attention.self.key', 'linear'),
  'self_attn/v_proj': ('attention.self.value', 'linear'),
  'self_attn/o_proj': ('attention.output.dense', 'linear'),
  'post_attention_layernorm': ('attention.output.LayerNorm', 'norm'),
  'mlp/up_proj': ('intermediate.dense', 'linear'),
  'mlp/down_proj': ('output.dense', 'linear'),
  'post_mlp_layernorm': ('output.LayerNorm', 'norm'),
}
_OLD_NORMS = (
  (r'LayerNorm\.weight$', 'LayerNorm.gamma'),
  (r'LayerNorm\.bias$', 'LayerNorm.beta'),
)


def _read_head(hf, head, masked_lm, classifier):
  if head == 'classifier':
    names = tuple(str(hf.id2label[i]) for i in range(hf.num_labels))
    return {'labels': names, 'head_activation': classifier}
  return {'head_activation': masked_lm if head == 'masked_lm' else ''}


def _write_labels(c):
  if not c.labels:
    return {}
  return {
    'id2label': dict(enumerate(c.labels)),
    'label2id': {name: i for i, name in enumerate(c.labels)},
  }


# -------------------------------------------------------------------- bert --


def _read_bert(hf, head):
  return {
    **SHAPE,
    'num_learned_positions': hf.max_position_embeddings,
    'num_token_types': hf.type_vocab_size,
    **_read_head(hf, head, hf.hidden_act, 'tanh'),
  }


BERT = Family(
  {
    'BertModel': 'none',
    'BertForMaskedLM': 'masked_lm',
    'BertForPreTraining': 'masked_lm',
    'BertForSequenceClassification': 'classifier',
  },
  (
    *_body('bert'),
    *layer_modules('bert.encoder.layer', _LAYER),
    Module(('head_dense',), 'cls.predictions.transform.dense', 'linear'),
    Module(('head_norm',), 'cls.predictions.transform.LayerNorm', 'norm'),
    Module(('lm_head',), 'cls.predictions.decoder', 'weight'),
    Module(('lm_head',), 'cls.predictions', 'bias'),
    Module(('pooler',), 'bert.pooler.dense', 'linear'),
    Module(('classifier',), 'classifier', 'linear'),
  ),
  _read_bert,
  lambda c: {'type_vocab_size': c.num_token_types, **_write_labels(c)},
  fields=_FIELDS,
  prefix='bert.',
  spellings=_OLD_NORMS,
  unread=r'(bert\.)?(embeddings\.position_ids|pooler\..*)|cls\..*',
)

# ----------------------------------------------------------------- roberta --


def _read_roberta(hf, head):
  return {
    **_read_bert(hf, head),
    'first_position': hf.pad_token_id + 1,
    **_read_head(hf, head, 'gelu', 'tanh'),
  }


ROBERTA = Family(
  {
    'RobertaModel': 'none',
    'RobertaForMaskedLM': 'masked_lm',
    'RobertaForSequenceClassification': 'classifier',
  },
  (
    *_body('roberta'),
    *layer_modules('roberta.encoder.layer', _LAYER),
    Module(('head_dense',), 'lm_head.dense', 'linear'),
    Module(('head_norm',), 'lm_head.layer_norm', 'norm'),
    Module(('lm_head',), 'lm_head.decoder', 'weight'),
    Module(('lm_head',), 'lm_head', 'bias'),
    Module(('pooler',), 'classifier.dense', 'linear'),
    Module(('classifier',), 'classifier.out_proj', 'linear'),
  ),
  _read_roberta,
  BERT.write,
  fields=_FIELDS,
  prefix='roberta.',
  spellings=_OLD_NORMS,
  unread=r'(roberta\.)?(embeddings\.position_ids|pooler\..*)|lm_head\..*',
)

# -------------------------------------------------------------- distilbert --


def _read_distilbert(hf, head):
  return {
    **SHAPE,
    'norm_eps': 1e-12,
    'num_learned_positions': hf.max_position_embeddings,
    **_read_head(hf, head, hf.activation, 'relu'),
  }


DISTILBERT = Family(
  {
    'DistilBertModel': 'none',
    'DistilBertForMaskedLM': 'masked_lm',
    'DistilBertForSequenceClassification': 'classifier',
  },
  (
    *_body('distilbert'),
    *layer_modules(
      'distilbert.transformer.layer',
      {
        'self_attn/q_proj': ('attention.q_lin', 'linear'),
        'self_attn/k_proj': ('attention.k_lin', 'linear'),
        'self_attn/v_proj': ('attention.v_lin', 'linear'),
        'self_attn/o_proj': ('attention.out_lin', 'linear'),
        'post_attention_layernorm': ('sa_layer_norm', 'norm'),
        'mlp/up_proj': ('ffn.lin1', 'linear'),
        'mlp/down_proj': ('ffn.lin2', 'linear'),
        'post_mlp_layernorm': ('output_layer_norm', 'norm'),
      },
    ),
    Module(('head_dense',), 'vocab_transform', 'linear'),
    Module(('head_norm',), 'vocab_layer_norm', 'norm'),
    Module(('lm_head',), 'vocab_projector', 'linear'),
    Module(('pooler',), 'pre_classifier', 'linear'),
    Module(('classifier',), 'classifier', 'linear'),
  ),
  _read_distilbert,
  _write_labels,
  fields={
    **_FIELDS,
    'hidden_size': 'dim',
    'intermediate_size': 'hidden_dim',
    'num_layers': 'n_layers',
    'num_heads': 'n_heads',
    'activation': 'activation',
    'norm_eps': None,
  },
  prefix='distilbert.',
  unread=r'(distilbert\.)?embeddings\.position_ids|vocab_.*',
)

# ------------------------------------------------------------------- mpnet --


def _read_mpnet(hf, head):
  if hf.relative_attention_num_buckets != 32:  # transformers computes with 32
    raise Error(
      f'relative_attention_num_buckets={hf.relative_attention_num_buckets} is '
      'not supported; supported: 32.'
    )
  return {
    **SHAPE,
    'num_learned_positions': hf.max_position_embeddings,
    'first_position': hf.pad_token_id + 1,
    'relative_buckets': hf.relative_attention_num_buckets,
    **_read_head(hf, head, 'gelu', 'tanh'),
  }


MPNET = Family(
  {
    'MPNetModel': 'none',
    'MPNetForMaskedLM': 'masked_lm',
    'MPNetForSequenceClassification': 'classifier',
  },
  (
    *(m for m in _body('mpnet') if m.path != ('embed_types',)),
    Module(
      ('embed_distances',), 'mpnet.encoder.relative_attention_bias', 'embedding'
    ),
    *layer_modules(
      'mpnet.encoder.layer',
      {
        **{
          f'self_attn/{x}_proj': (f'attention.attn.{x}', 'linear')
          for x in 'qkvo'
        },
        'post_attention_layernorm': ('attention.LayerNorm', 'norm'),
        'mlp/up_proj': ('intermediate.dense', 'linear'),
        'mlp/down_proj': ('output.dense', 'linear'),
        'post_mlp_layernorm': ('output.LayerNorm', 'norm'),
      },
    ),
    Module(('head_dense',), 'lm_head.dense', 'linear'),
    Module(('head_norm',), 'lm_head.layer_norm', 'norm'),
    Module(('lm_head',), 'lm_head.decoder', 'weight'),
    Module(('lm_head',), 'lm_head', 'bias'),
    Module(('pooler',), 'classifier.dense', 'linear'),
    Module(('classifier',), 'classifier.out_proj', 'linear'),
  ),
  _read_mpnet,
  lambda c: {
    'relative_attention_num_buckets': c.relative_buckets,
    **_write_labels(c),
  },
  fields=_FIELDS,
  prefix='mpnet.',
  unread=r'(mpnet\.)?(embeddings\.position_ids|pooler\..*)|lm_head\..*',
)
