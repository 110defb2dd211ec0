"""Rules and methods of 2025 and 2026 on low-rank factors, against NumPy.

The papers' equations are in `references_spectral`; every test of a rule also
names a rule beside it that the same numbers refute.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_lora as lora
import references_spectral as ref
import toy

from fedjax_llm import adapters, aggregators, local, recipes, scopes, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.lora.fedask import sketched
from fedjax_llm.recipes.lora.florg import gram_mean
from fedjax_llm.recipes.lora.la_lora import in_turns
from fedjax_llm.recipes.ranks.florist import occupied
from fedjax_llm.types import Context, Error, Masks, Uploads

KEY = jax.random.key(0)
NONE = Masks(None, None)
K, D, F, R = 4, 8, 7, 3
WEIGHT = np.array([1.0, 3.0, 2.0, 2.0])
RANKS = [3, 1, 2, 1]
# Methods whose bytes and rounds are tested here (test_combinations).
RECIPES = (
  *('fed_plora', 'fedask', 'fedmomentum', 'fedrpca', 'flora_na', 'florg'),
  *('florist', 'fslora', 'glora', 'ilora', 'la_lora', 'raflora', 'sfed_lora'),
)


def clients(seed=0, ranks=None) -> Any:
  """Factors that share a part, [K, ...], zero beyond a client's rank."""
  rng = np.random.default_rng(seed)
  near = lambda *s: rng.normal(size=s) + 0.6 * rng.normal(size=(K, *s))
  a, b = near(D, R), near(R, F)
  held = np.arange(R) < np.array(ranks or [R] * K)[:, None]
  return np.float32(a * held[:, None]), np.float32(b * held[..., None])


def server(seed=9):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  return LowRank(draw(D, R), draw(R, F), jnp.float32(0.5))


SCALE = np.full(K, 0.5)


@functools.cache
def program(name, settings):
  rule = getattr(aggregators, name)(**dict(settings))

  @jax.jit
  def run(uploads, params):
    state = rule.init(params, KEY)
    result, _ = rule.aggregate(uploads, state, params, KEY)
    new = tree.add(params, result.delta)
    return new if result.assign is None else tree.merge(result.assign, new)

  return run


def sent(a, b, ranks=None):
  start = server()
  ends = [
    LowRank(jnp.asarray(x), jnp.asarray(y), start.scale) for x, y in zip(a, b)
  ]
  return aggregators.received(start, ends, list(WEIGHT), ranks)


def served(name, a, b, ranks=None, **settings):
  """The node after the rule, and its product s a b in float64."""
  run = program(name, tuple(sorted(settings.items())))
  new = run(sent(a, b, ranks), server())
  x, y = lora.f64(new.a, new.b)
  return new, 0.5 * x @ y


def near(got, want, tolerance=2e-5):
  size = max(1.0, float(np.abs(want).max()))
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * size)


def apart(got, other, by=1e-2):
  assert np.abs(got - other).max() > by


# --------------------------------------------------------------- raFLoRA --


def test_raflora_is_the_sum_over_parts_of_their_holders_means():
  a, b = clients(ranks=RANKS)
  new, product = served('raflora', a, b, RANKS)
  want = ref.raflora(a, b, SCALE, RANKS, [1, 2, 3], WEIGHT, R)
  near(product, want)
  apart(product, lora.flexlora(a, b, SCALE, WEIGHT, R))
  # A root of the singular values on either factor.
  near(jnp.linalg.norm(new.a, axis=0), jnp.linalg.norm(new.b, axis=1))


def test_raflora_of_equal_ranks_is_flexlora():
  a, b = clients()
  near(served('raflora', a, b)[1], lora.flexlora(a, b, SCALE, WEIGHT, R))


def test_raflora_recovers_what_nested_clients_share_and_padding_shrinks_it():
  a, b = clients(seed=3)
  held = np.arange(R) < np.array(RANKS)[:, None]
  a: Any = np.float32(a[:1] * held[:, None])
  b: Any = np.float32(b[:1] * held[..., None])
  whole = 0.5 * np.float64(a[0]) @ b[0]
  near(served('raflora', a, b, RANKS)[1], whole)
  apart(served('flexlora', a, b, RANKS)[1], whole, by=0.1)


def test_raflora_keeps_the_servers_value_of_ranks_that_nobody_holds():
  ranks = [2, 1, 2, 1]
  a, b = clients(ranks=ranks)
  old_a, old_b = lora.f64(server().a, server().b)
  parts = ref.raflora(a, b, SCALE, ranks, [1, 2], WEIGHT, F)
  mine = 0.5 * np.outer(old_a[:, 2], old_b[2])
  near(served('raflora', a, b, ranks)[1], ref.best(parts + mine, R))
  cut = served('raflora', a, b, ranks, keep_unheld=False)[1]
  near(cut, ref.best(parts, R))


