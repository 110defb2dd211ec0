"""Prompt methods: float64 references, identities, neighbours, bytes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest
import references_prompts as ref
import tiny
from prompted import IDS, D, K, N, P, S, apart, close

from fedjax_llm import adapters, recipes, tree
from fedjax_llm.local import distillation, evolution
from fedjax_llm.recipes.prompts import fed_bbpt as bbpt
from fedjax_llm.recipes.prompts import fed_bpt as bpt
from fedjax_llm.recipes.prompts import p_fed_pg as pg
from fedjax_llm.types import Error

RATE = 0.5
ROWS = np.asarray(toy.prompt()['inputs'].rows)
BYTES = P * D * 4  # of a prompt


@functools.cache
def history(name, rate=RATE, rounds=2, **settings):
  algorithm = getattr(recipes, name)(
    toy.LOSS, toy.sgd(rate), upload=toy.watched(), **settings
  )
  return algorithm, toy.run(algorithm, toy.prompt(), rounds)


def check_bytes(states, info, up, down):
  for k in range(K):
    assert len(toy.wire(states, k)) == info.bytes_up[k].sum() == up
  assert info.bytes_down.sum(1).tolist() == [down] * K


# ------------------------------------------------------------------ CMA-ES --


@pytest.mark.parametrize('raw', ['all', 'parents'])
def test_a_generation_equals_the_tutorials(raw):
  rng = np.random.default_rng(0)
  n, population = 3, 6
  raw = evolution.raw_weights(6) if raw == 'all' else evolution.parents(6)
  want = ref.CMA(rng.normal(size=n), 0.7)
  state = evolution.started(jnp.float32(want.m), 0.7)
  step = jax.jit(evolution.moved)
  for _ in range(5):
    z = rng.normal(size=(population, n))
    xs = want.m + want.sigma * z @ ref.root(want.C, 0.5)
    values = (xs**2).sum(1)
    want.tell(xs, values, raw)
    state = step(
      state,
      jnp.float32(xs),
      jnp.float32(values),
      evolution.constants(raw, n),
    )
  close(state.mean, want.m)
  close(state.sigma, want.sigma)
  close(state.covariance, want.C, atol=1e-4)
  close(state.path, want.pc, atol=1e-4)
  apart(want.C, np.eye(n), by=0.05)


def test_the_strategy_finds_a_minimum():
  target = jnp.array([1.0, -2.0, 0.5])
  constants = evolution.constants(evolution.raw_weights(8), 3)

  def step(number, state):
    key = jax.random.fold_in(toy.KEY, number)
    xs = evolution.asked(state, key, 8)
    return evolution.moved(state, xs, jnp.sum((xs - target) ** 2, 1), constants)

  start = evolution.started(jnp.zeros(3), 1.0)
  end = jax.jit(lambda s: jax.lax.fori_loop(0, 80, step, s))(start)
  close(end.mean, target, atol=1e-2)


# ------------------------------------------------------------------ FedBPT --

SEARCH = dict(dimension=3, population=4, generations=2)


def searched(A, batch):
  """The loss [k, z] of `batch` with the prompt of z."""

  def value(k, z):
    rows = ROWS + np.tensordot(z, A, 1)
    data = [toy.rows_of(batch, k, s) for s in range(S)]
    nats = [
      toy.nll(toy.logits(toy.hidden(x, rows)), y) * len(y) for x, y in data
    ]
    return sum(nats) / sum(len(y) for _, y in data)

  return value


def normals_of(rounds):
  """The draws of the clients' generations."""
  return [
    [
      np.stack([
        jax.random.normal(
          jax.random.fold_in(toy.client_key(k, t), i), (4, 3), jnp.float32
        )
        for i in range(2)
      ])
      for k in IDS
    ]
    for t in range(rounds)
  ]  # fmt: skip


