"""Methods in stages: one algorithm after another, on the same parameters.

`stages` returns a `FederatedAlgorithm`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import (
  Base,
  ClientState,
  Cohort,
  Error,
  FederatedAlgorithm,
  Key,
  Params,
  RoundInfo,
  ServerState,
  Uploads,
)

Between = Callable[[Params], Params]


class Staged(NamedTuple):
  """The number of the present stage, and the states of the rules of all."""

  stage: Any  # [] int32, from 0; checkpoints hold it
  each: tuple[Any, ...]


class Kept(NamedTuple):
  """The stages in which a client took part, and its local states in all."""

  took: Any  # [stages] bool; () where clients keep nothing
  each: tuple[Any, ...]


def stages(
  *parts: tuple[FederatedAlgorithm, int | None],
  between: Sequence[Between | None] = (),
) -> FederatedAlgorithm:
  """Returns a method that runs algorithms one after another.

  All of them have the same parameters, labels and codecs; what a stage leaves
  alone is frozen by its masks. The server's state holds the number of the
  stage, so a run resumes in the stage of its checkpoint. Rounds are counted
  from the start of the run. A stage begins with the server optimizer and the
  rule as new, and a client that takes part in a stage for the first time with
  the private parameters of a newcomer to it. Metrics that a stage does not have
  are NaN in its rounds.

  Args:
    parts: pairs (algorithm, rounds); None, of the last stage: until the end.
    between: `(params) -> params` at the end of each stage but the last, where
      not None.

  Raises:
    Error: fewer than two stages, one of less than one round, a stage without
      end before the last, an algorithm that plans on the host; from `init` and
      `init_client`, stages with other structures.

  >>> from fedjax_llm.types import FederatedAlgorithm
  >>> def adding(size):
  ...   def round(state, cohort, base, data=None):
  ...     params, done = state.params + size, state.round + 1
  ...     new = state._replace(params=params, round=done)
  ...     info = RoundInfo(jnp.ones(1), None, None, None, {})
  ...     return new, cohort.states, info
  ...   return FederatedAlgorithm(
  ...     lambda key, p: ServerState(jnp.int32(0), p, (), (), key),
  ...     lambda p: ClientState(), round, lambda p, state: p)
  >>> method = stages((adding(1), 2), (adding(10), None))
  >>> state = method.init(jax.random.key(0), jnp.float32(0))
  >>> cohort = Cohort(None, None, None, None, states=method.init_client(0.0))
  >>> for _ in range(3):
  ...   state, _, _ = method.round(state, cohort)
  >>> float(state.params), int(state.aggregator.stage)
  (12.0, 1)
  """
  algorithms = [algorithm for algorithm, _ in parts]
  ends = _ends([rounds for _, rounds in parts])
  turns = [*between, *[None] * (len(parts) - 1 - len(between))]
  if len(turns) != len(parts) - 1:
    raise Error(
      f'stages: {len(parts)} stages have {len(parts) - 1} functions between '
      f'them, not {len(between)}.'
    )
  if any(algorithm.plan is not None for algorithm in algorithms):
    raise Error('stages: an algorithm that plans on the host is no stage.')

  def init(key: Key, params: Params) -> ServerState:
    each = [algorithm.init(key, params) for algorithm in algorithms]
    shapes = [jax.tree.map(jnp.shape, state.params) for state in each]
    if any(shape != shapes[0] for shape in shapes):
      raise Error('stages: the parameters of all stages must be the same.')
    return each[0]._replace(
      optimizer=tuple(state.optimizer for state in each),
      aggregator=Staged(jnp.int32(0), tuple(s.aggregator for s in each)),
    )

  def init_client(params: Params) -> ClientState:
    each = [algorithm.init_client(params) for algorithm in algorithms]
    shared = [jax.tree.map(jnp.shape, x._replace(local=())) for x in each]
    if any(shapes != shared[0] for shapes in shared):
      raise Error('stages: the labels and codecs of all must be the same.')
    took = jnp.zeros(len(each), bool) if jax.tree.leaves(each) else ()
    local = Kept(took, tuple(state.local for state in each))
    return each[0]._replace(local=local)

  def own(state: ServerState, i: int) -> ServerState:
    return state._replace(
      optimizer=state.optimizer[i], aggregator=state.aggregator.each[i]
    )

  def back(state: ServerState, new: ServerState, i: int) -> ServerState:
    return new._replace(
      optimizer=_put(state.optimizer, i, new.optimizer),
      aggregator=state.aggregator._replace(
        each=_put(state.aggregator.each, i, new.aggregator)
      ),
    )

  def client(states: ClientState, params: Params, i: int) -> ClientState:
    """Returns clients' states [K, ...] (or one) in stage i."""
    private = states.private
    if jax.tree.leaves(private):
      new = algorithms[i].init_client(params).private
      took = states.local.took[..., i]
      private = tree.map_present(
        lambda old, new: jnp.where(_wide(took, old), old, new), private, new
      )
    return states._replace(private=private, local=states.local.each[i])

  def kept(states: ClientState, new: ClientState, reported: Any, i: int):
    took = states.local.took
    if not isinstance(took, tuple):
      took = took.at[..., i].set(took[..., i] | reported)
    # A client that is left out has entered nothing.
    private = tree.map_present(
      lambda new, old: jnp.where(_wide(reported, old), new, old),
      new.private,
      states.private,
    )
    local = Kept(took, _put(states.local.each, i, new.local))
    return new._replace(private=private, local=local)

  def advanced(state: ServerState) -> ServerState:
    """Enters the next stage where the rounds of the present one are over."""
    for i, (turn, end) in enumerate(zip(turns, ends)):

      def enter(state, turn=turn, i=i):
        params = state.params if turn is None else turn(state.params)
        new = algorithms[i + 1].init(state.key, params)
        new = new._replace(round=state.round, key=state.key)
        state = back(state, new, i + 1)
        stage = jnp.int32(i + 1)
        return state._replace(aggregator=state.aggregator._replace(stage=stage))

      over = (state.aggregator.stage == i) & (state.round >= end)
      state = jax.lax.cond(over, enter, lambda state: state, state)
    return state

  def run(
    state: ServerState, cohort: Cohort, base: Base, half: bool, data=None
  ):
    """Returns the results of the present stage: a round, or its first half."""

    def one(i: int, state, cohort, base, data):
      states = client(cohort.states, state.params, i)
      inside = own(state, i), cohort._replace(states=states), base
      if half:
        result, states, info = _half(algorithms[i].train)(*inside)
      else:
        more = () if data is None else (data,)
        result, states, info = algorithms[i].round(*inside, *more)
        result = back(state, result, i)
      return result, kept(cohort.states, states, info.reported, i), info

    branches = [
      lambda *arguments, i=i: one(i, *arguments) for i in range(len(parts))
    ]
    return _switch(state.aggregator.stage, branches, state, cohort, base, data)

  def round_fn(state, cohort, base=None, data=None):
    state, states, info = run(state, cohort, base, False, data)
    return advanced(state), states, info

  def train(state, cohort, base=None):
    return run(state, cohort, base, True)

  def aggregate(state: ServerState, uploads: Uploads, base=None, data=None):
    def one(i: int, state, uploads, base, data):
      more = () if data is None else (data,)
      inside = own(state, i), uploads, base
      new, metrics = _half(algorithms[i].aggregate)(*inside, *more)
      info = RoundInfo(None, None, None, None, metrics)
      return back(state, new, i), None, info

    branches = [
      lambda *arguments, i=i: one(i, *arguments) for i in range(len(parts))
    ]
    stage = state.aggregator.stage
    state, _, info = _switch(stage, branches, state, uploads, base, data)
    return advanced(state), info.metrics

  def personal(params: Params, state: ClientState | None) -> Params:
    if state is None:
      return algorithms[0].personal(params, None)
    served = algorithms[0].personal(params, client(state, params, 0))
    took = state.local.took
    for i in range(1, len(parts) if not isinstance(took, tuple) else 1):
      later = algorithms[i].personal(params, client(state, params, i))
      choose = lambda new, old, i=i: jnp.where(took[i], new, old)
      served = jax.tree.map(choose, later, served)
    return served

  halves = all(a.train and a.aggregate for a in algorithms)
  return FederatedAlgorithm(
    init=init,
    init_client=init_client,
    round=round_fn,
    personal=personal,
    train=train if halves else None,
    aggregate=aggregate if halves else None,
  )


