"""DiLoCo and data-parallel training of a small model from random weights.

Both train on the batches of `configs/pretrain_diloco.py`, in the same order: S
batches for each worker and round. DiLoCo's workers take S steps of AdamW before
they send their change. Data-parallel workers send their gradient after each
batch, and one AdamW of the same settings steps with the mean. Losses are those
of a fifth of the lines that nobody trains on.
"""

import argparse
import datetime
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import optax
import tables

from fedjax_llm import aggregators, local, recipes, tree
from fedjax_llm.run import config, experiment
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Cohort

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'scripts'))
import cell_files  # noqa: E402 (beside the folder of this file)

EVERY = 4  # rounds between evaluations


def build(seed: int, rounds: int | None) -> experiment.Experiment:
  """Returns the experiment of the config with this seed."""
  path = f'{ROOT}/configs/pretrain_diloco.py'
  words = ['--config', path, '--workdir', '-', f'--config.seed={seed}']
  if rounds is not None:
    words.append(f'--config.num_rounds={rounds}')
  args = config.parse(words, SPEC)
  return experiment.build(args.config, say=lambda text: None)


def data_parallel(built: experiment.Experiment) -> Any:
  """Returns rounds of one batch a worker: AdamW on the mean gradient."""
  section = dict(built.conf['local'])
  assert section.pop('name') == 'adamw'
  # One step of SGD of rate 1 changes the weights by minus the gradient.
  return recipes.fed_avg(
    built.task.loss(built.loaded),
    local.optimizer('sgd', 1.0),
    aggregator=aggregators.uniform_mean(),
    server=optax.adamw(**section),
    fold=built.adapter.fold,
  )


def train(method: str, seed: int, rounds: int | None) -> dict[str, Any]:
  """Trains one cell and returns its record."""
  built = build(seed, rounds)
  apart = method == 'data_parallel'
  algorithm = data_parallel(built) if apart else built.method()
  state = algorithm.init(built.round_key, built.initial)
  step = jax.jit(algorithm.round)
  examine = built.examiner(algorithm)
  kept = tree.broadcast(
    algorithm.init_client(state.params), len(built.owned)
  )  # [N, ...]
  num_rounds, sent, curve = built.settings.num_rounds, 0, []

  def note(number: int) -> None:
    values = examine(built.base, state.params, None, built.round_key)
    curve.append(dict(round=number, loss=values['evals/new/loss']))

  note(0)
  for number in range(num_rounds):
    cohort = built.assemble(number)[1]
    for part in batches(cohort) if apart else [cohort]:
      part = part._replace(states=tree.take(kept, part.ids))
      state, states, info = step(state, part, built.base)
      kept = jax.tree.map(lambda x, new: x.at[part.ids].set(new), kept, states)  # noqa: B023
      sent += int(info.bytes_up[0].sum())
    if (number + 1) % EVERY == 0 or number + 1 == num_rounds:
      note(number + 1)
  return dict(
    method=method,
    seed=seed,
    steps=num_steps(cohort),
    workers=len(cohort.ids),
    bytes_sent=sent,
    curve=curve,
  )


def num_steps(cohort: Cohort) -> int:
  return jax.tree.leaves(cohort.batches)[0].shape[1]


def batches(cohort: Cohort) -> list[Cohort]:
  """Returns the cohort [K, S, ...] as S cohorts of one batch a client."""
  one = lambda i: jax.tree.map(lambda x: x[:, i : i + 1], cohort.batches)
  return [cohort._replace(batches=one(i)) for i in range(num_steps(cohort))]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--rounds', type=int, help="by default the config's")
  parser.add_argument(
    '--budget', type=float, help='minutes after which no cell is begun'
  )
  parser.add_argument('--table', action='store_true', help='train nothing')
  args = parser.parse_args()
  path_of = lambda cell: tables.CELLS / f'{cell[0]}-{cell[1]}.json'
  cells = [(method, seed) for seed in tables.SEEDS for method in tables.METHODS]
  todo = [] if args.table else cell_files.missing(cells, path_of)
  budget, longest = cell_files.budget(args.budget), 0.0
  while todo and budget.left() >= 0:
    (method, seed), *todo = todo
    since = time.monotonic()
    cell = train(method, seed, args.rounds)
    seconds = time.monotonic() - since
    cell |= dict(
      seconds=round(seconds, 1),
      date=f'{datetime.date.today()}',
      machine=f'{platform.machine()}, CPU',
    )
    cell_files.save(path_of((method, seed)), cell)
    longest = max(longest, seconds)
    name = f'{method}, seed {seed}, loss {cell["curve"][-1]["loss"]:.3f}'
    needed = longest * len(todo)
    print(cell_files.line(name, seconds, len(todo), needed), flush=True)
  print(tables.markdown(tables.read()))
  print(cell_files.unfinished(len(todo)))


if __name__ == '__main__':
  main()
