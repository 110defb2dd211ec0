"""Codecs of private messages: noise that every client adds itself.

`noised` is local privacy: no message needs trust. `skellam` is distributed
privacy: the sum of a secure sum is private, a single message is not.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Codec, Error

_SLACK = 1e-6
_NOISE = 301  # the purpose of a key


def _clipped(update: Any, clip: Any) -> Any:
  """Returns one client's clipped update; entries that are not finite are 0."""
  clean = jax.tree.map(
    lambda x: jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32), update
  )
  bound = clip * (1 - _SLACK)
  return tree.scale(clean, bound / jnp.maximum(tree.norm(clean), bound))


def _keys(context: Any, leaves: list[Any]) -> Any:
  key = jax.random.fold_in(context.key, _NOISE)
  return jax.random.split(key, max(len(leaves), 1))


def noised(inner: Codec, clip: float, noise_multiplier: float) -> Codec:
  """Returns a codec of clip(u) + N(0, (z C)^2), encoded by `inner`.

  Every entry of a leaf gets noise. What `inner` does, and what the server does
  with the messages, sees noised updates only.

  >>> from fedjax_llm.types import Context, Masks
  >>> plain = Codec(lambda _: (), lambda u, m, s, c: (u, s),
  ...               lambda m, s, c: m, lambda m, k: ())
  >>> codec, update = noised(plain, 1.0, 0.0), {'w': jnp.array([3.0, 4.0])}
  >>> message, _ = codec.encode(
  ...   update, Masks(None, None), (), Context(key=jax.random.key(0)))
  >>> message['w'].round(3).tolist()
  [0.6000000238418579, 0.800000011920929]
  """
  deviation = noise_multiplier * clip

  def encode(update, masks, state, context):
    leaves, treedef = jax.tree.flatten(_clipped(update, clip))
    noisy = [
      x + deviation * jax.random.normal(k, x.shape)
      for x, k in zip(leaves, _keys(context, leaves))
    ]
    whole = tree.map_present(
      lambda x, u: x.astype(u.dtype), jax.tree.unflatten(treedef, noisy), update
    )
    return inner.encode(whole, masks, state, context)

  return inner._replace(encode=encode, private=True)


def poisson(key: Any, mean: float, shape: tuple[int, ...]) -> jax.Array:
  """Returns Poisson numbers less their mean, a whole number, int32.

  `jax.random.poisson` accepts a number k by k log m - m - log k!, which float32
  does not resolve at large means: at 1.7e7 its variance is an eighth too large
  and its excess kurtosis 2. Here the sampler is the same (PTRS: Hörmann 1993,
  Insurance: Mathematics and Economics 12), and with d = k - m and x = d / m

      log P(k) = -m ((1 + x) log(1 + x) - x) - log(2 pi k) / 2 - 1 / (12 k)

  whose parts are small.

  >>> drawn = poisson(jax.random.key(0), 1e6, (4000,))
  >>> bool(abs(drawn.std() / 1000 - 1) < 0.05)
  True
  """
  if mean < 1000:
    drawn = jax.random.poisson(key, mean, shape, jnp.int32)
    return drawn - int(mean)
  m = jnp.float32(mean)
  b = 0.931 + 2.53 * math.sqrt(mean)
  a = -0.059 + 0.02483 * b
  spread, most = 1.1239 + 1.1328 / (b - 3.4), 0.9277 - 3.6224 / (b - 2)

  def log_mass(d):
    x = d / m
    series = x * x * (
      1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x / 42))))
    )  # fmt: skip
    safe = jnp.maximum(x, -0.99)
    whole = (1 + safe) * jnp.log1p(safe) - safe
    k = jnp.maximum(m + d, 1.0)
    part = jnp.where(jnp.abs(x) < 0.05, series, whole)
    return -m * part - jnp.log(2 * jnp.pi * k) / 2 - 1 / (12 * k)

  def again(carry):
    _, done, _ = carry
    return ~jnp.all(done)

  def draw(carry):
    drawn, done, key = carry
    key, first, second = jax.random.split(key, 3)
    u = jax.random.uniform(first, shape) - 0.5
    v = jnp.maximum(jax.random.uniform(second, shape), 1e-30)
    inside = jnp.maximum(0.5 - jnp.abs(u), 1e-7)
    d = jnp.floor((2 * a / inside + b) * u + 0.43)
    quick = (inside >= 0.07) & (v <= most)
    never = (m + d < 0) | ((inside < 0.013) & (v > inside))
    ratio = jnp.log(v * spread / (a / inside**2 + b))
    fine = quick | (~never & (ratio <= log_mass(d)))
    drawn = jnp.where(done | ~fine, drawn, d)
    return drawn, done | fine, key

  begin = jnp.zeros(shape), jnp.zeros(shape, bool), key
  return jax.lax.while_loop(again, draw, begin)[0].astype(jnp.int32)


