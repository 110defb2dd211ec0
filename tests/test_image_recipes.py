"""Methods on dual encoders: float64 references, neighbours, bytes."""

import functools

import jax
import jax.numpy as jnp
import named_images as toy
import numpy as np
import pytest
import references_images as ref
from named_images import B, C, D, E, K, N, P, V
from prompted import IDS, apart, close, f64, mean, wire

from fedjax_llm import adapters, recipes, server, tree, uploads
from fedjax_llm.adapters.prompts import classes
from fedjax_llm.nodes import Context, Visual, scores
from fedjax_llm.nodes.transport import partial_plan
from fedjax_llm.types import Error

BASE = classes.sizes(D, V, E)
BATCH = toy.cohort().batches
FIRST = jax.tree.map(lambda leaf: leaf[0, 0], BATCH)
PLAN = jax.jit(lambda s, mass: partial_plan(s, mass, 0.1, 1000))


def rows_at(seed=2, width=D, spread=0.5):
  draw = np.random.default_rng(seed).normal(size=(P, width)) * spread
  return jnp.asarray(draw, jnp.float32)


CONTEXT = {'scores': Context(rows_at())}
START = {
  'prompt_fl': lambda: CONTEXT,
  'fed_otp': lambda: CONTEXT,
  'fed_pgp_clip': lambda: CONTEXT,
  'fed_pr': lambda: {'scores': Visual(rows_at(width=V))},
  'fed_clip': lambda: grown(adapters.feature_attention()),
  'fed_tpg': lambda: grown(adapters.generated_context(P, 2, 1)),
  'fed_apt': lambda: grown(adapters.domain_context(P, C, 0.5)),
  'p_fed_moap': lambda: grown(adapters.gated_context(P, E, 1)),
}
SETTINGS = {
  'fed_otp': dict(mass=0.7),
  'fed_pgp_clip': dict(rank=2),
  'fed_pr': dict(ratio=0.7),
  'fed_apt': dict(num_clients=N),
  'p_fed_moap': dict(num_clients=N, num_experts=2),
}


def grown(adapter):
  return jax.jit(lambda: adapter.init(jax.random.key(3), BASE))()


@functools.cache
def history(name, rounds=2, labels=C, **settings):
  return toy.run(
    getattr(recipes, name),
    START[name](),
    rounds,
    toy.cohort(labels),
    **{**SETTINGS.get(name, {}), **settings},
  )


def federated(local, start, rounds, uniform=False):
  """Means of the first array that clients end with; the others are kept."""
  common, own = f64(start[0]), [list(map(f64, start[1:])) for _ in range(K)]
  weight = np.ones(K) if uniform else toy.WEIGHT
  for t in range(rounds):
    ends = [local(t, k, [common, *own[k]]) for k in range(K)]
    common = mean([end[0] for end in ends], weight)
    own = [end[1:] for end in ends]
  return common, own


def plainly(loss):
  """Local training on a loss(pixels, labels, arrays), for `federated`."""
  return lambda t, k, start: toy.trained(loss, k, start)


# ---------------------------------------------------------------- PromptFL --


def test_prompt_fl_equals_a_float64_loop():
  state = history('prompt_fl')[1][-1][0]
  loss = lambda x, y, a: toy.nll(toy.logits(x, toy.texts(a[0])), y)
  want, _ = federated(plainly(loss), [rows_at()], 2)
  close(state.params['scores'].rows, want)
  apart(want, rows_at(), by=0.02)
  # Neighbour: the mean of the rows alone, without the class names' order.
  apart(toy.texts(want), toy.texts(want[::-1]), by=1e-2)


def test_zero_shot_needs_no_parameters():
  x, y = toy.step_of(BATCH, 0, 0)
  sums = jax.jit(toy.LOSS)(toy.base(), {}, FIRST, jax.random.key(0))
  close(sums.total / sums.count, toy.nll(toy.logits(x, toy.texts()), y))
  assert sums.count == len(y)


# ----------------------------------------------------------------- FedCLIP --


