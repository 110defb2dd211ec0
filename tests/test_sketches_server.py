"""Sketches of later families on the server's side, on the real transformer.

As in `test_sketches`: a part or two, a real round, a closed form; a comment
names the contract without which the test fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import close

from fedjax_llm import aggregators, local, recipes, scopes, tree
from fedjax_llm.local.gradients import backprop
from fedjax_llm.types import (
  ClientState,
  Draw,
  Error,
  FederatedAlgorithm,
  Model,
  RoundInfo,
  ServerState,
  Shared,
  StreamingAggregator,
  Traits,
)

RATE = 0.5


def averaged(**parts):
  parts.setdefault('measure', None)  # of factors: another program to compile
  return recipes.fed_avg(tiny.loss, tiny.sgd(RATE), **parts)


@pytest.fixture(scope='module')
def world():
  """Parameters, a cohort of one step, and the updates [K, ...] of plain SGD."""
  params, cohort = tiny.lora(), tiny.cohort(steps=1)
  return params, cohort, tiny.updates(params, cohort, RATE)


# ----------------------------------------------------------- split learning --


def split(
  *, model: Model, learning_rate: float = RATE, fold=None
) -> FederatedAlgorithm:
  """Clients run the layers, the server the head (Vepakomma et al. 2018).

  In every step all clients send hidden states [B, T, D], and receive their
  gradient. `fold` is the adapter's; there are no residuals here.
  """
  labels = scopes.everything().labels
  own = lambda p: {k: v for k, v in p.items() if k != 'lm_head'}
  rest = lambda p: {k: v for k, v in p.items() if k == 'lm_head'}

  def round(state, cohort, base=None, data=None):
    def step(params, batch):  # [K, B, T]
      trained = tree.select(params, labels(params), Shared)

      def below(mine):
        params_of = tree.merge(mine, own(params))
        each = lambda batch: model.hidden(base, params_of, batch)
        return jax.vmap(each)(batch)

      def above(head, sent):
        params_of = tree.merge(head, rest(params))
        rows = lambda x: x.reshape(-1, *x.shape[2:])
        top = Model(lambda *_: rows(sent), model.logits)
        sums = local.causal_lm(top)(
          base, params_of, jax.tree.map(rows, batch), state.key
        )
        return sums.total / jnp.maximum(sums.count, 1), sums

      sent, back = jax.vjp(below, own(trained))
      (head, answer), sums = jax.grad(above, (0, 1), has_aux=True)(
        rest(trained), sent
      )
      grads = {**back(answer)[0], **head}
      new = tree.sub(trained, tree.scale(grads, learning_rate))
      return tree.merge(new, params), (sums, jnp.int32(sent[0].nbytes))

    turns = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), cohort.batches)
    params, (sums, size) = jax.lax.scan(step, state.params, turns)
    size = jnp.where(cohort.valid, jnp.sum(size), 0)[:, None]
    tokens = jnp.sum(sums.count)
    metrics = {
      'local/loss': jnp.sum(sums.total) / jnp.maximum(tokens, 1),
      'local/tokens': tokens,
    }
    state = state._replace(round=state.round + 1, params=params)
    info = RoundInfo(cohort.valid, cohort.valid | True, size, size, metrics)
    return state, cohort.states, info

  return FederatedAlgorithm(
    init=lambda key, params: ServerState(jnp.int32(0), params, (), (), key),
    init_client=lambda params: ClientState(),
    round=round,
    personal=lambda params, state: params,
  )


def test_split_learning_is_centralised_training():
  """Contract: an algorithm without halves; `RoundInfo`."""
  params = tiny.lora('self_attn/q_proj', 'lm_head')
  cohort = tiny.cohort()
  algorithm = split(model=tiny.loaded().model)
  assert algorithm.train is None and algorithm.aggregate is None
  state, _, info = tiny.run(algorithm, params, cohort)
  pool = lambda x: np.swapaxes(x, 0, 1).reshape(1, tiny.S, -1, *x.shape[3:])
  pooled = tiny.cohort(
    batches=jax.tree.map(pool, cohort.batches),
    ids=np.zeros(1, np.int32),
    weight=[1.0],
  )
  want, _, central = tiny.run(averaged(), params, pooled)
  close(state.params, want.params)
  assert tiny.differs(want.params, params)
  for name in ('local/loss', 'local/tokens'):
    assert info.metrics[name] == pytest.approx(
      float(central.metrics[name]), rel=1e-5
    )
  sent = tiny.S * tiny.B * tiny.T * tiny.D * 4
  assert info.bytes_up.tolist() == info.bytes_down.tolist() == [[sent]] * 3


# -------------------------------------------------------------- asynchronous --


def by_staleness() -> StreamingAggregator:
  """FedBuff's weights (Nguyen et al. 2022): 1 / sqrt(1 + staleness)."""
  rule = aggregators.mean()

  def accumulate(sums, uploads, state, params):
    weight = uploads.weight / jnp.sqrt(1.0 + uploads.staleness)
    return rule.accumulate(sums, uploads._replace(weight=weight), state, params)

  return rule._replace(accumulate=accumulate, traits=Traits())


