"""Inputs are recovered from gradients of low-rank factors by matching them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.evals import matching
from fedjax_llm.types import Error

T, D, R, V = 3, 6, 2, 12
_rng = np.random.default_rng(0)
TABLE = jnp.float32(_rng.normal(size=(V, D)))
A, B = (jnp.float32(_rng.normal(size=s)) for s in ((D, R), (R, 4)))
HEAD = jnp.float32(_rng.normal(size=(D, 4)))
TOKENS, LABELS = np.array([5, 1, 8]), np.array([2, 0, 3])


def loss(factors, x):
  """Cross-entropy of x (HEAD + a b), [T, D]; T exceeds the rank."""
  a, b = factors
  logits = x @ HEAD + (x @ a) @ b
  return -jnp.mean(jax.nn.log_softmax(jnp.tanh(logits))[jnp.arange(T), LABELS])


def gradient(x):
  return jax.grad(loss)((A, B), x)


def by_hand(kind):
  """The distances in NumPy float64."""
  x, y = gradient(TABLE[TOKENS]), gradient(0.5 * TABLE[TOKENS[::-1]])
  total = 0.0
  for g, h in zip(x, y):
    g, h = np.float64(g), np.float64(h)
    if kind == 'squared':
      total += ((g - h) ** 2).sum()
    else:
      total += 1 - (g * h).sum() / np.linalg.norm(g) / np.linalg.norm(h)
  return total, float(matching.distance(x, y, kind))


@functools.cache
def attacked(kind, scale=1.0, noise=0.0):
  seen = jax.tree.map(lambda g: scale * g, gradient(TABLE[TOKENS]))
  if noise:
    rng = np.random.default_rng(1)
    size = np.sqrt(sum(float((g**2).mean()) for g in seen))
    seen = jax.tree.map(
      lambda g: g + noise * size * rng.normal(size=g.shape), seen
    )
  start = TABLE[TOKENS] + 0.7 * jnp.float32(
    np.random.default_rng(2).normal(size=(T, D))
  )
  return matching.recovered(
    gradient, seen, start, kind=kind, steps=800, learning_rate=0.05
  )


def test_distances_are_their_formulas():
  for kind in matching.DISTANCES:
    want, got = by_hand(kind)
    assert got == pytest.approx(want, rel=1e-5)
  with pytest.raises(Error, match='must be one of squared, cosine'):
    matching.distance({}, {}, 'l2')


def test_a_matched_gradient_is_the_one_that_was_seen():
  for kind in matching.DISTANCES:
    result = attacked(kind)
    before = matching.distance(
      gradient(TABLE[TOKENS]), gradient(TABLE[TOKENS] + 0.7), kind
    )
    assert float(result.distance) < 0.02 * float(before)


def test_only_the_cosine_does_not_read_lengths():
  """A clipped gradient: its length is that of the clip norm."""
  cosine, squared = (
    attacked(kind, scale=0.05) for kind in ('cosine', 'squared')
  )
  again = matching.distance(
    gradient(TABLE[TOKENS]), gradient(cosine.inputs), 'cosine'
  )
  other = matching.distance(
    gradient(TABLE[TOKENS]), gradient(squared.inputs), 'cosine'
  )
  assert float(again) < 0.02 and float(other) > 3 * float(again)


def test_noise_of_privacy_is_in_the_way():
  """Its deviation is ten times the gradient's: what is matched is noise."""
  clean, noisy = attacked('cosine'), attacked('cosine', noise=10.0)
  seen = gradient(TABLE[TOKENS])
  gap = lambda result: float(
    matching.distance(seen, gradient(result.inputs), 'cosine')
  )
  assert gap(clean) < 0.02 < 0.2 < gap(noisy)


def test_lengths_are_held_where_asked():
  result = matching.recovered(
    lambda x: {'w': 0.0 * x + 1.0}, {'w': jnp.ones((T, D))},
    jnp.ones((T, D)), lengths=1.0, length=0.5, steps=200,
  )  # fmt: skip
  norms = np.linalg.norm(np.asarray(result.inputs), axis=-1)
  assert norms.mean() == pytest.approx(0.5, abs=0.01)