def test_fed_bpt_equals_a_float64_loop():
  _, seen = history('fed_bpt', **SEARCH)
  state = seen[-1][0]
  A = toy.f64(seen[0][0].params['projection']['inputs'].rows)
  value, normals = searched(A, toy.cohort().batches), normals_of(2)
  want, sigma_c = ref.fed_bpt(value, normals, 3, 1.0, 2, K, mu=2)
  close(state.params['z'], want.m, atol=1e-4)
  close(state.aggregator[0], sigma_c, atol=1e-4)
  close(state.aggregator[1].covariance, want.C, atol=1e-4)
  # Neighbour: the weighted mean of the clients' means.
  once = seen[1][0].params['z']
  own = toy.mean(np.asarray(seen[1][1].upload[0]['z']))
  apart(once, own)


def test_fed_bpt_divides_by_the_loss_of_disturbed_texts():
  algorithm = recipes.fed_bpt(toy.LOSS, toy.sgd(), perturbed=0.5, **SEARCH)
  state = algorithm.init(toy.KEY, toy.prompt())
  A = toy.f64(state.params['projection']['inputs'].rows)
  cohort = toy.cohort()
  states = tree.broadcast(algorithm.init_client(state.params), K)
  base = {**toy.base(), 'embed_tokens': {'embedding': toy.base()['embed']}}
  new, _, info = jax.jit(algorithm.round)(
    state, cohort._replace(states=states), base
  )
  noisy = cohort.batches.tokens.copy()
  for k, client in enumerate(IDS):
    own = jax.tree.map(lambda x, k=k: x[k], cohort.batches)
    key = toy.client_key(client, 0)
    noisy[k] = bpt.disturbed(own, key, 0.5, toy.V).tokens
  changed = np.mean(noisy != cohort.batches.tokens)
  assert 0.2 < changed < 0.7  # a ninth of the drawn tokens are the old ones
  clean = searched(A, cohort.batches)
  other = searched(A, cohort.batches._replace(tokens=noisy))
  ratio = lambda k, z: clean(k, z) / other(k, z)
  want, _ = ref.fed_bpt(ratio, normals_of(1), 3, 1.0, 1, K, mu=2)
  close(new.params['z'], want.m, atol=1e-4)
  plain, _ = ref.fed_bpt(clean, normals_of(1), 3, 1.0, 1, K, mu=2)
  apart(new.params['z'], plain.m)
  # The loss of the metrics is that of the texts as they are.
  assert info.metrics['local/loss'] > 0.5


def test_fed_bpt_sends_a_mean_and_receives_the_strategy():
  _, seen = history('fed_bpt', **SEARCH)
  check_bytes(*seen[-1][1:], up=4 * (3 + 1 + 2), down=4 * (3 + 9 + 1))


def test_fed_bpt_serves_the_projected_prompt():
  algorithm, seen = history('fed_bpt', **SEARCH)
  params = seen[-1][0].params
  served = algorithm.personal(params, None)['inputs'].rows
  A = params['projection']['inputs'].rows
  close(served, ROWS + np.tensordot(params['z'], A, 1))
  assert tree.norm(bpt.prompted(seen[0][0].params)) == tree.norm(toy.prompt())


def test_fed_bpt_ignores_a_client_that_drops_out():
  algorithm = history('fed_bpt', **SEARCH)[0]
  cohort = toy.cohort()
  state = algorithm.init(toy.KEY, toy.prompt())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  ends = []
  for ids, valid in ((IDS, [1, 0, 1]), ([4, 5, 2], [1, 0, 1])):
    of = cohort._replace(
      ids=np.asarray(ids, np.int32), valid=np.array(valid, bool), states=states
    )
    new, _, _ = jax.jit(algorithm.round)(state, of, toy.base())
    ends.append(new.params['z'])
  np.testing.assert_array_equal(ends[0], ends[1])
  assert np.isfinite(ends[0]).all() and np.abs(ends[0]).max() > 0


# --------------------------------------------- nothing is differentiated --


