"""Estimates memory, bytes and time of a run, without weights or a download.

    python -m fedjax_llm.plan --config C [--config.section.field=value ...]
        [--devices N] [--memory 16GB] [--model DIRECTORY-OR-NAME] [--clients N]
        [--probe | --peak 197e12 --bandwidth 819e9] [--steps] [--modes]
        [--shards] [--lower tpu|cuda|rocm|cpu] [--topology v5e:2x4]

The program traces the config's round from shapes. It prints the parameters, the
bytes of every kind, the clients that fit at once on a device, the bytes sent,
the operations, and the time, either from a short measurement on this machine or
from the rates of another one. `--steps` compiles one step of one client and
prints its peak memory with and without backpropagation; `--modes` prints what
each memory mode would save in it, without compiling. It assumes rows of
`population.max_length` tokens and a loss on every token.

`--shards` lists the part of every tensor that a device holds with `--devices`
and `mesh_model`. `--lower` checks, without a device, that the round of such a
mesh can be lowered for a platform. `--topology` compiles it for TPUs that are
not there, with the package libtpu, and counts memory and collectives.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fedjax_llm.clients.system import Job
from fedjax_llm.plan import abstract, clocks, modes, probe, steps, work
from fedjax_llm.run import blocks, command, config, costs, metrics, workdir
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error, Images

_UNITS = {'': 1, 'K': 10**3, 'M': 10**6, 'G': 10**9, 'T': 10**12}

# Settings to change where memory does not suffice, the mildest first.
_KNOBS = (
  ('block_size', lambda s: max(s.block // 2, 1)),
  ('block_size', lambda s: 1),
  ('model.remat', lambda s: 'full'),
  ('memory.micro_batch', lambda s: 1),
  ('model.dtype', lambda s: 'bfloat16'),
  ('cohort.batch_size', lambda s: max(s.batch // 2, 1)),
  ('population.max_length', lambda s: max(s.tokens // 2, 8)),
)


def size(text: str) -> int:
  """Returns the bytes of a size with K, M, G or T; with an i it is binary.

  >>> size('16GB'), size('1.5 GiB'), size('4096')
  (16000000000, 1610612736, 4096)
  """
  match = re.fullmatch(r'([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?', text.strip())
  if not match:
    raise Error(f'--memory {text} is no size such as 16GB or 16GiB.')
  number, unit, binary = match.groups()
  each = 1024 ** 'KMGT'.find(unit) * 1024 if binary else _UNITS[unit]
  return int(float(number) * each)


def run(argv: Sequence[str]) -> str:
  """Returns the plan of a command line as text."""
  args = _arguments(argv)
  conf, settings = args.conf, config.settings(args.conf, SPEC)
  read = lambda conf, **more: work.read(
    conf,
    model=args.model,
    num_clients=args.clients,
    devices=args.devices,
    **more,
  )

  planned = read(conf)
  cost = work.trace(planned)
  sizes, state = planned.sizes, planned.state
  share = settings.mesh_model
  base = costs.num_bytes(planned.base) // share
  rest = planned.arguments - costs.num_bytes(planned.base)
  need = base + rest + cost.temporary
  limit = size(args.memory) if args.memory else blocks.memory()

  alone = work.trace(read(conf, block_size=1)).temporary
  two = work.trace(read(conf, block_size=min(2, sizes.clients))).temporary
  each, fixed = two - alone, base + rest + alone - (two - alone)
  more = 2 * sizes.clients * args.devices // share
  wider = read(conf, cohort_size=more, block_size=sizes.block)
  further = _further(planned, cost, wider)
  up, down = work.travel(planned)
  rows = args.devices // share
  rounds = settings.num_rounds
  flops = sum(cost.flops.values()) * rows

  count = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
  human = lambda n: metrics.human_bytes(round(n))
  clients = costs.num_bytes(state.params) + costs.num_bytes(planned.optimizer)
  table: list[tuple[str, str]] = [
    ('model', planned.model.name),
    ('parameters, frozen', f'{count(planned.base):,}'),
    ('parameters of the adapter', f'{count(state.params):,}'),
    ('', ''),
    ('clients a round', f'{sizes.clients * rows} of one cohort'),
    ('a client', f'{sizes.steps} steps of {_rows(planned)}{_whose(conf)}'),
    ('block_size', f'{sizes.block} in {sizes.num_blocks} blocks'),
    ('', ''),
    ('base', human(base)),
    ('adapters at the server', human(costs.num_bytes(state.params))),
    (
      'server optimizer and rule',
      human(costs.num_bytes((state.optimizer, state.aggregator))),
    ),
    (
      'texts and client states',
      human(costs.num_bytes(planned.cohort)),
    ),
    (
      'adapters and optimizers at work',
      human(min(sizes.block * clients, cost.temporary)),
    ),
    (
      'activations and all else',
      human(max(cost.temporary - sizes.block * clients, 0)),
    ),
    ('together, a device', human(need)),
    ('a further client in a block', human(each)),
    ('a further client in the cohort', human(further)),
  ]
  if limit is not None:
    fits = int((limit - fixed) // each) if each > 0 else sizes.clients
    of = 'a device' if share == 1 else f'{share} devices with one base'
    table.append((f'clients at once that fit, {of}', f'{max(fits, 0)}'))
    if rows > 1:
      every = f'clients at once that fit, all {args.devices} devices'
      table.append((every, f'{max(fits, 0) * rows}'))
    table.append(('memory', human(limit)))
  table += [
    ('', ''),
    ('up, a round', human(up * rows)),
    ('down, a round', human(down * rows)),
    (f'up and down, {rounds} rounds', human((up + down) * rows * rounds)),
    ('operations, a round', f'{flops:.3g}'),
    (f'operations, {rounds} rounds', f'{flops * rounds:.3g}'),
  ]
  each_flops, num = sum(cost.flops.values()) / sizes.clients, sizes.clients
  table += clocks.rows(conf, Job(each_flops, down / num, up / num, sizes.steps))
  if (private := planned.privacy) is not None:
    table += [
      ('', ''),
      ('privacy, noise multiplier', f'{private.noise_multiplier:.4g}'),
      (
        f'privacy, epsilon after {private.num_rounds} rounds',
        f'{private.epsilon(private.num_rounds):.4g}, delta {private.delta:g}',
      ),
    ]
  if args.steps:
    again = None
    if conf['model'].get('remat') in (None, 'none'):
      again = _rematerialised(conf, read)
    table += [('', ''), ('a step of one client, compiled', '')]
    table += steps.rows(steps.peaks(planned, again=again))
  if args.modes:
    table += [('', ''), ('a step of one client, by memory mode', '')]
    table += modes.rows(modes.modes(conf, read))
  seconds = None
  if args.probe:
    seconds = probe.seconds(
      planned, lambda **more: read(conf, block_size=sizes.block, **more)
    )
    table.append(('a round, as measured here', _time(seconds)))
  elif args.peak:
    at_peak = flops / (args.peak * args.devices)
    reading = 0.0
    if args.bandwidth:
      passes = 3 if conf['model'].get('remat') == 'full' else 2
      reads = passes * sizes.steps * sizes.num_blocks * base
      reading = reads / args.bandwidth
    seconds = max(at_peak, reading)
    by = 'operations' if at_peak >= reading else 'reading the base'
    table.append(('a round, at least', f'{_time(seconds)} ({by})'))
    table.append(('a round at 40 % of that', _time(seconds / 0.4)))
  if seconds is not None:
    table.append((f'{rounds} rounds', _time(seconds * rounds)))
  width = max(len(name) for name, _ in table)
  lines = [f'{name:<{width}}  {value}'.rstrip() for name, value in table]
  if limit is not None and need > limit:
    knobs = list(_KNOBS)
    if args.devices % (2 * share) == 0:
      knobs.append(('mesh_model', lambda s: 2 * share))
    lines += ['', *_advice(conf, read, need, limit, knobs)]
  lines += _on_mesh(args, planned, read, share)
  return '\n'.join(lines)


def _rows(planned: Any) -> str:
  """Returns the contents of one step, as text."""
  sizes = planned.sizes
  if isinstance(planned.cohort.batches, Images):
    return f'{sizes.batch} images'
  return f'{sizes.batch} x {sizes.tokens} tokens'


def _whose(conf: Mapping[str, Any]) -> str:
  """Returns which model is counted for clients, where it is not theirs.

  >>> _whose({'client_models': {'models': [{'name': 'random'}]}})
  ', counted with the model of the server'
  """
  return ', counted with the model of the server' * bool(
    conf.get('client_models')
  )


def main(argv: Sequence[str] | None = None) -> int:
  words = sys.argv[1:] if argv is None else argv
  return workdir.status(lambda: print(run(words)))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the flags of `plan`, and the others as a config."""
  parser = argparse.ArgumentParser(
    prog='plan',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--devices', type=int)
  parser.add_argument('--memory', default='')
  parser.add_argument('--model', default='')
  parser.add_argument('--clients', type=int)
  parser.add_argument('--probe', action='store_true')
  parser.add_argument('--steps', action='store_true')
  parser.add_argument('--modes', action='store_true')
  parser.add_argument('--peak', type=float)
  parser.add_argument('--bandwidth', type=float)
  parser.add_argument('--shards', action='store_true')
  parser.add_argument('--lower', choices=abstract.PLATFORMS)
  parser.add_argument('--topology', default='')
  fields = [word for word in argv if word.startswith('--config.')]
  rest = [word for word in argv if not word.startswith('--config.')]
  args = command.parse(parser, rest)
  for name in ('devices', 'clients', 'peak', 'bandwidth'):
    value = getattr(args, name)
    if value is not None and value <= 0:
      raise Error(f'--{name} is {value:g}: it must be above 0.')
  words = ['--config', args.config, '--workdir', os.curdir, *fields]
  args.conf = config.parse(words, SPEC).config
  if args.devices is None:  # those that `train` would make of a CPU
    args.devices = config.settings(args.conf, SPEC).cpu_devices
  return args


def _rematerialised(conf, read) -> work.Work | None:
  """Returns the round with layers computed again, None if there is none."""
  try:
    changed, _ = config.override(conf, [('model.remat', 'full')], SPEC)
    return read(changed)
  except Error:
    return None  # this model has no such setting


def _on_mesh(args, planned: work.Work, read, num_model: int) -> list[str]:
  """Returns the lines of --shards, --lower and --topology."""
  lines: list[str] = []
  mesh = abstract.mesh(args.devices, num_model)
  if args.shards:
    lines += ['', *abstract.lines(abstract.table(planned.base, mesh))]
  count = lambda kinds: (
    ', '.join(f'{n} {name}' for name, n in kinds.items()) or 'none'
  )
  if args.lower:
    lowered = abstract.lower(read(args.conf, mesh=mesh), mesh, args.lower)
    kinds = count(abstract.collectives(lowered))
    text = f'lowered for {args.lower} on {args.devices} devices'
    lines += ['', f'{text}; collectives over clients: {kinds}']
  if args.topology:
    real = abstract.topology(args.topology, num_model)
    whole = work.read(
      args.conf,
      model=args.model,
      num_clients=args.clients,
      devices=real.size,
      mesh=real,
    )
    try:
      compiled = abstract.lower(whole, real, 'tpu').compile()
    except RuntimeError as error:  # most often of memory
      text = ' '.join(str(error).split())[:300]
      return [*lines, '', f'{args.topology}: the compiler refuses it: {text}']
    kinds = count(abstract.compiled_collectives(compiled))
    lines += ['', f'compiled for {args.topology}; collectives: {kinds}']
    if size := costs.compiled_bytes(compiled):
      text = f'{metrics.human_bytes(size)} of each device'
      lines.append(f'the compiler plans with {text}')
  return lines


def _further(planned: work.Work, cost: costs.Costs, wider: work.Work) -> float:
  """Returns the bytes of one more client in the cohort, texts included."""
  grown = work.trace(wider).temporary - cost.temporary
  grown += wider.arguments - planned.arguments
  return grown / max(wider.sizes.clients - planned.sizes.clients, 1)


def _advice(conf, read, need: int, limit: int, knobs) -> list[str]:
  """Returns the settings that save most memory, each tried alone, as lines."""
  human = lambda n: metrics.human_bytes(round(n))
  sizes = read(conf).sizes
  outcomes = []
  for field, change in knobs:
    value = change(sizes)
    try:
      changed, _ = config.override(conf, [(field, value)], SPEC)
      tried = read(changed)
    except Error:
      continue  # this model or method has no such setting
    base = costs.num_bytes(tried.base)
    split = changed.get('mesh_model') or 1
    total = base // split + tried.arguments - base + work.trace(tried).temporary
    if total < need:
      outcomes.append((total, f'{field}={value}'))
  lines = [
    f'It will not fit: {human(need)} are needed and there are {human(limit)}.'
  ]
  for total, what in sorted(dict((w, (t, w)) for t, w in outcomes).values()):
    fits = 'fits' if total <= limit else 'is not enough alone'
    lines.append(f'  --config.{what}: {human(total)}, {fits}')
  return lines


def _time(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.3g} s'
  minutes = seconds / 60
  return f'{minutes:.3g} min' if minutes < 120 else f'{minutes / 60:.3g} h'
