"""Sketches of later families on the client's side, on the real transformer.

Each is a part or two in the shape of `types`, trained in a real round, and
checked against a closed form. A comment names the contract that it stands on:
without it the test fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import K, close, draw

from fedjax_llm import local, nodes, recipes, tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.local.sgd import clip as clip_to
from fedjax_llm.types import (
  ClientOutput,
  LocalUpdate,
  LossSum,
  Work,
)

RATE = 0.5

# --------------------------------------------------------------- gradients --


def forward(loss, base, trained, start, batch, key):
  """Forward gradient (Baydin et al. 2022): z (z . g), by one jvp."""
  z = draw(key, trained)
  of = lambda now: mean_loss(loss, base, now, start, batch, key)
  _, slope, sums = jax.jvp(of, (trained,), (z,), has_aux=True)
  return tree.scale(z, slope), sums


def two_point(eps=0.02):
  """SPSA (Spall 1992): z (L(p + eps z) - L(p - eps z)) / (2 eps)."""

  def gradient(loss, base, trained, start, batch, key):
    z = draw(key, trained)
    at = lambda size: mean_loss(
      loss, base, tree.add(trained, tree.scale(z, size)), start, batch, key
    )
    (above, sums), (below, _) = at(eps), at(-eps)
    return tree.scale(z, (above - below) / (2 * eps)), sums

  return gradient


def fed_spsa(*, loss, optimizer, upload=None, block_size=None, eps=0.02):
  """A recipe that a config names by its import path."""
  update = local.sgd(loss, optimizer, gradient=two_point(eps))
  parts = {} if upload is None else {'upload': upload}
  return recipes.compose(update, block_size=block_size, **parts)


@pytest.mark.parametrize('name', ['forward', 'two_point'])
def test_a_gradient_along_one_direction(name):
  """Contract: `sgd(gradient=)`, and its key of (seed, round, client, step)."""
  params, cohort = tiny.lora(), tiny.cohort(steps=1)
  gradient = {'forward': forward, 'two_point': two_point()}[name]
  update = local.sgd(tiny.loss, tiny.sgd(RATE), gradient=gradient)
  state, _, _ = tiny.run(recipes.compose(update), params, cohort)
  trained = tiny.floats(params)
  keys = jax.vmap(jax.random.fold_in, (0, None))(tiny.client_key(tiny.IDS), 0)
  z = jax.vmap(lambda key: draw(key, trained))(keys)
  first = jax.tree.map(lambda x: x[:, 0], cohort.batches)
  g = tiny.gradients(params, trained, first)
  slope = jax.vmap(tree.dot)(z, g)
  want = jax.vmap(tree.scale)(z, -RATE * slope)
  rtol = {'forward': 1e-4, 'two_point': 0.02}[name]
  close(tiny.moved(state.params, params), tiny.mean(want, cohort.weight), rtol)


def test_two_points_of_a_quadratic_are_exact_and_in_the_mean_its_gradient():
  rng = np.random.default_rng(0)
  half = rng.normal(size=(4, 4)).astype(np.float32)
  hessian, x = half @ half.T, rng.normal(size=4).astype(np.float32)

  def loss(base, p, batch, key):
    return LossSum(0.5 * p @ hessian @ p, jnp.float32(1), jnp.float32(0))

  run = jax.jit(
    jax.vmap(lambda key: two_point(0.5)(loss, None, x, x, None, key)[0])
  )
  keys = jax.random.split(tiny.KEY, 4096)
  z = jax.vmap(lambda key: draw(key, x))(keys)
  estimates = run(keys)
  np.testing.assert_allclose(
    estimates, z * (z @ hessian @ x)[:, None], rtol=1e-3, atol=1e-3
  )
  # The variance of an entry is at most 2 |g|^2: six deviations of the mean.
  g = hessian @ x
  bound = 6 * np.sqrt(2 / 4096) * np.linalg.norm(g)
  assert np.abs(np.mean(estimates, 0) - g).max() < bound


def per_example(clip):
  """Every row's gradient is clipped by itself (Abadi et al. 2016)."""

  def gradient(loss, base, trained, start, batch, key):
    def one(row):
      alone = jax.tree.map(lambda x: x[None], row)
      of = lambda now: mean_loss(loss, base, now, start, alone, key)
      grads, sums = jax.grad(of, has_aux=True)(trained)
      return clip_to(grads, clip), sums

    grads, sums = jax.vmap(one)(batch)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), grads)
    return mean, jax.tree.map(jnp.sum, sums)

  return gradient


