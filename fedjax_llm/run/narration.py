"""The sentences and tables that a run prints.

They describe its clients, the clients left out of a round, and its results.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_llm.run import metrics
from fedjax_llm.types import Draw, Error, Population, RoundInfo


class Diverged(Error):
  """The error of a run without any finite update or parameter."""


def describe(population: Population) -> str:
  """Returns text on the clients, their sizes, and the records left out."""
  report: Any = population.report
  labels = report.get('labels')
  sizes = []
  if report['tokens']:
    sizes.append(f'{report["tokens"]:,} tokens')
  if labels is not None:
    sizes.append(f'{len(labels)} labels')
  elif report['tokens']:
    sizes.append(f'{report["loss_tokens"]:,} of them learned')
  some = f' ({", ".join(sizes)})' if sizes else ''
  lines = [
    f'{report["num_clients"]} clients train on {report["train_examples"]} '
    f'examples{some}; '
    f'{report["heldout_examples"] or "none"} of their examples and '
    f'{report["num_new_clients"] or "no"} more clients are held out'
  ]
  reasons = {
    'clients_left_out': 'clients without enough usable examples',
    'clients_not_drawn': 'clients above max_clients',
    'empty_records': 'empty records',
    'replies_left_out': 'replies longer than population.max_length',
    'heldout_duplicates': 'held-out copies of training texts',
  }
  for field, what in reasons.items():
    if report.get(field):
      named = [printable(n) for n in report.get(f'{field}_names', ())]
      if named and len(named) < report[field]:
        named.append('...')
      some = f' ({", ".join(named)})' if named else ''
      lines.append(f'left out: {report[field]} {what}{some}')
  if labels is not None:
    each = [f'{printable(name)} {count}' for name, count in labels.items()]
    more = [f'and {len(each) - 12} more'] if len(each) > 12 else []
    lines.append(f'labels: {", ".join([*each[:12], *more])}')
  if never := report.get('labels_untrained'):
    each = [f'{printable(name)} ({count})' for name, count in never.items()]
    lines.append(
      f'tested, but nobody trains on it: {", ".join(each)}: no model here can '
      'know these labels'
    )
  if report.get('unlabelled'):
    lines.append(f'labels hidden from {report["unlabelled"]} training examples')
  if report.get('texts_cut'):
    lines.append(
      f'cut at the end: {report["texts_cut"]} of {report["num_examples"]} '
      'texts, which are longer than population.max_length'
    )
  if report.get('replies_cut'):
    lines.append(f'cut: {report["replies_cut"]} replies, as asked')
  if report.get('replies_rewritten'):
    lines.append(
      f'changed: {report["replies_rewritten"]} replies, of which the chat '
      'template leaves something out; that part is not learned'
    )
  if report.get('prompts_truncated'):
    lines.append(
      f'cut on the left: {report["prompts_truncated"]} of '
      f'{report["num_examples"]} prompts, which are longer than '
      'population.max_length allows'
    )
  return '\n'.join([*lines, report['histogram']])


def unused_clients(conf: Mapping[str, Any]) -> str:
  """Returns a warning if the partition ignores `data.client_key`, else ''.

  >>> data, part = {'client_key': 'who'}, {'name': 'iid'}
  >>> unused_clients({'data': data, 'partition': part})[:44]
  "data.client_key='who' is not used: partition"
  >>> unused_clients({'data': data, 'partition': {'name': 'natural'}})
  ''
  """
  key, partition = conf['data'].get('client_key'), conf['partition']
  name = (partition.get('of') or partition).get('name')
  if key is None or name in ('natural', 'by_keys'):
    return ''
  return (
    f'data.client_key={key!r} is not used: partition.name={name} deals the '
    'texts to clients that it makes up; natural keeps those of the texts.'
  )


def left_out(
  record: Mapping[str, Any],
  info: RoundInfo,
  draw: Draw,
  names: Sequence[str],
  number: int,
) -> tuple[dict[str, Any], str]:
  """Returns a round's record with the clients left out, and a sentence on them.

  Raises:
    Diverged: all clients that reported sent values that are not finite, and
      they are more than one, or the only one of the population.
  """
  metrics = dict(record)
  # Rows beyond the draw are padding.
  broken = ~np.asarray(info.finite, bool)[: len(draw.ids)]
  chosen = np.asarray(draw.ids) >= 0
  reported = np.asarray(draw.reports, bool) & chosen
  counted = np.asarray(info.reported, bool)[: len(draw.ids)]
  bad = [names[int(i)] for i in np.sort(np.asarray(draw.ids)[broken])]
  some = ', '.join(map(printable, bad[:5])) + (', ...' if len(bad) > 5 else '')
  # A single broken client of a larger population does not end the run.
  alone = len(bad) == 1 and len(names) > 1
  if bad and len(bad) == int(reported.sum()) and not alone:
    raise Diverged(
      f'round {number}: the updates of all {len(bad)} clients that reported '
      f'are not finite ({some}): lower local.learning_rate or set '
      'local.clip_norm, in another workdir.'
    )
  metrics |= {
    'clients/reporting': int(counted.sum()),
    'clients/unavailable': int((~chosen).sum()),
    'clients/dropped_out': int((chosen & ~reported).sum()),
    'clients/not_finite': len(bad),
  }
  if draw.started is not None:  # started from a version the server has dropped
    metrics['clients/too_late'] = int((reported & ~broken & ~counted).sum())
  note = ''
  if bad:
    metrics['clients/not_finite_names'] = bad
    note = (
      f'round {number}: left out {len(bad)} of {int(reported.sum())} clients, '
      f'whose updates are not finite or too large, or weights out of range: '
      f'{some}'
    )
  if not reported.any():
    note = f'round {number}: no client reported'
    if float(record.get('server/step_norm', 0)) > 0:  # of a rule such as noise
      note += ', and the rule changed the parameters all the same'
    else:
      note += ', so nothing changed'
    for field in ('loss', 'accuracy', 'grad_norm', 'update_norm'):
      if f'local/{field}' in metrics:
        metrics[f'local/{field}'] = float('nan')  # written as null
  return metrics, note


def not_finite(number: int) -> str:
  """Returns the error message for server parameters that are not finite.

  >>> not_finite(3)[:54]
  'round 3: the parameters after the server step are not '
  """
  return (
    f'round {number}: the parameters after the server step are not finite, '
    'though the updates were: lower server.learning_rate or '
    'local.learning_rate, in another workdir.'
  )


def best(
  number: int, num_rounds: int, best: int | None, test: Any
) -> list[str]:
  """Returns lines on the best round and on early stopping, if configured.

  >>> import types
  >>> test = types.SimpleNamespace(patience=2, keep_best=True)
  >>> for line in best(5, 8, 3, test):
  ...   print(line)
  ended after round 5 of 8: 2 tests brought nothing better than round 3
  best: round 3, which is kept: export with --round best
  """
  lines = []
  if number < num_rounds:
    tests = f'{test.patience} test{"s" if test.patience > 1 else ""}'
    lines.append(
      f'ended after round {number} of {num_rounds}: {tests} brought nothing '
      f'better than round {best}'
    )
  if test.keep_best and best is not None:
    lines.append(f'best: round {best}, which is kept: export with --round best')
  return lines


_ROWS = {
  'heldout/loss': 'held-out loss, nats/token',
  'heldout/perplexity': 'held-out perplexity',
  'heldout/accuracy': 'held-out token accuracy',
  'heldout/client_mean': 'mean over clients',
  'heldout/client_worst_10': 'worst 10 % of clients',
  'new/loss': 'loss on new clients',
}
# The names for classification.
_LABEL_ROWS = {
  'heldout/accuracy': 'held-out accuracy',
  'heldout/client_accuracy_mean': 'mean over clients',
  'heldout/client_accuracy_worst_10': 'worst 10 % of clients',
  'new/accuracy': 'accuracy on new clients',
  'heldout/loss': 'held-out loss, nats/label',
}
_PERSONAL_LABEL_ROWS = {
  'personal/own/client_accuracy_mean': "own model, client's own texts",
  'personal/common/client_accuracy_mean': "own model, everybody's texts",
  'heldout/accuracy': 'shared part, held-out accuracy',
  'new/accuracy': 'shared part, accuracy on new clients',
}
_PERSONAL_ROWS = {
  'personal/own/client_mean': "own model, client's own text",
  'personal/common/client_mean': "own model, everybody's text",
  'heldout/loss': 'shared part, held-out loss',
  'new/loss': 'shared part, loss on new clients',
}


def summary(path: str | os.PathLike, unit: str = '') -> str:
  """Returns a short table of a finished run: its losses and its costs.

  `unit` is the singular name of what the loss counts; by default 'label' where
  accuracies of clients were measured, else 'token'.

  A cell without a measurement is empty. Personal models are compared with the
  models that the server sent to the same clients before training.
  """
  records = metrics.read(os.path.join(path, 'metrics.jsonl'))
  first, last = dict(records[0]), records[-1]
  own = last.get('evals/personal/own/clients')
  labelled = 'evals/heldout/accuracies' in last
  usual = 'label' if labelled else 'token'
  unit = unit or usual
  table = {
    (False, False): _ROWS,
    (False, True): _PERSONAL_ROWS,
    (True, False): _LABEL_ROWS,
    (True, True): _PERSONAL_LABEL_ROWS,
  }[labelled, bool(own)]
  if own:
    start = first.get('evals/heldout/clients') or {}
    first['evals/personal/own/client_mean'] = _mean(map(start.get, own))
    same = first.get('evals/common/loss')  # the same model for everybody
    first['evals/personal/common/client_mean'] = same
    if labelled:
      start = first['evals/heldout/accuracies']
      field = 'evals/personal/{}/client_accuracy_mean'
      first[field.format('own')] = _mean(map(start.get, own))
      first[field.format('common')] = first.get('evals/common/accuracy')
  rows = []
  for field, label in table.items():
    field = f'evals/{field}'
    if field in last:
      old, new = first.get(field), last[field]
      if own and old == new:
        continue  # nothing is shared
      change = '' if old is None or new is None else new - old
      new = 'not finite' if new is None else new  # null in the file
      label = label.replace(f'nats/{usual}', f'nats/{unit}')
      label = label.replace(f'{usual} accuracy', f'{unit} accuracy')
      rows.append((label, '' if old is None else old, new, change))
  notes = []
  if own:
    notes.append(
      'Clients keep parameters of their own, in states/: the adapter holds the '
      'shared ones and the initial private ones.'
    )
  if untrained := last.get('evals/personal/untrained'):
    notes.append(f'{untrained} clients were never trained: they are left out.')
  if not rows:
    losses = [r['local/loss'] for r in records if r.get('local/loss')]
    trend = f': {losses[0]:.4f} first, {losses[-1]:.4f} last' if losses else ''
    notes.append(f'Nothing was tested, training losses aside{trend}.')
  total = lambda field: sum(r.get(field) or 0 for r in records)
  up, down = total('uploads/bytes'), total('downloads/bytes')
  seconds = total('time/round') + total('time/evals')
  header = ('', 'before', 'after', 'change')
  return '\n'.join(
    [
      *([metrics.table(rows, header), ''] if rows else []),
      *notes,
      f'{last["round"]} round{"s" if last["round"] > 1 else ""}, '
      f'{total("local/tokens"):,.0f} {unit}s learned; '
      f'{metrics.human_bytes(up)} up and {metrics.human_bytes(down)} down; '
      f'{seconds:.0f} s',
      f'adapter: {pathlib.Path(path) / "adapter"}',
    ]
  )


def _mean(values: Iterable[float | None]) -> float | None:
  known = list(values)
  if None in known:
    return None
  return sum(x for x in known if x is not None) / max(len(known), 1)


def printable(text: str) -> str:
  """Returns text with control characters escaped, safe for a terminal.

  >>> printable('a\\x1b[2Jb')
  'a\\\\x1b[2Jb'
  """
  keep = lambda c: c == '\n' or c.isprintable()
  return ''.join(c if keep(c) else ascii(c)[1:-1] for c in text)