def test_fed_clip_equals_a_float64_loop():
  _, seen = history('fed_clip', rounds=1)
  arrays = [f64(x) for x in jax.tree.leaves(seen[0][0].params['scores'])]

  def loss(x, y, a):
    f = toy.length(ref.reweighted(toy.pooled(x), *a))
    return ref.symmetric(toy.SCALE * f @ toy.texts()[y].T)

  ends = [toy.trained(loss, k, arrays) for k in range(K)]
  got = jax.tree.leaves(seen[1][0].params['scores'])
  for i, leaf in enumerate(got):
    close(leaf, mean([end[i] for end in ends]), atol=1e-4)
  apart(got[0], arrays[0], by=1e-3)


# ------------------------------------------------------------------ FedOTP --


@pytest.mark.parametrize('mass', [0.7, 1.0])
def test_a_plan_is_that_of_the_kernel_form_and_optimal(mass):
  s = np.random.default_rng(0).uniform(-1, 1, (7, 2))
  plan = f64(PLAN(jnp.asarray(s), mass))
  close(plan, ref.partial_plan(s, mass, 0.1, 1000))
  close(plan.sum(0), [mass / 2] * 2)
  if mass < 1:
    # Optimal: T = u K v with u <= 1, and u < 1 only where the row is full.
    free = plan.sum(1) < 1 / 7 - 1e-5
    assert free.any() and not free.all()
    u = plan[:, 0] / np.exp((s[:, 0] - 1) / 0.1)
    np.testing.assert_allclose(u[free], u[free][0], rtol=1e-3)
    assert (u[~free] <= u[free][0] * 1.001).all()


def test_a_plan_is_that_of_pot():
  ot = pytest.importorskip('ot')
  s = np.random.default_rng(1).uniform(-1, 1, (6, 2))
  want = ot.partial.entropic_partial_wasserstein(
    np.full(6, 1 / 6), np.full(2, 0.3), 1 - s, reg=0.1, m=0.6,
    numItermax=5000, stopThr=1e-12,
  )  # fmt: skip
  close(PLAN(jnp.asarray(s), 0.6), want, atol=1e-4)


def otp_cosines(x, contexts):
  names = np.stack([toy.texts(rows) for rows in contexts])
  return np.einsum('bme,nce->bcmn', toy.length(toy.patches(x)), names)


def otp_step(x, y, contexts):
  """A step on both contexts; the plans have no gradient."""
  cosines = otp_cosines(x, contexts)
  flat = cosines.reshape(-1, *cosines.shape[2:])
  plans = np.reshape(
    [ref.partial_plan(s, 0.7, 0.1) for s in flat], cosines.shape
  )
  loss = lambda a: toy.nll(
    toy.SCALE * (plans * otp_cosines(x, a)).sum((2, 3)), y
  )
  return toy.stepped(loss, contexts)


def test_fed_otp_equals_a_float64_loop():
  _, seen = history('fed_otp', rounds=1)
  node = seen[0][0].params['scores']
  apart(node.own, node.common, by=0.1)

  def local(t, k, now):
    del t
    for s in range(toy.S):
      now = otp_step(*toy.step_of(BATCH, k, s), now)
    return now

  common, own = federated(local, [node.common, node.own], 1)
  state, states, info = seen[1]
  close(state.params['scores'].common, common)
  close(states.private['scores'].own, np.stack([o[0] for o in own]))
  apart(common, node.common, by=1e-3)
  for k in range(K):  # the own context is not sent
    assert len(wire(states, k)) == info.bytes_up[k].sum() == P * D * 4


def test_fed_otp_with_all_mass_is_another_method():
  node = history('fed_otp', rounds=1)[1][0][0].params['scores']
  run = jax.jit(lambda n, base: n.scores(toy.seen(base, {}, FIRST)))
  part = run(node, toy.base())
  whole = run(node._replace(mass=jnp.float32(1.0)), toy.base())
  apart(part / 0.7, whole, by=0.05)
  # Neighbour: the mean of both contexts, compared with whole images.
  even = run(Context((node.common + node.own) / 2), toy.base())
  apart(whole, even, by=0.05)


# ------------------------------------------------------------------ FedPGP --


def pgp_loss(x, y, a):
  sigma, left, right = a
  own = toy.texts(sigma + left @ right)
  common = toy.texts(sigma)
  return toy.nll(toy.logits(x, own), y) + ref.contrast(
    ref.cosine(toy.texts(), common), ref.cosine(common, own), 0.5
  )