def test_gradients_of_single_texts_are_clipped():
  """Contract: a `Gradient` sees the batch, and gives its own sums."""
  params, cohort, clip = tiny.lora(), tiny.cohort(steps=1), 0.3
  update = local.sgd(tiny.loss, tiny.sgd(RATE), gradient=per_example(clip))
  state, _, info = tiny.run(recipes.compose(update), params, cohort)
  rows = jax.tree.map(lambda x: x.reshape(-1, 1, x.shape[-1]), cohort.batches)
  g = tiny.gradients(params, tiny.floats(params), rows)  # [K B] texts alone
  norms = np.array(jax.vmap(tree.norm)(g))
  assert norms.min() < clip < norms.max() or norms.min() > clip
  each = np.minimum(1, clip / norms) * np.repeat(cohort.weight, tiny.B)
  want = jax.tree.map(
    lambda x: -RATE * np.tensordot(each, np.asarray(x), 1) / each.size, g
  )
  want = tree.scale(want, K / cohort.weight.sum())
  close(tiny.moved(state.params, params), want)
  assert info.metrics['local/tokens'] == cohort.batches.loss_mask.sum()


# --------------------------------------------------------- black-box steps --


def evolved(loss, *, population=4, sigma=0.1, rate=0.2) -> LocalUpdate:
  """An evolution strategy (Salimans et al. 2017): values, no gradient."""

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    first = tree.like(start, masks.trained)

    def step(now, inputs):
      batch, key = inputs

      def member(key):
        noise = draw(key, now)
        point = tree.add(now, tree.scale(noise, sigma))
        return noise, mean_loss(loss, base, point, start, batch, key)

      keys = jax.random.split(key, population)
      noise, (values, sums) = jax.lax.map(member, keys)
      slopes = (values - values.mean()) / (population * sigma)
      now = tree.sub(now, tree.scale(tree.weighted_sum(noise, slopes), rate))
      return now, (values.mean(), sums.count[0])

    num = jax.tree.leaves(batches)[0].shape[0]
    keys = jax.random.split(context.key, num)
    end, (values, tokens) = jax.lax.scan(step, first, (batches, keys))
    return ClientOutput(
      update=tree.apply_mask(tree.sub(end, first), masks.trained),
      masks=masks,
      work=Work(jnp.sum(tokens), num, turns=num),
      metrics={'loss': jnp.mean(values), 'spread': jnp.std(values)},
    )

  return LocalUpdate(lambda params: (), run)


@jax.custom_jvp
def no_derivative(x):
  return x


@no_derivative.defjvp
def _(primals, tangents):
  raise AssertionError('the network was differentiated')


def values_only(base, params, batch, key):
  return jax.tree.map(no_derivative, tiny.loss(base, params, batch, key))


def test_an_evolution_strategy_on_a_prompt_needs_no_derivative():
  """Contract: any `LocalUpdate`; `ClientOutput.metrics`, `Context.key`."""
  rows = tiny.base()['embed_tokens']['embedding'][20:23]
  params, cohort = {'inputs': nodes.Prompt(rows)}, tiny.cohort(steps=1)
  algorithm = recipes.compose(evolved(values_only, rate=0.2))
  state, _, info = tiny.run(algorithm, params, cohort)
  with pytest.raises(AssertionError, match='was differentiated'):
    tiny.run(recipes.fed_avg(values_only, tiny.sgd()), params, cohort)

  @jax.jit
  def value(batch, key):
    noise = draw(key, params)
    point = tree.add(params, tree.scale(noise, 0.1))
    sums = tiny.loss(tiny.base(), point, batch, None)
    return noise, sums.total / sums.count

  steps = []
  for k, key in enumerate(tiny.client_key(tiny.IDS)):
    batch = jax.tree.map(lambda x, k=k: x[k, 0], cohort.batches)
    keys = jax.random.split(jax.random.split(key, 1)[0], 4)
    noise, values = zip(*(value(batch, key) for key in keys))
    centred = np.asarray(values) - np.mean(values)
    move = lambda *z, c=centred: -0.2 * sum(a * b for a, b in zip(c, z)) / 0.4
    steps.append(jax.tree.map(move, *noise))
  want = tiny.mean(tree.stack(steps), cohort.weight)
  close(tiny.moved(state.params, params), want, rtol=1e-3)
  assert info.metrics['local/spread'] == 0  # one step has one value
