"""Trains the cells of `scripts/compare_peft` that are missing, then shows all.

    compare.py [--rounds N] [--budget MINUTES] [--models minilm smollm2]

For each model:

1. Search: every kind takes three learning rates for two rounds on a seed of its
   own; the lowest held-out loss decides. RATES-kind.json has all of them.
2. Plan: rounds R for equal tokens, and the bytes of LoRA in R rounds for equal
   bytes: kinds that send less train longer, up to 2 R rounds, and kinds that
   send more stop earlier. `--budget` lowers R. plan.json keeps R for all cells.
3. Cells: FedAvg of each kind with each seed, in the order of seeds.

Kinds of one seed see the same clients, texts and order of texts.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import cells  # beside this file
import tables

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

import cell_files  # noqa: E402

LONGEST = 2  # times R, for kinds that send little
LEAST = 2  # rounds
ALSO = 2  # rounds of a search


def name_of(kind: str) -> str:
  """Returns the name of a kind in a file.

  >>> name_of('(IA)3'), name_of('soft prompt')
  ('ia3', 'soft_prompt')
  """
  kept = kind.lower().replace(' ', '_')
  return ''.join(c for c in kept if c.isalnum() or c == '_')


def rounds_within(total: float, each: float, rounds: int) -> int:
  """Returns the rounds of `each` bytes within `total`, at most 2 `rounds`.

  >>> [rounds_within(100, each, 6) for each in (30, 1, 101)]
  [3, 12, 0]
  """
  return min(int(total / each + 1e-9), LONGEST * rounds)


def planned(searches: Mapping[str, Any], rounds: int) -> dict[str, Any]:
  """Returns R, the bytes of equal bytes, and the rounds of each kind there.

  >>> each = lambda b: dict(bytes_a_round=b)
  >>> planned({'LoRA': each(10), 'full': each(90), 'bias': each(2)}, 3)
  {'rounds': 3, 'bytes': 30, 'by_bytes': {'LoRA': 3, 'full': 0, 'bias': 6}}
  """
  total = rounds * searches['LoRA']['bytes_a_round']
  by_bytes = {
    kind: rounds_within(total, search['bytes_a_round'], rounds)
    for kind, search in searches.items()
  }
  return {'rounds': rounds, 'bytes': total, 'by_bytes': by_bytes}


def seconds(searches: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
  """Returns the predicted seconds of all kinds with one seed."""
  total = 0.0
  for kind, search in searches.items():
    rounds = max(plan['rounds'], plan['by_bytes'][kind])
    total += rounds * search['seconds_a_round'] + 3 * search['seconds_a_test']
  return total


def fitted(
  searches: Mapping[str, Any], rounds: int, left: float | None
) -> dict[str, Any]:
  """Returns the plan with the most rounds up to `rounds` that fits `left`."""
  while True:
    plan = planned(searches, rounds)
    needed = len(cells.SEEDS) * seconds(searches, plan)
    if left is None or needed <= left or rounds <= LEAST:
      return plan
    rounds -= 1


def search(bench: cells.Bench) -> dict[str, Any]:
  """Returns the learning rates tried for a kind, and the best of them."""
  tried, result = {}, {}
  for rate in cells.MODELS[bench.model][bench.kind].rates:
    result = bench.train(cells.TUNING, rate, ALSO, (0, ALSO))
    tried[rate] = result['curve'][-1]['loss']
  finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
  if not finite:
    raise SystemExit(
      f'{bench.model}, {bench.kind}: the loss is not finite at any of the '
      f'rates {", ".join(f"{rate:g}" for rate in tried)}.'
    )
  return {
    'kind': bench.kind,
    'numbers': bench.num_params,
    'rate': min(finite, key=finite.__getitem__),
    'tried': {f'{rate:g}': loss for rate, loss in tried.items()},
    'seed': cells.TUNING,
    'rounds': ALSO,
    **{k: v for k, v in result.items() if k != 'curve'},
    **cells.machine(),
  }


def compare(
  model: str, folder: pathlib.Path, rounds: int, minutes: float | None,
  smoke: bool,
) -> None:  # fmt: skip
  """Trains the missing searches and cells of a model."""
  budget = cell_files.budget(minutes)
  benches: dict[str, cells.Bench] = {}
  kinds = list(cells.MODELS[model])
  loaded = None

  def bench(kind: str) -> cells.Bench:
    nonlocal loaded
    if kind not in benches:
      benches[kind] = cells.Bench(model, kind, smoke, loaded)
      loaded = benches[kind].loaded
    return benches[kind]

  searches = {}
  for number, kind in enumerate(kinds):
    path = folder / f'rates-{name_of(kind)}.json'
    if not path.exists():
      cell_files.save(path, search(bench(kind)))
      print(
        f'{model}, {kind}: rate {json.loads(path.read_text())["rate"]:g}; '
        f'{budget.spent():.0f} s, {len(kinds) - number - 1} searches left',
        flush=True,
      )
    searches[kind] = json.loads(path.read_text())
  path = folder / 'plan.json'
  if not path.exists():
    left = None if minutes is None else budget.left()
    cell_files.save(path, fitted(searches, rounds, left))
  plan = json.loads(path.read_text())
  every = [
    (seed, kind, folder / f'{name_of(kind)}-{seed}.json')
    for seed in cells.SEEDS
    for kind in kinds
  ]
  todo = cell_files.missing(every, lambda cell: cell[-1])
  predicted = len(todo) / len(kinds) * seconds(searches, plan)
  print(
    f'{model}: {plan["rounds"]} rounds, {len(todo)} cells, about '
    f'{predicted / 60:.0f} minutes',
    flush=True,
  )
  for number, (seed, kind, path) in enumerate(todo, 1):
    by_bytes = plan['by_bytes'][kind]
    tests = {0, plan['rounds'], by_bytes}
    rate = searches[kind]['rate']
    result = bench(kind).train(seed, rate, max(tests), sorted(tests))
    cell_files.save(
      path,
      dict(
        model=model, kind=kind, seed=seed, rate=rate,
        equal_tokens=plan['rounds'], equal_bytes=by_bytes,
        numbers=searches[kind]['numbers'], **result, **cells.machine(),
      ),
    )  # fmt: skip
    print(
      f'{number}/{len(todo)} {model}, {kind}, seed {seed}: '
      f'{result["curve"][-1]["loss"]:.3f}; {budget.spent() / 60:.1f} minutes',
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, help='cells and figure')
  parser.add_argument('--rounds', type=int, default=12, help='R at most')
  parser.add_argument('--budget', type=float, help='minutes for each model')
  parser.add_argument(
    '--models', nargs='+', default=list(cells.MODELS), choices=cells.MODELS
  )
  parser.add_argument('--table', action='store_true', help='train nothing')
  parser.add_argument('--smoke', action='store_true', help='random models')
  args = parser.parse_args()
  default = cells.ROOT / 'runs' / 'compare_peft_smoke' if args.smoke else HERE
  out = args.out or default
  for model in [] if args.table else args.models:
    compare(model, out / 'cells' / model, args.rounds, args.budget, args.smoke)
  known = tables.read(out / 'cells')
  for model in known:
    print(f'\n{model}\n{tables.markdown(known[model])}')
  if known:
    tables.figure(known, out / 'compare_peft.png')


if __name__ == '__main__':
  main()
