"""The folder of a run: what is where, whose it is, and what is told of it.

config.json            the resolved config, every default filled in
metrics.jsonl          one JSON object a round
tensorboard/           the same as event files
checkpoints/, states/  the server's state, and the private one of clients
adapter/               the final adapter, a PEFT directory
"""

import json
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm import config, metrics
from fedjax_llm.types import Cohort, Draw, Error, Population

# What may change between a run and its resumption, without changing a number
# that was already written.
_FREE = ('num_rounds', 'checkpoint_every', 'keep_checkpoints')


class Workdir(NamedTuple):
  path: pathlib.Path
  checkpoints: pathlib.Path
  states: pathlib.Path
  adapter: pathlib.Path
  base: pathlib.Path
  save_config: Callable[[], None]


def open(path: str, resolved: Mapping[str, Any]) -> Workdir:
  """Looks at the folder; writes nothing until `save_config` is called.

  Raises:
    Error: it is no folder, or the run in it had another config (the fields that
      differ are named).
  """
  folder = pathlib.Path(path)
  file = folder / 'config.json'
  if folder.exists() and not folder.is_dir():
    raise Error(f'--workdir {path} is a file, not a folder.')
  if file.exists():
    try:
      before = json.loads(file.read_text())
    except ValueError as error:
      raise Error(f'{file} is damaged ({error}).') from error
    differ = config.same(before, resolved, ignore=_FREE)
    if differ:
      raise Error(
        f'{path} holds a run of another config: {"; ".join(differ)}. Take '
        'another --workdir, or the config of that run.'
      )

  def save_config() -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix('.new')
    with fresh.open('w') as out:
      out.write(json.dumps(resolved, indent=2, sort_keys=True) + '\n')
      out.flush()
      os.fsync(out.fileno())
    os.replace(fresh, file)

  return Workdir(
    folder,
    folder / 'checkpoints',
    folder / 'states',
    folder / 'adapter',
    folder / 'base',
    save_config,
  )


def stop_on_sigterm() -> Callable[[], bool]:
  """Says whether SIGTERM came, so that a round can be finished first."""
  asked = threading.Event()
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
  return asked.is_set


def describe(population: Population) -> str:
  """Who there is, what was left out and why, and the sizes of the clients."""
  report = population.report
  lines = [
    f'{report["num_clients"]} clients train on {report["train_examples"]} '
    f'examples ({report["tokens"]:,} tokens, {report["loss_tokens"]:,} of them '
    f'learned); {report["heldout_examples"]} examples of theirs and '
    f'{report["num_new_clients"]} more clients are held out'
  ]
  reasons = {
    'clients_left_out': 'clients without enough usable examples',
    'clients_not_drawn': 'clients above max_clients',
    'empty_records': 'empty records',
    'replies_left_out': 'replies longer than max_length',
    'heldout_duplicates': 'held-out copies of training texts',
  }
  for field, what in reasons.items():
    if report.get(field):
      named = report.get(f'{field}_names')
      names = f' ({", ".join(named)}, ...)' if named else ''
      lines.append(f'left out: {report[field]} {what}{names}')
  if report.get('replies_cut'):
    lines.append(f'cut: {report["replies_cut"]} replies, as asked')
  if report.get('prompts_truncated'):
    lines.append(
      f'cut on the left: {report["prompts_truncated"]} prompts that did not fit'
    )
  return '\n'.join([*lines, report['histogram']])


def left_out(
  told: dict[str, Any],
  draw: Draw,
  cohort: Cohort,
  names: Sequence[str],
  number: int,
) -> dict[str, Any]:
  """Counts and names of the clients of a round that did not count.

  Raises:
    Error: every client that reported sent values that are not finite.
  """
  broken = np.asarray(told.pop('clients/non_finite'), bool)
  name = lambda i: names[i] if i < len(names) else str(i)
  bad = [name(i) for i in np.asarray(draw.ids)[broken]]
  reported = np.asarray(cohort.valid, bool)
  if bad and len(bad) == int(reported.sum()):
    raise Error(
      f'round {number}: the updates of all {len(bad)} clients are not finite '
      f'({", ".join(bad[:5])}{", ..." if len(bad) > 5 else ""}): lower '
      'local.learning_rate or set algorithm.clip_norm.'
    )
  chosen = np.asarray(draw.ids) >= 0
  out = {
    'clients/reporting': int(reported.sum()) - len(bad),
    'clients/unavailable': int((~chosen).sum()),
    'clients/dropped_out': int((chosen & ~reported).sum()),
    'clients/not_finite': len(bad),
  }
  if bad:
    out['clients/not_finite_names'] = bad
  return out


def summary(path: str) -> str:
  """A short table of a finished run: the losses, and what they cost."""
  records = metrics.read(str(pathlib.Path(path) / 'metrics.jsonl'))
  first, last = records[0], records[-1]
  rows = []
  labels = {
    'evals/heldout/loss': 'held-out loss, nats/token',
    'evals/heldout/perplexity': 'held-out perplexity',
    'evals/heldout/accuracy': 'held-out token accuracy',
    'evals/heldout/client_mean': 'mean over clients',
    'evals/heldout/client_worst_10': 'worst 10 % of clients',
    'evals/new/loss': 'loss on new clients',
    'evals/personal/own/client_mean': 'own model, own text',
    'evals/personal/common/client_mean': "own model, everybody's text",
  }
  for field, label in labels.items():
    if field in first and field in last:
      rows.append(
        (label, first[field], last[field], last[field] - first[field])
      )
  total = lambda field: sum(r.get(field) or 0 for r in records)
  up, down = total('uploads/bytes'), total('downloads/bytes')
  seconds = total('time/round') + total('time/evals')
  return '\n'.join(
    [
      metrics.table(rows, ('', 'before', 'after', 'change')),
      '',
      f'{last["round"]} rounds, {total("local/tokens"):,.0f} tokens learned; '
      f'{metrics.human_bytes(up)} up and {metrics.human_bytes(down)} down; '
      f'{seconds:.0f} s',
      f'adapter: {pathlib.Path(path) / "adapter"}',
    ]
  )
