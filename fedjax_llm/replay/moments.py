"""Restores the state before a round of a run, from the folder of the run.

`before` returns a `Moment`; `play` computes its round.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import clients
from fedjax_llm.devices import compilation, sharding
from fedjax_llm.run import (
  builders,
  checkpoint,
  config,
  experiment,
  metrics,
  rebuild,
  resume,
  versions,
  workdir,
)
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  Base,
  Cohort,
  Draw,
  Error,
  FederatedAlgorithm,
  Params,
  RoundInfo,
  ServerState,
)


class Moment(NamedTuple):
  """A run just before one of its rounds."""

  built: experiment.Experiment
  algorithm: FederatedAlgorithm
  round: int  # the next round, from 1
  begun: int  # the round of the checkpoint that was used; 0: the start
  kept: list[int]  # rounds with a checkpoint
  state: ServerState
  store: clients.store.Store  # private client states; the disk is not changed
  step: Callable[..., Any]  # the compiled round
  record: Mapping[str, Any]  # the round's record in metrics.jsonl

  def people(self, number: int | None = None) -> tuple[Draw, Cohort]:
    """Returns the draw and the cohort of a round, with client states."""
    number = self.round if number is None else number
    draw, cohort = self.built.assemble(number - 1)
    return draw, cohort._replace(states=self.store.gather(draw.ids))


def before(path: str, number: int, *, trusted: bool = False) -> Moment:
  """Returns the `Moment` before a round of a run.

  Args:
    path: the workdir of a run that is finished or was interrupted.
    number: the round, from 1.
    trusted: import paths in the workdir's config.json, which run code, may be
      followed.

  Raises:
    Error: the folder holds no run, or one at work, on other texts, or without a
      record of that round; all checkpoints before it are damaged; config.json
      names a function outside the project and the run is not `trusted`.
  """
  file = str(pathlib.Path(path) / 'config.json')
  with builders.confined(file, rebuild.TRUST, trusted):
    return _before(path, number)


def _before(path: str, number: int) -> Moment:
  folder = pathlib.Path(path)
  raw = rebuild.read_config(folder)
  room = workdir.open(path, raw)
  file = folder / 'metrics.jsonl'
  records = {x['round']: x for x in metrics.read(str(file))}
  if number < 1 or number not in records:
    last = max(records, default=0)
    told = f'rounds 1 to {last}' if last else 'no round'
    raise Error(f'--round {number}: {file} tells of {told}.')
  room.hold()  # a run at work prunes its checkpoints
  then = workdir.settings_of(raw, number)
  conf, _ = config.override(then, [], SPEC, str(folder / 'config.json'))
  settings, _ = experiment.checked(conf)
  compilation.keep(settings.compilation_cache)
  built = experiment.build(conf, say=lambda text: None)
  size = settings.block_size
  if size == 'auto':
    size = room.chosen.get('block_size') or built.block_size()
  algorithm = built.method(size, mesh=built.mesh)
  state = algorithm.init(built.round_key, jax.tree.map(jnp.copy, built.initial))
  newcomer = algorithm.init_client(state.params)
  saver = checkpoint.open(room.checkpoints, read_only=True, conf=conf)

  def open_store(at: int, begins: bool) -> clients.store.Store:
    # Before the first round no client has a private state.
    states = room.states if at else room.states / 'none'
    return versions.open_store(
      states, newcomer, conf, at_round=at, read_only=True, begins=begins
    )

  def check(restored: checkpoint.Restored) -> None:
    digest = built.digest
    if restored.meta.get('data', digest) != digest:
      raise Error(f'{path} holds a run on other texts or clients.')

  newest, store = resume.newest(
    saver, state, open_store, check, up_to=number - 1
  )
  begun = 0
  if newest is not None:
    state, begun = newest.state, newest.round
  moment = Moment(
    built=built,
    algorithm=algorithm,
    round=number,
    begun=begun,
    kept=saver.rounds(),
    state=state,
    store=store,
    step=sharding.compiled(algorithm.round, built.mesh),
    record=records[number],
  )
  for after, fields in workdir.changes_of(raw):
    if begun < after < number and 'clients.cohort_size' in fields:
      raise Error(
        f'--round {number} is reached from the checkpoint of round {begun}, '
        f'and clients.cohort_size changed after round {after}: a larger '
        'keep_checkpoints keeps a nearer one.'
      )
  for passed in range(begun + 1, number):
    draw, cohort = moment.people(passed)
    state, states, info = play(moment, cohort)
    moment.store.scatter(draw.ids, info.reported, states)
    moment = moment._replace(state=state)
  return moment


def play(moment: Moment, cohort: Cohort) -> tuple[ServerState, Any, RoundInfo]:
  """Computes the round; returns server state, client states and `RoundInfo`."""
  state = jax.tree.map(jnp.copy, moment.state)  # the step donates its input
  cohort = sharding.joined(cohort, moment.built.mesh)  # as `train` does
  state, states, info = moment.step(state, cohort, moment.built.base)
  if moment.algorithm.plan is not None:
    state = moment.algorithm.plan(state)
  return state, sharding.held(states), jax.device_get(info)


def without(cohort: Cohort, row: int) -> Cohort:
  """Returns the cohort in which the client of a row does not report."""
  there = np.arange(len(cohort.ids)) != row
  return cohort._replace(
    valid=np.asarray(cohort.valid) & there,
    weight=np.where(there, cohort.weight, 0).astype(np.float32),
  )


def differences(
  record: Mapping[str, Any], again: Mapping[str, Any]
) -> list[str]:
  """Returns the fields in which two records differ, except times.

  >>> differences({'a': 1, 'b': 2.5, 'time/round': 3}, {'a': 1, 'b': 2.0})
  ['b was 2.5, is 2.0']
  """
  fields = sorted(x for x in {*record, *again} if not x.startswith('time/'))
  text = lambda x, field: json.dumps(x[field]) if field in x else 'absent'
  return [
    f'{field} was {text(record, field)[:40]}, is {text(again, field)[:40]}'
    for field in fields
    if text(record, field) != text(again, field)
  ]


def heldout_score(
  built: experiment.Experiment,
) -> Callable[[Base, Params], jax.Array]:
  """Returns a function for minus the held-out loss in nats a token, by row.

  The sum of its results over all rows of text is the score.

  Raises:
    Error: the run has no held-out texts.
  """
  tests = built.tests()
  if not tests.heldout:
    raise Error(
      'nothing is held out, so clients have no value: evals.per_client.'
    )
  loss = built.task.loss(built.loaded, per_row=True)

  def score(base, params):
    rows = lambda batch: loss(base, params, batch, built.round_key)
    parts = [jax.lax.map(rows, batches) for batches, _ in tests.heldout]
    total = jnp.concatenate([jnp.ravel(x.total) for x in parts])
    count = sum(jnp.sum(x.count) for x in parts)
    return -total / count

  return score
