"""The derivative of the loss of texts against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import models
from fedjax_llm.models.network import layers
from fedjax_llm.types import Batch, Model

LENGTH, WIDTH, WORDS = 7, 4, 11
KEY = jax.random.key(0)
_rng = np.random.default_rng(0)
TABLE = _rng.standard_normal((WORDS, WIDTH)).astype(np.float32)
HEAD = _rng.standard_normal((WIDTH, WORDS)).astype(np.float32)
START = {
  'mix': _rng.standard_normal((WIDTH, WIDTH)).astype(np.float32),
  'head': _rng.standard_normal((WIDTH, WORDS)).astype(np.float32),
}
TOKENS = _rng.integers(0, WORDS, (2, LENGTH)).astype(np.int32)
BATCH = Batch(
  TOKENS,
  np.arange(LENGTH) % 3 > 0 * TOKENS,
  np.ones_like(TOKENS),
  np.arange(LENGTH, dtype=np.int32) + 0 * TOKENS,
)
MODEL = Model(
  hidden=lambda base, p, batch: jnp.tanh(base[0][batch.tokens] @ p['mix']),
  logits=lambda base, p, h: h @ (base[1] + p.get('head', 0.0)),
)


def plain(params):
  hidden = MODEL.hidden((TABLE, HEAD), params, BATCH)[:, :-1]
  log_p = jax.nn.log_softmax(MODEL.logits((TABLE, HEAD), params, hidden))
  each = jnp.take_along_axis(log_p, TOKENS[:, 1:, None], -1)[..., 0]
  return -jnp.sum(jnp.where(BATCH.loss_mask[:, 1:], each, 0.0))


def ours(chunk_size=512):
  loss = fl.local.causal_lm(MODEL, chunk_size=chunk_size)
  base = jnp.asarray(TABLE), jnp.asarray(HEAD)
  return jax.jit(lambda params: loss(base, params, BATCH, KEY).total)


@pytest.mark.parametrize('names', [('mix',), ('mix', 'head'), ('head',)])
@pytest.mark.parametrize('chunk_size', [5, 512])
def test_derivatives_are_those_of_the_plain_formula(names, chunk_size):
  params = {name: jnp.asarray(START[name]) for name in names}
  if 'mix' not in names:
    fixed = {'mix': jnp.asarray(START['mix'])}
  else:
    fixed = {}
  at = lambda function: lambda p: function({**fixed, **p})
  value, grads = jax.value_and_grad(at(ours(chunk_size)))(params)
  expected, right = jax.value_and_grad(at(plain))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name in names:
    np.testing.assert_allclose(grads[name], right[name], atol=2e-5)
  # In forward mode, and over a batch of parameters.
  _, slope = jax.jvp(at(ours(chunk_size)), (params,), (params,))
  along = sum(jnp.vdot(right[name], params[name]) for name in names)
  np.testing.assert_allclose(slope, along, rtol=1e-4)
  two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  several = jax.vmap(jax.grad(at(ours(chunk_size))))(two)
  for name in names:
    np.testing.assert_allclose(several[name][0], right[name], atol=2e-5)


def test_the_second_derivative_is_that_of_the_plain_formula():
  params, fixed = jnp.asarray(START['mix']), ours()
  along = lambda f: jax.grad(
    lambda x: jnp.sum(jax.grad(lambda mix: f({'mix': mix}))(x) ** 2)
  )(params)
  right = along(plain)
  np.testing.assert_allclose(along(fixed), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('chunk_size', [5, 512])
def test_logits_of_a_fixed_head_are_computed_once(chunk_size):
  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'dot_general':
        yield any(WORDS in x.aval.shape for x in (*eqn.invars, *eqn.outvars))
      for inner in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
      ):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from sizes(inner)

  params = {'mix': jnp.asarray(START['mix'])}
  traced = jax.make_jaxpr(jax.grad(ours(chunk_size)))(params)
  # Logits, and their gradient times the head: no second time.
  assert sum(sizes(traced.jaxpr)) == 2


def test_a_padded_state_that_is_no_number_leaves_the_gradient_alone():
  spoilt = np.where(np.arange(WORDS)[:, None] == TOKENS[0, 2], np.nan, TABLE)
  mask = BATCH.loss_mask & (np.roll(TOKENS, 1, 1) != TOKENS[0, 2])
  batch = BATCH._replace(loss_mask=mask)
  loss = fl.local.causal_lm(
    MODEL._replace(hidden=lambda base, p, b: base[0][b.tokens] + p['shift'])
  )

  def of(table):
    total = lambda p: loss((jnp.asarray(table), HEAD), p, batch, KEY).total
    return jax.grad(total)({'shift': jnp.zeros(WIDTH)})['shift']

  assert mask[:, 1:].any()
  np.testing.assert_array_equal(of(spoilt), of(TABLE))


@pytest.mark.parametrize('kind', ['rms', 'rms_plus_one', 'layer'])
def test_norms_have_the_derivative_of_their_formula(kind):
  x, t = jnp.asarray(START['head']), jnp.asarray(HEAD)
  scale = jnp.linspace(-1.0, 2.0, WORDS)
  w = {'scale': scale, 'bias': jnp.zeros(WORDS)}

  def formula(x):
    if kind == 'layer':
      x = x - x.mean(-1, keepdims=True)
    unit = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return unit * (scale + (kind == 'rms_plus_one'))

  norm = lambda x: layers.norm(x, w, None, kind, 1e-5)
  (y, moved), (right, there) = (jax.jvp(f, (x,), (t,)) for f in (norm, formula))
  np.testing.assert_allclose(y, right, atol=1e-6)
  np.testing.assert_allclose(moved, there, atol=1e-5)
  back = [jax.vjp(f, x)[1](t)[0] for f in (norm, formula)]
  np.testing.assert_allclose(*back, atol=1e-5)


@pytest.mark.parametrize('name', sorted(layers.ACTIVATIONS))
@pytest.mark.parametrize('gated', [False, True])
def test_activations_have_the_derivative_of_their_formula(name, gated):
  x, u = jnp.asarray(TABLE), jnp.asarray(TABLE[::-1].copy())
  act = layers.ACTIVATIONS[name]
  formula = (lambda x, u: act(x) * u) if gated else lambda x, u: act(x)
  ours = lambda x, u: layers._activated(name, x, u if gated else None)
  np.testing.assert_array_equal(ours(x, u), formula(x, u))
  back = [jax.vjp(f, x, u)[1](x + 1) for f in (ours, formula)]
  for one, other in zip(*back, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_gated_layer_keeps_two_arrays_of_its_inner_width():
  loaded = models.random(
    vocab_size=WORDS, hidden_size=8, intermediate_size=24, num_heads=2
  )
  ones = jnp.ones((1, 3), jnp.int32)
  batch = Batch(ones, ones > 0, ones, jnp.arange(3)[None])
  params = fl.adapters.lora(2, 4).init(jax.random.key(0), loaded.base)
  of = lambda p: loaded.model.hidden(loaded.base, p, batch)
  kept = jax.eval_shape(lambda p: jax.vjp(of, p)[1], params)
  inner = [x for x in jax.tree.leaves(kept) if x.shape[-2:] == (3, 24)]
  assert len(inner) == 2