def test_fed_pgp_clip_equals_a_float64_loop():
  algorithm, seen = history('fed_pgp_clip')
  own = seen[0][0].params['own']
  start = [rows_at(), own.left, own.right]
  common, kept = federated(plainly(pgp_loss), start, 2)
  state, states, info = seen[-1]
  close(state.params['common']['scores'].rows, common, atol=1e-4)
  close(states.private['own'].left, np.stack([o[0] for o in kept]), atol=1e-4)
  assert info.bytes_up.sum(1).tolist() == [P * D * 4] * K
  # Neighbour: without the contrastive term.
  plain = lambda x, y, a: toy.nll(
    toy.logits(x, toy.texts(a[0] + a[1] @ a[2])), y
  )
  apart(common, federated(plainly(plain), start, 2)[0], by=5e-3)
  mine = jax.tree.map(lambda leaf: leaf[1], states)
  whole = {**state.params, 'own': mine.private['own']}
  served = algorithm.personal(whole, mine)['scores'].rows
  close(served, common + kept[1][0] @ kept[1][1], atol=1e-4)


# ------------------------------------------------------------------ FedTPG --


def generated(net, names):
  """The generator in float64, the published layers one by one."""
  net = jax.tree.map(f64, net)
  q, c = (
    ref.layer_norm(x, *norm) for x, norm in zip((net.queries, names), net.norms)
  )
  heads = []
  for wq, wk, wv in zip(net.query, net.key, net.value):
    near = (q @ wq) @ (c @ wk).T / np.sqrt(wq.shape[1])
    share = np.exp(near - near.max(1, keepdims=True))
    heads.append(share / share.sum(1, keepdims=True) @ (c @ wv))
  x = np.concatenate(heads, 1) @ net.out.kernel + net.out.bias
  inner = ref.layer_norm(x, *net.norms[2]) @ net.inner.kernel + net.inner.bias
  a, b = np.split(inner, 2, axis=1)
  gelu = jax.jit(lambda v: jax.nn.gelu(v, approximate=False))
  return x + a * f64(gelu(b)) @ net.last.kernel + net.last.bias


def test_fed_tpg_makes_a_context_of_the_classes_of_a_client():
  node = START['fed_tpg']()['scores']
  batch = jax.tree.map(lambda leaf: leaf[0, 0], toy.batches(1, 1, labels=2))
  some = node._replace(classes=jnp.asarray([[1, 0], [-1, 1]]))
  run = jax.jit(lambda n, base: n.scores(toy.seen(base, {}, batch)))
  logits = run(some, toy.base())
  names = toy.texts()[:2]
  want = toy.logits(batch.pixels, toy.texts(generated(node.net, names))[:2])
  close(logits[:, :2], want, atol=1e-4)
  assert (logits[:, 2:] < -1e8).all()
  # Neighbours: a context of all classes; a mask of the logits alone.
  full = f64(generated(node.net, toy.texts()))
  apart(full, generated(node.net, names), by=1e-3)
  # Unseen classes: the same network on a longer list of names.
  more = run(node, toy.base(C + 3))
  rows = generated(node.net, toy.texts(names=C + 3))
  want = toy.logits(batch.pixels, toy.texts(rows, C + 3))
  assert more.shape == (B, C + 3)
  close(more, want, atol=1e-4)


def test_fed_tpg_averages_the_generator_without_weights():
  _, seen = history('fed_tpg', rounds=1)
  state, states, info = seen[1]
  update = states.upload[0]['scores'].net.queries
  start = seen[0][0].params['scores'].net.queries
  close(state.params['scores'].net.queries, start + mean(update, np.ones(K)))
  apart(mean(update, np.ones(K)), mean(update), by=1e-4)
  size = sum(x.size for x in jax.tree.leaves(seen[0][0].params)) * 4
  assert info.bytes_up.sum(1).tolist() == [size] * K


# ------------------------------------------------------------------- FedPR --