# --------------------------------------------------- FLoRIST, FedMomentum --


def test_florist_keeps_the_fewest_directions_of_the_energy():
  a, b = clients(seed=1)
  new, product = served('florist', a, b, energy=0.8)
  p, want_a, want_b = ref.florist(a, b, SCALE, WEIGHT, 0.8)
  assert p < R
  near(product, want_a @ want_b)
  assert not new.a[:, p:].any() and not new.b[p:].any()
  near(new.b[:p] @ new.b[:p].T, np.eye(p))  # the singular values are on a
  apart(product, lora.flexlora(a, b, SCALE, WEIGHT, R))


def test_florist_of_all_energy_is_exact_where_the_server_has_the_columns():
  a, b = clients(ranks=[1, 1, 1, 0])  # three columns in all: as many as R
  near(
    served('florist', a, b, [1, 1, 1, 0], energy=1.0)[1],
    lora.mean_product(a, b, SCALE, WEIGHT),
  )


def test_a_download_of_florist_costs_its_columns_alone():
  new = served('florist', *clients(seed=1), energy=0.8)[0]
  a, b = clients(seed=1)
  p, *_ = ref.florist(a, b, SCALE, WEIGHT, 0.8)
  count: Any = occupied().num_bytes({'q': new._replace(scale=None)}, NONE)['q']
  assert (int(count.a), int(count.b)) == (4 * p * D, 4 * p * F)


def test_fedmomentum_moves_what_lies_beyond_its_rank_into_the_base():
  a, b = clients(seed=2)
  for energy in (1.0, 0.99):
    new, product = served('fedmomentum', a, b, energy=energy)
    best, rest = ref.fedmomentum(a, b, SCALE, WEIGHT, R, energy)
    near(product, best)
    near(new.residual, rest)
    exact = lora.mean_product(a, b, SCALE, WEIGHT)
    gap = np.abs(product + new.residual - exact).max()
    assert gap < 1e-5 if energy == 1 else gap > 1e-2
  near(jnp.linalg.norm(new.a, axis=0), jnp.linalg.norm(new.b, axis=1))


# ------------------------------------------------------ ILoRA and FedASK --


def test_ilora_is_a_cut_qr_and_not_the_best_product_of_that_rank():
  a, b = clients(seed=4)
  new, product = served('ilora', a, b)
  want = ref.ilora(a, b, SCALE, WEIGHT, R)
  near(product, want)
  near(new.b @ new.b.T, np.eye(R))
  exact = lora.mean_product(a, b, SCALE, WEIGHT)
  best = lora.flexlora(a, b, SCALE, WEIGHT, R)
  error = lambda x: np.linalg.norm(x - exact)
  assert error(product) > 1.05 * error(best)


def test_iloras_adapter_starts_as_the_base_from_its_qr():
  kernel = jax.random.normal(KEY, (1, D, F))
  base = {'layers': {'q': {'kernel': kernel}}}
  params = adapters.orthogonal(rank=R, targets='q').init(KEY, base)
  near(adapters.merge(base, params)['layers']['q']['kernel'], kernel)
  node = params['layers']['q']
  q, t = np.linalg.qr(np.float64(kernel[0]).T)
  near(node.scale[0] * node.a[0] @ node.b[0], (q[:, :R] @ t[:R]).T)
  with pytest.raises(Error, match='rank is 8, above the smaller side'):
    adapters.orthogonal(rank=8, targets='q').init(KEY, base)


def test_fedask_sketches_in_two_passes_and_is_exact_with_enough_columns():
  a, b = clients(seed=5)
  product = served('fedask', a, b)[1]
  at = jax.random.fold_in(KEY, 0)  # the path of a node alone is empty
  drawn = jax.random.normal(at, (D, R))
  near(product, ref.fedask(a, b, SCALE, WEIGHT, drawn, R), 1e-4)
  best = lora.flexlora(a, b, SCALE, WEIGHT, R)
  apart(product, best)
  near(served('fedask', a, b, sketch=F)[1], best)


def test_fedask_is_billed_for_both_passes():
  node = {'q': server()._replace(scale=None)}
  count = sketched(5).num_bytes(node, NONE)['q']
  assert (int(count.a), int(count.b)) == (4 * 5 * D, 4 * 5 * F)
  rule: Any = aggregators.fedask(sketch=5)
  counts, _ = rule.num_bytes(rule.init(server(), KEY), ())
  assert counts.tolist() == [4 * 5 * F]  # Q
  one, _ = rule.init(server(), KEY)
  _, after = rule.aggregate(sent(*clients()), (one, counts), server(), KEY)
  assert (after[0] == one).all()  # the same sketch in every round


