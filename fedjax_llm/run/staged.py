"""The section `stages` of a config: runs whose data change from round to round.

`read` sorts the records, `of` returns the `Staged` of a population, and
`tracker` the metrics of all stages, which it writes to stages.json.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm import clients, data
from fedjax_llm.data.encoding import Encode, content
from fedjax_llm.evals import continual
from fedjax_llm.run import builders, clock, workdir
from fedjax_llm.types import Error, Population, Sampler

FILE = 'stages.json'
NAMES = 'evals/stages/stage_names'  # in the order of the stages
LOSSES, ACCURACIES = 'evals/stages/losses', 'evals/stages/accuracies'
_OWN = 'evals/stages/personal'
# The title of a matrix, the field of its rows, and the sign of its score.
_MATRICES = (
  ('loss', LOSSES, -1),
  ('accuracy', ACCURACIES, 1),
  ('personal_loss', f'{_OWN}/losses', -1),
  ('personal_accuracy', f'{_OWN}/accuracies', 1),
)


class Reading(NamedTuple):
  """The records of a run in stages, before they are encoded.

  `encode(task's encoder)` returns an encoder that notes the stage of each
  example in `seen`, by its content.
  """

  plan: data.stages.Plan
  split: data.stages.Split
  encode: Callable[[Encode], Encode]
  seen: dict[bytes, tuple[int, float]]


class Staged(NamedTuple):
  """The stages of a run, and the stage of each held-out example."""

  names: tuple[str, ...]
  pools: clients.staged.Pools
  tested: Sequence[np.ndarray]  # [N] arrays of stages, from 0

  @property
  def ends(self) -> tuple[int, ...]:
    return self.pools.ends

  def heldout(self, population: Population) -> list[list[list[Any]]]:
    """Returns the held-out examples of each client in each stage, [N][T].

    They are those of a population as the task has prepared it.
    """
    return [
      [
        [x for x, stage in zip(own, of, strict=True) if stage == j]
        for j in range(len(self.names))
      ]
      for own, of in zip(population.heldout, self.tested, strict=True)
    ]

  def metrics(self, round: int) -> dict[str, int]:
    """Returns the number of the stage of a round; stages count from 1."""
    return {'data/stage': self.pools.stage(round) + 1}

  def sampler(
    self, make: Callable[[np.ndarray], Sampler], num_clients: int
  ) -> Sampler:
    """Returns the sampler of clients with an example of the round."""
    return clients.staged.sampler(make, self.pools, num_clients)


def check(conf: Mapping[str, Any]) -> None:
  """Raises an `Error` for a section that stages cannot be combined with.

  >>> check({'stages': {'name': 'by_key'}, 'privacy': {'clip': 1.0}})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: stages: the section privacy counts the same clients \
