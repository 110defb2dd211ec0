"""Measures the share of a round's time by kind of instruction.

A round of a regime is compiled and traced once. Every instruction of the
compiled program is of one kind: a product with a weight or with factors, a
product of attention, of logits (each with the elementwise work that the
compiler fused with it), elementwise work of attention, loss, norms, activations
or rotations, a copy (transposes, slices and writes into stacks of layers), or
the rest. On one core (`taskset -c 0 scripts/benchmark kinds`) the times are
those of one thread.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

import ours
import peak
import peer
import regimes

from fedjax_llm.devices import sharding
from fedjax_llm.run import profiling

PRODUCTS = 'products with weights and factors'
MOVES = frozenset(
  [
    'copy',
    'transpose',
    'dynamic-slice',
    'dynamic-update-slice',
    'slice',
    'pad',
    'concatenate',
    'reshape',
    'broadcast',
    'bitcast',
    'constant',
    'parameter',
    'gather',
    'scatter',
    'tuple',
    'get-tuple-element',
    'reduce-precision',
    'iota',
  ]
)
# The kind of the functions of the package, the innermost of a stack first.
FUNCTIONS = {
  '_heads_first': 'attention',
  '_blocked': 'attention',
  '_nats': 'loss',
  '_cross_entropy': 'loss',
  'head': 'loss',
  'norm': 'norms',
  '_activated': 'activations',
  '_activated_jvp': 'activations',
  'mlp': 'activations',
  'rotate': 'rotations',
}


class Instruction(NamedTuple):
  """An instruction, of a fusion those inside of it."""

  opcodes: frozenset[str]
  functions: tuple[str, ...]  # the stack of its root, the innermost first


def instructions(text: str) -> dict[str, Instruction]:
  """Returns the instructions of a compiled program's text by name."""
  frames = _frames(text)
  bodies: dict[str, list[tuple[str, str, str]]] = {}
  body: list[tuple[str, str, str]] = []
  for line in text.splitlines():
    if head := re.match(r'(?:ENTRY )?%?([\w.-]+) .*\{$', line):
      body = bodies.setdefault(head[1], [])
    elif part := re.match(
      r'\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(', line
    ):
      body.append((part[1], part[2], line))
  result = {}
  for name, opcode, line in (row for rows in bodies.values() for row in rows):
    inner = re.search(r'calls=%?([\w.-]+)', line)
    rows = bodies.get(inner[1], []) if inner else []
    stacks = [
      re.search(r'stack_frame_id=(\d+)', x) for x in (line, *_last(rows))
    ]
    stack = next((frames.get(int(x[1]), ()) for x in stacks if x), ())
    codes = {code for _, code, _ in rows} or {opcode}
    result[name] = Instruction(frozenset(codes), stack)
  return result


def _last(rows: list[tuple[str, str, str]]) -> list[str]:
  return [line for _, _, line in reversed(rows)]


def _frames(text: str) -> dict[int, tuple[str, ...]]:
  """Returns the functions of each stack, the innermost first."""
  tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
  name = ''
  for line in text.splitlines():
    if line in ('FunctionNames', 'FileLocations', 'StackFrames'):
      name = line
    elif name and (row := re.match(r'(\d+) (.*)', line)):
      tables[name][int(row[1])] = row[2]
    elif line.strip():
      name = ''
  number = lambda field, row: int(
    (re.search(rf'{field}=(\d+)', row) or '00')[1]
  )
  calls = {}
  for at, row in tables['StackFrames'].items():
    place = tables['FileLocations'].get(number('file_location_id', row), '')
    words = tables['FunctionNames'].get(number('function_name_id', place), '')
    calls[at] = words.strip('"'), number('parent_frame_id', row)
  stacks = {}
  for at in calls:
    stack, here = [], at
    while here in calls and len(stack) < len(calls):
      stack.append(calls[here][0])
      here = calls[here][1] - 1  # 1: it has no parent
    stacks[at] = tuple(stack)
  return stacks


def kind(instruction: Instruction) -> str:
  """Returns the kind of an instruction."""
  part = 'rest'
  for function in instruction.functions:
    names = [x for x in function.split('.') if x in FUNCTIONS]
    if names:
      part = FUNCTIONS[names[0]]
      break
  if instruction.opcodes & {'dot', 'custom-call'}:
    return {
      'attention': 'products of attention',
      'loss': 'products of logits',
    }.get(part, PRODUCTS)
  if instruction.opcodes <= MOVES:
    return 'copies'
  return part if part == 'rest' else f'{part}, elementwise'


def measured(run: Any) -> tuple[dict[str, list[float]], float]:
  """Returns [seconds, calls] by kind of a traced round, and its seconds."""
  of = {name: kind(x) for name, x in instructions(run.text()).items()}
  run.step()
  began = time.perf_counter()
  run.step()
  taken = time.perf_counter() - began
  with tempfile.TemporaryDirectory() as folder:
    with profiling.traced(folder, 1):
      run.step()
    profile = profiling.longest(profiling.files(folder)[-1], sys.maxsize)
  sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
  for operation in profile.operations:
    row = sums[of.get(operation.name, 'rest')]
    row[0] += operation.seconds
    row[1] += operation.calls
  return dict(sums), taken


def of_torch() -> float | None:
  """Returns PyTorch's rate of the same products, None without PyTorch."""
  try:
    import torch
  except ImportError:
    return None
  rates = []
  for m, k, n in peak.PRODUCTS:
    x, y = torch.randn(m, k), torch.randn(k, n)
    times = max(1, 2**30 // (m * k * n))
    taken = []
    for _ in range(5):
      began = time.perf_counter()
      for _ in range(times):
        x @ y
      taken.append(time.perf_counter() - began)
    rates.append(2.0 * times * m * k * n / min(taken))
  return max(rates)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='scripts/benchmark kinds',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('regime', nargs='?', default='long')
  parser.add_argument('--devices', type=int, default=1, help='of the CPU')
  parser.add_argument('--block', type=int, default=0, help='clients at once')
  parser.add_argument('--unroll', type=int, default=1)
  parser.add_argument('--work', type=pathlib.Path, default='runs/benchmark')
  args = parser.parse_args()
  sharding.split_cpu(args.devices)
  work = args.work.resolve() / args.regime
  regimes.make(args.regime, work)
  settings = argparse.Namespace(
    work=work, optimizer='adamw', rate=peer.RATE['adamw']
  )
  run = ours.ready(settings, args.block, unroll=args.unroll)
  sums, taken = measured(run)
  busy = sum(seconds for seconds, _ in sums.values())
  print(f'{args.regime}: a round takes {taken:.3f} s')
  print('| kind | ms | share | calls |\n|---|---|---|---|')
  for name, (seconds, calls) in sorted(sums.items(), key=lambda x: -x[1][0]):
    print(f'| {name} | {1e3 * seconds:.0f} | {seconds / busy:.0%} | {calls} |')
  done = peak.executed(run.program(), regimes.REGIMES[args.regime].steps)
  products, flops = peak.products()
  import records

  best = peak.rate(records.seconds(products, 5), flops)
  inside = sum(s for name, (s, _) in sums.items() if 'products' in name)
  print(
    f'The products are {done / 1e9:.0f} GFLOP: {done / inside / 1e9:.0f} '
    f'GFLOP/s; the best product of this machine: {best / 1e9:.0f} GFLOP/s, '
    f'at which they would take {done / best:.3f} s.'
  )
  if rate := of_torch():
    print(f'The best product of PyTorch: {rate / 1e9:.0f} GFLOP/s.')


if __name__ == '__main__':
  main()
