"""Trains every method with every seed, then prints and saves the results.

One process runs all of them, one after another, and a method compiles once.
Every run is a workdir: a finished run is skipped, a stopped run, or one with
fewer rounds than requested, resumes from its last round.

All methods get the same clients, texts and order of texts: runs of one seed
differ in the method only. The local optimizer is the same too, AdamW at 2e-3
with new moments in every round (local_only, which sends nothing, keeps its
moments). Methods that train two parts one after the other give each part half
of a client's steps, so that every method trains on the same number of tokens.
"""

import argparse
import pathlib
import sys

import tables  # beside this file

from fedjax_llm import train

ROOT = pathlib.Path(__file__).parents[2]
SEEDS = (0, 1, 2)
ALIKE = {
  # Eight roles train and four never do; half of the eight take part in a round,
  # in one block, so that the error of streaming rules is measured too.
  'population.template': 'plain',
  'population.max_length': 64,
  'population.max_clients': 12,
  'clients.cohort_size': 4,
  'block_size': 4,
  'cohort.packing': True,
  # Some rules have no weights: in every method all clients have equal weight.
  'cohort.weight_by': 'uniform',
  'evals.every': 1000,  # before the first round and after the last one only
  'evals.per_client': 2,
  'evals.samples': 0,
}
# Clients with a capacity of 2, 4 or all 8 ranks, a third each.
MIXED = ('--config.profiles={"name": "ranks", "choices": [2, 4, 8]}',)
# Two of a client's four steps train its private part.
HALVES = ('--config.algorithm.private_steps=2',)
METHODS = {
  'local_only': (),
  'fed_it': (),
  'ffa_lora': (),
  'rolora': (),
  'fedex_lora': (),
  'flexlora': MIXED,
  'het_lora': MIXED,
  'fed_sa': (),
  'ditto': HALVES,
}


def run(
  workdir: pathlib.Path, name: str, *, seed: int, rounds: int, smoke: bool
) -> None:
  config = str(ROOT / 'configs/quickstart.py') + (':smoke' if smoke else '')
  settings = {**ALIKE, 'seed': seed, 'num_rounds': rounds}
  flags = [f'--config.{field}={value}' for field, value in settings.items()]
  flags += [f'--config.algorithm.name={name}', *METHODS[name]]
  status = train.main(['--config', config, '--workdir', str(workdir), *flags])
  if status:
    raise SystemExit(status)
  if tables.num_rounds(workdir) < rounds:
    raise SystemExit('stopped; the same command goes on from there')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, help='results and figure')
  parser.add_argument('--rounds', type=int, default=4, help='of every run')
  parser.add_argument('--table', action='store_true', help='train nothing')
  parser.add_argument('--smoke', action='store_true', help='a random model')
  args = parser.parse_args()
  folder = 'compare_methods_smoke' if args.smoke else 'compare_methods'
  workdir = args.workdir or ROOT / 'runs' / folder
  out = args.out or (workdir if args.smoke else pathlib.Path(__file__).parent)
  seeds = SEEDS[:2] if args.smoke else SEEDS
  runs = {
    (name, seed): workdir / f'{name}-{seed}'
    for seed in seeds
    for name in METHODS
  }
  if not args.table:
    for number, ((name, seed), folder) in enumerate(runs.items(), 1):
      print(f'\n== {number}/{len(runs)}: {name}, seed {seed}', flush=True)
      run(folder, name, seed=seed, rounds=args.rounds, smoke=args.smoke)
  results = tables.collect(runs)
  tables.write(results, out)
  print(tables.markdown(results))
  print(f'\n{out}/results.json and {out}/results.png', file=sys.stderr)


if __name__ == '__main__':
  main()
