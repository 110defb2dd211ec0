"""The program `replay`: computes a round again and reports on its clients."""

import argparse
import difflib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_llm import replay
from fedjax_llm.replay import forgetting, values
from fedjax_llm.replay.moments import (
  Moment,
  before,
  differences,
  heldout_score,
  play,
  without,
)
from fedjax_llm.run import (
  builders,
  command,
  experiment,
  metrics,
  narration,
  rates,
  rebuild,
  staged,
  workdir,
)
from fedjax_llm.types import Cohort, Draw, Error


def run(argv: list[str]) -> None:
  args = command.parse(_parser(), argv)
  file = str(pathlib.Path(args.workdir) / 'config.json')
  with builders.confined(file, rebuild.TRUST, args.trust_code):
    _run(args)


def _run(args: argparse.Namespace) -> None:
  if args.json and not args.values:
    raise Error('--json belongs to --values.')
  for option in ('permutations', 'seed'):
    if getattr(args, option) is not None and args.values != 'shapley':
      raise Error(f'--{option} belongs to --values shapley.')
  if args.forget is not None:
    print(_forgotten(args))
    return
  moment = before(args.workdir, args.round, trusted=args.trust_code)
  built, (draw, cohort) = moment.built, moment.people()
  client: str | None = args.without
  row = None if client is None else _row(built, draw, client)
  print(_whence(moment))
  examine, rates_of = built.examiner(moment.algorithm), built.rates()
  tested = any(x.startswith('evals/') for x in moment.record)
  earlier = metrics.read(str(pathlib.Path(args.workdir) / 'metrics.jsonl'))

  def replayed(cohort: Cohort, test: bool) -> dict[str, Any]:
    state, states, info = play(moment, cohort)
    record, _ = narration.left_out(
      metrics.summarise(info), info, draw, built.names, moment.round
    )
    moment.store.scatter(draw.ids, info.reported, states)
    record |= built.selected(draw, moment.round - 1)
    record |= rates_of(moment.round, rates.num_steps(cohort.batches))
    if test:
      served = state.params
      record |= examine(built.base, served, moment.store, built.round_key)
      record |= staged.tracker(built.stages, earlier)(moment.round, record)
    return json.loads(metrics.line(moment.round, record))

  # First without the client, while its private state is that before the round.
  less = None if row is None else replayed(without(cohort, row), True)
  again = replayed(cohort, tested or less is not None)
  compared = {x: v for x, v in again.items() if tested or 'evals/' not in x}
  differ = differences(moment.record, compared)
  if not differ:
    print('equal: every number is the one in metrics.jsonl')
  if client is not None and less is not None:
    print(_compared(again, less, client))
  if args.values:
    print(_valued(moment, draw, cohort, args))
  if differ:
    more = f'; and {len(differ) - 5} more' if len(differ) > 5 else ''
    raise Error(
      f'round {moment.round} is not as recorded: {"; ".join(differ[:5])}{more}.'
      ' Another number of devices, kind of machine or version of JAX rounds '
      'differently.'
    )