def _ends(rounds: Sequence[int | None]) -> list[int]:
  """Returns the number of rounds after which each stage but the last ends."""
  if len(rounds) < 2:
    raise Error(f'stages: there must be two or more, not {len(rounds)}.')
  ends, done = [], 0
  for number in rounds[:-1]:
    if number is None or number < 1:
      raise Error(f'stages: a stage of rounds={number} must have at least 1.')
    done += number
    ends.append(done)
  return ends


def _put(each: tuple[Any, ...], i: int, new: Any) -> tuple[Any, ...]:
  return (*each[:i], new, *each[i + 1 :])


def _half(half: Callable[..., Any] | None) -> Callable[..., Any]:
  assert half is not None
  return half


def _wide(took: Any, x: Any) -> Any:
  """Returns [K] with axes of length one for those of x [K, ...]."""
  return jnp.reshape(took, (*took.shape, *[1] * (jnp.ndim(x) - took.ndim)))


def _switch(stage: Any, branches: Sequence[Callable], *arguments: Any) -> Any:
  """Returns the result of a branch, with the metrics of all branches."""
  shapes = [jax.eval_shape(branch, *arguments) for branch in branches]
  names: dict[str, Any] = {}
  for *_, info in shapes:
    names = {**info.metrics, **names}

  def full(branch, *arguments):
    *rest, info = branch(*arguments)
    absent = {
      name: jnp.full(x.shape, jnp.nan, x.dtype)
      for name, x in names.items()
      if name not in info.metrics
    }
    metrics = {**absent, **info.metrics}
    metrics = {name: metrics[name] for name in names}
    return (*rest, info._replace(metrics=metrics))

  each = [lambda *x, branch=branch: full(branch, *x) for branch in branches]
  return jax.lax.switch(stage, each, *arguments)
