"""A tiny encoder with random weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.models import config as config_lib
from fedjax_llm.models.config import Config
from fedjax_llm.models.families import encoders
from fedjax_llm.models.files import load
from fedjax_llm.types import Error


def random_encoder(
  *,
  labels: Sequence[str] | None = None,
  seed: int = 0,
  vocab_size: int = 256,
  hidden_size: int = 32,
  intermediate_size: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  max_positions: int = 512,
  attention: str = 'auto',
  compute_dtype: Any = 'float32',
) -> load.LoadedModel:
  """Builds a tiny BERT-type network: a classifier or a masked model.

  With `labels` it classifies into them, otherwise it is a masked language
  model.

  >>> loaded = random_encoder(labels=('sad', 'glad'))
  >>> loaded.base['classifier']['kernel'].shape
  (32, 2)

  Raises `Error` for a size below one and a width that the heads do not divide.
  """
  sizes = (vocab_size, hidden_size, intermediate_size, num_layers, num_heads)
  if min(*sizes, max_positions) < 1 or hidden_size % num_heads:
    raise Error(
      f'random_encoder needs sizes of at least 1 and a {hidden_size=} that '
      f'{num_heads=} divides.'
    )
  config = Config(
    family='bert',
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=hidden_size // num_heads,
    max_positions=max_positions,
    num_learned_positions=max_positions,
    num_token_types=2,
    activation='gelu',
    norm_eps=1e-12,
    head='masked_lm' if labels is None else 'classifier',
    head_activation='gelu' if labels is None else 'tanh',
    labels=() if labels is None else tuple(labels),
    **encoders.SHAPE,
  )
  return load.assemble(
    config,
    config_lib.init(config, jax.random.key(seed), jnp.float32),
    name=f'random-encoder-{seed}',
    compute_dtype=compute_dtype,
    attention=attention,
  )
