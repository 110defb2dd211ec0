"""FedAMoLE: a pool of experts that choose clients, against NumPy float64.

The network is y = sum over two layers of `linear` with its experts, whose loss
gives the statistics of the routers as those of the models do.
"""

import functools
import itertools
import json
from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_experts as ref
import toy
from test_variants import watched, wire

from fedjax_llm import (
  adapters,
  checkpoint,
  local,
  models,
  recipes,
  train,
  tree,
  uploads,
)
from fedjax_llm.clients import policies
from fedjax_llm.models import layers
from fedjax_llm.nodes import Experts, LowRank, Routing, protocol
from fedjax_llm.types import Batch, Cohort, Error, LossSum, Reports

KEY = jax.random.key(0)
N, K, S, B, L, D, F, R, E = 5, 4, 2, 4, 2, 5, 3, 2, 4
SCALE, RATE, STRENGTH, ROUNDS = 1.5, 0.1, 0.02, 3
BOUNDS = (2, 1, 3)  # clients an expert, experts a client


def base():
  kernel = jax.random.normal(jax.random.key(7), (L, D, F)) * 0.4
  return {'layers': {'q': {'kernel': kernel}}}


def with_statistics(base, params, batch, key):
  del key
  w, q = base['layers']['q'], params['layers']['q']
  y, rows = jnp.zeros(batch.y.shape), []
  for i in range(L):
    leaf, record = tree.take(q, i), protocol.Record(batch.mask, {})
    y = y + layers.linear(batch.x, tree.take(w, i), leaf, record=record)
    rows.append(protocol.statistics_of({'q': leaf}, record))
  each = 0.5 * jnp.sum((y - batch.y) ** 2, -1)
  count = jnp.sum(batch.mask.astype(jnp.float32))
  sums = LossSum(jnp.sum(each * batch.mask), count, jnp.float32(0))
  return sums, {'layers': tree.stack(rows)}


loss = local.Observed(
  lambda *given: with_statistics(*given)[0], with_statistics
)


def rows():
  rng = np.random.default_rng(5)
  x = rng.normal(size=(N, S, B, D)) + rng.normal(size=(N, 1, 1, D))
  x = 0.5 * x
  own = rng.normal(size=(N, D, F))
  y = np.einsum('ksbd,kdf->ksbf', x, own)
  mask = np.ones((N, S, B), bool)
  return toy.Rows(x.astype(np.float32), y.astype(np.float32), mask)


def cohort(states, ids: Sequence[int] = range(N), valid=None):
  at = np.array(ids, np.int32)
  return Cohort(
    ids=at,
    batches=jax.tree.map(lambda z: z[at], rows()),
    weight=np.arange(1, len(at) + 1, dtype=np.float32),
    valid=np.ones(len(at), bool) if valid is None else np.array(valid),
    states=states,
  )


def start():
  return adapters.lora(R, R * SCALE, targets='q').init(KEY, base())


def build(**settings):
  given = dict(num_experts=E, min_experts=1, max_experts=3, balance=STRENGTH)
  return recipes.fed_amole(
    loss,
    local.optimizer('sgd', RATE),
    **{'num_clients': N, 'fold': adapters.fold, **given, **settings},
  )


def began(algorithm, seed=3):
  """The first state, with experts that already say something."""
  state = algorithm.init(KEY, start())
  q = node_of(state)
  draw = lambda tag, x: (
    0.3
    * jax.random.normal(jax.random.fold_in(jax.random.key(seed), tag), x.shape)
  )
  q = q._replace(
    shared=q.shared._replace(b=draw(0, q.shared.b)),
    pool=q.pool._replace(b=draw(1, q.pool.b)),
  )
  return state._replace(params={'layers': {'q': q}})


def node_of(state) -> Experts:
  return state.params['layers']['q']


def plan_of(state):
  return np.asarray(state.aggregator.profiles['experts'])


@functools.cache
def compiled():
  algorithm = build(upload=watched(uploads.identity()))
  return algorithm, jax.jit(algorithm.round)


