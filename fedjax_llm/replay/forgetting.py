"""Ways to remove a client from a trained model, and figures of each.

They work on the rounds of a run, computed again: `Rounds` has its start and its
cohorts. `retrained` is the standard that the others are compared with.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.replay.moments import without
from fedjax_llm.types import (
  Base,
  ClientState,
  Cohort,
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
  ServerState,
  Uploads,
)

WAYS = ('retrained', 'subtracted', 'calibrated', 'ascended')


class Rounds(NamedTuple):
  """The rounds of a run, from its start."""

  algorithm: FederatedAlgorithm
  start: ServerState
  cohorts: Sequence[Cohort]  # without the states of clients
  base: Base


class Figures(NamedTuple):
  """The outcome of one way of forgetting, losses in nats a token."""

  forget: float  # on the texts that the client trained on
  retain: float  # on held-out texts of the other clients
  distance: float  # ||params - those of `retrained`||


# (state, cohort with states, round) -> (state, states of the cohort, reported)
Use = Callable[[ServerState, Cohort, int], tuple[ServerState, Any, Any]]


def _walk(rounds: Rounds, use: Use) -> ServerState:
  """Returns the state after all rounds; client states live in memory."""
  newcomer = rounds.algorithm.init_client(rounds.start.params)
  kept: dict[int, ClientState] = {}
  state = rounds.start
  for number, cohort in enumerate(rounds.cohorts):
    ids = np.asarray(cohort.ids).tolist()
    states = tree.stack([kept.get(i, newcomer) for i in ids])
    state, new, reported = use(state, cohort._replace(states=states), number)
    if rounds.algorithm.plan is not None:
      state = rounds.algorithm.plan(state)
    for row, i in enumerate(ids):
      if i >= 0 and reported[row]:
        kept[i] = tree.take(new, row)
  return state


def _rows(cohort: Cohort, client: int) -> list[int]:
  there = np.asarray(cohort.ids) == client
  return np.flatnonzero(there & np.asarray(cohort.valid)).tolist()


def _absent(cohort: Cohort, client: int) -> Cohort:
  for row in _rows(cohort, client):
    cohort = without(cohort, row)
  return cohort


def _halves(algorithm: FederatedAlgorithm, name: str) -> tuple[Any, Any]:
  if algorithm.train is None or algorithm.aggregate is None:
    raise Error(
      f'{name}: this method has no two halves of a round, so that single '
      'updates are not known; use retrained.'
    )
  return _program(algorithm.train), _program(algorithm.aggregate)


@functools.lru_cache(maxsize=8)  # the ways share compiled programs
def _program(fn: Callable[..., Any]) -> Callable[..., Any]:
  return jax.jit(fn)


def trained(rounds: Rounds) -> ServerState:
  """Returns the state of the run itself, with the client."""
  step = _program(rounds.algorithm.round)

  def use(state, cohort, number):
    state, states, info = step(state, cohort, rounds.base)
    return state, states, np.asarray(info.reported)

  return _walk(rounds, use)


def retrained(rounds: Rounds, client: int) -> ServerState:
  """Returns the state of the same rounds in which the client never reports."""
  cohorts = [_absent(cohort, client) for cohort in rounds.cohorts]
  return trained(rounds._replace(cohorts=cohorts))


def subtracted(rounds: Rounds, client: int) -> ServerState:
  """Returns the state of the run less what the client's updates added to it.

      params <- params_T - sum_t (aggregate(uploads_t) - aggregate(uploads_t
                                  with the client's update zero))

  from the parameters of the run in each round. It takes away the client's terms
  of sums: w_k u_k of a mean, w_k s_k a_k b_k of the stacks that FLoRA adds to
  the base (arXiv 2409.05976), w_k h_k of FedKSeed's coefficients (arXiv
  2312.06353), exactly. What others learned since from the client stays, as does
  its share of the server optimizer's moments.

  Raises:
    Error: the method has no two halves of a round.
  """
  train, aggregate = _halves(rounds.algorithm, 'subtracted')
  added: Any = None

  def use(state, cohort, number):
    nonlocal added
    uploads, states, info = train(state, cohort, rounds.base)
    new, _ = aggregate(state, uploads, rounds.base)
    rows = _rows(cohort, client)
    if rows:
      less, _ = aggregate(state, _zeroed(uploads, rows), rounds.base)
      wide = lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32)
      one = jax.tree.map(wide, new.params, less.params)
      added = one if added is None else tree.add(added, one)
    return new, states, np.asarray(info.reported)

  state = _walk(rounds, use)
  if added is None:
    return state

  # A residual that later rounds have added has no part before its first round.
  def take(p, d):  # whole numbers, such as the seed of a pool, stay
    whole = not jnp.issubdtype(p.dtype, jnp.floating)
    return p if whole else (p - d).astype(p.dtype)

  return state._replace(params=jax.tree.map(take, state.params, added))


def _zeroed(uploads: Uploads, rows: list[int]) -> Uploads:
  zero = lambda x: jnp.asarray(x).at[jnp.array(rows)].set(0)
  return uploads._replace(
    update=jax.tree.map(zero, uploads.update),
    reports=jax.tree.map(zero, uploads.reports),
  )


def calibrated(
  rounds: Rounds, client: int, *, share: float = 0.5
) -> ServerState:
  """Returns FedEraser's state: short training, in steps of the old lengths.

      u_k <- ||u_k of the run|| u'_k / ||u'_k||

  In each round the other clients train `share` of their steps from the model
  without the client, u'_k, and their updates get the length of those in the run
  (Liu et al. 2021, FedEraser, IWQoS, section IV-B).

  Raises:
    Error: a share outside of (0, 1]; the method has no two halves of a round.
  """
  if not 0 < share <= 1:
    raise Error(f'calibrated: share={share} must be above 0 and at most 1.')
  train, aggregate = _halves(rounds.algorithm, 'calibrated')
  lengths: list[jax.Array] = []
  norms = jax.jit(lambda uploads: jax.vmap(tree.norm)(uploads.update))

  def remember(state, cohort, number):
    uploads, states, info = train(state, cohort, rounds.base)
    lengths.append(norms(uploads))
    state, _ = aggregate(state, uploads, rounds.base)
    return state, states, np.asarray(info.reported)

  _walk(rounds, remember)

  def use(state, cohort, number):
    uploads, states, info = train(state, cohort, rounds.base)
    size = norms(uploads)
    factor = jnp.where(size > 0, lengths[number] / size, 0.0)
    scaled = jax.tree.map(
      lambda u: (u * factor.reshape((-1,) + (1,) * (u.ndim - 1))).astype(
        u.dtype
      ),
      uploads.update,
    )
    uploads = uploads._replace(update=scaled)
    state, _ = aggregate(state, uploads, rounds.base)
    return state, states, np.asarray(info.reported)

  cohorts = [_shorter(_absent(c, client), share) for c in rounds.cohorts]
  return _walk(rounds._replace(cohorts=cohorts), use)


def _shorter(cohort: Cohort, share: float) -> Cohort:
  steps = jax.tree.leaves(cohort.batches)[0].shape[1]
  num = max(1, round(share * steps))
  return cohort._replace(
    batches=jax.tree.map(lambda x: x[:, :num], cohort.batches)
  )


def ascended(
  rounds: Rounds,
  client: int,
  loss: Loss,
  state: ServerState,
  key: Key,
  *,
  learning_rate: float = 0.01,
  retain: float = 1.0,
  num_steps: int = 16,
) -> ServerState:
  """Returns the state after gradient ascent on the client's texts.

      p <- p - learning_rate grad(retain L_others - L_client)

  with the batches of the last round in which the client took part, those of the
  client for L_client and those of the others for L_others (Jang et al. 2023,
  arXiv 2210.01504; with the second term Liu et al. 2022, arXiv 2203.12817). Too
  many steps destroy the model: compare the figure `retain`.

  Args:
    rounds: of the run.
    client: its id.
    loss: of the task.
    state: the trained one.
    key: of dropout.
    learning_rate: of plain gradient descent.
    retain: weight of the others' loss.
    num_steps: number of steps.

  Raises:
    Error: the client took part in no round, or alone; `num_steps` below 1; a
      method without two halves of a round.
  """
  if num_steps < 1:
    raise Error(f'ascended: num_steps={num_steps} must be at least 1.')
  train, _ = _halves(rounds.algorithm, 'ascended')
  cohort = next((c for c in rounds.cohorts[::-1] if _rows(c, client)), None)
  if cohort is None:
    raise Error(f'ascended: client {client} took part in no round.')
  own = _rows(cohort, client)
  others = np.flatnonzero(np.asarray(cohort.valid)).tolist()
  others = [row for row in others if row not in own]
  if not others:
    raise Error(
      f'ascended: client {client} took part alone, so there is no text to '
      'retain.'
    )
  newcomer = rounds.algorithm.init_client(rounds.start.params)
  states = tree.broadcast(newcomer, len(np.asarray(cohort.ids)))
  sent = jax.eval_shape(
    train, state, cohort._replace(states=states), rounds.base
  )[0]
  steps = jax.tree.leaves(cohort.batches)[0].shape[1]
  # A step of every row in turn.
  of = lambda rows: jax.tree.map(
    lambda x: jnp.asarray(x)[jnp.array(rows)].reshape(-1, *x.shape[2:]),
    cohort.batches,
  )
  mine, rest = of(own), of(others)
  sizes = len(own) * steps, len(others) * steps

  def mean(params, batches, i, key):
    batch = tree.take(batches, i)
    sums = loss(rounds.base, params, batch, key)
    return sums.total / jnp.maximum(sums.count, 1.0)

  def objective(part, params, i, key):
    whole = tree.merge(part, params)
    away = mean(whole, mine, i % sizes[0], key)
    return retain * mean(whole, rest, i % sizes[1], key) - away

  @jax.jit
  def run(params):
    part = tree.like(params, sent.update)  # what clients train

    def step(part, i):
      grads = jax.grad(objective)(part, params, i, jax.random.fold_in(key, i))
      down = lambda p, g: (p - learning_rate * g).astype(p.dtype)
      return jax.tree.map(down, part, grads), None

    part, _ = jax.lax.scan(step, part, jnp.arange(num_steps))
    return tree.merge(part, params)

  return state._replace(params=run(state.params))


def losses(
  loss: Loss, base: Base, key: Key
) -> Callable[[Params, Sequence[Any]], float]:
  """Returns a function for the mean loss, nats a token, of groups of batches.

  A group has batches of one shape, [M, ...].
  """

  @jax.jit
  def sums(params, batches):
    return jax.lax.map(lambda batch: loss(base, params, batch, key), batches)

  def evaluate(params: Params, groups: Sequence[Any]) -> float:
    rows = [jax.device_get(sums(params, batches)) for batches in groups]
    total = sum(float(np.sum(x.total, dtype=np.float64)) for x in rows)
    return total / max(sum(float(np.sum(x.count)) for x in rows), 1.0)

  return evaluate


def compared(
  rounds: Rounds,
  client: int,
  *,
  loss: Loss,
  key: Key,
  retain: Sequence[Any],
  ways: Sequence[str] = WAYS,
) -> Mapping[str, Figures]:
  """Returns the figures of the run ('trained') and of each way of forgetting.

  Args:
    rounds: of the run.
    client: the id to forget.
    loss: of the task.
    key: of the run.
    retain: groups of batches [M, ...] of held-out texts of other clients.
    ways: some of `WAYS`; `retrained` is always computed.

  Raises:
    Error: another way; the client took part in no round; as the ways.
  """
  for way in ways:
    if way not in WAYS:
      raise Error(f'there is no way {way!r} to forget: {", ".join(WAYS)}.')
  seen = [c for c in rounds.cohorts if _rows(c, client)]
  if not seen:
    raise Error(f'client {client} took part in no round.')
  pick = lambda c: jax.tree.map(
    lambda x: np.asarray(x)[_rows(c, client)].reshape(-1, *x.shape[2:]),
    c.batches,
  )
  forget = [pick(c) for c in seen]
  evaluate = losses(loss, rounds.base, key)
  states = {'trained': trained(rounds), 'retrained': retrained(rounds, client)}
  if 'subtracted' in ways:
    states['subtracted'] = subtracted(rounds, client)
  if 'calibrated' in ways:
    states['calibrated'] = calibrated(rounds, client)
  if 'ascended' in ways:
    states['ascended'] = ascended(rounds, client, loss, states['trained'], key)
  gold = states['retrained'].params
  result = {}
  for way, state in states.items():
    params = rounds.algorithm.personal(state.params, None)
    result[way] = Figures(
      evaluate(params, forget),
      evaluate(params, retain),
      float(tree.norm(_apart(state.params, gold))),
    )
  return result


def _apart(x: Params, y: Params) -> Any:
  wide = lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32)
  return jax.tree.map(wide, x, y)