@jax.custom_vjp
def _marked(total):
  return total


_marked.defvjp(lambda total: (total, ()), lambda _, g: (g,))


def marked(base, params, batch, key):
  sums = toy.LOSS(base, params, batch, key)
  return sums._replace(total=_marked(sums.total))


@pytest.mark.parametrize(
  'name, settings, values_only',
  [('fed_bpt', SEARCH, True), ('fed_bbpt', {}, True), ('fed_avg', {}, False)],
)
def test_the_program_differentiates_nothing(name, settings, values_only):
  """A derivative replaces the call of a function with its own rule."""
  algorithm = getattr(recipes, name)(marked, toy.sgd(), **settings)
  state = algorithm.init(toy.KEY, toy.prompt())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  program = jax.make_jaxpr(algorithm.round)(
    state, toy.cohort()._replace(states=states), toy.base()
  )
  assert ('custom_vjp_call' in str(program)) == values_only


# ---------------------------------------------------------------- Fed-BBPT --


def bbpt_reference(momentum, c=0.05, rate=0.1):
  batch, ends = toy.cohort().batches, []
  like = {'inputs': toy.prompt()['inputs']}
  for k, client in enumerate(IDS):
    p, v = toy.f64(ROWS), np.zeros_like(ROWS)
    for s in range(S):
      key = jax.random.fold_in(toy.client_key(client, 0), s)
      u = bbpt.direction(jax.random.fold_in(key, 0), like)['inputs'].rows
      u = toy.f64(u)
      gap = ref.loss_of(batch, k, s, p + c * u)
      gap -= ref.loss_of(batch, k, s, p - c * u)
      g = gap / (2 * c) / u
      v = momentum * v + g
      p = p - rate * (g + momentum * v)
    ends.append(p)
  return toy.mean(ends)


def test_fed_bbpt_equals_a_float64_loop():
  algorithm = recipes.fed_bbpt(
    toy.LOSS,
    toy.sgd(0.1, momentum=0.9, nesterov=True),
    radius=0.05,
    upload=toy.watched(),
  )
  state, states, info = toy.run(algorithm, toy.prompt(), 1)[-1]
  want = bbpt_reference(0.9)
  close(state.params['inputs'].rows, want, atol=1e-4)
  apart(bbpt_reference(0.0), want)  # without the correction
  apart(ref.fed_prompt(toy.cohort().batches, ROWS, 0.1, 1, K, S), want)
  check_bytes(states, info, BYTES, BYTES)


def test_the_mean_of_many_estimates_is_the_gradient():
  batch = jax.tree.map(lambda x: x[0, 0], toy.cohort().batches)
  slope = bbpt.perturbed(1e-2, samples=4000)
  params = toy.prompt()
  of = jax.jit(lambda p: slope(toy.LOSS, toy.base(), p, p, batch, toy.KEY))
  grads, sums = of(params)
  exact = toy.slope(lambda x: ref.loss_of(toy.cohort().batches, 0, 0, x), ROWS)
  close(grads['inputs'].rows, exact, atol=0.03)
  assert np.abs(exact).max() > 0.1 and sums.count == (batch.label >= 0).sum()


# ------------------------------------------------------------------ pFedPG --

PG = dict(num_clients=N, num_heads=2, server_rate=0.5)


def test_p_fed_pg_equals_a_float64_loop():
  algorithm, seen = history('p_fed_pg', **PG)
  phi = seen[0][0].params['generator']
  train = functools.partial(
    ref.p_fed_pg, phi, toy.cohort().batches, IDS, RATE, 0.5, 2, S
  )
  want = train(heads=2)
  for x, y in zip(seen[-1][0].params['generator'], want):
    close(x, y)
  one = train(heads=1)
  apart(one[1], want[1], by=1e-4)
  served = algorithm.personal(seen[-1][0].params, tree.take(seen[-1][1], 1))
  close(served['inputs'].rows, ref.generate(want, IDS[1], 2))