def buffered(*, loss, optimizer, fold=None, block_size=None, versions: int = 2):
  """A recipe that a config names by its import path."""
  return recipes.fed_avg(
    loss, optimizer, fold=fold, block_size=block_size,
    aggregator=by_staleness(), history=versions,
  )  # fmt: skip


def arrivals(*, num_clients: int, cohort_size: int):
  """A sampler by import path: slot k started k rounds ago."""

  def draw(round):
    slots = np.arange(cohort_size)
    ids = ((round + slots) % num_clients).astype(np.int32)
    started = np.maximum(round - slots, 0).astype(np.int32)
    return Draw(ids, np.ones(cohort_size, bool), started)

  return draw


@functools.cache
def asynchronous():
  return buffered(loss=tiny.loss, optimizer=tiny.sgd(RATE))


def test_late_clients_train_from_old_parameters_and_count_less(world):
  """Contract: `history`, `Cohort.started`, `Uploads.staleness`."""
  params, cohort, _ = world
  algorithm, state, seen = asynchronous(), None, [params]
  for started in ([0, 0, 0], [1, 0, 1], [2, 1, 0]):
    started = np.array(started, np.int32)
    late = cohort._replace(started=started)
    state, _, info = tiny.run(algorithm, params, late, state=state)
    staleness = len(seen) - 1 - started
    assert info.reported.tolist() == (staleness < 2).tolist()
    rows = [
      tree.take(tiny.updates(seen[at], cohort, RATE), k)
      for k, at in enumerate(started)
    ]
    weight = cohort.weight / np.sqrt(1 + staleness) * (staleness < 2)
    want = tiny.mean(tree.stack(rows), weight)
    close(tiny.moved(state.params, seen[-1]), want, rtol=1e-3)
    seen.append(state.params)
  with pytest.raises(Error, match='the server keeps no versions: set history'):
    tiny.run(averaged(), params, late)


# --------------------------------------------------- adversaries, and after --


def flipped(*ids: int):
  """Attackers by id send the opposite of their update."""

  def adversary(uploads, key):
    lies = jnp.isin(uploads.ids, jnp.array(ids))
    minus = tree.scale(uploads.update, -1.0)
    return uploads._replace(update=tree.where(lies, minus, uploads.update))

  return adversary


def test_attackers_by_id_flip_their_updates(world):
  """Contract: `adversary`, `Uploads.ids`."""
  params, cohort, each = world
  state, _, _ = tiny.run(averaged(adversary=flipped(2, 9)), params, cohort)
  signed = np.array([1, -1, 1])  # the ids are 7, 2, 4
  want = tiny.mean(each, cohort.weight * signed)
  want = tree.scale(want, (cohort.weight * signed).sum() / cohort.weight.sum())
  close(tiny.moved(state.params, params), want)
  with pytest.raises(Error, match='leave block_size out'):
    averaged(adversary=flipped(2), block_size=2)


def test_the_server_trains_on_its_own_data_after_the_rule(world):
  """Contract: `after`, and the data that `round` and `aggregate` are given."""
  params, cohort, each = world

  def after(state, base, data, key):
    grads, _ = backprop(
      tiny.loss, base, tiny.floats(state.params), state.params, data, key
    )
    step = tree.scale(grads, -0.3)
    return state._replace(params=tree.add(state.params, step))

  data = tiny.texts(tiny.B, seed=9)
  state, _, _ = tiny.run(averaged(after=after), params, cohort, data=data)
  mean = tiny.mean(each, cohort.weight)
  middle = tree.add(params, tree.map_present(jnp.float32, mean))
  again = jax.tree.map(lambda x: np.stack([x] * 3), data)
  g = tiny.gradients(middle, tiny.floats(middle), again)
  want = jax.tree.map(lambda m, g: m - 0.3 * np.float64(g[0]), mean, g)
  close(tiny.moved(state.params, params), want)
