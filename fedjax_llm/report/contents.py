"""The contents of a report, in the order of a round.

`sections` returns its pictures, tables and sentences.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fedjax_llm.report import continual, curves, newcomers, spreads, tables
from fedjax_llm.report.drawing import Picture
from fedjax_llm.report.runs import Run
from fedjax_llm.report.tables import Samples, Table

Item = Picture | Table | Samples | str


class Section(NamedTuple):
  name: str
  title: str
  intro: str
  items: Sequence[Item]


def sections(runs: Sequence[Run]) -> list[Section]:
  """Returns the whole report; a sentence stands for each missing item."""
  unit = runs[0].unit
  return [
    Section(
      'summary',
      'Summary',
      '',
      [tables.summary(runs), *tables.notices(runs)],
    ),
    Section(
      'loss',
      'Loss',
      'Measured on texts that no round trains on; where clients keep models of '
      'their own, each is tested with its own.',
      curves.losses(runs),
    ),
    *_stages(runs),
    Section(
      'clients',
      'Clients',
      'Who is served badly, and what each of them holds.',
      [
        spreads.distribution(runs),
        spreads.sizes(runs),
        spreads.loss_by_size(runs),
        *tables.worst(runs),
        *newcomers.table(runs),
      ],
    ),
    Section(
      'aggregation',
      'Aggregation',
      'Drift is 0 where all updates agree and 1 where they cancel out. The '
      'error is how far the product of the aggregated factors is from the mean '
      "of the clients' products, relative to it.",
      _aggregation(runs),
    ),
    Section(
      'time',
      'Time',
      'Setting up is done once; compiling is part of the first round.',
      [
        spreads.times(runs),
        *curves.rounds(
          runs,
          field='time/tokens_per_second',
          name='speed',
          title='Speed of training',
          label=f'{unit}s a second',
        ),
        *_devices(runs),
      ],
    ),
    Section(
      'samples',
      'Replies',
      'To the beginnings of held-out texts, before and after training.',
      tables.samples(runs),
    ),
    Section('config', 'Config', '', [tables.configs(runs)]),
  ]


def _stages(runs: Sequence[Run]) -> list[Section]:
  """Returns the section of runs in stages, where there are any."""
  items = continual.items(runs)
  if not items:
    return []
  intro = 'The texts of every stage, tested before training and at each end.'
  return [Section('stages', 'Stages', intro, items)]


def _devices(runs: Sequence[Run]) -> list[Item]:
  """Returns charts of what devices did, of runs that have recorded it."""
  charts = (
    ('share_of_peak', 'Share of the measured rate of products', 'share'),
    ('memory', 'Memory in use on the first device', 'bytes'),
    ('waiting', 'Waiting for the host', 'seconds'),
  )
  items: list[Item] = []
  for name, title, label in charts:
    field = f'time/{name}'
    if any(field in record for run in runs for record in run.records):
      name = name.replace('_', '-')
      items += curves.rounds(
        runs, field=field, name=name, title=title, label=label
      )
  return items


def _aggregation(runs: Sequence[Run]) -> list[Item]:
  return [
    *curves.rounds(
      runs,
      field='aggregators/drift',
      name='drift',
      title='Drift of the clients',
      label='drift',
    ),
    *curves.layers(
      runs,
      field='aggregators/drift_by_layer',
      name='drift-layers',
      title='Drift by layer',
      label='drift',
    ),
    *curves.rounds(
      runs,
      field='aggregators/error',
      name='error',
      title='Aggregation error',
      label='relative error',
    ),
    *curves.layers(
      runs,
      field='aggregators/error_by_layer',
      name='error-layers',
      title='Aggregation error by layer',
      label='relative error',
    ),
    *curves.rounds(
      runs,
      field='aggregators/effective_rank',
      name='rank',
      title="Effective rank of the clients' mean",
      label='effective rank',
    ),
  ]


def pictures(runs: Sequence[Run]) -> list[Picture]:
  items = [item for section in sections(runs) for item in section.items]
  return [item for item in items if isinstance(item, Picture)]