def test_p_fed_pg_moves_only_descriptors_of_the_cohort():
  _, seen = history('p_fed_pg', **PG)
  start, end = (seen[i][0].params['generator'].descriptors for i in (0, -1))
  changed = np.abs(end - start).max(1) > 0
  assert set(np.flatnonzero(changed)) == set(IDS.tolist())
  _, states, info = seen[-1]
  check_bytes(states, info, BYTES, BYTES)


def test_p_fed_pg_without_attention_is_fed_prompt():
  algorithm, seen = history('p_fed_pg', **PG)
  state = seen[0][0]
  silent = state.params['generator']._replace(out=jnp.zeros((D, D)))
  state = state._replace(params={**state.params, 'generator': silent})
  of = toy.cohort()._replace(states=seen[0][1])
  new, _, _ = jax.jit(algorithm.round)(state, of, toy.base())
  want = ref.fed_prompt(of.batches, ROWS, RATE, 1, K, S)
  # One step: after it the matrices have moved too.
  close(new.params['generator'].common, (ROWS + want) / 2)


def test_p_fed_pg_of_a_newcomer_is_that_of_the_mean_descriptor():
  algorithm, seen = history('p_fed_pg', **PG)
  params = seen[-1][0].params
  phi = params['generator']
  table = jnp.mean(phi.descriptors, 0, keepdims=True)
  want = pg.generate(phi._replace(descriptors=table), 0, 2)
  close(algorithm.personal(params, None)['inputs'].rows, want)


# ------------------------------------------------------------------ FedPGP --


def test_fed_pgp_equals_a_float64_loop():
  algorithm, seen = history('fed_pgp', model=toy.MODEL, rank=2)
  state, states, info = seen[-1]
  own = seen[0][1].private['own']
  batch = toy.cohort().batches
  args = (batch, ROWS, np.asarray(own.left[0]), np.asarray(own.right[0]))
  settings = (RATE, 2, K, S)
  sigma, kept = ref.fed_pgp(*args, *settings, 1.0, 0.5)
  close(state.params['common']['inputs'].rows, sigma)
  for k in range(K):
    close(states.private['own'].left[k], kept[k][0])
    close(states.private['own'].right[k], kept[k][1])
    served = algorithm.personal(state.params, tree.take(states, k))
    close(served['inputs'].rows, sigma + kept[k][0] @ kept[k][1])
  for mu, t in ((0.0, 0.5), (1.0, 1.0)):  # neighbours
    apart(ref.fed_pgp(*args, *settings, mu, t)[0], sigma)
  check_bytes(states, info, BYTES, BYTES)


def test_contrast_of_equal_similarities_is_log_of_their_number():
  near, far = jnp.full(5, 0.3), jnp.full((5, 3), 0.3)
  close(distillation.contrast(near, far), np.full(5, np.log(4)))


# --------------------------------------------------------------- FedPrompt --


def test_fed_prompt_equals_a_float64_loop():
  _, seen = history('fed_prompt')
  state, states, info = seen[-1]
  want = ref.fed_prompt(toy.cohort().batches, ROWS, RATE, 2, K, S)
  close(state.params['inputs'].rows, want)
  apart(state.params['inputs'].rows, ROWS)
  check_bytes(states, info, BYTES, BYTES)


KINDS: dict[str, Any] = {
  'fed_prompt': (dict(name='soft_prompt', length=2), 'a soft prompt'),
  'fed_pf': (dict(name='prefix', length=2), 'a prefix'),
  'fed_p_tuning': (dict(name='p_tuning', length=2), "a prompt's network"),
}


