"""ViT, DINOv2 and CLIP: networks of images, and a dual encoder.

CLIP has two towers. Its `Config` is that of the text tower, with the image
tower in `Config.vision`; the modules of a tower have the paths of a network of
its own below `text` or `vision`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm import reading
from fedjax_llm.models.config import Config, Patches, tower
from fedjax_llm.models.families.tables import FIELDS, Family, Module
from fedjax_llm.models.network import layers
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

# Rows of a picture are no tokens: they are limited by memory alone.
_MOST_ROWS = 1 << 16
_SHAPE = {
  'norm': 'layer',
  'gated': False,
  'residual': 'pre',
  'final_norm': True,
  'rope': Rope('none'),
  'qkv_bias': True,
  'output_bias': True,
  'mlp_bias': True,
}
# Of the pixels 0..1, for checkpoints without a preprocessor_config.json.
_CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PREPROCESSOR = 'preprocessor_config.json'


def modules(prefix: str, top: str, names: Mapping[str, Any]) -> tuple:
  """Returns the modules of a tower below `top` ('' for a network alone).

  `names` maps our path to (their name, kind); a path below `layers` has '{}'
  for the number of the layer in their name.
  """
  front = (top,) if top else ()
  return tuple(
    Module((*front, *path.split('/')), f'{prefix}{name}', kind)
    for path, (name, kind) in names.items()
  )


def patches(hf: Any, normal: Any, **fields: Any) -> Patches:
  """Reads the `Patches` of a config.

  Raises:
    Error: an image size that is no multiple of the patch size, or sizes that
      are not one number.
  """
  size, patch = hf.image_size, hf.patch_size
  for name, value in (('image_size', size), ('patch_size', patch)):
    if not isinstance(value, int):
      raise Error(f'{name}={value!r} is not supported; it must be one number.')
  if size % patch:
    raise Error(f'image_size={size} is no multiple of patch_size={patch}.')
  channels = hf.num_channels
  if channels != len(normal[0]):
    normal = ((0.5,) * channels, (0.5,) * channels)
  return Patches(size, patch, channels, mean=normal[0], std=normal[1], **fields)


def normalised(directory: pathlib.Path, config: Config) -> Config:
  """Returns the config with the mean and std of preprocessor_config.json.

  They are 0 and 1 if the file has do_normalize=false.

  Raises:
    Error: the file has other than one number for each channel, or does not
      divide pixels by 255.
  """
  image = (config.vision or config).image
  file = directory / PREPROCESSOR
  if image is None or not file.is_file():
    return config
  values = reading.read(file)
  factor = values.get('rescale_factor', 1 / 255)
  if values.get('do_rescale') is False or abs(255 * factor - 1) > 1e-3:
    raise Error(
      f'{file}: do_rescale is {values.get("do_rescale", True)} and '
      f'rescale_factor is {factor:g}; pixels are divided by 255 here.'
    )
  if values.get('do_normalize') is False:
    n = image.channels
    image = image._replace(mean=(0.0,) * n, std=(1.0,) * n)
    return _with_image(config, image)
  new = {}
  for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std')):
    value = values.get(theirs)
    if value is None:
      continue
    numbers = isinstance(value, list) and all(
      isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )
    if not numbers or len(value) != image.channels:
      raise Error(
        f'{file}: {theirs} is {reading.short(value)}; it must be a list of '
        f'{image.channels} numbers, one for each channel.'
      )
    if ours == 'std' and min(value) <= 0:
      raise Error(f'{file}: image_std is {value}; it must be above 0.')
    new[ours] = tuple(map(float, value))
  return _with_image(config, image._replace(**new))


def preprocessor(config: Config) -> str | None:
  """Returns the content of preprocessor_config.json; None without images."""
  image = (config.vision or config).image
  if image is None:
    return None
  size = {'height': image.size, 'width': image.size}
  values = {
    'do_normalize': True,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': list(image.mean),
    'image_std': list(image.std),
    'size': size,
  }
  return json.dumps(values, indent=2) + '\n'


def like(config: Config, other: Config) -> Config:
  """Returns `config` with the mean and std of `other`."""
  image = (config.vision or config).image
  others = (other.vision or other).image
  if image is None or others is None:
    return config
  return _with_image(config, image._replace(mean=others.mean, std=others.std))


def _with_image(config: Config, image: Patches) -> Config:
  if config.vision is None:
    return config._replace(image=image)
  return config._replace(vision=config.vision._replace(image=image))


def _labels(hf: Any, head: str) -> dict[str, Any]:
  if head != 'classifier':
    return {}
  return {'labels': tuple(str(hf.id2label[i]) for i in range(hf.num_labels))}


def _write_labels(c: Config) -> dict[str, Any]:
  if not c.labels:
    return {}
  return {
    'id2label': dict(enumerate(c.labels)),
    'label2id': {name: i for i, name in enumerate(c.labels)},
  }


def _write_image(c: Config) -> dict[str, Any]:
  assert c.image is not None
  return {
    'image_size': c.image.size,
    'patch_size': c.image.patch,
    'num_channels': c.image.channels,
  }


# --------------------------------------------------------------------- vit --

_FIELDS = {
  **FIELDS,
  'vocab_size': None,
  'num_kv_heads': None,
  'head_dim': None,
  'max_positions': None,
  'norm_eps': 'layer_norm_eps',
  'rope_theta': None,
  'tied': None,
}
_ATTENTION = {
  'layers/self_attn/q_proj': ('attention.attention.query', 'linear'),
  'layers/self_attn/k_proj': ('attention.attention.key', 'linear'),
  'layers/self_attn/v_proj': ('attention.attention.value', 'linear'),
  'layers/self_attn/o_proj': ('attention.output.dense', 'linear'),
}
_OUTSIDE = {
  'embed_patches': ('embeddings.patch_embeddings.projection', 'conv'),
  'embed_class': ('embeddings.cls_token', 'rows'),
  'embed_positions': ('embeddings.position_embeddings', 'rows'),
}


def _vit_modules(name: str, layer: Mapping[str, Any]) -> tuple[Module, ...]:
  body = f'{name}.encoder.layer.{{}}.'
  return (
    *modules(f'{name}.', '', _OUTSIDE),
    *modules(body, '', layer),
    *modules(f'{name}.', '', {'norm': ('layernorm', 'norm')}),
    Module(('classifier',), 'classifier', 'linear'),
  )


def _read_vit(hf, head):
  image = patches(hf, _HALF)
  return {
    **_SHAPE,
    'causal': False,
    'vocab_size': 0,
    'max_positions': _MOST_ROWS,
    'num_learned_positions': image.count + 1,
    'image': image,
    'qkv_bias': bool(hf.qkv_bias),
    **_labels(hf, head),
  }


VIT = Family(
  {'ViTModel': 'none', 'ViTForImageClassification': 'classifier'},
  _vit_modules(
    'vit',
    {
      **_ATTENTION,
      'layers/input_layernorm': ('layernorm_before', 'norm'),
      'layers/post_attention_layernorm': ('layernorm_after', 'norm'),
      'layers/mlp/up_proj': ('intermediate.dense', 'linear'),
      'layers/mlp/down_proj': ('output.dense', 'linear'),
    },
  ),
  _read_vit,
  lambda c: {
    **_write_image(c),
    'qkv_bias': c.qkv_bias,
    **_write_labels(c),
  },
  fields=_FIELDS,
  prefix='vit.',
  unread=r'(vit\.)?(pooler\..*|embeddings\.mask_token)',
)

# ------------------------------------------------------------------ dinov2 --


def _read_dinov2(hf, head):
  if hf.use_swiglu_ffn:
    raise Error('use_swiglu_ffn=True is not supported; supported: False.')
  image = patches(hf, _IMAGENET, resized=True, with_mean=head == 'classifier')
  return {
    **_SHAPE,
    'causal': False,
    'vocab_size': 0,
    'max_positions': _MOST_ROWS,
    'num_learned_positions': image.count + 1,
    'image': image,
    'qkv_bias': bool(hf.qkv_bias),
    'layer_scale': True,
    'intermediate_size': int(hf.hidden_size * hf.mlp_ratio),
    **_labels(hf, head),
  }


def _write_dinov2(c: Config) -> dict[str, Any]:
  return {
    **_write_image(c),
    'qkv_bias': c.qkv_bias,
    'mlp_ratio': _ratio(c.intermediate_size, c.hidden_size),
    **_write_labels(c),
  }


def _ratio(size: int, of: int) -> int | float:
  return size // of if size % of == 0 else size / of


DINOV2 = Family(
  {'Dinov2Model': 'none', 'Dinov2ForImageClassification': 'classifier'},
  _vit_modules(
    'dinov2',
    {
      **_ATTENTION,
      'layers/input_layernorm': ('norm1', 'norm'),
      'layers/attention_scale': ('layer_scale1', 'gain'),
      'layers/post_attention_layernorm': ('norm2', 'norm'),
      'layers/mlp/up_proj': ('mlp.fc1', 'linear'),
      'layers/mlp/down_proj': ('mlp.fc2', 'linear'),
      'layers/mlp_scale': ('layer_scale2', 'gain'),
    },
  ),
  _read_dinov2,
  _write_dinov2,
  fields={**_FIELDS, 'intermediate_size': None},
  prefix='dinov2.',
  unread=r'(dinov2\.)?(pooler\..*|embeddings\.mask_token)',
)

# -------------------------------------------------------------------- clip --

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
    **{**_SHAPE, **fields},
  )


def _read_clip(hf: Any, labels: Sequence[str] | None) -> Config:
  """Reads both towers; `labels` are the classes of a zero-shot classifier."""
  image = patches(hf.vision_config, _CLIP, bias=False)
  vision = _clip_tower(
    hf.vision_config,
    vocab_size=0,
    max_positions=_MOST_ROWS,
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
      **_write_image(vision),
      'model_type': 'clip_vision_model',
      'projection_dim': c.projection,
    },
    **_write_labels(c),
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
