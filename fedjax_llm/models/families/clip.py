"""CLIP: a dual encoder of images and texts.

Its `Config` is that of the text tower, with the image tower in `Config.vision`;
the modules of a tower have the paths of a network of its own below `text` or
`vision`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.models.config import Config, tower
from fedjax_llm.models.families.images import (
  CLIP_NORMAL,
  MOST_ROWS,
  SHAPE,
  modules,
  patches,
  write_image,
  write_labels,
)
from fedjax_llm.models.families.tables import Family, Module
from fedjax_llm.models.network import layers
from fedjax_llm.types import Error

_CLIP_LAYER = {
  **{
    f'layers/self_attn/{ours}_proj': (f'self_attn.{theirs}_proj', 'linear')
    for ours, theirs in (('q', 'q'), ('k', 'k'), ('v', 'v'), ('o', 'out'))
  },
  'layers/input_layernorm': ('layer_norm1', 'norm'),
  'layers/post_attention_layernorm': ('layer_norm2', 'norm'),
  'layers/mlp/up_proj': ('mlp.fc1', 'linear'),
  'layers/mlp/down_proj': ('mlp.fc2', 'linear'),
}


def _tower_modules(top: str, name: str, outside: Mapping[str, Any]) -> tuple:
  return (
    *modules(f'{name}.', top, outside),
    *modules(f'{name}.encoder.layers.{{}}.', top, _CLIP_LAYER),
  )


def _clip_tower(hf: Any, **fields: Any) -> Config:
  width, heads = hf.hidden_size, hf.num_attention_heads
  if width % heads:
    raise Error(f'hidden_size={width} is no multiple of {heads} heads.')
  if hf.hidden_act not in layers.ACTIVATIONS:
    raise Error(
      f'hidden_act={hf.hidden_act!r} is not supported; supported: '
      f'{", ".join(layers.ACTIVATIONS)}.'
    )
  return Config(
    family='clip',
    hidden_size=width,
    intermediate_size=hf.intermediate_size,
    num_layers=hf.num_hidden_layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    activation=hf.hidden_act,
    norm_eps=float(hf.layer_norm_eps),
    **{**SHAPE, **fields},
  )


def _read_clip(hf: Any, labels: Sequence[str] | None) -> Config:
  """Reads both towers; `labels` are the classes of a zero-shot classifier."""
  image = patches(hf.vision_config, CLIP_NORMAL, bias=False)
  vision = _clip_tower(
    hf.vision_config,
    vocab_size=0,
    max_positions=MOST_ROWS,
    causal=False,
    num_learned_positions=image.count + 1,
    embedding_norm=True,
    image=image,
    head='none',
  )
  text = hf.text_config
  eos = text.eos_token_id
  return _clip_tower(
    text,
    vocab_size=text.vocab_size,
    max_positions=text.max_position_embeddings,
    num_learned_positions=text.max_position_embeddings,
    head='dual',
    vision=vision,
    projection=hf.projection_dim,
    labels=() if labels is None else tuple(labels),
    bos_id=text.bos_token_id,
    eos_ids=() if eos is None else (eos,),
    pad_id=text.pad_token_id,
  )


def _write_clip(c: Config) -> dict[str, Any]:
  def sizes(c: Config) -> dict[str, Any]:
    return {
      'hidden_size': c.hidden_size,
      'intermediate_size': c.intermediate_size,
      'num_hidden_layers': c.num_layers,
      'num_attention_heads': c.num_heads,
      'hidden_act': c.activation,
      'layer_norm_eps': c.norm_eps,
      'projection_dim': c.projection,
    }

  vision = tower(c, 'vision')
  return {
    'projection_dim': c.projection,
    'text_config': {
      **sizes(c),
      'model_type': 'clip_text_model',
      'vocab_size': c.vocab_size,
      'max_position_embeddings': c.max_positions,
      'bos_token_id': c.bos_id,
      'eos_token_id': c.eos_ids[0] if c.eos_ids else None,
      'pad_token_id': c.pad_id,
    },
    'vision_config': {
      **sizes(vision),
      **write_image(vision),
      'model_type': 'clip_vision_model',
      'projection_dim': c.projection,
    },
    **write_labels(c),
  }


CLIP = Family(
  {'CLIPModel': 'dual'},
  (
    *_tower_modules(
      'text',
      'text_model',
      {
        'embed_tokens': ('embeddings.token_embedding', 'embedding'),
        'embed_positions': ('embeddings.position_embedding', 'embedding'),
        'norm': ('final_layer_norm', 'norm'),
      },
    ),
    *_tower_modules(
      'vision',
      'vision_model',
      {
        'embed_patches': ('embeddings.patch_embedding', 'conv'),
        'embed_class': ('embeddings.class_embedding', 'vector'),
        'embed_positions': ('embeddings.position_embedding', 'embedding'),
        'embed_norm': ('pre_layrnorm', 'norm'),
        'norm': ('post_layernorm', 'norm'),
      },
    ),
    Module(('text_projection',), 'text_projection', 'weight'),
    Module(('visual_projection',), 'visual_projection', 'weight'),
    Module(('logit_scale',), 'logit_scale', 'scalar'),
  ),
  lambda hf, head: {},
  _write_clip,
  fields={},
  prefix='',
  unread=r'(text|vision)_model\.embeddings\.position_ids',
  whole=_read_clip,
)
