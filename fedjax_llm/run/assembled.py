"""The parts of a run, as `experiment.build` makes them of a config."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fedjax_llm import clients, data, evals, models
from fedjax_llm.devices import sharding
from fedjax_llm.run import (
  blocks,
  client_models,
  config,
  evaluators,
  guarantee,
  rates,
  selecting,
  staged,
  tasks,
)
from fedjax_llm.run.method import algorithm, keeps_private, make_part
from fedjax_llm.run.sections import SPEC, Evals, Settings
from fedjax_llm.types import (
  Adapter,
  Cohort,
  Draw,
  FederatedAlgorithm,
  Params,
  Population,
  Sampler,
)


class Tests(NamedTuple):
  """The evaluation examples of a run, in groups of one width, with owners."""

  heldout: Sequence[Any]
  new: Sequence[Any]
  common: Sequence[Any]


class Experiment(NamedTuple):
  """All parts of a run: data, clients, model, method and evaluations."""

  conf: Mapping[str, Any]
  settings: Settings
  test: Evals
  task: tasks.Task
  labels: Sequence[str] | None  # the classes; None: not a classification
  tokenizer: data.tokenizers.Tokenizer
  loaded: models.LoadedModel
  population: Population
  digest: str  # of the population, before the task prepared it
  owned: Sequence[Sequence[Any]]  # examples of each client that trains
  names: Sequence[str]  # the names of these clients
  sampler: Sampler
  profiles: Mapping[str, Any] | None  # the capacities of clients, [N] each
  make_cohort: Callable[[Draw, int], Cohort]  # of any draw
  assemble: Callable[[int], tuple[Draw, Cohort]]  # round, from 0 -> cohort
  selected: Callable[[Draw, int], dict[str, float]]  # counts of examples
  adapter: Adapter
  initial: Params
  round_key: jax.Array
  mesh: Any  # all devices; None: there is one
  near: Any  # the devices of this process
  width: int  # columns of the longest example
  public: Any = None  # batches [M, B, ...] for the server; None: there are none
  stages: staged.Staged | None = None  # of the section of that name
  small: client_models.Groups | None = None  # the clients' own models
  beside: Mapping[str, Any] = {}  # `Task.beside`

  @property
  def base(self) -> Any:
    if self.small is None and not self.beside:
      return self.loaded.base
    more: dict[str, Any] = dict(self.beside)
    if self.small is not None:
      more[client_models.MODELS] = self.small.bases
    return {**self.loaded.base, **more}

  def method(
    self,
    block_size: int | None = None,
    *,
    mesh: Any = None,
    conf: Mapping[str, Any] | None = None,
  ) -> FederatedAlgorithm:
    """Returns the algorithm; `conf` may differ in numbers only."""
    conf = self.conf if conf is None else conf
    result = algorithm(
      conf,
      loss=self.task.loss(self.loaded),
      model=self.loaded.model,
      adapter=self.adapter,
      num_clients=len(self.owned),
      profiles=self.profiles,
      num_layers=self.loaded.config.num_layers,
      public=self.public,
      client_models=self.small and self.small.groups,
      block_size=block_size,
      widths=tuple(self.settings.widths),
      mesh=mesh,
      execution=self.settings.execution,
    )
    by_row = self.task.loss(self.loaded, per_row=True)
    return selecting.scored(conf, result, by_row)

  def rates(
    self, conf: Mapping[str, Any] | None = None
  ) -> Callable[[int, int], dict[str, float]]:
    """Returns `rates.of` for this run: the learning rates in its records."""
    conf = self.conf if conf is None else conf
    of = rates.of(
      make_part(conf, 'local'), config.resolved(conf, SPEC).get('server')
    )
    more = []
    if (plan := guarantee.of(conf, len(self.owned))) is not None:
      more.append(plan.metrics)
    if isinstance(self.sampler, clients.timed.Timed):
      tell = self.sampler.clock
      more.append(lambda number: tell(number - 1))
    return lambda number, steps: functools.reduce(
      lambda values, part: values | part(number), more, of(number, steps)
    )

  @property
  def privacy(self) -> Any:
    """Returns the plan of the section `privacy`; None without it."""
    return guarantee.of(self.conf, len(self.owned))

  def block_size(self) -> int | None:
    """Returns the block size, chosen by `blocks.auto` for 'auto'."""
    if self.settings.block_size != 'auto':
      return self.settings.block_size
    return blocks.auto(
      lambda size: self.method(size, mesh=self.near),
      self.initial,
      self.assemble(0)[1],
      self.base,
      num_rows=1 if self.near is None else self.near.shape[sharding.CLIENTS],
      num_model=self.settings.mesh_model,
    )

  def tests(self) -> Tests:
    """Returns the held-out examples selected by the section `evals`."""
    test, people = self.test, self.population
    heldout = [own[: test.per_client] for own in people.heldout]
    fresh = [own[: test.per_client] for own in people.new]
    limits = clients.cohorts.bounds(
      [[example for own in (*heldout, *fresh) for example in own]],
      batch_size=test.batch_size,
      max_length=self.width,
      epochs=1,
    )
    return Tests(
      heldout=self.rows(heldout, limits),
      new=self.rows(fresh, limits),
      common=self.rows(evals.in_turn(heldout, test.common), limits),
    )

  def likelihood(self) -> Callable[..., Any]:
    """Returns the program that evaluates one model: `evals.likelihood`."""
    return evals.likelihood(self.task.loss(self.loaded, per_row=True))

  def examiner(
    self,
    algorithm: FederatedAlgorithm,
    *,
    tests: Tests | None = None,
    together: Callable[..., Any] | None = None,
  ) -> Callable[..., Any]:
    """Returns the evaluation of a run: the evaluators of its config.

    Runs that share a `likelihood` as `together`, and `tests` of the same
    shapes, share one compiled program.
    """
    test = self.test
    return evaluators.build(
      evaluators.with_implied(
        test.evaluators, test.personal, self.stages is not None
      ),
      built=self,
      algorithm=algorithm,
      tests=tests or self.tests(),
      private=keeps_private(algorithm, self.initial),
      loss=self.task.loss(self.loaded, per_row=True),
      model=self.loaded.model,
      together=together,
    )

  def rows(
    self,
    examples: Sequence[Sequence[Any]],
    limits: Sequence[int | None] | None = None,
  ) -> list[Any]:
    """Returns examples in batches of a few widths, with their owners."""
    groups = clients.cohorts.rows(
      examples,
      batch_size=self.test.batch_size,
      max_length=self.width,
      buckets=self.test.buckets,
      pad_id=self.tokenizer.pad_id,
      collate=self.task.collate,
      length=self.task.length,
      limits=limits,
    )
    return [(group.batches, group.owners) for group in groups]