# ---------------------------------------------------- GLoRA and FLoRA-NA --


def test_glora_averages_in_the_frame_of_the_mean_projector():
  a, b = clients(seed=6, ranks=RANKS)
  for frame in (3, 5):
    product = served('glora', a, b, RANKS, frame=frame)[1]
    near(product, ref.glora(a, b, SCALE, WEIGHT, frame, R), 1e-4)
  best = lora.flexlora(a, b, SCALE, WEIGHT, R)
  near(served('glora', a, b, RANKS, frame=F)[1], best)
  apart(served('glora', a, b, RANKS, frame=3)[1], best)


def test_glora_depends_on_products_and_the_mean_on_factors():
  a, b = clients(seed=7)
  rng = np.random.default_rng(1)
  turn = np.eye(R) + 0.4 * rng.normal(size=(K, R, R))
  other = np.float32(a @ turn), np.float32(np.linalg.inv(turn) @ b)
  near(served('glora', *other)[1], served('glora', a, b)[1], 1e-4)
  means = [
    0.5 * np.matmul(*lora.mean_factors(*x, WEIGHT)) for x in ((a, b), other)
  ]
  apart(*means, by=0.1)


def test_flora_na_finds_the_weights_of_the_least_error():
  a, b = clients(seed=8)
  product = served('flora_na', a, b)[1]
  want_a, want_b = ref.flora_na(a, b, WEIGHT, 5)
  near(product, 0.5 * want_a @ want_b, 1e-3)
  exact = lora.mean_product(a, b, SCALE, WEIGHT)
  error = lambda x: np.linalg.norm(x - exact)
  mean = 0.5 * np.matmul(*lora.mean_factors(a, b, WEIGHT))
  best = lora.flexlora(a, b, SCALE, WEIGHT, R)
  assert error(best) < error(product) < 0.99 * error(mean)
  near(served('flora_na', a, b, sweeps=0)[1], mean)


# --------------------------------------------------------------- FedRPCA --


def test_fedrpca_is_the_mean_of_a_pursuits_parts():
  rng = np.random.default_rng(2)
  common = rng.normal(size=(D, R)) * rng.normal(size=(K, 1, 1))
  spikes = 5.0 * rng.normal(size=(K, D, R)) * (rng.random((K, D, R)) < 0.1)
  a = np.float32(server().a + common + spikes)
  _, b = clients()
  b[:] = np.asarray(server().b)  # no change: nothing to split
  for beta in (1.0, 2.0):
    new, _ = served('fedrpca', a, b, beta=beta)
    want = ref.fedrpca(a - np.float64(server().a), WEIGHT, beta)
    near(new.a - server().a, want, 2e-3)
    near(new.b, server().b)
    mean = lora.mean_factors(a, b, WEIGHT)[0]
    gap = np.abs(new.a - mean).max()
    assert gap < 1e-5 if beta == 1 else gap > 0.1


# ----------------------------------------------------------------- FLoRG --


def test_florg_keeps_the_gram_matrix_and_turns_its_factor():
  rng = np.random.default_rng(3)
  base = {'layers': {'q': {'kernel': jnp.zeros((2, D, F))}}}
  params = adapters.florg(rank=R, sigma=3.0, targets='q').init(KEY, base)
  node = params['layers']['q']
  near(jnp.swapaxes(node.p, -1, -2) @ node.p, np.tile(np.eye(F), (2, 1, 1)))
  near(node.q @ jnp.swapaxes(node.q, -1, -2), np.tile(np.eye(F), (2, 1, 1)))
  change = adapters.product(node)
  by_hand = node.scale[0] * node.p[0] @ node.g[0].T @ node.g[0] @ node.q[0]
  near(change[0], by_hand)
  moved = np.float32(0.5 * rng.normal(size=(K, 2, R, F)))
  bare = node._replace(p=None, q=None, scale=None)
  uploads = Uploads(
    bare._replace(g=moved),
    tree.broadcast(node, K),
    NONE,
    jnp.asarray(WEIGHT),
    jnp.ones(K, bool),
  )
  run = lambda **more: (
    jax.jit(
      lambda u, p: gram_mean(weighted=True, **more).aggregate(u, (), p, KEY)[0]
    )(uploads, node).assign.g
  )
  new, plain = run(), run(align=False)
  ends = np.asarray(node.g) + moved
  for i in range(2):
    near(new[i], ref.florg(ends[:, i], node.g[i], WEIGHT), 1e-4)
    near(new[i].T @ new[i], plain[i].T @ plain[i], 1e-4)
  distance = lambda x: np.linalg.norm(np.asarray(x) - np.asarray(node.g))
  assert distance(new) < 0.9 * distance(plain)
  apart(new[0], lora.mean_factors(ends[:, 0], ends[:, 0], WEIGHT)[0])