in every round, and those with data change with the stage: leave one of the \
sections out.
  """
  if not conf.get('stages'):
    return
  reasons = {
    'privacy': 'counts the same clients in every round, and those with data '
    'change with the stage',
    'poison': 'changes records, and their stages with them',
    'system': 'simulates one clock for clients that train all the time',
    'client_models': 'encodes the examples of clients anew, and their stages '
    'are known in the tokens of the server only',
  }
  for section, reason in reasons.items():
    if conf.get(section):
      raise Error(
        f'stages: the section {section} {reason}: leave one of the sections '
        'out.'
      )
  name = builders.named(conf.get('clients'))
  if name in clock.TIMED:
    raise Error(
      f'stages: clients.name={name} has a clock, and clients without data of '
      'the stage are not there: take another sampler.'
    )
  if name == 'with_root':
    raise Error(
      'stages: clients.name=with_root draws its root in every round, and '
      'clients without data of the stage are not there: take another sampler.'
    )
  if (conf.get('evals') or {}).get('patience') is not None:
    raise Error(
      'stages: evals.patience would end the run before its last stage: leave '
      'it out.'
    )


def records(
  conf: Mapping[str, Any],
  first: Sequence[Any],
  sources: Any,
) -> Sequence[Any]:
  """Returns the records of all stages; those of `data` without the section.

  Args:
    conf: a checked config.
    first: the records of the section `data`.
    sources: the builders of sections of data.
  """
  if not conf.get('stages'):
    return first
  return read(conf, first, sources).split.records


def read(
  conf: Mapping[str, Any],
  first: Sequence[Any],
  sources: Any,
) -> Reading:
  """Returns the `Reading` of a config with a section `stages`.

  Args and errors as in `records` and the builders of `data.stages`.
  """
  plan = builders.build(conf['stages'], data.stages)
  more = [
    _source(section, f'stages.then[{i}]', sources)
    for i, section in enumerate(plan.sources)
  ]
  split = plan.split([first, *more])
  place = {id(record): i for i, record in enumerate(split.records)}
  seen: dict[bytes, tuple[int, float]] = {}

  def noting(encode: Encode) -> Encode:
    def encode_and_note(record, how):
      encoded = encode(record, how)
      i = place[id(record)]
      when = 0.0 if split.when is None else float(split.when[i])
      mine = int(split.stage[i]), when
      for example in encoded.examples:
        # A text of several stages belongs to the first.
        key = content(example)
        seen[key] = min(mine, seen.get(key, mine))
      return encoded

    return encode_and_note

  return Reading(plan, split, noting, seen)


def _source(section: Mapping[str, Any], label: str, sources: Any) -> Any:
  """Returns the records of a section of data, checked under its own name."""
  name = section.get('name')
  builder = builders.resolve_builder(label, name, sources, f'{label}.name')
  keywords = builders.keywords_of(section, sources)
  builders.check(keywords, builder, (), lambda field: f'{label}.{field}')
  return builder(**keywords)


def of(
  reading: Reading, population: Population, num_rounds: int, seed: int
) -> Staged:
  """Returns the `Staged` of a population that was built of the records.

  Raises:
    Error: the rounds of the stages are not those of the run; a stage without an
      example to train or to test on; a window without one to train on.
  """
  names, plan = reading.split.names, reading.plan
  each = plan.rounds
  if isinstance(each, int):
    each = (each,) * len(names)
  if len(each) != len(names):
    raise Error(
      f'stages.rounds has {len(each)} numbers, but there are {len(names)} '
      f'stages: {", ".join(names)}.'
    )
  if sum(each) != num_rounds:
    raise Error(
      f'num_rounds is {num_rounds}, but the {len(names)} stages have '
      f'{sum(each)} rounds (stages.rounds={plan.rounds}).'
    )
  _, owned = data.population.trainers(population)
  of_each = lambda examples, i: [
    np.array([reading.seen[content(x)][i] for x in own]) for own in examples
  ]
  stage, when = of_each(owned, 0), of_each(owned, 1)
  tested = of_each(population.heldout, 0)
  for j, name in enumerate(names):
    if not any((own == j).any() for own in stage):
      raise Error(f'stages: no client has an example of {name!r} to train on.')
    if not any((own == j).any() for own in tested):
      raise Error(
        f'stages: no example of {name!r} is held out; '
        'population.heldout_fraction is the share of each client.'
      )
  pools = clients.staged.pools(
    stage,
    np.cumsum(each).tolist(),
    train=plan.train,
    replay=plan.replay,
    when=when,
    window=plan.window,
    seed=seed,
  )
  for round in range(num_rounds if plan.window is not None else 0):
    if not len(pools.able(round)):
      raise Error(
        f'stages.window is {plan.window}: no client has an example to train on '
        f'in round {round + 1}; choose a larger share.'
      )
  return Staged(names, pools, tested)


def describe(stages: Staged) -> str:
  """Returns a line about the stages and their rounds."""
  begins = (0, *stages.ends)
  each = [
    f'{name} (rounds {begin + 1} to {end})'
    for name, begin, end in zip(stages.names, begins, stages.ends)
  ]
  return f'{len(each)} stages: {", ".join(each)}'


# ----------------------------------------------------------------- results --


def matrices(
  names: Sequence[str],
  ends: Sequence[int],
  records: Mapping[int, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Returns the matrices of a run, each with its summary.

  Row i holds the values after stage i, row 0 those before training, up to the
  last stage that ended. The signs of a summary are those of
  `continual.summary` of accuracies: of a loss, forgetting is its increase and
  transfer its decrease.

  Args:
    names: of the stages.
    ends: the round after which each stage ends.
    records: metrics by round; others than those of `ends` and 0 are not read.

  >>> two = lambda a, b: {LOSSES: {'one': a, 'two': b}}
  >>> matrices(('one', 'two'), (1, 2), {
  ...   0: two(3.0, 3.0), 1: two(1.0, 2.5), 2: two(1.5, 1.0)})
  {'loss': {'matrix': [[3.0, 3.0], [1.0, 2.5], [1.5, 1.0]], 'average': 1.25, \
'forgetting': 0.5, 'backward': -0.5, 'forward': 0.5}}
  """
  result: dict[str, dict[str, Any]] = {}
  for title, field, sign in _MATRICES:
    rows: list[list[float]] = []
    for number in (0, *ends):
      values = records.get(number, {}).get(field)
      if not isinstance(values, Mapping):
        break
      rows.append([_number(values.get(name)) for name in names])
    if not rows:
      continue
    summary = continual.summary(sign * np.array(rows))
    if 'average' in summary:
      summary['average'] *= sign
    result[title] = {'matrix': rows, **summary}
  return result


