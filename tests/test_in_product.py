"""Whole weights perturbed inside of their products, against explicit copies."""

import functools
import pathlib
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import adapters, local, models, recipes, tree
from fedjax_llm.nodes import Swayed, swayed
from fedjax_llm.recipes.zeroth_order import fed_kseed_base as method
from fedjax_llm.run import config, experiment, sections
from fedjax_llm.types import Cohort, Context, Error

L, D, F, J = 2, 6, 4, 3
POOL, EPS, RATE, S = 5, 2e-2, 0.05, 3


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(swayed, 'BLOCK', 2 * F)


def node(sizes=(0.5, 0.0, -2.0), count=J):
  keys = jax.random.split(jax.random.key(3), J)
  return Swayed(
    swayed.key_data(keys, 'q', L),
    jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (L, J)),
    jnp.full(L, count, jnp.int32),
  )


def drawn(sizes, count=J, rows=2):
  """sum_j sizes_j Z_j in float64, from the keys of weight, layer and block."""
  whole = np.zeros((L, D, F))
  for j, key in enumerate(jax.random.split(jax.random.key(3), J)[:count]):
    own = jax.random.fold_in(key, np.uint32(zlib.crc32(b'q')))
    for layer in range(L):
      at = jax.random.fold_in(own, layer)
      blocks = [
        jax.random.normal(jax.random.fold_in(at, b), (rows, F))
        for b in range(D // rows)
      ]
      whole[layer] += sizes[j] * np.concatenate(blocks).astype(float)
  return whole


def test_the_product_equals_that_with_the_written_weight(small_blocks):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(L, D, F)).astype(np.float32)
  x = rng.normal(size=(5, D)).astype(np.float32)
  for sizes, count in (((0.5, 0.0, -2.0), 3), ((0.5, 1.0, -2.0), 2)):
    one = node(sizes, count)
    want = w + drawn(sizes, count)
    tiny.close(one.write(w), want, rtol=1e-5, atol=1e-5)
    for layer in range(L):
      row = tree.take(one, layer)
      got = row.act(x, x @ w[layer], w[layer])
      tiny.close(got, x @ want[layer], rtol=1e-4, atol=1e-4)
  moved, rest = node().fold(w)
  tiny.close(moved, w + drawn((0.5, 0.0, -2.0)), rtol=1e-5, atol=1e-5)
  tiny.close(rest.write(moved), moved, rtol=0, atol=0)
  # Blocks, layers and directions differ.
  z = [drawn(np.eye(J)[j]) for j in range(J)]
  assert abs(np.corrcoef(z[0].ravel(), z[1].ravel())[0, 1]) < 0.5
  assert np.abs(z[0][0] - z[0][1]).max() > 0.1
  assert np.abs(z[0][0][:2] - z[0][0][2:4]).max() > 0.1
  with pytest.raises(Error, match='has 2 layers, and the weight has 3'):
    node().check((3, D, F), 'q')


@functools.cache
def network():
  return tiny.loaded(2)


@functools.cache
def adapter():
  return adapters.swayed(('q_proj', 'up_proj'))


def kseed(**settings):
  settings = {'candidates': POOL, 'eps': EPS, **settings}
  loss = local.causal_lm(network().model)
  return recipes.fed_kseed_base(
    loss, local.optimizer('sgd', RATE), fold=adapter().fold, **settings
  )


@functools.cache
def cohort():
  batches = tiny.texts(2, S, tiny.B, seed=6)
  return Cohort(
    np.array([4, 1], np.int32),
    batches,
    np.array([1, 3], np.float32),
    np.ones(2, bool),
  )


@functools.cache
def learned():
  """A start with a histogram, and the state and outcome after a round."""
  algorithm = kseed()
  params = adapter().init(tiny.KEY, network().base)
  start = algorithm.init(tiny.KEY, params)
  before = jnp.linspace(-0.02, 0.02, POOL).at[2].set(0)
  start = start._replace(params=start.params._replace(coefficients=before))
  states = tiny.fresh(algorithm, start, 2)
  step = jax.jit(algorithm.round)
  state, _, info = step(start, cohort()._replace(states=states), network().base)
  return start, state, info


def test_a_round_equals_that_on_explicit_copies_of_the_weights():
  start, state, _ = learned()
  params, seed = start.params.params, start.params.seed
  pool = method._keys(seed, jnp.arange(POOL))
  merge = jax.jit(adapter().merge)
  loss = jax.jit(
    lambda base, batch: local.causal_lm(network().model)(
      base, {}, batch, tiny.KEY
    )
  )

  def moved(base, sizes):
    return merge(
      base, method.swayed(params, pool, jnp.asarray(sizes, jnp.float32), POOL)
    )

  whole = moved(network().base, start.params.coefficients)
  updates = []
  for k, key in enumerate(tiny.client_key(cohort().ids)):
    draws = jax.random.fold_in(key, POOL)
    places = np.asarray(jax.random.randint(draws, (S,), 0, POOL))
    mine, copy = np.zeros(POOL), whole
    for s, j in enumerate(places):
      batch = tree.take(tree.take(cohort().batches, k), s)
      z = np.eye(POOL)[j]
      sums = [loss(moved(copy, size * z), batch) for size in (EPS, -EPS)]
      above, below = (float(x.total) / float(x.count) for x in sums)
      change = -RATE * (above - below) / (2 * EPS)
      mine[j] += change
      copy = moved(copy, change * z)  # the copy that the method never makes
    updates.append(mine)
  want = np.average(updates, 0, [1, 3])
  got = state.params.coefficients - start.params.coefficients
  tiny.close(got, want, rtol=2e-2, atol=2e-5)
  assert np.abs(want).max() > 1e-3
  # The neighbour steps from the weights before the round.
  assert np.abs(updates[0] - updates[1]).max() > 1e-3


