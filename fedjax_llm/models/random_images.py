"""Tiny networks of images with random weights: a ViT, and a CLIP."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.models import config as config_lib
from fedjax_llm.models.config import Config, Patches
from fedjax_llm.models.files import load
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Error


def _tower(family: str, **fields: Any) -> Config:
  heads, width = fields['num_heads'], fields['hidden_size']
  return Config(
    family=family,
    num_kv_heads=heads,
    head_dim=width // heads,
    norm='layer',
    gated=False,
    rope=Rope('none'),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    **fields,
  )


def _checked(**sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise Error(f'model.{name} is {size}; it must be at least 1.')
  for name, of in (('hidden_size', 'num_heads'), ('image_size', 'patch_size')):
    if sizes[name] % sizes[of]:
      raise Error(
        f'model.{name} is {sizes[name]}, which is no multiple of '
        f'model.{of}={sizes[of]}.'
      )


def random_vit(
  *,
  labels: Sequence[str] | None = None,
  seed: int = 0,
  image_size: int = 8,
  patch_size: int = 4,
  channels: int = 3,
  hidden_size: int = 32,
  intermediate_size: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  attention: str = 'auto',
  compute_dtype: Any = 'float32',
) -> load.LoadedModel:
  """Builds a tiny ViT with random weights; with `labels` a classifier.

  >>> loaded = random_vit(labels=('cat', 'dog'))
  >>> loaded.base['classifier']['kernel'].shape
  (32, 2)

  Raises `Error` for a size below one, a width that the heads do not divide and
  an image size that the patch size does not divide.
  """
  _checked(
    image_size=image_size,
    patch_size=patch_size,
    channels=channels,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
  )
  half = (0.5,) * channels
  image = Patches(image_size, patch_size, channels, mean=half, std=half)
  config = _tower(
    'vit',
    vocab_size=0,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
    max_positions=1 << 16,
    num_learned_positions=image.count + 1,
    activation='gelu',
    causal=False,
    norm_eps=1e-12,
    image=image,
    head='none' if labels is None else 'classifier',
    labels=() if labels is None else tuple(labels),
  )
  return load.assemble(
    config,
    config_lib.init(config, jax.random.key(seed), jnp.float32),
    name=f'random-vit-{seed}',
    compute_dtype=compute_dtype,
    attention=attention,
  )


def random_clip(
  *,
  labels: Sequence[str] | None = None,
  seed: int = 0,
  vocab_size: int = 259,
  eos_ids: Sequence[int] = (258,),
  image_size: int = 8,
  patch_size: int = 4,
  channels: int = 3,
  hidden_size: int = 32,
  intermediate_size: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  max_positions: int = 64,
  projection: int = 16,
  attention: str = 'auto',
  compute_dtype: Any = 'float32',
) -> load.LoadedModel:
  """Builds a tiny CLIP with random weights; both towers have the same sizes.

  `labels` are the names of the classes of a zero-shot classifier.

  >>> loaded = random_clip(num_layers=3)
  >>> loaded.base['vision']['layers']['mlp']['up_proj']['kernel'].shape
  (3, 32, 64)

  Raises `Error` for sizes as `random_vit`.
  """
  _checked(
    image_size=image_size,
    patch_size=patch_size,
    channels=channels,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
    vocab_size=vocab_size,
    max_positions=max_positions,
    projection=projection,
  )
  half = (0.5,) * channels
  image = Patches(
    image_size, patch_size, channels, bias=False, mean=half, std=half
  )
  sizes: Any = {
    'hidden_size': hidden_size,
    'intermediate_size': intermediate_size,
    'num_layers': num_layers,
    'num_heads': num_heads,
    'activation': 'quick_gelu',
    'norm_eps': 1e-5,
  }
  vision = _tower(
    'clip',
    vocab_size=0,
    max_positions=1 << 16,
    num_learned_positions=image.count + 1,
    embedding_norm=True,
    causal=False,
    image=image,
    head='none',
    **sizes,
  )
  config = _tower(
    'clip',
    vocab_size=vocab_size,
    max_positions=max_positions,
    num_learned_positions=max_positions,
    head='dual',
    vision=vision,
    projection=projection,
    labels=() if labels is None else tuple(labels),
    eos_ids=tuple(eos_ids),
    **sizes,
  )
  return load.assemble(
    config,
    config_lib.init(config, jax.random.key(seed), jnp.float32),
    name=f'random-clip-{seed}',
    compute_dtype=compute_dtype,
    attention=attention,
  )
