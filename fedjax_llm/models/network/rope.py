"""Rotary positions: rotates pairs of features by an angle per position.

    (x_i, x_i+half) -> rotated by position * frequency_i

Angles are float32 for every compute dtype.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error

KINDS = ('default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope', 'none')


class Rope(NamedTuple):
  """A rotary position embedding (arXiv:2104.09864) and its context extension.

  The kind defines the frequency of feature pair i:

  default     theta^(-2 i / rotary_dim)
  linear      divided by `factor`
  dynamic     as default, for texts up to the model's positions only
  llama3      only low frequencies divided by `factor`, with a smooth band
  yarn        likewise, by feature, and cos and sin times
              `attention_factor` (arXiv:2309.00071, sections 3.2 and 3.4)
  longrope    divided by `short[i]`, cos and sin times `attention_factor`, for
              texts up to `original_max_positions` only (arXiv:2402.13753)
  none        no rotation
  """

  kind: str = 'default'
  theta: float = 10000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192
  attention_factor: float = 1.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()  # unused here; saved for other programs


def rope_frequencies(rope: Rope, rotary_dim: int) -> np.ndarray:
  """Returns the radians per position, float32 [rotary_dim / 2].

  >>> rope_frequencies(Rope(theta=100.0), 4).round(3).tolist()
  [1.0, 0.10000000149011612]
  """
  frequency = rope.theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
  if rope.kind == 'linear':
    frequency = frequency / rope.factor
  elif rope.kind == 'llama3':
    # Rotations over the original context: many -> keep, few -> stretch.
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = keep * frequency + (1 - keep) * frequency / rope.factor
  elif rope.kind == 'yarn':
    keep = 1 - _yarn_ramp(rope, rotary_dim)
    frequency = keep * frequency + (1 - keep) * frequency / rope.factor
  elif rope.kind == 'longrope':
    frequency = frequency / np.asarray(rope.short)
  elif rope.kind == 'none':
    frequency = 0 * frequency
  elif rope.kind not in KINDS:
    raise Error(
      f'rope type {rope.kind!r} is not supported; supported: '
      f'{", ".join(KINDS)}.'
    )
  return frequency.astype(np.float32)


def _yarn_ramp(rope: Rope, rotary_dim: int) -> np.ndarray:
  """Returns 0 for features with many rotations, 1 for few, [rotary_dim / 2]."""

  def feature(turns):  # index of the feature with this number of rotations
    wavelength = rope.original_max_positions / (turns * 2 * math.pi)
    return rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

  low, high = feature(rope.beta_fast), feature(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_dim - 1)
  high = high + 0.001 if low == high else high
  return np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)


def longest_text(rope: Rope, max_positions: int) -> int | None:
  """Returns the number of tokens up to which frequencies are constant.

  The rotation of a longer text would depend on the other texts of its batch, so
  such texts are refused. None: no bound.
  """
  if rope.kind == 'dynamic':
    return max_positions
  return rope.original_max_positions if rope.kind == 'longrope' else None


def rope_angles(
  positions, frequencies, factor: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin times `factor`, float32 [..., T, 1, rotary_dim / 2]."""
  angle = positions.astype(jnp.float32)[..., None, None] * frequencies
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + half) of each head, [B, T, H, head_dim].

  With fewer angles than pairs of a head, its last features are not rotated.
  """
  cos, sin = angles
  rotary_dim = 2 * cos.shape[-1]
  wide = x.astype(jnp.float32)
  first, second = jnp.split(wide[..., :rotary_dim], 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  if rotary_dim < x.shape[-1]:
    parts.append(wide[..., rotary_dim:])
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)