@pytest.mark.parametrize('name', KINDS)
def test_a_method_of_one_kind_of_prompt_refuses_the_others(name):
  base = tiny.base()
  for other, (settings, _) in KINDS.items():
    settings = dict(settings)
    adapter = getattr(adapters, settings.pop('name'))(**settings)
    params = adapter.init(toy.KEY, base)
    algorithm = getattr(recipes, name)(tiny.loss, tiny.sgd())
    if name == other:
      state = algorithm.init(toy.KEY, params)
      assert jax.tree.structure(state.params) == jax.tree.structure(params)
      continue
    with pytest.raises(Error) as error:
      algorithm.init(toy.KEY, params)
    adapter_name, kind = KINDS[name][0]['name'], KINDS[name][1]
    assert str(error.value) == (
      f'{name} trains {kind}: adapter.name={adapter_name}.'
    )


@pytest.mark.parametrize('name', ['fed_pf', 'fed_p_tuning'])
def test_a_step_of_prompts_is_the_mean_of_the_clients_gradients(name):
  settings = dict(KINDS[name][0])
  check_step(name, getattr(adapters, settings.pop('name'))(**settings))


def check_step(name, adapter):
  params = adapter.init(toy.KEY, tiny.base())
  cohort = tiny.cohort(steps=1)
  algorithm = getattr(recipes, name)(tiny.loss, tiny.sgd(0.5), measure=None)
  state, _, info = tiny.run(algorithm, params, cohort)
  first = jax.tree.map(lambda x: x[:, 0], cohort.batches)
  grads = tiny.gradients(params, params, first)
  want = jax.tree.map(lambda g: -0.5 * g, tiny.mean(grads, cohort.weight))
  tiny.close(tiny.moved(state.params, params), want)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert info.bytes_up.sum(1).tolist() == [size] * tiny.K
  plain = tiny.mean(grads, np.ones(tiny.K))
  assert tiny.differs(want, jax.tree.map(lambda g: -0.5 * g, plain))


# ------------------------------------------------------------------ pFedPT --

BOTH = {**toy.prompt(), 'out': {'bias': jnp.zeros(D)}}


def p_fed_pt_reference(rate=0.3, prompt_rate=1.0, epochs=2, rounds=2):
  batch, bias = toy.cohort().batches, np.zeros(D)
  own: list[Any] = [toy.f64(ROWS)] * K

  def of(k, s, rows, bias):
    tokens, label = toy.rows_of(batch, k, s)
    return toy.nll(toy.logits(toy.hidden(tokens, rows) + bias), label)

  for _ in range(rounds):
    ends = []
    for k in range(K):
      for _ in range(epochs):
        for s in range(S):
          own[k] = own[k] - prompt_rate * toy.slope(
            lambda x, k=k, s=s, b=bias: of(k, s, x, b), own[k]
          )
      mine = bias
      for s in range(S):
        mine = mine - rate * toy.slope(
          lambda x, k=k, s=s: of(k, s, own[k], x), mine
        )
      ends.append(mine)
    bias = toy.mean(ends)
  return bias, own


def test_p_fed_pt_equals_a_float64_loop():
  algorithm = recipes.p_fed_pt(
    toy.LOSS, toy.sgd(0.3), prompt_epochs=2, upload=toy.watched()
  )
  state, states, info = toy.run(algorithm, BOTH, 2)[-1]
  bias, own = p_fed_pt_reference()
  close(state.params['out']['bias'], bias)
  for k in range(K):
    close(states.private['inputs'].rows[k], own[k])
    served = algorithm.personal(state.params, tree.take(states, k))
    close(served['inputs'].rows, own[k])
  check_bytes(states, info, 4 * D, 4 * D)
  # Neighbours: FedRep, with one rate and one pass, and one pass alone.
  apart(p_fed_pt_reference(prompt_rate=0.3, epochs=1)[0], bias)
  apart(p_fed_pt_reference(epochs=1)[0], bias)


def test_p_fed_pt_of_one_pass_and_one_rate_is_fed_rep():
  one = recipes.p_fed_pt(
    toy.LOSS, toy.sgd(0.3), prompt_epochs=1, prompt_rate=0.3
  )
  two = recipes.fed_rep(toy.LOSS, toy.sgd(0.3), private='^inputs/')
  ends = [toy.run(x, BOTH, 1)[-1] for x in (one, two)]
  close(ends[0][0].params['out']['bias'], ends[1][0].params['out']['bias'])


