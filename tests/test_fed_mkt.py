"""FedMKT on bigram models of several vocabularies, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_exchange as reference
import tiny

from fedjax_llm import local, recipes, tree
from fedjax_llm.local import knowledge
from fedjax_llm.recipes.two_models.fed_mkt import Group
from fedjax_llm.types import Batch, Cohort, Error, Model

M, B, S, TOP, HARD, RATE = 2, 3, 2, 3, 0.4, 0.7
SIZES = (7, 5, 9)  # of vocabularies: the server's, then one for each group
LENGTHS = (6, 5, 8)
GROUPS = np.array([1, 0, 1])
K = len(GROUPS)

MODEL = Model(
  hidden=lambda base, params, batch: params['w'][batch.tokens],
  logits=lambda base, params, hidden: hidden,
)
LOSS = local.causal_lm(MODEL)


def texts(rng, size, length, *shape):
  tokens = rng.integers(0, size, (*shape, B, length)).astype(np.int32)
  mask = rng.random(tokens.shape) < 0.8
  mask[..., 1] = True
  ones = np.ones_like(tokens)
  return Batch(tokens, mask, ones, ones)


def places(rng, to, other):
  return rng.integers(-1, other, (M, B, to)).astype(np.int32)


@functools.cache
def world():
  rng = np.random.default_rng(5)
  publics = [texts(rng, v, t, M) for v, t in zip(SIZES, LENGTHS)]
  groups = []
  for g in (1, 2):
    up = knowledge.Alignment(
      places(rng, LENGTHS[0], LENGTHS[g]),
      rng.integers(0, SIZES[0], SIZES[g]).astype(np.int32),
    )
    down = knowledge.Alignment(
      places(rng, LENGTHS[g], LENGTHS[0]),
      rng.integers(0, SIZES[g], SIZES[0]).astype(np.int32),
    )
    like = {'w': jax.ShapeDtypeStruct((SIZES[g],) * 2, np.float32)}
    groups.append(Group(LOSS, MODEL, like, publics[g], up, down))
  starts = [rng.normal(size=(v, v)).astype(np.float32) for v in SIZES]
  base = {
    'client_models': [
      {'base': (), 'start': {'w': jnp.asarray(w)}} for w in starts[1:]
    ]
  }
  # Clients' texts are drawn from the smallest vocabulary.
  private = texts(rng, min(SIZES), 6, K, S)
  cohort = Cohort(
    np.arange(K, dtype=np.int32), private, np.ones(K, np.float32),
    np.ones(K, bool), {'group': GROUPS.astype(np.int32)},
  )  # fmt: skip
  return publics, groups, starts, base, cohort


@functools.cache
def program():
  publics, groups, *_ = world()
  method = recipes.fed_mkt(
    LOSS, local.optimizer('sgd', RATE), model=MODEL, public=publics[0],
    client_models=groups, top_k=TOP, hard=HARD,
  )  # fmt: skip
  return method, jax.jit(method.round)


def ran(state=None, states=None, **changes):
  method, step = program()
  *_, starts, base, cohort = world()
  if state is None:
    state = method.init(tiny.KEY, {'w': jnp.asarray(starts[0])})
  if states is None:
    states = tree.broadcast(method.init_client(state.params), K)
  return step(state, cohort._replace(states=states, **changes), base)


def pairs(batch):
  """Texts [M, B, T] as the reference reads them."""
  counted = np.array(batch.loss_mask)
  counted[..., 0] = False
  return list(zip(np.asarray(batch.tokens), counted, strict=True))


def referred(hard=HARD, num=TOP):
  publics, groups, starts, _, cohort = world()
  clients = [starts[1 + g].astype(float) for g in GROUPS]
  each = [tree.take(cohort.batches, k) for k in range(K)]
  ways = [(tuple(g.up), tuple(g.down)) for g in groups]
  return reference.round(
    starts[0].astype(float), clients, [pairs(p) for p in publics], GROUPS,
    [pairs(one) for one in each], ways, num, hard, RATE,
  )  # fmt: skip


def matrices(states):
  """The clients' parameters, [K] of [V, V]."""
  flat, result = np.asarray(states.local.flat), []
  for row, g in zip(flat, GROUPS, strict=True):
    size = SIZES[1 + g] ** 2
    assert not row[size:].any()
    result.append(row[:size].reshape((SIZES[1 + g],) * 2))
  return result