def _forgotten(args: argparse.Namespace) -> str:
  """Returns a table of the ways to forget a client, after `--round` rounds."""
  before(args.workdir, args.round, trusted=args.trust_code)  # it is recorded
  moment = before(args.workdir, 1, trusted=args.trust_code)
  built = moment.built
  names = list(built.names)
  if args.forget not in names:
    near = difflib.get_close_matches(args.forget, names, 3, 0.3) or names[:3]
    raise Error(
      f'--forget {args.forget} is none of the {len(names)} clients, such as '
      f'{", ".join(map(str, near))}.'
    )
  if built.small is not None:
    raise Error(
      '--forget measures the model of the server on the texts of a client, and '
      'the clients of the section client_models have tokens of their own.'
    )
  client = names.index(args.forget)
  heldout = [
    () if k == client else own[: built.test.per_client]
    for k, own in enumerate(built.population.heldout)
  ]
  if not any(heldout):
    raise Error('--forget needs held-out texts of other clients.')
  halves = moment.algorithm.train is not None
  figures = forgetting.compared(
    forgetting.Rounds(
      moment.algorithm,
      moment.state,
      [built.assemble(number)[1] for number in range(args.round)],
      built.base,
    ),
    client,
    loss=built.task.loss(built.loaded),
    key=built.round_key,
    retain=[batches for batches, _ in built.rows(heldout)],
    **({} if halves else {'ways': ()}),
  )
  rows = [
    (way, f'{x.forget:.6f}', f'{x.retain:.6f}', f'{x.distance:.6f}')
    for way, x in figures.items()
  ]
  header = ('', 'loss, its texts', "loss, others' held-out", 'from retrained')
  note = (
    '\nThe method tells no single updates: only training again forgets them.'
  )
  return (
    f'forgetting {narration.printable(args.forget)} after round {args.round}:\n'
    f'{metrics.table(rows, header)}{"" if halves else note}'
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.replay',
    description=replay.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--workdir', required=True, help='the folder of the run')
  parser.add_argument('--round', required=True, type=int, help='from 1')
  one = parser.add_mutually_exclusive_group()
  one.add_argument('--without', metavar='CLIENT', help='leave a client out')
  one.add_argument(
    '--forget',
    metavar='CLIENT',
    help='remove a client from the model after that round, in several ways',
  )
  one.add_argument(
    '--values',
    choices=('shapley', 'leave_one_out'),
    help="the value of each client's update for the held-out loss",
  )
  parser.add_argument(
    '--permutations',
    type=int,
    metavar='P',
    help='random orders, for shapley; 200 if left out',
  )
  parser.add_argument('--seed', type=int, help='of these orders; 0')
  parser.add_argument(
    '--json', metavar='FILE', help='write the values, for clients.name=by_value'
  )
  parser.add_argument(
    rebuild.TRUST,
    action='store_true',
    help="follow import paths in the workdir's config.json, which run code",
  )
  return parser


def _row(built: experiment.Experiment, draw: Draw, client: str) -> int:
  """Returns the row of a client in the cohort."""
  there = {
    built.names[i]: row
    for row, i in enumerate(draw.ids.tolist())
    if i >= 0 and draw.reports[row]
  }
  if client not in there:
    near = difflib.get_close_matches(client, there, 3, 0.3)
    some = ', '.join(map(str, near or [*there][:3]))
    raise Error(
      f'--without {client} is none of the {len(there)} clients of that round, '
      f'such as {some}.'
    )
  return there[client]


def _whence(moment: Moment) -> str:
  number, begun = moment.round, moment.begun
  kept = ', '.join(map(str, moment.kept)) or 'no round'
  if begun:
    text = f'round {number}, from the checkpoint of round {begun}'
  else:
    text = f'round {number}, from the start of the run'
  if begun + 1 < number:
    passed = f'round {begun + 1}'
    if begun + 2 < number:
      passed = f'rounds {begun + 1} to {number - 1}'
    text += (
      f', with {passed} again (there are checkpoints of {kept}; a run with a '
      'larger keep_checkpoints keeps more)'
    )
  return text


def _compared(
  full: Mapping[str, Any], less: Mapping[str, Any], client: str
) -> str:
  """Returns a table of the evaluations with and without a client."""
  shown = ('loss', 'accuracy', 'client_mean', 'client_worst_10')
  rows = [
    (name.removeprefix('evals/'), full[name], less[name])
    for name in full
    if name.startswith('evals/') and name.split('/')[-1] in shown
    if isinstance(full[name], float) and name in less
  ]
  each, other = (x.get('evals/heldout/clients', {}) for x in (full, less))
  most = sorted(each, key=lambda who: -abs(other[who] - each[who]))[:5]
  rows += [
    (f'loss of {narration.printable(who)}', each[who], other[who])
    for who in dict.fromkeys([*[x for x in (client,) if x in each], *most])
  ]
  table = [(name, a, b, f'{b - a:+.6f}') for name, a, b in rows]
  header = ('', 'as it was', 'without', 'difference')
  return (
    f'without {narration.printable(client)}, after the round:\n'
    f'{metrics.table(table, header)}'
  )


def _valued(
  moment: Moment, draw: Draw, cohort: Cohort, args: argparse.Namespace
) -> str:
  """Returns a table of the values of clients."""
  built = moment.built
  game = values.of_round(
    moment.algorithm, moment.state, cohort, built.base, heldout_score(built)
  )
  present = np.asarray(cohort.valid)
  if args.values == 'shapley':
    keywords = {'num_permutations': args.permutations, 'seed': args.seed}
    keywords = {k: v for k, v in keywords.items() if v is not None}
    result = values.shapley(game, present, **keywords)
  else:
    result = values.leave_one_out(game, present)
  if args.json:
    who = [built.names[int(draw.ids[k])] for k in np.flatnonzero(present)]
    value = dict(zip(who, result.value[present].tolist(), strict=True))
    content = {'round': moment.round, 'kind': args.values, 'values': value}
    workdir.replace(
      pathlib.Path(args.json), json.dumps(content, indent=1) + '\n'
    )
  share = cohort.weight / max(float(np.sum(cohort.weight)), 1e-30)
  order = [k for k in np.argsort(-result.value) if present[k]]
  rows = [
    (
      narration.printable(built.names[int(draw.ids[k])]),
      f'{result.value[k]:+.6f}',
      f'+-{result.margin[k]:.6f}' if result.margin[k] else 'exact',
      float(share[k]),
    )
    for k in order
  ]
  header = ('client', 'value', '95 %', 'weight')
  gain = result.all - result.none
  return '\n'.join(
    [
      f'{args.values}: how far an update lowered the held-out loss, nats/token '
      f'({result.num_subsets} subsets of {len(order)} clients)',
      metrics.table(rows, header),
      f'together {gain:+.6f}: from {-result.none:.6f} to {-result.all:.6f}; '
      f'the values add up to {result.value.sum():+.6f}',
    ]
  )


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))