def test_the_served_model_has_the_written_weights():
  _, state, _ = learned()
  algorithm = kseed()
  served = algorithm.personal(state.params, None)
  batch = jax.tree.map(jnp.asarray, tiny.texts(tiny.B))

  @jax.jit
  def both(base, served, batch):
    beside = network().model.hidden(base, served, batch)
    written = adapter().merge(base, served)
    plain = network().model.hidden(base, {}, batch)
    return beside, network().model.hidden(written, {}, batch), plain

  beside, written, plain = both(network().base, served, batch)
  tiny.close(beside, written, rtol=1e-4, atol=1e-4)
  assert tiny.differs(beside, plain)


def test_a_client_sends_seeds_in_under_18_kb():
  """4 K bytes down, 8 bytes a step up: 200 steps of the paper fit."""
  _, _, info = learned()
  drawn = [
    len(set(np.asarray(jax.random.randint(
      jax.random.fold_in(key, POOL), (S,), 0, POOL)).tolist()))
    for key in tiny.client_key(cohort().ids)
  ]  # fmt: skip
  assert np.asarray(info.bytes_up).sum(1).tolist() == [8 * n for n in drawn]
  assert np.asarray(info.bytes_down).sum(1).tolist() == [4 * POOL] * 2
  params = adapter().init(tiny.KEY, network().base)
  state = kseed(candidates=4096).init(tiny.KEY, params)
  assert state.params.coefficients.nbytes + 8 * 200 < 18_000


def test_no_client_has_weights_of_its_own():
  """In the compiled clients' half no array has the shape of K weights."""
  update = method.in_product(
    local.causal_lm(network().model), local.optimizer('sgd', RATE), EPS, POOL
  )
  start = learned()[0].params

  def clients(base, start, batches, keys):
    run = lambda batch, key: (
      update.run(
        base, start, (), batch, None, Context(round=jnp.int32(0), key=key)
      ).update.coefficients
    )
    return jax.vmap(run)(batches, keys)

  keys = jax.random.split(tiny.KEY, 2)
  compiled = jax.jit(clients).lower(
    network().base, start, cohort().batches, keys
  ).compile()  # fmt: skip
  text = compiled.as_text() or ''
  shapes = re.findall(r'f32\[([\d,]+)\]', text)
  sizes = {tuple(map(int, shape.split(','))) for shape in shapes}
  layers = network().base['layers']
  for module in (layers['self_attn']['q_proj'], layers['mlp']['up_proj']):
    shape = module['kernel'].shape  # [L, D, F]
    assert shape in sizes  # the base, which is there once
    assert (2, *shape) not in sizes


def test_a_step_has_the_memory_of_inference(monkeypatch):
  """A step on explicit copies holds all perturbed weights once more."""
  monkeypatch.setattr(swayed, 'BLOCK', 256)
  loaded = models.random(vocab_size=29, hidden_size=64, num_layers=4)
  params = adapter().init(tiny.KEY, loaded.base)
  loss = local.causal_lm(loaded.model)
  batch = tree.take(tree.take(cohort().batches, 0), 0)
  keys = method._keys(jnp.uint32(0), jnp.arange(S))

  def value(base, params):
    return loss(base, params, batch, tiny.KEY).total

  def two_points(of):
    def step(base, sizes):
      nodes = lambda size: method.swayed(params, keys, sizes.at[0].set(size), S)
      return of(base, nodes(EPS)) - of(base, nodes(-EPS))

    return step

  def peak(function):
    compiled = jax.jit(function).lower(loaded.base, jnp.zeros(S)).compile()
    sizes: Any = compiled.memory_analysis()
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

  first = peak(lambda base, sizes: value(base, {}) + sizes[0])
  assert peak(two_points(value)) <= 1.15 * first
  copied = lambda base, nodes: value(adapter().merge(base, nodes), {})
  layers = loaded.base['layers']
  weights = layers['self_attn']['q_proj'], layers['mlp']['up_proj']
  more = sum(module['kernel'].nbytes for module in weights)
  assert peak(two_points(copied)) >= first + more


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(candidates=0), 'candidates=0 must be at least 1'),
    (dict(eps=0.0), r'eps=0\.0 must be above 0'),
    (dict(scope=object()), 'brings its own scope'),
  ],
)
def test_settings_without_sense_are_refused(settings, words):
  with pytest.raises(Error, match=words):
    kseed(**settings)


def test_other_adapters_optimizers_and_no_fold_are_refused():
  loss = local.causal_lm(network().model)
  lora = adapters.lora(2, targets='q_proj').init(tiny.KEY, network().base)
  with pytest.raises(Error, match='only nodes of adapter'):
    kseed().init(tiny.KEY, lora)
  with pytest.raises(Error, match='needs fold, the adapter'):
    recipes.fed_kseed_base(loss, local.optimizer('sgd'))
  with pytest.raises(Error, match='without momentum'):
    recipes.fed_kseed_base(loss, local.optimizer('adamw'), fold=adapter().fold)


def test_the_adapter_is_refused_where_a_method_trains_nothing_of_it():
  path = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
  argv = ['--config', f'{path}:fed_avg:smoke', '--workdir', 'none']
  words = '--config.adapter.name=swayed'
  conf = config.parse([*argv, words], sections.SPEC).config
  with pytest.raises(Error, match='has no parameter that algorithm'):
    experiment.algorithm(
      conf, loss=None, model=None, adapter=adapter(), num_clients=3
    )