# -------------------------------------------------------------- no m x n --


@pytest.mark.parametrize(
  'name', ['raflora', 'florist', 'ilora', 'fedask', 'glora', 'flora_na']
)
def test_a_rule_makes_no_matrix_of_the_full_size(name):
  d, f, r, k = 60, 50, 2, 3
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  rule = getattr(aggregators, name)()
  params = LowRank(like(d, r), like(r, f), like())

  def run(a, b, params, weight):
    ends = [LowRank(a[i], b[i], params.scale) for i in range(k)]
    uploads = aggregators.received(params, ends)
    state = rule.init(params, KEY)
    return rule.aggregate(uploads, state, params, KEY)[0]

  arguments = like(k, d, r), like(k, r, f), params, like(k)
  text = jax.jit(run).lower(*arguments).as_text()
  assert f'{d}x{k * r}x' in text or f'{k * r}x{d}x' in text
  for shape in (f'{d}x{f}x', f'{f}x{d}x', f'{d}x{d}x', f'{f}x{f}x'):
    assert shape not in text


@pytest.mark.parametrize(
  'broken, words',
  [
    (lambda: aggregators.florist(energy=0.0), 'energy=0.0 must be above 0'),
    (lambda: aggregators.fedmomentum(energy=2), 'energy=2 must be above 0'),
    (lambda: aggregators.fedask(sketch=0), 'sketch=0 must be at least 1'),
    (lambda: aggregators.glora(frame=0), 'frame=0 must be at least 1'),
    (lambda: aggregators.flora_na(sweeps=-1), 'sweeps=-1 must not be negative'),
    (lambda: aggregators.fedrpca(beta=-1), 'beta=-1 must not be negative'),
    (lambda: aggregators.raflora(split='c'), "split='c' is none of"),
    (lambda: adapters.florg(sigma=0), 'adapter.sigma is 0; it must be above'),
    (lambda: adapters.sfed_lora(clients=0), 'adapter.clients is 0'),
    (lambda: in_turns(toy.sgd(), damping=0), 'damping=0 must be positive'),
  ],
)
def test_settings_out_of_range_are_refused(broken, words):
  with pytest.raises(Error, match=words):
    broken()


# ------------------------------------------------- clients that draw ranks --

TOY_RANKS = np.array([2, 1, 1, 2], np.int32)


def round_of(name, profiles: Any = TOY_RANKS, seed=0, **more):
  algorithm = getattr(recipes, name)(
    toy.loss, toy.sgd(0.1), fold=toy.fold, **more
  )
  state = algorithm.init(jax.random.key(seed), toy.params())
  states = tree.broadcast(algorithm.init_client(state.params), K)
  cohort = toy.cohort(num_clients=K, states=states)._replace(profiles=profiles)
  return state, cohort, jax.jit(algorithm.train)(state, cohort, toy.base())


@pytest.mark.parametrize('name', ['fed_plora', 'fslora'])
def test_clients_train_the_ranks_that_they_draw(name):
  """Each client by hand, then the mean of the paper; bytes are those sent."""
  state, cohort, (uploads, _, info) = round_of(name)
  algorithm = getattr(recipes, name)(toy.loss, toy.sgd(0.1))
  after, _ = algorithm.aggregate(state, uploads, toy.base())
  w, s = np.float64(toy.base()), float(state.params['q'].scale)
  q = state.params['q']
  rows = cohort.batches
  chosen = np.asarray(uploads.masks.trained['q'].a).reshape(K, toy.R)
  assert chosen.sum(1).tolist() == TOY_RANKS.tolist()
  changes = []
  for k in range(K):
    batches = list(zip(rows.x[k], rows.y[k], rows.mask[k]))
    factor = None if name == 'fed_plora' else toy.R / TOY_RANKS[k]
    change = ref.sketched(w, s, q.a, q.b, batches, 0.1, chosen[k], factor)
    near(uploads.update['q'].a[k], change[0])
    near(uploads.update['q'].b[k], change[1])
    changes.append(change[0])
  total = np.sum(changes, 0)
  holders = np.maximum(chosen.sum(0), 1)
  mean = total / (holders if name == 'fed_plora' else K)
  near(after.params['q'].a - q.a, mean)
  apart(mean, total / (K if name == 'fed_plora' else holders), by=1e-3)
  sizes = 4 * TOY_RANKS * (toy.D + toy.F)
  assert info.bytes_up.sum(1).tolist() == sizes.tolist()
  down = sizes if name == 'fslora' else np.full(K, 4 * toy.R * (toy.D + toy.F))
  assert info.bytes_down.sum(1).tolist() == down.tolist()