def test_fed_pr_equals_a_float64_loop():
  _, seen = history('fed_pr')
  first = rows_at(width=V)
  names = toy.texts()

  def loss(x, y, a):
    f = toy.pooled(x, a[0])
    return toy.nll(toy.SCALE * toy.length(f) @ names.T, y)

  def local(t, k, start, projected=True):
    matrix = ref.null_space(start[0], V - 1) if t and projected else np.eye(V)
    now = start
    for s in range(toy.S):
      one = functools.partial(loss, *toy.step_of(BATCH, k, s))
      now = [now[0] + (toy.stepped(one, now)[0] - now[0]) @ matrix]
    return now

  want, _ = federated(local, [first], 2)
  close(seen[-1][0].params['scores'].rows, want, atol=1e-4)
  # Neighbour: without the projection.
  plain, _ = federated(functools.partial(local, projected=False), [first], 2)
  apart(want, plain, by=1e-2)


def test_fed_pr_moves_nothing_that_the_common_prompt_spans():
  _, seen = history('fed_pr', ratio=0.01)
  once, twice = (seen[t][0].params['scores'].rows for t in (1, 2))
  change = f64(twice) - f64(once)
  assert np.abs(change).max() > 1e-3
  close(change @ f64(once).T, np.zeros((P, P)), atol=1e-5)


# ------------------------------------------------------------------ FedAPT --


def test_fed_apt_equals_a_float64_loop():
  algorithm, seen = history('fed_apt', rounds=1)
  node = seen[0][0].params['scores']
  keys, start = f64(node.keys), [node.meta, node.query]

  def loss(k, x, y, a):
    meta, query = a
    names = toy.texts(meta * (1 + keys[IDS[k]]))
    whose = np.full(len(y), IDS[k])
    return toy.nll(toy.logits(x, names), y) + toy.nll(
      toy.pooled(x) @ query, whose
    )

  ends = [toy.trained(functools.partial(loss, k), k, start) for k in range(K)]
  state, _, info = seen[1]
  even = lambda i: mean([end[i] for end in ends], np.ones(K))
  close(state.params['scores'].meta, even(0))
  close(state.params['scores'].query, even(1))
  apart(even(1), mean([end[1] for end in ends]), by=1e-3)
  assert info.bytes_up.sum(1).tolist() == [4 * (C * P * D + E * N)] * K
  # Served: a context for each image, from its shares.
  x = BATCH.pixels[0, 0]
  served = algorithm.personal(state.params, None)['scores']
  share = ref.shares(toy.pooled(x), even(1), 0.5)
  rows = even(0) * (1 + np.einsum('bn,npd->bpd', share, keys))[:, None]
  want = [toy.logits(x[b : b + 1], toy.texts(rows[b]))[0] for b in range(B)]
  got = jax.jit(lambda n: n.scores(toy.seen(toy.base(), {}, FIRST)))(served)
  close(got, np.stack(want), atol=1e-4)
  apart(got, toy.logits(x, toy.texts(even(0)[0])), by=1e-2)


# ---------------------------------------------------------------- pFedMoAP --


def moap_loss(x, y, a, others):
  rows, *gate = a
  f, own = toy.length(toy.pooled(x)), toy.texts(rows)
  alone = toy.SCALE * f @ own.T
  if not len(others):
    return toy.nll(alone, y)
  experts = np.stack([own, *map(toy.texts, others)])
  gated = ref.attention(f, experts, gate)
  return toy.nll(alone / 2 + toy.SCALE * np.einsum('bd,bcd->bc', f, gated), y)


