"""Times rounds of a regime in this checkout against another one, in turns.

Both run in one process, with the same model, texts and start. The ratios are
medians over pairs of rounds, of CPU time and of wall-clock time, and the
largest difference of parameters after the first round tells whether both
compute the same. On one core: `taskset -c 0 scripts/benchmark checkouts ...`.
"""

import argparse
import pathlib
import statistics
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).parents[2]
# Modules of a checkout; those of one are forgotten before the next is loaded.
OWN = frozenset(
  ['fedjax_llm', 'ours', 'peer', 'regimes', 'peak', 'records', 'runners']
)


def prepared(checkout: pathlib.Path, regime: str, args: argparse.Namespace):
  """Returns a round of a checkout, and its parameters after the first one."""
  for name in [x for x in sys.modules if x.split('.')[0] in OWN]:
    del sys.modules[name]
  sys.path[:0] = [str(checkout), str(checkout / 'scripts' / 'benchmarks')]
  import jax
  import ours
  import peer
  import regimes

  assert pathlib.Path(ours.fl.__file__).is_relative_to(checkout)
  work = args.work.resolve() / regime
  regimes.make(regime, work)
  settings = argparse.Namespace(
    work=work, optimizer='adamw', rate=peer.RATE['adamw']
  )
  run = ours.ready(settings, args.block)
  run.step()
  del sys.path[:2]
  return run.step, jax.tree.leaves(jax.tree.map(np.asarray, run.params()))


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='scripts/benchmark checkouts',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('other', type=pathlib.Path, help='the other checkout')
  parser.add_argument('regimes', nargs='*', default=['many', 'middle', 'long'])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--block', type=int, default=0, help='clients at once')
  parser.add_argument('--work', type=pathlib.Path, default='runs/benchmark')
  args = parser.parse_args()
  other = args.other.resolve()
  if not (other / 'scripts' / 'benchmarks' / 'ours.py').is_file():
    parser.error(f'{args.other} is no checkout: it has no scripts/benchmarks.')
  for regime in args.regimes:
    sides = [prepared(folder, regime, args) for folder in (other, HERE)]
    cpu: list[list[float]] = [[], []]
    wall: list[list[float]] = [[], []]
    for _ in range(args.rounds):
      for side, (step, _) in enumerate(sides):
        clocks = time.process_time(), time.perf_counter()
        step()
        cpu[side].append(time.process_time() - clocks[0])
        wall[side].append(time.perf_counter() - clocks[1])
    ratio = lambda times: statistics.median(
      theirs / own for theirs, own in zip(*times, strict=True)
    )
    apart = max(
      float(np.abs(x - y).max())
      for x, y in zip(sides[0][1], sides[1][1], strict=True)
    )
    print(
      f'{regime}: {statistics.median(cpu[0]):.2f} -> '
      f'{statistics.median(cpu[1]):.2f} s of CPU, {ratio(cpu):.2f} x as fast '
      f'({ratio(wall):.2f} x by the clock); parameters differ by {apart:.1e}',
      flush=True,
    )


if __name__ == '__main__':
  main()