# --------------------------------------------------------------- FedPepTAO --


def pep_tao_reference(rounds=3, lr=0.5, beta=0.9, server=0.05, correct=True):
  """Layer 1 is shared, layer 0 the client's own; arrays [2, 2, ...]."""
  q = toy.stacked()['layers']['q']
  a, b = (np.asarray(x, np.float64) for x in (q.a, q.b))
  w: list[Any] = [a[1], b[1]]
  own = [[a[0], b[0]] for _ in range(K)]
  zero = [np.zeros_like(x) for x in w]
  c, v, before = zero, zero, None
  c_k = [zero] * K
  batch, p = toy.cohort().batches, toy.f64(toy.WEIGHT) / toy.WEIGHT.sum()
  for _ in range(rounds):
    ends = []
    for k in range(K):
      a, b = (np.stack([own[k][i], w[i]]) for i in range(2))
      for s in range(S):
        a, b = toy.deep_step(toy.rows_of(batch, k, s), a, b, lr)
      own[k] = [a[0], b[0]]
      ends.append([a[1], b[1]])
    mean = [sum(p[k] * ends[k][i] for k in range(K)) for i in range(2)]
    delta = [w[i] - mean[i] for i in range(2)]
    new = [
      [c_k[k][i] - c[i] + (w[i] - ends[k][i]) / (S * lr) for i in range(2)]
      for k in range(K)
    ]
    gain = [sum(new[k][i] - c_k[k][i] for k in range(K)) / K for i in range(2)]
    c = [c[i] + K / N * gain[i] for i in range(2)]
    c_k = new
    if before is None:
      w = mean
    else:
      server = max(server * 0.99, 1e-4)
      pull = [
        c[i] - sum(p[k] * c_k[k][i] for k in range(K)) if correct else 0.0
        for i in range(2)
      ]
      v = [
        beta * v[i] + (1 - beta) * (before[i] - delta[i]) + pull[i]
        for i in range(2)
      ]
      w = [mean[i] - server * v[i] for i in range(2)]
    before = delta
  return w, own


def test_fed_pep_tao_equals_a_float64_loop():
  algorithm = recipes.fed_pep_tao(
    toy.deep_loss,
    toy.sgd(RATE),
    num_clients=N,
    shared_layers=(-1,),
    upload=toy.watched(),
  )
  seen = toy.run(algorithm, toy.stacked(), 3)
  state, states, info = seen[-1]
  want, own = pep_tao_reference()
  got = state.params['prompts'].shared['layers']['q']
  close(got.a[1], want[0])
  close(got.b[1], want[1])
  kept = states.private['prompts'].personal['layers']['q']
  for k in range(K):
    close(kept.a[k, 0], own[k][0])
    served = algorithm.personal(state.params, tree.take(states, k))
    close(served['layers']['q'].a, np.stack([own[k][0], want[0]]))
  start = toy.stacked()['layers']['q']
  np.testing.assert_array_equal(got.a[0], start.a[0])
  apart(pep_tao_reference(server=1e-9)[0][0], want[0], by=1e-4)
  apart(pep_tao_reference(correct=False)[0][0], want[0], by=1e-3)
  size = 4 * 2 * D * 4  # one layer's factors
  check_bytes(states, info, size + 4, size)


def test_the_first_round_of_fed_pep_tao_is_fed_avg():
  one = recipes.fed_pep_tao(toy.deep_loss, toy.sgd(RATE), num_clients=N)
  two = recipes.fed_avg(toy.deep_loss, toy.sgd(RATE))
  ends = [toy.run(x, toy.stacked(), 1)[-1][0].params for x in (one, two)]
  close(ends[0]['prompts'].shared['layers']['q'].a, ends[1]['layers']['q'].a)