def test_a_round_equals_the_loops_of_the_reference():
  server, clients = referred()
  state, states, info = ran()
  tiny.close(state.params['w'], server, rtol=1e-4, atol=1e-5)
  tiny.close(matrices(states), clients, rtol=1e-4, atol=1e-5)
  assert info.reported.tolist() == [True] * K
  assert 0 < float(info.metrics['server/selected']) < 1
  assert 0 < float(info.metrics['local/selected']) < 1
  # The neighbours: no teacher, and all of the teacher's logits.
  for hard, num in ((1.0, TOP), (HARD, 9)):
    alone, _ = referred(hard, num)
    assert np.abs(alone - server).max() > 1e-3


def test_bytes_are_those_of_the_messages():
  publics, *_ = world()
  info = ran()[2]
  tokens = [sum(c.sum() for _, c in pairs(p)) for p in publics]
  size = lambda i: int(8 * TOP * tokens[i] + 4 * M * B)
  assert np.asarray(info.bytes_up)[:, 0].tolist() == [
    size(1 + g) for g in GROUPS
  ]
  assert np.asarray(info.bytes_down)[:, 0].tolist() == [size(0)] * K
  method, _ = program()
  assert method.exchanged is not None
  assert method.exchanged(None, None, None) == (size(2), size(0))


def test_clients_keep_their_models_and_a_resumed_run_agrees():
  first, states, _ = ran()
  second, later, _ = ran(first, states)
  written = jax.tree.map(np.array, (first._replace(key=None), states))
  again, same, _ = ran(written[0]._replace(key=first.key), written[1])
  tiny.close(again.params, second.params, rtol=0, atol=0)
  tiny.close(same.local.flat, later.local.flat, rtol=0, atol=0)
  fresh = ran(first)[1]  # a client that forgets begins anew
  assert tiny.differs(fresh.local.flat, later.local.flat)


def test_a_client_that_does_not_count_teaches_nobody():
  broken = np.zeros(K, bool)
  broken[1] = True
  *_, cohort = world()
  without, states, info = ran(valid=~broken)
  assert info.reported.tolist() == (~broken).tolist()
  assert not np.asarray(states.local.flat)[1].any()
  assert not np.asarray(info.bytes_up)[1].any()
  assert not np.asarray(info.bytes_down)[1].any()
  method, _ = program()
  state = method.init(tiny.KEY, {'w': jnp.asarray(world()[2][0])})
  states = tree.broadcast(method.init_client(state.params), K)
  flat = np.array(states.local.flat)
  flat[1] = np.nan
  kept = states.local._replace(took=jnp.asarray(broken), flat=flat)
  other, _, info = ran(states=states._replace(local=kept))
  assert info.finite.tolist() == (~broken).tolist()
  tiny.close(other.params, without.params, rtol=0, atol=0)
  nobody, *_ = ran(valid=np.zeros(K, bool))
  tiny.close(nobody.params, state.params, rtol=0, atol=0)
  del cohort


