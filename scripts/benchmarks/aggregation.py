"""Aggregation alone, and the low-rank algebra against the dense way.

    .venv-peers/bin/python scripts/benchmarks/aggregation.py [--out FILE]

The stack is that of K clients' LoRA factors (rank 8 on q and v of a model of
width 512, 6 layers). A rule's rate is the bytes of the stack it reads over its
time, as a share of what copying that stack reaches; calls are interleaved.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.types import LowRank, Masks, Uploads


def seconds(functions, repeats: int) -> dict[str, float]:
  """Medians of interleaved calls, the first (compilation) not counted."""
  for call in functions.values():
    jax.block_until_ready(call())
  told = {name: [] for name in functions}
  for _ in range(repeats):
    for name, call in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      told[name].append(time.perf_counter() - began)
  return {name: statistics.median(values) for name, values in told.items()}


def uploads_of(num: int, seed: int) -> Uploads:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  layers, width, rank = 6, 512, 8
  node = lambda: LowRank(
    draw(num, layers, width, rank), draw(num, layers, rank, width), None
  )
  update = {'q_proj': node(), 'v_proj': node()}
  start = jax.tree.map(
    lambda x: x._replace(scale=jnp.full((num, layers), 2.0)),
    jax.tree.map(jnp.zeros_like, update),
    is_leaf=low_rank.is_node,
  )
  full = jax.tree.map(lambda x: jnp.ones(num, bool), update)
  return Uploads(
    update, start, Masks(full, full), jnp.ones(num), jnp.ones(num, bool)
  )


def rules(num: int, repeats: int, seed: int) -> dict[str, dict[str, float]]:
  import torch

  uploads = uploads_of(num, seed)
  params = jax.tree.map(lambda x: x[0], uploads.start)
  stack = jax.tree.leaves(uploads.update)
  size = sum(x.nbytes for x in stack)
  key = jax.random.key(0)

  def ours(rule):
    rule = aggregators.as_stack(rule)
    state = rule.init(params, key)
    step = jax.jit(lambda u: rule.aggregate(u, state, params, key)[0])
    return lambda: step(uploads)

  arrays = [np.asarray(x) for x in stack]
  tensors = [torch.from_numpy(x.copy()) for x in arrays]
  clients = [[x[k] for x in arrays] for k in range(num)]
  copy = [np.empty_like(x) for x in arrays]

  def flower():
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return aggregate_arrayrecords(records, 'num-examples')

  from flwr.app import ArrayRecord, MetricRecord, RecordDict

  records = [
    RecordDict(
      {
        'arrays': ArrayRecord(client),
        'metrics': MetricRecord({'num-examples': 1}),
      }
    )
    for client in clients
  ]
  functions = {
    'copy': lambda: [np.copyto(a, b) for a, b in zip(copy, arrays)],
    'ours mean': ours(aggregators.mean()),
    'ours trimmed_mean': ours(aggregators.trimmed_mean(0.1)),
    'ours product mean (fedex)': ours(aggregators.fedex()),
    'numpy mean, one by one': lambda: [
      sum(client[i] for client in clients) / num for i in range(len(arrays))
    ],
    'numpy mean, stacked': lambda: [x.mean(0) for x in arrays],
    'torch mean': lambda: [x.mean(0) for x in tensors],
    'flower FedAvg': flower,
  }
  if num <= 256:
    functions['ours krum'] = ours(aggregators.krum(num // 8))
  told = seconds(functions, repeats)
  rate = lambda s: size / s
  return {
    name: {
      'seconds': s,
      'gb_per_second': rate(s) / 1e9,
      'share_of_copy': told['copy'] / s,
    }
    for name, s in told.items()
  }


def rounding(repeats: int, seed: int) -> dict[str, dict[str, float]]:
  """`svd_round` against a dense SVD of the mean product, 4096 x 4096."""
  rng = np.random.default_rng(seed)
  width, told = 4096, {}
  for num, rank in ((10, 8), (50, 16)):
    a = jnp.asarray(rng.standard_normal((num, width, rank), np.float32))
    b = jnp.asarray(rng.standard_normal((num, rank, width), np.float32))
    nodes = LowRank(a, b, jnp.ones(num))
    weight = tree.normalise(jnp.ones(num))

    @jax.jit
    def ours(nodes, weight=weight, rank=rank):
      return low_rank.svd_round(low_rank.stack(nodes, weight), rank)

    def dense(a=a, b=b, num=num, rank=rank):
      mean = np.einsum('kdr,krf->df', a, b, optimize=True) / num
      u, s, v = np.linalg.svd(mean, full_matrices=False)
      return (u[:, :rank] * s[:rank]) @ v[:rank]

    fast = seconds({'ours': lambda ours=ours, n=nodes: ours(n)}, repeats)
    began = time.perf_counter()
    exact = dense()
    slow = time.perf_counter() - began
    got = np.asarray(low_rank.dense(ours(nodes)))
    told[f'{num} clients of rank {rank}'] = {
      'seconds': fast['ours'],
      'dense_seconds': slow,
      'times_faster': slow / fast['ours'],
      'relative_error': float(
        np.linalg.norm(got - exact) / np.linalg.norm(exact)
      ),
    }
  return told


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clients', type=int, nargs='+', default=[64, 1024])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  told = {
    'date': datetime.date.today().isoformat(),
    'jax': jax.__version__,
    'seed': args.seed,
    'rules': {k: rules(k, args.repeats, args.seed) for k in args.clients},
    'svd_round': rounding(args.repeats, args.seed),
  }
  if args.out:
    args.out.write_text(json.dumps(told, indent=1) + '\n')
  for number, by_name in told['rules'].items():
    print(f'\n{number} clients: milliseconds, GB/s, share of copying')
    for name, r in by_name.items():
      print(
        f'  {name:28} {1e3 * r["seconds"]:9.1f} {r["gb_per_second"]:7.2f} '
        f'{100 * r["share_of_copy"]:6.0f} %'
      )
  print('\nsvd_round against a dense SVD of the mean product, 4096 x 4096')
  for name, r in told['svd_round'].items():
    print(
      f'  {name:28} {1e3 * r["seconds"]:9.1f} ms, {r["times_faster"]:.0f} x '
      f'faster, off {r["relative_error"]:.1e}'
    )


if __name__ == '__main__':
  main()