@functools.cache
def history():
  """Every round's (state before it, after it, client states, metrics)."""
  algorithm, step = compiled()
  state, found = began(algorithm), []
  states = tree.broadcast(algorithm.init_client(state.params), N)
  for _ in range(ROUNDS):
    new, states, told = step(state, cohort(states), base())
    found.append((state, new, states, told))
    state = algorithm.plan(new)  # type: ignore
  return found


def in_numpy(q):
  """The layers of a node, float64, as the reference has them."""
  fields = dict(
    a=q.shared.a,
    b=q.shared.b,
    pool_a=q.pool.a,
    pool_b=q.pool.b,
    router=q.router,
  )
  every = {n: np.array(x, np.float64) for n, x in fields.items()}
  return [{n: x[i] for n, x in every.items()} for i in range(len(q.router))]


# --------------------------------------------------------------- the layer --


def drawn(held, seed=0):
  """One layer's node, and tokens [8, D]."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  node = Experts(
    LowRank(draw(D, R), draw(R, F), jnp.float32(SCALE)),
    LowRank(draw(E, D, R), draw(E, R, F), jnp.full(E, SCALE)),
    draw(D, R),
    jnp.asarray(held, jnp.uint8),
  )
  return node, draw(8, D)


HELD = [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('held', HELD)
def test_a_layer_equals_a_float64_reference(held):
  node, x = drawn(held)
  w = base()['layers']['q']['kernel'][0]
  real = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
  record = protocol.Record(jnp.asarray(real), {})
  got = layers.linear(x, {'kernel': w}, node, record=record)
  told = protocol.statistics_of(node, record)
  assert isinstance(told, Routing)
  np.testing.assert_array_equal(layers.linear(x, {'kernel': w}, node), got)
  wide = jax.tree.map(lambda z: z[None], node)
  p, mine = in_numpy(wide)[0], np.array(held, bool)
  rows = np.asarray(x, np.float64)
  want, probs, chosen = ref.layer(rows, np.float64(w), SCALE, p, mine)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert (chosen.sum(1) == min(2, sum(held))).all()
  balance = ref.balance(probs, chosen, real, mine)
  np.testing.assert_allclose(told.balance, balance, atol=1e-5)
  experts, tokens = ref.embeddings([p], [rows[real]], np.ones((1, E), bool))
  np.testing.assert_allclose(told.experts / told.count, experts[0], atol=1e-5)
  np.testing.assert_allclose(told.tokens / told.count, tokens[0], atol=1e-5)
  assert told.count == real.sum()


def test_experts_that_are_not_held_have_no_influence_and_no_slope():
  node, x = drawn([0, 1, 1, 0])
  y = jnp.zeros((8, F))
  out = lambda pool: node._replace(pool=pool).act(x, y)
  others = jnp.array([1, 0, 0, 1]).reshape(E, 1, 1)
  noisy = node.pool._replace(
    a=node.pool.a + 1e4 * others, b=node.pool.b - 1e4 * others
  )
  np.testing.assert_array_equal(out(node.pool), out(noisy))
  slope = jax.grad(lambda pool: jnp.sum(jnp.sin(out(pool))))(node.pool)
  for g in (slope.a, slope.b):
    assert (g[np.array([0, 3])] == 0).all() and (g[1:3] != 0).any((1, 2)).all()


def test_the_product_with_the_base_has_no_axis_of_clients():
  node, x = drawn([1, 1, 1, 1])
  stacked = tree.broadcast(node, K)
  w = {'kernel': base()['layers']['q']['kernel'][0]}
  run = jax.vmap(lambda leaf, x: layers.linear(x, w, leaf))
  traced = jax.make_jaxpr(run)(stacked, jnp.stack([x] * K))
  found = [
    e.params['dimension_numbers']
    for e in traced.jaxpr.eqns
    if e.primitive.name == 'dot_general'
    and any(v.aval.shape == (D, F) for v in e.invars)
  ]
  assert found and all(batch == ((), ()) for _, batch in found)


# ---------------------------------------------------------- the assignment --


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_an_assignment_is_the_best_of_all(data):
  num, clients = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
  per_expert = data.draw(st.integers(1, clients))
  least = data.draw(st.integers(0, 2))
  most = data.draw(st.integers(max(least, 1), 4))
  values = st.lists(
    st.integers(0, 9), min_size=num * clients, max_size=num * clients
  )
  score = np.array(data.draw(values), float).reshape(num, clients) / 9
  best, worth = ref.assignment(score, per_expert, least, most)
  if best is None:
    with pytest.raises(Error, match='num_experts is'):
      policies.assignment(score, per_expert, least, most)
    return
  got = policies.assignment(score, per_expert, least, most)
  assert (got.sum(1) == per_expert).all()
  assert got.sum(0).min() >= least and got.sum(0).max() <= most
  np.testing.assert_allclose((score * got).sum(), worth, atol=1e-9)


def test_an_assignment_of_the_papers_size_is_whole_and_silent(capfd):
  score = np.random.default_rng(0).dirichlet(np.ones(10), 30)
  got = policies.assignment(score, 2, 2, 8)
  assert (got.sum(1) == 2).all()
  assert got.sum(0).min() >= 2 and got.sum(0).max() <= 8
  assert capfd.readouterr() == ('', '')
  # Nobody can swap one choice of two experts and gain.
  for e, f in np.ndindex(30, 30):
    for j in np.flatnonzero(got[e] & ~got[f]):
      for i in np.flatnonzero(got[f] & ~got[e]):
        swapped = score[e, i] + score[f, j] - score[e, j] - score[f, i]
        assert swapped <= 1e-9


def test_a_policy_is_a_function_of_what_it_is_told():
  build = functools.partial(policies.by_affinity, per_expert=2, least=1, most=3)
  zeros = dict(experts=np.zeros((N, L, E, R)), tokens=np.zeros((N, L, R)))
  none = Reports({**zeros, 'held': np.zeros((N, L, E))}, np.full(N, -1))
  blank = {'experts': np.zeros((N, L, E), bool)}
  first = build()(0, none, blank)['experts']
  np.testing.assert_array_equal(first, build()(0, none, blank)['experts'])
  assert (first != build(seed=1)(0, none, blank)['experts']).any()
  assert (first.sum(0) == 2).all() and not blank['experts'].any()
  # A round from which nobody reported decides nothing.
  assert build()(2, none, {'experts': first})['experts'] is first


# -------------------------------------------------------------- the method --


def test_fed_amole_equals_a_float64_loop():
  begin = history()[0][0]
  data = rows()
  clients = [list(zip(data.x[k], data.y[k])) for k in range(N)]
  clients = [[tuple(map(np.float64, step)) for step in c] for c in clients]
  want, plans, told = ref.fed_amole(
    np.float64(base()['layers']['q']['kernel']),
    *(SCALE, in_numpy(node_of(begin)), clients, RATE, STRENGTH),
    *(plan_of(begin), BOUNDS, ROUNDS),
  )
  for (state, new, *_), plan, (experts, tokens) in zip(history(), plans, told):
    np.testing.assert_array_equal(plan_of(state), plan)
    values = new.aggregator.reports.values
    np.testing.assert_allclose(values['experts'], experts, atol=1e-5)
    np.testing.assert_allclose(values['tokens'], tokens, atol=1e-5)
    np.testing.assert_array_equal(values['held'], plan)
  assert any((x != y).any() for x, y in itertools.pairwise(plans))
  got = in_numpy(node_of(history()[-1][1]))
  for one, other in zip(got, want, strict=True):
    for name in ref.FIELDS:
      np.testing.assert_allclose(
        one[name], other[name], atol=1e-5, err_msg=name
      )


def test_experts_of_absent_clients_stay_as_they_are():
  algorithm, step = compiled()
  state = began(algorithm)
  kept = tree.broadcast(algorithm.init_client(state.params), N)
  # Client 1 drops out; the last row is padding.
  of = cohort(kept, ids=[3, 1, 0, 2, 4], valid=[1, 0, 0, 0, 0])
  new, states, told = step(state, of, base())
  held = plan_of(state)[3]  # [L, E]
  assert held.any(1).all() and not held.all()
  for old, now in zip(node_of(state).pool[:2], node_of(new).pool[:2]):
    moved = np.any(np.asarray(old != now), axis=(-1, -2))
    np.testing.assert_array_equal(moved, held)
  notes = np.asarray(states.private['layers']['q'].held)
  np.testing.assert_array_equal(notes[0], held)
  assert not notes[1:].any()
  assert new.aggregator.reports.round.tolist() == [-1, -1, -1, 1, -1]
  assert (told.bytes_up.sum(1) > 0).tolist() == [True] + [False] * 4
  planned = algorithm.plan(new)  # type: ignore
  assert (plan_of(planned).sum(0) == 2).all()


def test_with_silent_experts_a_step_is_fedit_of_the_shared_one():
  """All B_e are zero at first, so they say nothing in the first step."""
  plain = recipes.fed_it(loss, local.optimizer('sgd', RATE))
  ends = []
  for one, step in (compiled(), (plain, jax.jit(plain.round))):
    state = one.init(KEY, start())
    of = cohort(tree.broadcast(one.init_client(state.params), N))
    of.batches.mask[:, 1:] = False  # the other steps are padding
    new, *_ = step(state, of._replace(weight=np.ones(N, np.float32)), base())
    ends.append(one.personal(new.params, None)['layers']['q'])
  assert isinstance(ends[0], LowRank)
  assert jnp.abs(ends[0].b).max() > 0
  toy.close(ends[0], ends[1])


def test_bytes_are_those_of_the_message_the_report_and_the_plan():
  for state, new, states, told in history():
    q, values = node_of(state), new.aggregator.reports.values
    for k in range(N):
      mine = plan_of(state)[k]
      report = np.asarray(values['tokens'][k]).tobytes()
      report += np.asarray(values['experts'][k])[mine].tobytes()
      assert len(wire(states, k)) + len(report) == told.bytes_up[k].sum()
      parts = [q.shared.a, q.shared.b, q.router, q.pool.a[mine], q.pool.b[mine]]
      down = b''.join(np.asarray(x).tobytes() for x in parts) + mine.tobytes()
      assert len(down) == told.bytes_down[k].sum()
      assert len(wire(states, k)) == len(down) - mine.size


def test_a_client_is_served_its_own_experts():
  algorithm, _ = compiled()
  state, new, states, _ = history()[-1]
  x = rows().x[0, 0]
  for k in range(N):
    one = tree.take(states, k)
    served = algorithm.personal(new.params, one)['layers']['q']
    np.testing.assert_array_equal(served.held, plan_of(state)[k])
    for i in range(L):
      got = tree.take(served, i).act(x, jnp.zeros((B, F)))
      p, held = in_numpy(served)[i], plan_of(state)[k, i]
      want, *_ = ref.layer(np.float64(x), np.zeros((D, F)), SCALE, p, held)
      np.testing.assert_allclose(got, want, atol=1e-5)
  newcomer = algorithm.init_client(new.params)
  stranger = algorithm.personal(new.params, newcomer)['layers']['q']
  alone = algorithm.personal(new.params, None)['layers']['q']
  w = tree.take(base()['layers']['q'], 0)
  out = lambda node: np.asarray(layers.linear(x, w, tree.take(node, 0)))
  np.testing.assert_allclose(out(stranger), out(alone), atol=1e-6)


def test_it_learns():
  losses = [float(told.metrics['local/loss']) for *_, told in history()]
  assert losses[-1] < 0.8 * losses[0], losses


def test_a_resumed_run_goes_on_with_the_same_plan(tmp_path):
  algorithm, step = compiled()
  _, new, states, _ = history()[-2]
  saver = checkpoint.open(tmp_path, max_to_keep=1)
  saver.save(ROUNDS - 1, algorithm.plan(new), {})  # type: ignore
  restored = saver.restore(began(algorithm))
  assert restored is not None
  begin, *want = history()[-1]
  np.testing.assert_array_equal(plan_of(restored.state), plan_of(begin))
  got = step(restored.state, cohort(states), base())
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(tuple(want))):
    if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(one, other)


def test_what_makes_no_sense_is_refused():
  for section in ('scope', 'aggregator'):
    with pytest.raises(Error, match=section):
      build(**{section: None})
  with pytest.raises(Error, match='num_experts is 30: with 2 clients each'):
    build(num_experts=30)
  with pytest.raises(Error, match='clients_per_expert is 6'):
    build(clients_per_expert=6)
  with pytest.raises(Error, match='must not be negative'):
    build(balance=-1.0)
  with pytest.raises(Error, match='low-rank factors of one rank'):
    build().init(KEY, {'layers': {'w': jnp.zeros((2, 2))}})
  node = start()['layers']['q']
  with pytest.raises(Error, match='in the layers, and only there'):
    build().init(KEY, {'layers': {'q': node}, 'head': node})
  rest = toy.base(), toy.params(), tree.take(toy.cohort().batches, (0, 0)), KEY
  with pytest.raises(Error, match='this loss gives no statistics of experts'):
    local.balanced(toy.loss, 1.0)(*rest)
  none = local.Observed(
    toy.loss, lambda *given: (toy.loss(*given), {'q': None})
  )
  with pytest.raises(Error, match='the network has no experts'):
    local.balanced(none, 1.0)(*rest)
  with pytest.raises(Error, match='cannot be written into a weight'):
    adapters.merge(base(), history()[0][1].params)


# ------------------------------------------------------------------ models --


def test_a_network_tells_of_its_layers_though_it_computes_them_again():
  loaded = models.random(
    vocab_size=32, hidden_size=16, num_layers=2, remat='full'
  )
  plain = local.causal_lm(loaded.model)
  params = adapters.lora(2, targets=['q_proj', 'up_proj']).init(
    KEY, loaded.base
  )
  is_node = lambda x: isinstance(x, Experts)
  wide = jax.tree.map(
    lambda x: x._replace(held=jnp.ones_like(x.held)) if is_node(x) else x,
    adapters.experts.pooled(KEY, params, 3),
    is_leaf=is_node,
  )
  tokens = jnp.arange(12).reshape(2, 6)
  real = (tokens < 10).astype(jnp.int32)
  batch = Batch(tokens, tokens > 0, real, jnp.arange(6)[None])
  q = wide['layers']['self_attn']['q_proj']

  def total(router):
    inner = {'self_attn': {'q_proj': q._replace(router=router)}}
    now = {**wide, 'layers': {**wide['layers'], **inner}}
    return local.balanced(plain, 0.5)(loaded.base, now, batch, KEY).total

  @jax.jit
  def seen():
    sums, told = plain.with_statistics(loaded.base, wide, batch, KEY)
    return sums, *jax.value_and_grad(total)(q.router), told

  sums, value, slope, told = seen()
  inner = told['layers']
  nodes = inner['mlp']['up_proj'], inner['self_attn']['q_proj']
  for node in nodes:
    assert node.experts.shape == (2, 3, 2) and node.count.tolist() == [10, 10]
    assert ((node.balance > 0.5) & (node.balance < 1.5)).all()
  term = sum(np.sum(node.balance) for node in nodes)
  want = sums.total + sums.count * 0.5 * term
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert jnp.abs(slope).max() > 0  # B_e is 0: the balance alone has a slope


def test_a_config_says_it(tmp_path, capsys):
  folder = tmp_path / 'run'
  given = [
    *('--config', 'configs/methods.py:fed_amole:smoke'),
    *('--workdir', str(folder), '--config.num_rounds=3'),
    '--config.algorithm.num_experts=8',
    '--config.population.max_clients=4',
    *('--config.model.hidden_size=16', '--config.adapter.targets=q_proj'),
    *('--config.cohort.num_steps=2', '--config.population.max_length=64'),
    *('--config.evals.samples=0', '--config.population.new_clients=0'),
    *('--config.evals.per_client=1', '--config.evals.common=0'),
  ]
  assert train.main(given) == 0, capsys.readouterr().err
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  first, *rounds = map(json.loads, lines)
  assert len(rounds) == 3
  losses = [r['local/loss'] for r in rounds]
  assert losses[-1] < losses[0]
  before = first['evals/heldout/loss']
  assert rounds[-1]['evals/heldout/loss'] < before
  assert rounds[-1]['evals/personal/own/loss'] < before
  assert (folder / 'adapter' / 'adapter_model.safetensors').exists()