def skellam(
  clip: float,
  noise_multiplier: float,
  least: int,
  grid: float,
  masked: Callable[[Any, Any], Any],
  unmasked: Callable[[Any, Any], Any],
) -> Codec:
  """Returns an additive codec of whole numbers with Skellam noise.

      m_k = trunc(s clip(u_k)) + Sk(0, (s z C)^2 / n)   modulo 2^32,

  with Sk(0, v) the difference of two Poisson numbers of mean v / 2 (Agarwal et
  al. 2021, arXiv 2110.04995). Truncation brings no entry further from zero, so
  the norm in units of the grid is at most s C. The sum of n messages has the
  variance (s z C)^2; a round with fewer reports is given up: nothing of it is
  released.

  Args:
    clip: C.
    noise_multiplier: z, of the sum.
    least: n, the fewest reports.
    grid: s C, the clip norm in steps of the grid.
    masked: `(numbers, context) -> numbers`, the masks of a secure sum.
    unmasked: `(sum, context) -> sum` takes away what drop-outs left of them.

  Raises:
    Error: from `encode`, numbers whose sum may leave 32 bits.

  >>> same = lambda numbers, context: numbers
  >>> codec = skellam(1.0, 0.5, 4, 1024.0, masked=same, unmasked=same)
  >>> codec.additive, codec.lossy
  (True, True)
  """
  scale = grid / clip
  variance = (grid * noise_multiplier) ** 2

  def encode(update, masks, state, context):
    del masks
    rows = context.peers.shape[0]
    if rows * grid + 40 * variance**0.5 * (rows / least) ** 0.5 > 2**31:
      raise Error(
        f'privacy.grid is {grid:g}: the sum of {rows} clients with noise may '
        'leave 32 bits; take a coarser grid.'
      )
    leaves, treedef = jax.tree.flatten(_clipped(update, clip))
    numbers = []
    for x, key in zip(leaves, _keys(context, leaves)):
      up, down = jax.random.split(key)
      whole = jnp.trunc(x * scale).astype(jnp.int32)
      if variance:
        mean = float(math.ceil(variance / (2 * least)))
        whole += poisson(up, mean, x.shape) - poisson(down, mean, x.shape)
      numbers.append(whole.astype(jnp.uint32))
    return masked(jax.tree.unflatten(treedef, numbers), context), state

  def decode(message, start, context):
    enough = jnp.sum(context.reported) >= least
    total = unmasked(message, context)

    def leaf(x, p):
      number = x.astype(jnp.int32).astype(jnp.float32) / scale
      return jnp.where(enough, number, 0).astype(p.dtype)

    return tree.map_present(leaf, total, start)

  def num_bytes(message, masks):
    del masks
    return jax.tree.map(lambda x: jnp.int32(4 * x.size), message)

  return Codec(
    lambda _: (), encode, decode, num_bytes,
    additive=True, lossy=True, private=True,
  )  # fmt: skip
