"""Attention: every way equals the formula, and asks for no more than it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import models
from fedjax_llm.models.network import attention as attention_lib
from fedjax_llm.models.network import transformer
from fedjax_llm.models.network.attention import Places, attention, choose
from fedjax_llm.types import Error

K, B, T, H, KV, D = 2, 2, 40, 4, 2, 8  # clients, rows, tokens, heads, width


def inputs():
  """Two clients' rows: two texts and padding, one text, nothing but padding."""
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (K, B, T, H, D))
  k, v = (jax.random.normal(key, (K, B, T, KV, D)) for key in keys[1:3])
  weight = jax.random.normal(keys[3], q.shape)
  two = np.repeat([1, 2, 0], [17, 19, 4])
  one, none = np.ones(T, int), np.zeros(T, int)
  segments = np.array([[two, one], [none, two]], np.int32)
  positions = np.arange(T) - np.where(segments == 2, 17, 0)
  return q, k, v, Places(positions.astype(np.int32), segments), weight


def formula(q, k, v, places, window, cap, causal):
  """Row by row, head by head, query by query, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b in np.ndindex(K, B):
    at, text = places.positions[b], places.segments[b]
    for t in range(T):
      seen = (text == text[t]) & (text[t] > 0)
      if causal:
        seen &= at <= at[t]
      if window:
        seen &= at[t] - at < window
      for h in range(H if seen.any() else 0):
        scores = k[b][seen, h // (H // KV)] @ q[b][t, h] / D**0.5
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores - scores.max())
        out[b][t, h] = weights @ v[b][seen, h // (H // KV)] / weights.sum()
  return out


def plain(q, k, v, queries, keys, *, window, causal, scale, softcap):
  """Attention with all scores at once, whose gradient is that of JAX."""
  groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum('btkgd,bskd->bktgs', groups, k) * scale
  scores = attention_lib.softcapped(scores, softcap)
  seen = attention_lib.visible(queries, keys, window, causal)
  weights = jax.nn.softmax(
    jnp.where(seen[:, None, :, None, :], scores, attention_lib.MASKED)
  )
  return jnp.einsum('bktgs,bskd->btkgd', weights, v).reshape(q.shape)


def cached(q, k, v, *places, **settings):
  """The blocked form with keys and values as a cache holds them."""
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  return attention(q, k, v, *places, block=16, cached=True, **settings)


WAYS = {
  'plain': plain,
  'cached': cached,
  'xla': functools.partial(attention, implementation='xla'),
  'blocked': functools.partial(attention, implementation='blocked', block=16),
  'splash': functools.partial(attention_lib.splash, interpret=True),
}
CASES = {
  'whole': (None, 0.0, True),
  'window': (5, 0.0, True),
  'capped': (None, 2.0, True),
  'both ways': (None, 0.0, False),
}


@functools.cache
def program(way, case):
  """Outputs and gradients of all clients, compiled; nothing of padding."""
  window, cap, causal = CASES[case]

  def loss(qkv, places, weight):
    out = WAYS[way](
      *qkv,
      places,
      places,
      window=window,
      causal=causal,
      scale=D**-0.5,
      softcap=cap,
    )
    out = jnp.where(places.segments[..., None, None] > 0, out, 0)
    return jnp.sum(out * weight), out

  q, k, v, places, weight = inputs()
  both = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))
  return both((q, k, v), places, weight)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('way', WAYS)
def test_each_way_equals_the_formula_and_its_gradient(way, case):
  if (way, case) == ('xla', 'capped'):
    with pytest.raises(Error, match='softcap'):
      program(way, case)
    return
  q, k, v, places, _ = inputs()
  gradient, out = program(way, case)
  wanted = formula(q, k, v, places, *CASES[case])
  np.testing.assert_allclose(out, wanted, atol=2e-5)
  assert np.abs(wanted).max() > 1
  for x, y in zip(gradient, program('plain', case)[0]):
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_a_window_may_differ_from_layer_to_layer():
  """A traced window, as in a scan over layers of several windows."""
  q, k, v, places, _ = inputs()
  row = lambda x: jax.tree.map(lambda x: x[0], x)
  for way in ('xla', 'blocked'):
    run = jax.jit(
      lambda window, way=way: WAYS[way](
        *row((q, k, v)), row(places), row(places), window=window
      )
    )
    for window in (0, 5):
      wanted = formula(q, k, v, places, window, 0.0, True)[0]
      real = places.segments[0] > 0
      np.testing.assert_allclose(run(window)[real], wanted[real], atol=2e-5)


def shapes_in(jaxpr):
  """The shapes of all that a program computes, loops and calls included."""
  for equation in jaxpr.eqns:
    yield from (getattr(x.aval, 'shape', ()) for x in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from shapes_in(inner)


@pytest.mark.parametrize('window', [None, 9])
def test_the_blocked_form_never_holds_all_scores(window):
  """Forwards and backwards: at most a block of queries against all keys."""
  length, block = 128, 16

  def largest(way, **settings):
    def loss(q, k, v):
      places = Places(jnp.arange(length)[None], jnp.ones([1, length], int))
      return attention(
        *(q, k, v, places, places),
        implementation=way,
        window=window,
        **settings,
      ).sum()

    shapes = [
      jax.ShapeDtypeStruct((1, length, n, D), 'float32') for n in (4, 2, 2)
    ]
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes)
    return max(map(np.prod, shapes_in(program.jaxpr)))

  assert largest('xla') >= H * length**2
  keys = length if window is None else block + window
  assert largest('blocked', block=block) <= max(
    H * block * keys, length * H * D
  )


def test_the_memory_of_long_rows_grows_with_their_length_not_its_square():
  """What a compiled gradient holds at once, by the compiler's own account."""

  def temporary(way, length):
    def loss(q):
      places = Places(jnp.arange(length)[None], jnp.ones([1, length], int))
      return attention(q, q, q, places, places, implementation=way).sum()

    shape = jax.ShapeDtypeStruct((1, length, 1, D), 'float32')
    compiled = jax.jit(jax.grad(loss)).lower(shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes  # type: ignore

  assert temporary('xla', 2048) > 2048**2 * 4
  assert temporary('blocked', 2048) < 2048**2 * 4 / 2


def test_slots_of_a_cache_may_hold_tokens_in_any_order():
  q, k, v, places, _ = (jax.tree.map(lambda x: x[0], x) for x in inputs())
  shuffle = np.random.default_rng(0).permutation(T + 16)
  slots = lambda x: jnp.pad(x, [(0, 0), (0, 16)] + [(0, 0)] * (x.ndim - 2))
  slots = functools.partial(jax.tree.map, lambda x, f=slots: f(x)[:, shuffle])
  for window in (None, 5):
    found = {
      way: WAYS[way](
        q, slots(k), slots(v), places, slots(places), window=window
      )
      for way in ('xla', 'blocked')
    }
    real = places.segments > 0
    np.testing.assert_allclose(
      found['blocked'][real], found['xla'][real], atol=2e-6
    )


@pytest.mark.parametrize(
  'way, settings, words',
  [
    ('flash', {}, 'auto, blocked, xla, cudnn, splash'),
    ('cudnn', {'backend': 'cpu'}, 'GPU only, and this is CPU'),
    ('splash', {'backend': 'gpu'}, 'TPU only, and this is GPU'),
    ('cudnn', {'backend': 'gpu'}, 'compute_dtype is float32'),
    ('xla', {'softcap': 50.0}, 'no soft cap.*50.0'),
    (
      'cudnn',
      {'backend': 'gpu', 'softcap': 5.0, 'compute_dtype': 'bfloat16'},
      'no soft cap',
    ),
    ('splash', {'backend': 'tpu', 'mixed_windows': True}, 'several'),
  ],
)
def test_what_does_not_exist_here_is_refused(way, settings, words):
  with pytest.raises(Error, match=words):
    choose(way, **settings)


def test_what_exists_is_taken_as_asked_for():
  half = {'compute_dtype': jnp.bfloat16}
  assert choose('cudnn', backend='gpu', **half) == 'cudnn'
  assert choose('splash', backend='tpu', softcap=5.0) == 'splash'
  assert choose('auto', backend='tpu') == 'xla'
  assert choose('auto', backend='tpu', softcap=5.0) == 'blocked'
  assert choose('auto', backend='cpu', mixed_windows=True) == 'blocked'


def test_the_config_of_a_model_says_which():
  with pytest.raises(Error, match='cudnn'):
    models.random(attention='cudnn')
  capped = models.random().config._replace(score_cap=50.0, windows=(7, 0))
  with pytest.raises(Error, match=r'xla.*\(50.0\)'):
    transformer.build(capped, attention='xla')
  assert transformer.build(capped, attention='blocked')
