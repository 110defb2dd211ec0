"""Weights that are chosen when a text is tested, against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_personalised as ref
import toy

from fedjax_llm import adapters, evals, local, models, tree
from fedjax_llm.adapters import multi
from fedjax_llm.types import Batch, Dual, Error, Model

KEY = jax.random.key(0)
V, B, T = 48, 3, 10


@pytest.fixture(scope='module')
def world():
  """A model, two adapters at it, texts to test on and texts remembered."""
  loaded = models.random(vocab_size=V, hidden_size=16, num_heads=2,
                         num_kv_heads=2)  # fmt: skip
  # Compiled once for all tests.
  model = Model(*(jax.jit(f) for f in loaded.model[:2]))
  loaded = loaded._replace(model=model)
  fresh = adapters.lora(rank=2).init(jax.random.key(1), loaded.base)
  rng = np.random.default_rng(0)
  moved = lambda: jax.tree.map(
    lambda x: x + rng.normal(size=x.shape).astype(np.float32)
    if x.ndim > 1 else x,
    fresh,
  )  # fmt: skip
  both = Dual(moved(), moved())

  def texts(num):
    tokens = rng.integers(0, V, (num, T)).astype(np.int32)
    length = rng.integers(T - 3, T + 1, num)
    inside = np.arange(T) < length[:, None]
    first = rng.integers(2, 5, num)
    learned = inside & (np.arange(T) >= first[:, None])
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (num, T))
    return Batch(tokens, learned, inside.astype(np.int32), places)

  loss = local.causal_lm(loaded.model, per_row=True)
  return loaded, both, texts(B), texts(4), loss


def test_a_text_weighs_the_local_adapter_by_its_likeness(world):
  loaded, both, batch, own, _ = world
  for at in ('prompt', 'end'):
    states = evals.text_states(loaded.model, at=at)
    near = states(loaded.base, both.personal, own)
    weigh = evals.instance_weights(loaded.model, strength=0.4, at=at)
    got = weigh(loaded.base, evals.Instances(both, near), batch)
    hidden = lambda x: np.asarray(
      loaded.model.hidden(loaded.base, both.personal, x), np.float64
    )
    first = lambda x: np.argmax(x.loss_mask, -1) - 1
    last = lambda x: x.segments.sum(-1) - 1
    place = first if at == 'prompt' else last
    here, there = (
      [h[i] for h, i in zip(hidden(x), place(x))] for x in (batch, own)
    )
    want = [ref.instance_weight(h, there, 0.4) for h in here]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.ptp(want) > 1e-3


def test_a_reply_says_nothing_about_its_own_weight(world):
  loaded, both, batch, _, _ = world
  states = evals.text_states(loaded.model)
  other = batch._replace(
    tokens=np.where(batch.loss_mask, (batch.tokens + 1) % V, batch.tokens)
  )
  one, two = (states(loaded.base, both.personal, x) for x in (batch, other))
  np.testing.assert_array_equal(one, two)


def test_every_row_meets_its_own_mix(world):
  loaded, both, batch, own, loss = world
  states = evals.text_states(loaded.model)(loaded.base, both.personal, own)
  client = evals.Instances(both, states)
  alpha = evals.instance_weights(loaded.model)(loaded.base, client, batch)
  mixed = evals.instance_mixed(loss, loaded.model)
  got = jax.jit(mixed)(loaded.base, client, batch, KEY)
  for b in range(B):
    parts = [
      adapters.merge(loaded.base, jax.tree.map(lambda x, w=w: x, part))
      for w, part in ((alpha[b], both.personal), (1 - alpha[b], both.shared))
    ]
    share = float(alpha[b])
    base = jax.tree.map(
      lambda w, x, y, share=share: w + share * (x - w) + (1 - share) * (y - w),
      loaded.base,
      *parts,
    )
    one = jax.tree.map(lambda x, b=b: x[b : b + 1], batch)
    want = loss(base, {}, one, KEY)
    np.testing.assert_allclose(got.total[b], want.total[0], rtol=2e-5)
    assert got.count[b] == want.count[0]


def test_mixes_of_clients_pass_through_the_personal_evaluation(world):
  loaded, both, batch, own, loss = world
  states = evals.text_states(loaded.model)(loaded.base, both.personal, own)
  swapped = Dual(both.personal, both.shared)
  clients = [evals.Instances(both, states), evals.Instances(swapped, -states)]
  two = tree.stack(clients)
  group = (jax.tree.map(lambda x: x[None], batch), np.array([[5, 9, -1]]))
  mixed = evals.instance_mixed(loss, loaded.model)
  report = evals.personal(mixed)(
    loaded.base, two, [5, 9], [group], [], KEY, 'mixed'
  )
  sums = report.clients['mixed/own']
  for row, k in ((0, 0), (1, 1)):
    want = mixed(loaded.base, tree.take(two, k), batch, KEY)
    np.testing.assert_allclose(sums.total[k], want.total[row], rtol=1e-5)


# ------------------------------------------------------------------ memory --


def test_a_model_with_a_memory_equals_a_loop_over_tokens(world):
  loaded, both, batch, own, _ = world
  memory = evals.remember(loaded.model)(loaded.base, both.shared, own)
  settings: dict = dict(neighbours=3, weight=0.4, temperature=5.0)
  got = jax.jit(evals.recalling(loaded.model, **settings))(
    loaded.base, memory, batch, KEY
  )
  hidden = lambda x: np.asarray(
    loaded.model.hidden(loaded.base, both.shared, x), np.float64
  )
  keys, values = [], []
  for h, tokens, mask in zip(hidden(own), own.tokens, own.loss_mask):
    for t in range(1, T):
      if mask[t]:
        keys.append(h[t - 1])
        values.append(tokens[t])
  assert len(keys) == memory.valid.sum()
  for b, h in enumerate(hidden(batch)):
    logits = loaded.model.logits(loaded.base, both.shared, jnp.float32(h))
    p_model = np.asarray(jax.nn.softmax(logits), np.float64)
    nats, hits = 0.0, 0
    for t in range(1, T):
      if batch.loss_mask[b, t]:
        p = ref.recall(h[t - 1], keys, values, p_model[t - 1], **settings)
        nats -= np.log(p[batch.tokens[b, t]])
        hits += np.argmax(p) == batch.tokens[b, t]
    np.testing.assert_allclose(got.total[b], nats, rtol=1e-5)
    assert got.correct[b] == hits


def test_a_memory_without_weight_or_without_entries_is_the_model(world):
  loaded, both, batch, own, loss = world
  memory = evals.remember(loaded.model)(loaded.base, both.shared, own)
  want = loss(loaded.base, both.shared, batch, KEY)
  empty = memory._replace(valid=jnp.zeros_like(memory.valid))
  for weight, held in ((0.0, memory), (0.5, empty)):
    got = evals.recalling(loaded.model, weight=weight)(
      loaded.base, held, batch, KEY
    )
    np.testing.assert_allclose(got.total, want.total, rtol=1e-5)
    assert (got.correct == want.correct).all()


def test_a_text_that_was_remembered_is_told_better(world):
  loaded, both, _, own, loss = world
  memory = evals.remember(loaded.model)(loaded.base, both.shared, own)
  alone = loss(loaded.base, both.shared, own, KEY)
  helped = evals.recalling(loaded.model)(loaded.base, memory, own, KEY)
  assert (helped.total < 0.7 * alone.total).all()


# ------------------------------------------------------------------ fusion --


def test_a_fusion_finds_the_minimum_of_a_grid():
  q = toy.params()['q']
  both = Dual(
    {'q': q._replace(b=q.b + 0.4)}, {'q': q._replace(a=-q.a, b=0.5 * q.b)}
  )
  batch = jax.tree.map(lambda x: x[0, 0], toy.cohort().batches)
  penalty = 0.02
  search = jax.jit(evals.fuse(toy.loss, penalty=penalty, num_generations=40))
  weights, value = search(toy.base(), both, batch, KEY)

  def objective(w):
    fused = multi.blend((both.personal, both.shared), w)
    sums = toy.loss(toy.base(), fused, batch, KEY)
    return sums.total / sums.count + penalty * jnp.sum(jnp.abs(w))

  axis = jnp.linspace(-1.5, 1.5, 121)
  grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
  values = jax.jit(jax.vmap(objective))(grid)
  assert value <= values.min() + 1e-3
  np.testing.assert_allclose(value, objective(weights), rtol=1e-5)
  assert value < objective(jnp.array([0.5, 0.5])) - 1e-2


@pytest.mark.parametrize(
  'broken',
  [
    lambda: evals.fuse(toy.loss, penalty=-1.0),
    lambda: evals.text_states(models.random(vocab_size=V).model, at='middle'),
    lambda: evals.recalling(models.random(vocab_size=V).model, weight=2.0),
    lambda: evals.recalling(models.random(vocab_size=V).model, neighbours=0),
  ],
)
def test_settings_out_of_range_are_refused(broken):
  with pytest.raises(Error, match=r'must|neither'):
    broken()