def _known(x: Any) -> Any:
  """Returns nested values for JSON, None in place of NaN."""
  if isinstance(x, Mapping):
    return {name: _known(value) for name, value in x.items()}
  if isinstance(x, list | tuple):
    return [_known(value) for value in x]
  return None if isinstance(x, float) and x != x else x


def _number(x: Any) -> float:
  return float(x) if isinstance(x, int | float) else float('nan')


def tracker(
  stages: Staged | None,
  earlier: Sequence[Mapping[str, Any]] = (),
  folder: pathlib.Path | None = None,
) -> Callable[[int, Mapping[str, Any]], dict[str, Any]]:
  """Returns `(round, metrics) -> metrics`, the summaries at the end of a stage.

  They are named 'evals/stages/loss_average', 'accuracy_forgetting' and so on;
  'evals/stages/stage_names' has the stages in their order, also before the
  first round. Without stages, and in other rounds, there are none.

  Args:
    stages: of the run; None: it has none.
    earlier: the records of the rounds that are done.
    folder: gets stages.json at the end of each stage; None: it is not written.
  """
  if stages is None:
    return lambda number, values: {}
  rows = {record['round']: record for record in earlier}

  def note(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    rows[number] = values
    if number not in (0, *stages.ends):
      return {}
    if number == 0:
      return {NAMES: list(stages.names)}
    tables = matrices(stages.names, stages.ends, rows)
    if folder is not None:
      content = {
        'names': list(stages.names),
        'ends': list(stages.ends),
        'round': number,
        **tables,
      }
      text = json.dumps(_known(content), indent=1)
      workdir.replace(folder / FILE, text + '\n')
    return {NAMES: list(stages.names)} | {
      f'evals/stages/{title}_{name}': value
      for title, table in tables.items()
      for name, value in table.items()
      if name != 'matrix'
    }

  return note


def sentence(
  stages: Staged | None, number: int, values: Mapping[str, Any]
) -> str:
  """Returns a sentence on a stage that ended in this round, else ''."""
  if stages is None or number not in stages.ends:
    return ''
  place = stages.ends.index(number)
  parts = [f'stage {place + 1} of {len(stages.ends)} ({stages.names[place]})']
  for name in ('average', 'forgetting', 'backward', 'forward'):
    value = values.get(f'evals/stages/loss_{name}')
    if value is not None:
      parts.append(f'{name} {value:.4f}')
  return f'end of {parts[0]}, loss: {", ".join(parts[1:])}'