def test_one_group_with_the_servers_model_is_public_distillation():
  """An alignment of a text with itself is the identity, and needs no group."""
  publics, _, starts, _, cohort = world()
  start = {'w': jnp.asarray(starts[0])}
  parts = dict(model=MODEL, public=publics[0], top_k=7, hard=HARD)
  method = recipes.fed_mkt(LOSS, local.optimizer('sgd', RATE), **parts)
  identity = knowledge.Alignment(
    np.broadcast_to(np.arange(LENGTHS[0]), (M, B, LENGTHS[0])),
    np.arange(SIZES[0]),
  )
  group = Group(LOSS, MODEL, start, publics[0], identity, identity)
  aligned = recipes.fed_mkt(
    LOSS, local.optimizer('sgd', RATE), client_models=[group], **parts
  )
  base = {'client_models': [{'base': (), 'start': start}]}
  one = jax.tree.map(lambda x: x[:1], cohort)._replace(profiles=())
  results = []
  for algorithm in (method, aligned):
    state = algorithm.init(tiny.KEY, start)
    states = tree.broadcast(algorithm.init_client(state.params), 1)
    results.append(
      jax.jit(algorithm.round)(state, one._replace(states=states), base)
    )
  (state, states, _), (other, kept, _) = results
  tiny.close(other.params, state.params, rtol=0, atol=0)
  tiny.close(kept, states, rtol=0, atol=0)

  # With the whole vocabulary it is Hinton's distillation on the texts of which
  # the teacher's loss is less, with the loss of the texts themselves.
  average = recipes.fed_avg(LOSS, local.optimizer('sgd', RATE), measure=None)
  begun = average.init(tiny.KEY, start)
  trained, *_ = average.round(
    begun, one._replace(states=average.init_client(start)), None
  )
  want = distilled(start['w'], trained.params['w'], publics[0])
  tiny.close(state.params['w'], want, rtol=1e-4, atol=1e-5)


def distilled(student, teacher, public):
  def logits(w, batch):
    return w[batch.tokens[:, :-1]]

  def nats(w, batch, q):
    p = jax.nn.log_softmax(logits(w, batch))
    return -jnp.sum(q * p, -1)

  @jax.jit
  def step(w, batch, selected):
    mask = jnp.asarray(batch.loss_mask)[:, 1:]
    hard = jax.nn.one_hot(batch.tokens[:, 1:], SIZES[0])
    soft = jax.nn.softmax(logits(teacher, batch))
    kept = mask & selected[:, None]
    mean = lambda x, m: jnp.sum(x * m) / jnp.maximum(jnp.sum(m), 1)

    def value(w):
      return HARD * mean(nats(w, batch, hard), mask) + (1 - HARD) * mean(
        nats(w, batch, soft), kept
      )

    return w - RATE * jax.grad(value)(w)

  def losses(w):
    hard = jax.nn.one_hot(public.tokens[..., 1:], SIZES[0])
    mask = public.loss_mask[..., 1:]
    each = jnp.stack([nats(w, tree.take(public, m), hard[m]) for m in range(M)])
    return jnp.sum(each * mask, -1) / mask.sum(-1)

  better = losses(teacher) < losses(student)
  for m in range(M):
    student = step(student, tree.take(public, m), better[m])
  return student


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(top_k=0), 'algorithm.top_k is 0; it must be at least 1'),
    (dict(epochs=0), 'algorithm.epochs is 0; it must be at least 1'),
    (dict(hard=1.5), 'algorithm.hard is 1.5; it must be from 0 to 1'),
    (dict(public=None), 'add the section public'),
    (dict(public={'x': 1}), 'exchanges predictions of tokens'),
    (dict(mesh=object()), 'not built for several devices'),
    (dict(upload=object()), 'leave the section upload out'),
    (dict(scope=object()), 'leave the section scope out'),
  ],
)
def test_what_it_has_no_use_for_is_refused(settings, words):
  parts = {'public': world()[0][0], **settings}
  with pytest.raises(Error, match=words):
    recipes.fed_mkt(LOSS, local.optimizer('sgd'), model=MODEL, **parts)


def test_groups_that_are_not_there_are_refused():
  with pytest.raises(Error, match='needs the group of each client'):
    ran(profiles=())


def test_more_logits_than_tokens_are_all_of_them():
  batch = tree.take(world()[0][0], 0)
  params = {'w': jnp.asarray(world()[2][0])}
  some, more = (knowledge.of(MODEL, (), params, batch, n) for n in (7, 9))
  tiny.close(more.values[..., :7], some.values, rtol=0, atol=0)
  assert (np.asarray(more.values[..., 7:]) == -np.inf).all()
  near = knowledge.distilled
  every = np.ones(B, bool)
  one, other = (
    near(MODEL, (), params, batch, x, every, HARD) for x in (some, more)
  )
  tiny.close(one, other, rtol=1e-6)
