"""Trains the cells that are missing, then prints and draws all of them."""

import argparse
import functools
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tables  # beside this file

from fedjax_llm import evals, tree
from fedjax_llm.run import config, experiment, guarantee
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import FederatedAlgorithm

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

import cell_files  # noqa: E402

TUNINGS = ('lora', 'ffa', 'bitfit', 'prompt')


def _conf(words: str) -> Any:
  argv = ['--config', f'{HERE}/cell.py:{words}', '--workdir', 'unused']
  return config.parse(argv, SPEC).config


class Room(NamedTuple):
  """What the cells of one tuning and one seed share."""

  built: experiment.Experiment
  mean: FederatedAlgorithm  # without privacy
  examine: Callable[[Any], float]  # parameters -> held-out loss


@functools.cache
def _programs(model: str, tuning: str) -> tuple[Any, Any]:
  """Returns the programs of a tuning: training and evaluation."""
  built = _built(model, tuning, 0)
  by_row = built.task.loss(built.loaded, per_row=True)
  train = built.method().train
  assert train is not None
  return jax.jit(train), evals.likelihood(by_row)


@functools.lru_cache(maxsize=1)
def _built(model: str, tuning: str, seed: int) -> experiment.Experiment:
  return experiment.build(_conf(f'{model}:{tuning}:none:{seed}:1'))


@functools.lru_cache(maxsize=1)
def room(model: str, tuning: str, seed: int) -> Room:
  """Returns the room of a tuning and a seed."""
  built = _built(model, tuning, seed)
  mean, (_, likelihood) = built.method(), _programs(model, tuning)
  groups = built.tests().heldout

  def examine(params):
    served = mean.personal(params, None)
    report = likelihood(built.base, served, groups, built.round_key)
    return report.metrics['evals/heldout/client_mean']

  return Room(built, mean, examine)


@functools.cache
def _before(model: str, tuning: str, seed: int) -> float:
  built, _, examine = room(model, tuning, seed)
  return examine(built.initial)


@functools.lru_cache(maxsize=1)
def _first(model: str, tuning: str, seed: int) -> Any:
  """Returns the uploads of round 0, which no epsilon has touched yet."""
  built = _built(model, tuning, seed)
  state = built.method().init(built.round_key, built.initial)
  return _sent(model, tuning, seed, state, 0)


def _sent(model: str, tuning: str, seed: int, state: Any, number: int) -> Any:
  """Returns the uploads of a round. Rows without a client are cut."""
  built, mean, _ = room(model, tuning, seed)
  cohort = built.assemble(number)[1]
  there = -(-max(int(np.sum(cohort.valid)), 1) // 8) * 8
  rows = np.argsort(~np.asarray(cohort.valid), kind='stable')[:there]
  cohort = jax.tree.map(lambda x: x[rows], cohort)
  newcomer = mean.init_client(built.initial)
  cohort = cohort._replace(states=tree.broadcast(newcomer, len(rows)))
  of_mean = mean.init(built.round_key, built.initial).aggregator
  train = _programs(model, tuning)[0]
  return train(state._replace(aggregator=of_mean), cohort, built.base)[0]


def cell(
  model: str, tuning: str, epsilon: str, seed: int, rounds: int
) -> dict[str, Any]:
  """Trains one run and returns its numbers.

  A round is its two halves: all epsilons share the program of the first, and
  in round 0 its result; the second clips, adds and noises.
  """
  began = time.monotonic()
  conf = _conf(f'{model}:{tuning}:{epsilon}:{seed}:{rounds}')
  built, _, examine = room(model, tuning, seed)
  before = _before(model, tuning, seed)
  method = built.method(conf=conf)
  plan = guarantee.of(conf, len(built.owned))
  aggregate = jax.jit(method.aggregate)
  state = method.init(built.round_key, built.initial)
  for number in range(rounds):
    sent = (
      _sent(model, tuning, seed, state, number)
      if number
      else _first(model, tuning, seed)
    )
    state, _ = aggregate(state, sent, built.base)
  return {
    'model': model,
    'tuning': tuning,
    'epsilon': epsilon,
    'seed': seed,
    'rounds': rounds,
    'clients': len(built.owned),
    'trained': sum(x[0].size for x in jax.tree.leaves(sent.update)),
    'before': before,
    'after': examine(state.params),
    'spent': plan and plan.epsilon(rounds),
    'delta': plan and plan.delta,
    'noise_multiplier': plan and plan.noise_multiplier,
    'clip': plan and plan.clip,
    'seconds': round(time.monotonic() - began, 1),
    'machine': platform.machine(),
    'python': platform.python_version(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, help='cells, table, figure')
  parser.add_argument('--rounds', type=int, default=4, help='of every run')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--epsilons', nargs='+', default=['1', '3', '8', 'none'])
  parser.add_argument('--tunings', nargs='+', default=TUNINGS, choices=TUNINGS)
  parser.add_argument(
    '--budget', type=float, help='minutes after which no run is begun'
  )
  parser.add_argument(
    '--small', action='store_true', help='a decoder of 1.0 million parameters'
  )
  parser.add_argument('--table', action='store_true', help='train nothing')
  parser.add_argument('--smoke', action='store_true', help='a random model')
  args = parser.parse_args()
  model = 'smoke' if args.smoke else 'small' if args.small else 'smollm2'
  where = pathlib.Path(tempfile.mkdtemp()) if args.smoke else HERE
  out = args.out or where / model
  cells = out / 'cells'
  cells.mkdir(parents=True, exist_ok=True)
  budget, left = cell_files.budget(args.budget or None), 0
  order = [
    (seed, tuning, epsilon)
    for seed in range(args.seeds)
    for tuning in args.tunings
    for epsilon in args.epsilons
  ]
  for number, (seed, tuning, epsilon) in enumerate(order, 1):
    name = f'{tuning}-{epsilon}-{seed}'
    path = cells / f'{name}.json'
    if path.exists() or args.table:
      continue
    if budget.left() < 0:
      left += 1
      continue
    print(f'\n== {number}/{len(order)}: {name}', flush=True)
    result = cell(model, tuning, epsilon, seed, args.rounds)
    cell_files.save(path, result)
  known = tables.read(cells)
  table = tables.markdown(known, args.epsilons)
  tables.figure(known, args.epsilons, out / 'figure.png')
  print(f'\n{table}\n\n{out}')
  if left:
    print(f'{left} runs are left: the same command goes on with them')


if __name__ == '__main__':
  main()
