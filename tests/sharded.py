"""Run by test_sharding.py with eight CPU devices: prints what it found."""

import contextlib
import json
import logging
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import fedjax_llm as fl
from fedjax_llm import metrics, sharding, train
from fedjax_llm.types import Batch, Cohort

S, B, T, V = 2, 1, 12, 96


def cohort(num: int) -> Cohort:
  """Six clients, the last of which does not report, and padding."""
  rng = np.random.default_rng(0)
  shape = (6, S, B, T)
  mask = rng.random(shape) < 0.5
  mask[..., 1] = True
  six = Cohort(
    ids=np.arange(10, 16, dtype=np.int32),
    batches=Batch(
      tokens=rng.integers(0, V, shape).astype(np.int32),
      loss_mask=mask,
      segments=np.ones(shape, np.int32),
      positions=np.broadcast_to(np.arange(T, dtype=np.int32), shape),
    ),
    weight=rng.random(6).astype(np.float32),
    valid=np.array([True] * 5 + [False]),
  )
  pad = lambda x: np.concatenate([x, np.zeros_like(x[: num - 6])])
  return jax.tree.map(pad, six)


def replica_groups(line: str) -> list[list[int]]:
  """The device groups of a collective, whichever way they are printed."""
  explicit = re.search(
    r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}', line
  )
  if explicit:
    return [
      [int(n) for n in group.split(',')]
      for group in re.findall(r'\{([\d,]+)\}', explicit[1])
    ]
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line
  )
  if iota:
    numbers = lambda s: [int(n) for n in s.split(',')]
    ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
    if iota[3]:
      ids = ids.transpose(numbers(iota[3]))
    return ids.reshape(numbers(iota[1])).tolist()
  named = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]'
    r'(?:T\(([\d,]+)\))?\))? *\{([^}]*)\}',
    line,
  )
  if named:
    numbers = lambda s: [int(n) for n in s.split(',')]
    axes = re.findall(r"'?(\w+)'?=(\d+)", named[1])
    sizes = [int(n) for _, n in axes]
    over = re.findall(r"'?(\w+)'?", named[4])
    ids = np.arange(np.prod(sizes))
    if named[2]:
      ids = ids.reshape(numbers(named[2]))
      ids = ids.transpose(numbers(named[3])) if named[3] else ids
    ids = ids.reshape(sizes)
    kept = [i for i, (name, _) in enumerate(axes) if name not in over]
    summed = [i for i, (name, _) in enumerate(axes) if name in over]
    width = int(np.prod([sizes[i] for i in summed]))
    return ids.transpose(kept + summed).reshape(-1, width).tolist()
  raise ValueError(f'replica groups in a new spelling: {line}')


def collectives(text: str, mesh) -> dict[str, int]:
  """How many collectives cross 'clients', and how many only 'model'."""
  row = {d.id: i for i, ds in enumerate(mesh.devices) for d in ds}
  count = {'clients': 0, 'model': 0}
  names = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
  for line in text.splitlines():
    found = re.search(rf' ({names})(-start)?\(', line)
    sizes = [
      np.prod([int(n) for n in dims.split(',')])
      for dims in re.findall(r'\w\d+\[([\d,]+)\]', line.split(' = ')[-1])
    ]
    if not found or max(sizes, default=0) < 32:
      continue  # scalars are metrics
    crosses = any(
      len({row[d] for d in group}) > 1 for group in replica_groups(line)
    )
    count['clients' if crosses else 'model'] += 1
  return count


def trained(folder: str) -> dict:
  """A run on all devices: what each round was given, and in which order."""
  events, places, compiled = [], set(), sharding.compiled
  handler = logging.Handler()
  handler.emit = lambda record: events.append(record.getMessage()[:23])

  def watched(module, name):
    do = getattr(module, name)

    def told(*args):
      events.append(name)
      return do(*args)

    setattr(module, name, told)

  def strict(round, mesh):
    step = compiled(round, mesh)

    def run(state, cohort, base):
      if isinstance(cohort.ids, Tracer):  # asked for shapes
        return step(state, cohort, base)
      events.append('step')
      for leaf in jax.tree.leaves(cohort):
        places.add((leaf.committed, str(leaf.sharding.spec)))
      # Nothing is left to move.
      with jax.transfer_guard('disallow'):
        return step(state, cohort, base)

    return run

  sharding.compiled = strict
  watched(sharding, 'joined')
  watched(metrics, 'summarise')
  logging.getLogger('jax').addHandler(handler)
  config = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py:smoke'
  fields = {
    'num_rounds': 3,
    'mesh_model': 2,
    'clients.cohort_size': 4,
    'model.name': 'multihost:shallow',
    'adapter.targets': 'q_proj',
    'algorithm.name': 'scaffold',
    'local.name': 'sgd',
    'evals.samples': 0,
    'compilation_cache': 'none',
  }
  given = [f'--config.{k}={v}' for k, v in fields.items()]
  with jax.log_compiles():
    words = ['--config', str(config), '--workdir', folder, *given]
    with contextlib.redirect_stdout(sys.stderr):
      assert train.main(words) == 0
  return {
    'events': [x for x in events if x in ('step', 'joined', 'summarise')],
    'compiled': sum(x.startswith('Compiling jit(round_fn)') for x in events),
    'places': sorted(places),
  }


def main(shapes: list[str]) -> None:
  sharding.split_cpu(8)
  loaded = fl.models.random(
    vocab_size=V, hidden_size=32, num_heads=4, num_kv_heads=4
  )
  params = fl.adapters.lora(rank=2).init(jax.random.key(0), loaded.base)
  loss = fl.local.causal_lm(loaded.model)
  optimizer = fl.local.optimizer('sgd', 0.1)
  out: dict = {}
  for shape in shapes:
    if shape.startswith('train:'):
      out['train'] = trained(shape.removeprefix('train:'))
      continue
    rule, rows, columns, block, num, *execution = shape.split(':')
    devices = jax.devices()[: int(rows) * int(columns)]
    mesh = sharding.mesh(int(columns), devices)
    mesh_or_none = None if len(devices) == 1 else mesh
    algorithm = fl.recipes.fed_avg(
      loss,
      optimizer,
      aggregator=getattr(fl.aggregators, rule)(),
      block_size=int(block) or None,
      mesh=mesh_or_none,
      execution=(execution or ['shard_map'])[0],
    )
    base = sharding.place(loaded.base, mesh)
    state = sharding.everywhere(
      algorithm.init(jax.random.key(1), jax.tree.map(jnp.copy, params)),
      mesh_or_none,
    )
    before = jax.tree.map(lambda x: x.sharding, state)
    step = sharding.compiled(algorithm.round, mesh_or_none)
    given = sharding.joined(cohort(int(num)), mesh_or_none)
    program = step.lower(state, given, base).compile()
    state, _, told = program(state, given, base)
    after = jax.tree.map(lambda x: x.sharding, state)
    out[shape] = {
      'as_it_lies': jax.tree.all(
        jax.tree.map(
          lambda x, where: x.sharding.is_equivalent_to(where, x.ndim),
          given,
          program.input_shardings[0][1],
        )
      ),
      'params': [
        np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.params)
      ],
      'compiled_once': before == after,
      'loss': float(told.metrics['local/loss']),
      'bytes': int(np.sum(told.bytes_up)),
      'reported': np.asarray(told.reported).tolist(),
      # A rule on the stack moves the stack: only sums are one all-reduce.
      'collectives': rule == 'mean'
      and collectives(program.as_text() or '', mesh),
    }
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:])