def test_p_fed_moap_equals_a_float64_loop():
  algorithm, seen = history('p_fed_moap')
  start = seen[0][0].params
  rows = f64(start['common']['scores'].rows)
  gates = [[f64(x) for x in start['gate']] for _ in range(K)]
  latest: list = []
  for t in range(2):
    ends = []
    for k in range(K):
      others = []
      if t:  # the nearest of the two other clients
        far = [((z - latest[k]) ** 2).sum() for z in latest]
        far[k] = np.inf
        others = [latest[int(np.argmin(far))]]
      loss = functools.partial(moap_loss, others=others)
      end = toy.trained(loss, k, [rows, *gates[k]])
      gates[k] = end[1:]
      ends.append(end[0])
    latest, rows = ends, mean(ends)
  state, states, info = seen[-1]
  close(state.params['common']['scores'].rows, rows, atol=1e-4)
  close(state.params['latest'][np.array(IDS)], np.stack(latest), atol=1e-4)
  assert np.flatnonzero(state.params['known']).tolist() == sorted(IDS)
  close(states.private['gate'].query[1], gates[1][0], atol=1e-4)
  apart(gates[1][0], start['gate'].query, by=1e-4)
  # One context up; down the average and, from the second time on, an expert.
  size = 4 * P * D
  assert info.bytes_up.sum(1).tolist() == [size] * K
  down = [seen[t][2].bytes_down.sum(1).tolist() for t in (1, 2)]
  assert down == [[size] * K, [2 * size] * K]
  # Served: the latest own context with its gate and expert.
  mine = jax.tree.map(lambda leaf: leaf[0], states)
  serve = jax.jit(algorithm.personal)
  node = serve({**state.params, 'gate': mine.private['gate']}, mine)['scores']
  close(node.rows, latest[0], atol=1e-4)
  assert node.present.tolist() == [1.0]
  new = serve(state.params, algorithm.init_client(state.params))
  close(new['scores'].rows, rows, atol=1e-4)
  assert new['scores'].present.tolist() == [0.0]


# -------------------------------------------------------------- all of them --


@pytest.mark.parametrize('name', START)
def test_the_server_serves_a_node_of_class_names(name):
  algorithm, seen = history(name, **ROUNDS.get(name, {}))
  serve = lambda params: algorithm.personal(params, None)
  served = jax.eval_shape(serve, seen[-1][0].params)
  assert set(served) == {'scores'}
  shape = jax.eval_shape(
    lambda p: scores.scores(p['scores'], toy.seen(toy.base(), {}, FIRST)),
    served,
  )
  assert shape.shape == (B, C)


ROUNDS = {
  name: dict(rounds=1) for name in ('fed_clip', 'fed_otp', 'fed_tpg', 'fed_apt')
}


@pytest.mark.parametrize('name', ['fed_otp', 'fed_pgp_clip', 'p_fed_moap'])
def test_methods_take_compressed_uploads_and_other_servers(name):
  algorithm = getattr(recipes, name)(
    toy.LOSS,
    toy.sgd(),
    upload=uploads.top_k(density=0.5),
    server=server.fed_adam(),
    **SETTINGS.get(name, {}),
  )

  def whole(params):
    state = algorithm.init(jax.random.key(0), params)
    states = tree.broadcast(algorithm.init_client(state.params), K)
    of = toy.cohort()._replace(states=states)
    return state, algorithm.round(state, of, toy.base())

  state, (new, _, info) = jax.eval_shape(whole, START[name]())
  assert jax.tree.structure(new.params) == jax.tree.structure(state.params)
  assert info.bytes_up.shape[0] == K


@pytest.mark.parametrize('name', START)
def test_another_adapter_is_one_sentence(name):
  build = getattr(recipes, name)
  algorithm = build(toy.LOSS, toy.sgd(), **SETTINGS.get(name, {}))
  with pytest.raises(Error, match=r'adapter\.name=') as error:
    algorithm.init(jax.random.key(0), {'w': jnp.ones(2)})
  assert str(error.value).count('. ') == 0


@pytest.mark.parametrize(
  ('name', 'settings', 'text'),
  [
    ('fed_otp', dict(mass=0.0), 'algorithm.mass is 0.0; it must be above 0'),
    ('fed_otp', dict(temperature=-1.0), 'algorithm.temperature is -1.0'),
    ('fed_pgp_clip', dict(rank=0), 'algorithm.rank is 0'),
    ('fed_pr', dict(ratio=1.5), 'algorithm.ratio is 1.5'),
    ('p_fed_moap', dict(num_clients=2, num_experts=1), 'num_experts is 1'),
  ],
)
def test_wrong_settings_are_refused(name, settings, text):
  with pytest.raises(Error, match=text):
    getattr(recipes, name)(toy.LOSS, toy.sgd(), **settings)


@pytest.mark.parametrize('name', ['fed_clip', 'fed_pgp_clip', 'fed_apt'])
def test_losses_without_names_are_refused(name):
  with pytest.raises(Error, match=f'{name} compares images with names'):
    getattr(recipes, name)(lambda *_: None, toy.sgd(), **SETTINGS.get(name, {}))
