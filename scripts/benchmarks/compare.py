"""Runs every framework on every workload and writes the table.

Each run is a fresh process; runs are interleaved, so that a slow minute of the
machine affects all frameworks; medians are quoted with the spread. No speed is
quoted for a run with a final adapter that differs from the float64 reference.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
import psutil
import regimes
from runners import RUNNERS, Runner
from tables import overview, table

HERE = pathlib.Path(__file__).parent
PEERS = sys.executable  # one environment holds them all


# Allowed error of a final adapter, relative to the largest change of an entry.
TOLERANCE = {'sgd': 1e-3, 'adamw': 5e-2}
# Keeps freed memory, in large pages, which speeds up both frameworks.
ALLOCATOR = {
  'MALLOC_MMAP_THRESHOLD_': str(1 << 32),
  'MALLOC_TRIM_THRESHOLD_': str(1 << 36),
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}


def environment(name: str) -> dict[str, str]:
  threads = '1' if name.endswith('x2') or name == 'p2' else '2'
  return {
    **os.environ,
    **ALLOCATOR,
    'OMP_NUM_THREADS': threads,
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_VERBOSITY': 'error',
    'TOKENIZERS_PARALLELISM': 'false',
  }


def run(name, work, out, rounds, optimizer, more=(), limit=900) -> Any:
  """Runs one fresh process; returns its result with peak memory or an error."""
  runner = RUNNERS[name]
  shutil.rmtree(out, ignore_errors=True)
  command = [PEERS, HERE / runner.program, '--work', work, '--out', out]
  command += ['--rounds', str(rounds), '--optimizer', optimizer]
  command += [*runner.flags, *more]
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(
      [str(x) for x in command],
      stdout=log,
      stderr=log,
      env=environment(name),
      start_new_session=True,
    )
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process.pid, peak))
    watch.start()
    try:
      process.wait(limit)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, 9)
      return {'error': f'over {limit} s'}
    finally:
      process.poll() is None or watch.join()
    file = out / 'result.json'
    if process.returncode or not file.exists():
      log.seek(0)
      return {'error': log.read().decode(errors='replace')[-400:]}
  return json.loads(file.read_text()) | {'peak_mb': peak[0] / 1e6}


def _watch(pid: int, peak: list[int]) -> None:
  """Records the largest proportional set size of a process tree, at 5 Hz."""
  while psutil.pid_exists(pid):
    try:
      root = psutil.Process(pid)
      if root.status() == psutil.STATUS_ZOMBIE:
        return
      total = 0
      for one in [root, *root.children(recursive=True)]:
        text = pathlib.Path(f'/proc/{one.pid}/smaps_rollup').read_text()
        total += int(text.split('Pss:')[1].split()[0]) * 1024
      peak[0] = max(peak[0], total)
    except (psutil.Error, OSError, IndexError):
      pass
    time.sleep(0.2)


def gate(work, out, reference, optimizer) -> tuple[float, bool]:
  """Returns the error of the final adapter and whether it is tolerated.

  The error is relative to the largest change of an entry.
  """
  with np.load(out / 'adapter.npz') as a, np.load(reference) as b:
    off = max(np.abs(a[n].astype('f8') - b[n]).max() for n in b.files)
    from safetensors.numpy import load_file

    start = load_file(work / 'adapter' / 'adapter_model.safetensors')
    move = max(np.abs(b[n] - start[n]).max() for n in b.files)
  share = float(off / move)
  return share, share < TOLERANCE[optimizer]


def compare(args, folder: pathlib.Path) -> dict[str, Any]:
  """Runs the frameworks on all regimes and returns the results by regime."""
  measured: dict[str, Any] = {}
  for regime in args.regimes:
    work = folder / regime
    try:
      regimes.make(regime, work)
    except FileNotFoundError as error:
      print(error)
      continue
    shape = regimes.REGIMES[regime]
    tokens = shape.clients * shape.steps * shape.batch * shape.length
    checks: dict[str, Any] = {}
    for optimizer in args.optimizers:  # correctness first
      of = f'{regime}-{optimizer}-{args.rounds}'
      reference = folder / 'reference' / of
      RUNNERS['reference'] = Runner('', 'torch_loop.py', ('--dtype', 'float64'))
      if not (reference / 'adapter.npz').exists():
        run('reference', work, reference, args.rounds, optimizer)
      for name in args.frameworks:
        out = folder / 'out' / f'{regime}-{name}-{optimizer}'
        if optimizer == 'adamw' or regime == 'overhead':
          result = run(name, work, out, args.rounds, optimizer)
          if 'error' not in result:
            result['off'], result['right'] = gate(
              work, out, reference / 'adapter.npz', optimizer
            )
          checks.setdefault(name, {})[optimizer] = result
          print(regime, name, optimizer, _short(result), flush=True)
    timed: dict[str, list] = {
      name: [checks[name]['adamw']]
      for name in args.frameworks
      if checks[name]['adamw'].get('right')
    }
    for _ in range(args.repeats - 1):
      for name in timed:
        out = folder / 'out' / 'again'
        result = run(name, work, out, args.rounds, 'adamw')
        print(regime, name, _short(result), flush=True)
        if 'error' not in result:
          timed[name].append(result)
    off = {
      f'{name} {optimizer}': result.get('off', result.get('error'))
      for name, by in checks.items()
      for optimizer, result in by.items()
    }
    measured[regime] = {'tokens': tokens, 'off': off}
    for name, results in timed.items():
      # The first round compiles and warms up; it is reported separately.
      seconds = [statistics.median(r['rounds'][1:]) for r in results]
      measured[regime][name] = {
        'tokens_per_second': tokens / statistics.median(seconds),
        'spread': [tokens / max(seconds), tokens / min(seconds)],
        'first_round': statistics.median(r['rounds'][0] for r in results),
        'peak_mb': statistics.median(r['peak_mb'] for r in results),
        'runs': len(results),
      }
  return measured


def _short(result: dict[str, Any]) -> str:
  if 'error' in result:
    return 'failed: ' + result['error'].strip().splitlines()[-1][:200]
  seconds = ' '.join(f'{s:.2f}' for s in result['rounds'])
  off = f', off {result["off"]:.1e}' if 'off' in result else ''
  return f'rounds {seconds} s, {result["peak_mb"]:.0f} MB{off}'


def machine() -> dict[str, Any]:
  names = (
    'fedjax_llm',
    'jax',
    'torch',
    'transformers',
    'peft',
    'flwr',
    'pfl',
    'drjax',
  )
  cpu = pathlib.Path('/proc/cpuinfo')
  model = [
    x for x in cpu.read_text().splitlines() if x.startswith('model name')
  ]
  return {
    'date': datetime.date.today().isoformat(),
    'cores': os.cpu_count(),
    'cpu': model[0].split(':')[1].strip() if model else platform.machine(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in names},
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='scripts/benchmark',
    description=__doc__.splitlines()[0],
    epilog='scripts/benchmark aggregation, rounding and costs measure rules, '
    'the low-rank algebra and a round by themselves: see their --help.',
  )
  parser.add_argument('--quick', action='store_true', help='two regimes, once')
  parser.add_argument('--regimes', nargs='+', choices=list(regimes.REGIMES))
  parser.add_argument('--frameworks', nargs='+', choices=list(RUNNERS))
  parser.add_argument('--optimizers', nargs='+', default=['adamw'])
  parser.add_argument('--repeats', type=int, help='fresh processes each')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--work', type=pathlib.Path, default='runs/benchmark')
  parser.add_argument('--out', type=pathlib.Path, help='a .json file')
  parser.add_argument('--show', type=pathlib.Path, help='tables of that file')
  args = parser.parse_args()
  if args.show:
    measured = json.loads(args.show.read_text())['regimes']
    print(table(measured) + '\n\n' + overview(measured))
    return
  quick = args.quick
  args.repeats = args.repeats or (1 if quick else 3)
  args.regimes = args.regimes or (
    ['overhead', 'middle'] if quick else list(regimes.REGIMES)
  )
  some = ['ours', 'oursx2u', 'p0', 'p0+', 'p0+x2', 'p7']
  args.frameworks = args.frameworks or (some if quick else list(RUNNERS))
  here, before = machine(), {}  # on the day that the run begins
  if args.out and args.out.exists():
    earlier = json.loads(args.out.read_text())
    before = earlier['regimes']
    if earlier['machine'] != here:
      raise SystemExit(
        f'{args.out} is of another day or machine: take another --out.'
      )
  measured = compare(args, args.work.resolve())
  for regime, results in before.items():
    new = measured.get(regime, {})
    off = results['off'] | new.get('off', {})
    measured[regime] = results | new | {'off': off}
  result = {'machine': here, 'regimes': measured}
  if args.out:
    args.out.write_text(json.dumps(result, indent=1) + '\n')
  print('\n' + json.dumps(result['machine']) + '\n\n' + table(measured))


if __name__ == '__main__':
  sys.exit(main())
