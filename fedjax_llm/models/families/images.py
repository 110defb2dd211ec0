"""ViT and DINOv2: networks of images."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from fedjax_llm import reading
from fedjax_llm.models.config import Config, Patches
from fedjax_llm.models.families.tables import FIELDS, Family, Module
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error

# Rows of a picture are no tokens: they are limited by memory alone.
MOST_ROWS = 1 << 16
SHAPE = {
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
CLIP_NORMAL = (
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


def write_labels(c: Config) -> dict[str, Any]:
  if not c.labels:
    return {}
  return {
    'id2label': dict(enumerate(c.labels)),
    'label2id': {name: i for i, name in enumerate(c.labels)},
  }


def write_image(c: Config) -> dict[str, Any]:
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
    **SHAPE,
    'causal': False,
    'vocab_size': 0,
    'max_positions': MOST_ROWS,
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
    **write_image(c),
    'qkv_bias': c.qkv_bias,
    **write_labels(c),
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
    **SHAPE,
    'causal': False,
    'vocab_size': 0,
    'max_positions': MOST_ROWS,
    'num_learned_positions': image.count + 1,
    'image': image,
    'qkv_bias': bool(hf.qkv_bias),
    'layer_scale': True,
    'intermediate_size': int(hf.hidden_size * hf.mlp_ratio),
    **_labels(hf, head),
  }


def _write_dinov2(c: Config) -> dict[str, Any]:
  return {
    **write_image(c),
    'qkv_bias': c.qkv_bias,
    'mlp_ratio': _ratio(c.intermediate_size, c.hidden_size),
    **write_labels(c),
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