# ------------------------------------------------------------ combinations --

SETTINGS: dict[str, Any] = {
  'fed_bpt': SEARCH,
  'fed_pgp': dict(model=toy.MODEL, rank=2),
  'fed_prompt': {},
  'p_fed_pg': PG,
}


@pytest.mark.parametrize('name', ['fed_bpt', 'p_fed_pg'])
def test_blocks_change_nothing(name):
  whole = history(name, **SETTINGS[name])[1][1][0]
  algorithm = getattr(recipes, name)(
    toy.LOSS, toy.sgd(RATE), block_size=2, **SETTINGS[name]
  )
  parts = toy.run(algorithm, toy.prompt(), 1)[-1][0]
  for x, y in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params)):
    close(x, y)


@pytest.mark.parametrize('name', ['fed_pgp', 'fed_prompt', 'p_fed_pg'])
def test_the_loss_falls(name):
  _, seen = history(name, **SETTINGS[name])
  losses = [float(info.metrics['local/loss']) for _, _, info in seen[1:]]
  assert losses[1] < losses[0]


# ---------------------------------------------------------------- refusals --


@pytest.mark.parametrize(
  'name, settings, message',
  [
    ('fed_bpt', dict(population=1), 'algorithm.population is 1; it must be at '
     'least 2.'),
    ('fed_bpt', dict(perturbed=1.0), 'algorithm.perturbed is 1.0; it must be '
     'at least 0 and below 1.'),
    ('p_fed_pt', dict(prompt_epochs=0), 'algorithm.prompt_epochs is 0; it must '
     'be at least 1.'),
    ('fed_bbpt', dict(radius=0.0), 'algorithm.radius is 0.0; it must be above '
     '0.'),
    ('p_fed_pg', dict(num_clients=N, server_rate=0.0), 'algorithm.server_rate '
     'is 0.0; it must be above 0.'),
    ('fed_pgp', dict(model=None, rank=0), 'algorithm.rank is 0; it must be at '
     'least 1.'),
    ('fed_pgp', dict(model=None, temperature=0.0), 'algorithm.temperature is '
     '0.0; it must be above 0.'),
  ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(name, settings, message):
  with pytest.raises(Error) as error:
    getattr(recipes, name)(toy.LOSS, toy.sgd(), **settings)
  assert str(error.value) == message


@pytest.mark.parametrize('name', ['p_fed_pg', 'fed_pgp'])
def test_other_adapters_are_refused(name):
  settings = dict(p_fed_pg=dict(num_clients=N), fed_pgp=dict(model=toy.MODEL))
  algorithm = getattr(recipes, name)(toy.LOSS, toy.sgd(), **settings[name])
  with pytest.raises(Error) as error:
    algorithm.init(toy.KEY, toy.factors())
  assert str(error.value) == (
    f'{name} trains a soft prompt: adapter.name=soft_prompt.'
  )


def test_a_layer_that_is_not_there_is_refused():
  algorithm = recipes.fed_pep_tao(
    toy.deep_loss, toy.sgd(), num_clients=N, shared_layers=(2,)
  )
  with pytest.raises(Error) as error:
    algorithm.init(toy.KEY, toy.stacked())
  assert str(error.value) == (
    'algorithm.shared_layers names the layer 2; the adapter has the layers 0 '
    'to 1.'
  )
  with pytest.raises(Error) as error:
    algorithm.init(toy.KEY, toy.prompt())
  assert str(error.value) == (
    'fed_pep_tao needs prompts in the layers: adapter.name=prefix.'
  )


def test_heads_must_divide_the_width():
  algorithm = recipes.p_fed_pg(toy.LOSS, toy.sgd(), num_clients=N, num_heads=3)
  with pytest.raises(Error) as error:
    algorithm.init(toy.KEY, toy.prompt())
  assert str(error.value) == (
    'algorithm.num_heads is 3; it must divide the width 4 of the prompt.'
  )
