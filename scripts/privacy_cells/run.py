"""Trains the cells that are missing, then prints and draws all of them."""

import argparse
import json
import pathlib
import platform
import time

import tables  # beside this file

from fedjax_llm import train

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TUNINGS = ('lora', 'ffa', 'bitfit', 'prompt')


def cell(
  workdir: pathlib.Path, model: str, tuning: str, epsilon: str, seed: int,
  rounds: int,
) -> dict:  # fmt: skip
  """Returns the numbers of one run, which is trained if it is not finished."""
  words = f'{model}:{tuning}:{epsilon}:{seed}:{rounds}'
  began = time.monotonic()
  if train.main(
    ['--config', f'{HERE}/cell.py:{words}', '--workdir', str(workdir)]
  ):
    raise SystemExit(f'{workdir}: the run failed.')
  text = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in text]
  if records[-1]['round'] < rounds:
    raise SystemExit('stopped; the same command goes on from there')
  mean = lambda record: record['evals/heldout/client_mean']
  plan = {}
  if epsilon != 'none':
    plan = json.loads((workdir / 'privacy.json').read_text())
  return {
    'model': model,
    'tuning': tuning,
    'epsilon': epsilon,
    'seed': seed,
    'rounds': rounds,
    'before': mean(records[0]),
    'after': mean(records[-1]),
    'spent': plan.get('epsilon'),
    'delta': plan.get('delta'),
    'noise_multiplier': plan.get('noise_multiplier'),
    'clip': plan.get('clip'),
    'bytes_up': sum(r['uploads/bytes'] for r in records[1:]),
    'seconds': round(time.monotonic() - began, 1),
    'machine': platform.machine(),
    'python': platform.python_version(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, help='cells, table, figure')
  parser.add_argument('--rounds', type=int, default=12, help='of every run')
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
  workdir = args.workdir or ROOT / 'runs' / f'privacy_utility_{model}'
  out = args.out or (workdir if args.smoke else HERE) / model
  cells = out / 'cells'
  cells.mkdir(parents=True, exist_ok=True)
  began, left = time.monotonic(), 0
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
    if args.budget and time.monotonic() - began > 60 * args.budget:
      left += 1
      continue
    print(f'\n== {number}/{len(order)}: {name}', flush=True)
    result = cell(workdir / name, model, tuning, epsilon, seed, args.rounds)
    path.write_text(json.dumps(result, indent=1) + '\n')
  known = tables.read(cells)
  table = tables.markdown(known, args.epsilons)
  (out / 'table.md').write_text(table + '\n')
  tables.figure(known, args.epsilons, out / 'figure.png')
  print(f'\n{table}\n\n{out}')
  if left:
    print(f'{left} runs are left: the same command goes on with them')


if __name__ == '__main__':
  main()