@pytest.mark.parametrize('name', ['fed_plora', 'fslora'])
def test_of_all_ranks_they_are_fed_it(name):
  full = np.full(K, toy.R, np.int32)
  _, _, (uploads, *_) = round_of(name, profiles=full)
  _, _, (plain, *_) = round_of('fed_it')
  toy.close(uploads.update, plain.update)


def test_a_sketch_is_right_on_average_and_the_same_for_both_factors():
  params = {'q': server()}
  scope: Any = scopes.drawn(hold=False)
  mask = lambda key: scope.mask(
    params, None, Context(profile=jnp.int32(1), key=key)
  )
  masks = jax.vmap(mask)(jax.random.split(KEY, 600)).held['q']
  a, b = np.asarray(masks.a), np.asarray(masks.b)[..., 0]
  assert (a == b).all() and (a.sum(1) == 1).all()
  # R / r times the mean projector: the identity, within four deviations.
  np.testing.assert_allclose(R * a.mean(0), 1, atol=4 * (2 / 600) ** 0.5)


# ------------------------------------------------ LA-LoRA and SFed-LoRA --


@pytest.mark.parametrize('smooth', [False, True])
def test_la_lora_takes_turns_within_a_round(smooth):
  state, cohort, (uploads, _, info) = round_of('la_lora', smooth=smooth)
  q, rows = state.params['q'], cohort.batches
  w, s = np.float64(toy.base()), float(q.scale)
  for k in range(K):
    batches = list(zip(rows.x[k], rows.y[k], rows.mask[k]))
    a, b = ref.la_lora(w, s, q.a, q.b, batches, 0.1, smooth)
    near(uploads.update['q'].a[k], a - np.float64(q.a))
    near(uploads.update['q'].b[k], b - np.float64(q.b))
  _, _, (plain, *_) = round_of('fed_it')
  apart(uploads.update['q'].a, plain.update['q'].a, by=1e-3)
  size = 4 * toy.R * (toy.D + toy.F)
  assert info.bytes_up.sum(1).tolist() == [size] * K


def test_la_loras_scaled_gradients_are_those_of_the_change_projected():
  rng = np.random.default_rng(4)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  node = LowRank(draw(D, R), draw(R, F), None)
  g = rng.normal(size=(D, F))
  grads = node._replace(a=jnp.float32(g) @ node.b.T, b=node.a.T @ g)
  turns = in_turns(local.optimizer('sgd', 1.0), smooth=False, scaled=True)
  step, later = turns.update(grads, turns.init(node), node, 0)
  a, b = lora.f64(node.a, node.b)
  near(-step.b, np.linalg.lstsq(a, g, rcond=None)[0], 1e-4)
  step, _ = turns.update(grads, later, node, 1)
  near(-step.a, np.linalg.lstsq(b.T, g.T, rcond=None)[0].T, 1e-4)


def test_sfed_lora_of_one_client_is_rank_stabilised_and_grows_with_more():
  base = {'layers': {'q': {'kernel': jnp.zeros((1, D, F))}}}
  scale = lambda adapter: adapter.init(KEY, base)['layers']['q'].scale.item()
  one = adapters.sfed_lora(R, 4.0, clients=1, targets='q')
  assert scale(one) == pytest.approx(scale(adapters.rslora(R, 4.0, 'q')))
  many = adapters.sfed_lora(R, 4.0, clients=9, targets='q')
  assert scale(many) == pytest.approx(3 * scale(one))
  # The mean of N random factors is smaller by sqrt(N): s a b keeps its size.
  rng = np.random.default_rng(0)
  sizes = [
    np.mean([
      n**0.5 * np.linalg.norm(rng.normal(size=(n, D, R)).mean(0))
      for _ in range(200)
    ])
    for n in (1, 16)
  ]  # fmt: skip
  assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_sfed_lora_shares_a_and_keeps_b():
  algorithm = recipes.sfed_lora(toy.loss, toy.sgd())
  kept = algorithm.init_client(toy.params()).private['q']
  assert kept.a is None and kept.b.shape == (toy.R, toy.F)
