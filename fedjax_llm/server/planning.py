"""Plans that the host makes for every client between rounds.

`planned` returns a `FederatedAlgorithm` with a plan.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.types import (
  Cohort,
  FederatedAlgorithm,
  Key,
  Params,
  Reports,
  RoundInfo,
  ServerState,
)

# (round, Reports, profiles [N, ...]) -> profiles, NumPy
Policy = Callable[[int, Reports, Any], Any]


class Planned(NamedTuple):
  """A rule's state, the plan of every client, and their last reports."""

  inner: Any
  profiles: Mapping[str, Any]  # [N, ...]
  reports: Reports


def planned(
  algorithm: FederatedAlgorithm,
  policy: Callable[[Params], Policy],
  *,
  first: Callable[[Params], tuple[Mapping[str, np.ndarray], Any]],
  num_clients: int,
  sent: Callable[[Mapping[str, Any]], Any] | None = None,
) -> FederatedAlgorithm:
  """Returns the algorithm with a policy's plan for every client.

  A client's report (`ClientOutput.report`) is kept by its id. After every round
  `plan(state)` passes all reports to the policy, and the next round reads the
  plan in `Cohort.profiles`, beside the entries that are there already. Reports
  and plan are in the server's state, so a checkpoint holds them and a resumed
  run goes on with the same plan. A report counts in 'uploads/bytes', the
  client's row of the plan in 'downloads/bytes'.

  Args:
    algorithm: of a local update that reports.
    policy: `(params) -> policy`, for the shapes of the parameters. The policy
      is a pure function `(round, reports, profiles) -> profiles` on NumPy
      arrays, where round counts the rounds done.
    first: `(params) -> (profiles [N, ...], report)`: the plan before the first
      report, and zeros in the shape of one client's report.
    num_clients: N.
    sent: `(row of the plan) -> booleans` in the shape of the client's report,
      broadcast from the right: the entries that travel; all if None.

  >>> none = jnp.zeros((2, 1), jnp.int32)
  >>> def round(state, cohort, base, data):  # clients report what they got
  ...   who = cohort.ids >= 0
  ...   info = RoundInfo(who, who, none, none, {}, cohort.profiles['size'])
  ...   return state._replace(round=state.round + 1), (), info
  >>> init = lambda key, params: ServerState(jnp.int32(0), params, (), (), key)
  >>> def policy(params):
  ...   return lambda round, reports, plan: {
  ...     'size': plan['size'] + 10 * (reports.round == round) * reports.values}
  >>> method = planned(
  ...   FederatedAlgorithm(init, None, round, None), policy, num_clients=3,
  ...   first=lambda params: ({'size': np.ones(3)}, np.float32(0)))
  >>> state = method.init(None, {})
  >>> cohort = Cohort(jnp.array([2, 0]), None, None, None)
  >>> state, _, info = method.round(state, cohort)
  >>> method.plan(state).aggregator.profiles['size'].tolist()
  [11.0, 1.0, 11.0]
  """

  def init(key: Key, params: Params) -> ServerState:
    profiles, report = first(params)
    zeros = lambda x: np.zeros((num_clients, *np.shape(x)), np.float32)
    never = np.full(num_clients, -1, np.int32)
    reports = Reports(jax.tree.map(zeros, report), never)
    profiles = policy(params)(0, reports, profiles)
    state = algorithm.init(key, params)
    kept = jax.tree.map(jnp.asarray, (dict(profiles), reports))
    return state._replace(aggregator=Planned(state.aggregator, *kept))

  def bare(state: ServerState) -> ServerState:
    return state._replace(aggregator=state.aggregator.inner)

  def rows_of(state: ServerState, cohort: Cohort) -> dict[str, Any]:
    """Returns the clients' rows of the plan, [K, ...]."""
    at = jnp.maximum(cohort.ids, 0)
    return {name: x[at] for name, x in state.aggregator.profiles.items()}

  def beside(cohort: Cohort, rows: dict[str, Any]) -> Cohort:
    present = cohort.profiles if isinstance(cohort.profiles, Mapping) else {}
    return cohort._replace(profiles={**present, **rows})

  def billed(info: RoundInfo, cohort: Cohort, rows: Any) -> RoundInfo:
    some = None if sent is None else jax.vmap(sent)(rows)
    up = _beside(info.bytes_up, info.reports, info.reported, some)
    down = _beside(info.bytes_down, rows, cohort.ids >= 0)
    return info._replace(bytes_up=up, bytes_down=down, reports=None)

  def kept(state, new, ids, reported, report) -> ServerState:
    """Returns the new state, with this round's reports over earlier ones."""
    _, profiles, reports = state.aggregator
    # Rows of padding and drop-outs are written beyond the end and so dropped.
    to = jnp.where(reported, ids, num_clients)
    write = lambda old, row: old.at[to].set(row, mode='drop')
    reports = Reports(
      jax.tree.map(write, reports.values, report),
      write(reports.round, new.round),
    )
    return new._replace(aggregator=Planned(new.aggregator, profiles, reports))

  def train(state, cohort, base=None):
    assert algorithm.train is not None
    rows = rows_of(state, cohort)
    uploads, states, info = algorithm.train(
      bare(state), beside(cohort, rows), base
    )
    return uploads, states, billed(info, cohort, rows)

  def aggregate(state, uploads, base=None, data=None):
    assert algorithm.aggregate is not None
    new, metrics = algorithm.aggregate(bare(state), uploads, base, data)
    return kept(
      state, new, uploads.ids, uploads.valid, uploads.reports
    ), metrics

  def round(state, cohort, base=None, data=None):
    rows = rows_of(state, cohort)
    new, states, info = algorithm.round(
      bare(state), beside(cohort, rows), base, data
    )
    state = kept(state, new, cohort.ids, info.reported, info.reports)
    return state, states, billed(info, cohort, rows)

  def plan(state: ServerState) -> ServerState:
    inner, profiles, reports = state.aggregator
    decided = policy(state.params)(
      int(state.round),
      *jax.tree.map(np.asarray, (reports, profiles)),
    )

    def put(new, old):
      new = np.asarray(new, old.dtype).reshape(old.shape)
      if not old.committed:  # else the next round would compile again
        return jnp.asarray(new)
      # On the old array's devices: one, or whole on those of all processes.
      place = lambda at: new[at]
      return jax.make_array_from_callback(old.shape, old.sharding, place)

    profiles = jax.tree.map(put, dict(decided), profiles)
    return state._replace(aggregator=Planned(inner, profiles, reports))

  halves = algorithm.train is not None
  return algorithm._replace(
    init=init,
    round=round,
    train=train if halves else None,
    aggregate=aggregate if halves else None,
    plan=plan,
  )


def _beside(
  counts: jax.Array, rows: Any, who: jax.Array, sent: Any = None
) -> jax.Array:
  """Returns bytes [K, leaves] with one more column, of the rows [K, ...]."""
  if sent is None:
    sent = jax.tree.map(lambda x: jnp.ones(len(x), bool), rows)

  def size(x, some):
    entries = jnp.broadcast_to(tree.rows(some, x), x.shape)
    axes = tuple(range(1, x.ndim))
    return jnp.sum(entries, axes, dtype=jnp.int32) * x.dtype.itemsize

  more = sum(jax.tree.leaves(jax.tree.map(size, rows, sent)))
  return jnp.concatenate([counts, jnp.where(who, more, 0)[:, None]], axis=1)
