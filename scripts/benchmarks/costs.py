"""Measures the time of a round by cohort, width, row length and block size.

(a) the cohort: 1 to 256 clients in blocks of 16, each one step on one row of 8
tokens, 2 layers of width 64: nearly all of the time is overhead. A line a + b N
is fitted from 16 clients on; b minus the time of its matrix products at the
machine's rate is the fixed cost of a client. (b) width, 4 layers, 16 clients of
one row of 64 tokens; (c) length of a row, 4 layers of width 256, 4 clients; (d)
block size, 64 clients of one row of 64 tokens. One step everywhere. Points of a
panel are interleaved in one process; each point of the eager torch loop (needed
logits) runs in its own process. Then, for three regimes of `compare.py`, the
rate of a round's operations as a share of the rate of this machine's matrix
products, which are measured between the rounds.
"""

import argparse
import os
import pathlib
import statistics
import sys
from typing import Any

import compare
import ours
import peak
import peer
import records
import regimes
import tables

from fedjax_llm.devices import sharding

SHARES = ('many', 'middle', 'long')


def shape(width: int, layers: int = 4, vocabulary: int = 2048) -> dict:
  heads = max(width // 64, 1)
  return {
    'vocab_size': vocabulary,
    'hidden_size': width,
    'intermediate_size': 8 * width // 3 // 8 * 8,
    'num_layers': layers,
    'num_heads': heads,
    'num_kv_heads': heads,
  }


def panels(quick: bool) -> dict[str, dict[int, regimes.Regime]]:
  """Returns the regimes by panel and by the panel's variable."""
  row = lambda clients, length, of: regimes.Regime(clients, 1, length, 1, of)
  some = lambda values: values[::2][:2] if quick else values
  small = regimes.REGIMES['overhead'].shape
  numbers = [1, 2, 4, 8, 16, 32, 64, 128, 256]
  return {
    'cohort': {
      n: row(n, 8, small) for n in ([4, 16, 32, 48] if quick else numbers)
    },
    'width': {n: row(16, 64, shape(n)) for n in some([64, 128, 256, 512, 768])},
    'length': {
      n: row(4, n, shape(256)) for n in some([64, 128, 256, 512, 1024])
    },
    'block': {
      n: row(64, 64, shape(256)) for n in some([1, 2, 4, 8, 16, 32, 64])
    },
  }


def work_of(folder: pathlib.Path, name: str, regime: Any = None) -> Any:
  """Writes a workload into its own folder; returns the runners' arguments."""
  regimes.make(name, folder / name, 0, regime)
  return argparse.Namespace(
    work=folder / name, optimizer='adamw', rate=peer.RATE['adamw']
  )


def measured(
  panel: str, points: dict[int, regimes.Regime], args: Any
) -> dict[str, Any]:
  """Measures milliseconds per round of ours and of torch, and the peak rate."""
  calls, done = peak.products()
  counts = {}
  for n, regime in points.items():
    name = panel if panel == 'block' else f'{panel}-{n}'
    work = work_of(args.work, name, regime)
    block = {'cohort': min(tables.BLOCK, n), 'block': n}.get(panel, 0)
    run = ours.ready(work, block)
    calls[f'{n}'] = run.step
    needed = regime.batch * (regime.length // 2)
    counts[f'{n}'] = peak.counted(regime, run.loaded.config, needed)
  short = 5 if panel == 'cohort' else 1  # rounds of milliseconds: repeat more
  taken = records.seconds(calls, short * args.repeats)
  results: dict[str, Any] = {
    'gflop_per_second': peak.rate(taken, done) / 1e9,
    'ours': {n: 1e3 * taken[n] for n in counts},
    'counted_gflop': {n: x / 1e9 for n, x in counts.items()},
    'tokens': {
      str(n): r.clients * r.steps * r.batch * r.length
      for n, r in points.items()
    },
  }
  if panel != 'block':
    results['torch'] = {n: by_torch(f'{panel}-{n}', args) for n in counts}
  return results


def by_torch(name: str, args: Any) -> float | None:
  """Measures milliseconds per round of the eager loop in a fresh process."""
  out = args.work / 'out'
  rounds = args.repeats + 1
  result = compare.run('p0+', args.work / name, out, rounds, 'adamw')
  if 'error' in result:
    print(f'{name}: torch failed: {result["error"]}', file=sys.stderr)
    return None
  return 1e3 * statistics.median(result['rounds'][1:])


def share(name: str, args: Any) -> dict[str, float]:
  """Measures a round's share of the machine's rate of matrix products."""
  regime = regimes.REGIMES[name]
  work = work_of(args.work, name)
  run = ours.ready(work)
  calls, done = peak.products()
  taken = records.seconds(calls | {'round': run.step}, args.repeats)
  _, mask = peer.data(work.work)
  needed = int(mask[0, 0, :, 1:].sum())
  counted = peak.counted(regime, run.loaded.config, needed)
  executed = peak.executed(run.program(), regime.steps)
  best = peak.rate(taken, done)
  return {
    'seconds': taken['round'],
    'peak_gflop_per_second': best / 1e9,
    'counted_gflop': counted / 1e9,
    'executed_gflop': executed / 1e9,
    'share': counted / taken['round'] / best,
    'share_executed': executed / taken['round'] / best,
  }


def main() -> None:
  missing = {
    k: v for k, v in compare.ALLOCATOR.items() if os.environ.get(k) != v
  }
  if missing:  # as in the comparison; the allocator reads it at process start
    words = [sys.executable, *sys.argv]
    os.execve(sys.executable, words, {**os.environ, **missing})
  parser = records.arguments(__doc__, 'costs.json')
  parser.add_argument('--devices', type=int, default=1, help='of the CPU')
  parser.add_argument('--work', type=pathlib.Path, default='runs/benchmark')
  args = parser.parse_args()
  args.work = args.work.resolve()
  args.repeats = args.repeats or (3 if args.quick else 7)
  sharding.split_cpu(args.devices)
  kept = records.Records(
    args.out, repeats=args.repeats, devices=args.devices, quick=args.quick
  )
  for panel, points in panels(args.quick).items():
    measure = lambda panel=panel, points=points: measured(panel, points, args)
    kept.keep('costs', panel, measure)
    print(f'{panel} is measured', flush=True)
  for name in SHARES[:1] if args.quick else SHARES:
    kept.keep('shares', name, lambda name=name: share(name, args))
  print('\n' + tables.costs(kept.results))
  from costs_figure import save

  save(args.out.with_suffix('.png'), kept.results, tables.overhead)


if __name__ == '__main__':
  main()
