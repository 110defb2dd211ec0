"""Measures aggregation rules on a stack of adapters, and other libraries.

The stack holds K clients' LoRA factors: rank 8 on q and v of 6 layers of width
512, float32, 393 kB a client. Every library has it in memory in its own form. A
rule reads the stack once, a copy reads and writes it; the rate of either is the
number of bytes to move divided by its time. The copy is torch's on all cores,
or NumPy's if that is faster. The mean of products computes 2 K R D F operations
for each product and is bound by them, so their rate is reported too, as is that
of Krum, with inner products of 2 K^2 operations an entry.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import records
import tables

from fedjax_llm import aggregators
from fedjax_llm.aggregators import low_rank
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Masks, Uploads

LAYERS, WIDTH, RANK = 6, 512, 8
TRIMMED = 0.1


def uploads_of(num: int, seed: int) -> Uploads:
  """Returns random uploads: two full low-rank nodes of every client."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  node = lambda: LowRank(
    draw(num, LAYERS, WIDTH, RANK), draw(num, LAYERS, RANK, WIDTH), None
  )
  update = {'q_proj': node(), 'v_proj': node()}
  start = jax.tree.map(
    lambda x: jax.tree.map(jnp.zeros_like, x)._replace(
      scale=jnp.full((num, LAYERS), 2.0)
    ),
    update,
    is_leaf=low_rank.is_node,
  )
  full = jax.tree.map(lambda x: jnp.ones(num, bool), update)
  return Uploads(
    update, start, Masks(full, full), jnp.ones(num), jnp.ones(num, bool)
  )


Calls = dict[str, Callable[[], Any]]


def ours(uploads: Uploads) -> Calls:
  params = jax.tree.map(lambda x: x[0], uploads.start)
  key = jax.random.key(0)

  def call(rule):
    rule = aggregators.as_stack(rule)
    state = rule.init(params, key)
    step = jax.jit(lambda u: rule.aggregate(u, state, params, key)[0])
    return lambda: step(uploads)

  num = len(uploads.weight)
  return {
    'mean': call(aggregators.mean()),
    'trimmed mean': call(aggregators.trimmed_mean(TRIMMED)),
    'krum': call(aggregators.krum(num // 8)),
    'product mean': call(aggregators.fedex()),
  }


def in_numpy(arrays: list[np.ndarray]) -> Calls:
  num = len(arrays[0])
  cut = int(TRIMMED * num)
  share = np.full(num, 1 / num, np.float32)

  def trimmed():
    parts = [np.partition(x, (cut, num - cut - 1), axis=0) for x in arrays]
    return [x[cut : num - cut].mean(0) for x in parts]

  def krum():
    gram = sum(x @ x.T for x in (x.reshape(num, -1) for x in arrays))
    square = np.diagonal(gram)
    distances = np.sort(square[:, None] + square - 2 * gram, axis=1)
    best = distances[:, 1 : num - num // 8 - 1].sum(1).argmin()
    return [x[best] for x in arrays]

  def products():
    a_q, b_q, a_v, b_v = arrays
    mean = lambda a, b: np.matmul(
      a.transpose(1, 2, 0, 3).reshape(LAYERS, WIDTH, -1),
      b.transpose(1, 0, 2, 3).reshape(LAYERS, -1, WIDTH) / num,
    )
    return [mean(a_q, b_q), mean(a_v, b_v)]

  return {
    'mean': lambda: [np.tensordot(share, x, 1) for x in arrays],
    'mean, x.mean(0)': lambda: [x.mean(0) for x in arrays],
    'trimmed mean': trimmed,
    'krum': krum,
    'product mean': products,
  }


def in_torch(arrays: list[np.ndarray]) -> Calls:
  import torch

  num = len(arrays[0])
  cut = int(TRIMMED * num)
  tensors = [torch.from_numpy(x.copy()) for x in arrays]
  share = torch.full((num,), 1 / num)

  def trimmed():
    parts = [x.sort(dim=0).values for x in tensors]
    return [x[cut : num - cut].mean(0) for x in parts]

  def krum():
    flat = [x.reshape(num, -1) for x in tensors]
    gram = sum(x @ x.T for x in flat)
    square = gram.diagonal()
    distances = (square[:, None] + square - 2 * gram).sort(dim=1).values
    best = distances[:, 1 : num - num // 8 - 1].sum(1).argmin()
    return [x[best] for x in tensors]

  def products():
    a_q, b_q, a_v, b_v = tensors
    mean = lambda a, b: torch.matmul(
      a.permute(1, 2, 0, 3).reshape(LAYERS, WIDTH, -1),
      b.permute(1, 0, 2, 3).reshape(LAYERS, -1, WIDTH) / num,
    )
    return [mean(a_q, b_q), mean(a_v, b_v)]

  return {
    'mean': lambda: [torch.tensordot(share, x, dims=1) for x in tensors],
    'mean, x.mean(0)': lambda: [x.mean(0) for x in tensors],
    'trimmed mean': trimmed,
    'krum': krum,
    'product mean': products,
  }


def in_flower(arrays: list[np.ndarray]) -> Calls:
  """Returns the functions of Flower's strategies on the clients' records."""
  from flwr.app import ArrayRecord, MetricRecord, RecordDict
  from flwr.serverapp.strategy import fedtrimmedavg, multikrum, strategy_utils

  num = len(arrays[0])
  sent = [
    RecordDict(
      {
        'arrays': ArrayRecord([x[k] for x in arrays]),
        'metrics': MetricRecord({'num-examples': 1}),
      }
    )
    for k in range(num)
  ]

  def trimmed():
    by_client = [r.array_records['arrays'].to_numpy_ndarrays() for r in sent]
    return [
      fedtrimmedavg.trim_mean(np.stack(layers), TRIMMED)
      for layers in zip(*by_client, strict=True)
    ]

  average = strategy_utils.aggregate_arrayrecords
  return {
    'mean': lambda: average(sent, 'num-examples') and None,
    'trimmed mean': trimmed,
    'krum': lambda: multikrum.select_multikrum(sent, num // 8, 1) and None,
  }


def measured(num: int, repeats: int, seed: int) -> dict[str, Any]:
  import torch

  uploads = uploads_of(num, seed)
  arrays = [np.asarray(x) for x in jax.tree.leaves(uploads.update)]
  libraries = {
    'fedjax_llm': ours(uploads),
    'numpy': in_numpy(arrays),
    'torch': in_torch(arrays),
    'flower': in_flower(arrays),
  }
  calls: Calls = {
    f'{rule}: {library}': call
    for library, by_rule in libraries.items()
    for rule, call in by_rule.items()
  }
  new = [np.empty_like(x) for x in arrays]
  pairs = list(zip(new, arrays, strict=True))
  threads = [tuple(map(torch.tensor, pair)) for pair in pairs]
  calls['copy: numpy'] = lambda: [np.copyto(a, b) for a, b in pairs] and None
  calls['copy: torch'] = lambda: [a.copy_(b) for a, b in threads] and None
  taken = records.seconds(calls, repeats, pause=0.1)
  size = sum(x.nbytes for x in arrays)
  copy = 2 * size / min(taken['copy: numpy'], taken['copy: torch'])
  done = {
    'krum': 2 * num * size / 4,
    'product mean': 2 * 2 * num * RANK * LAYERS * WIDTH**2,
  }
  results: dict[str, Any] = {}
  for name, spent in sorted(taken.items()):
    rule = name.split(':')[0]
    rate = size * (2 if rule == 'copy' else 1) / spent
    results[name] = {
      'seconds': spent,
      'gb_per_second': rate / 1e9,
      'share_of_copy': rate / copy,
    }
    if rule in done:
      results[name]['gflop_per_second'] = done[rule] / spent / 1e9
  return results


def main() -> None:
  parser = records.arguments(__doc__, 'aggregation.json')
  parser.add_argument('--clients', type=int, nargs='+')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  numbers = args.clients or ([32] if args.quick else [64, 1024])
  repeats = args.repeats or (3 if args.quick else 7)
  kept = records.Records(args.out, seed=args.seed, repeats=repeats)
  for num in numbers:
    results = kept.keep(
      'rules', num, lambda num=num: measured(num, repeats, args.seed)
    )
    print('\n' + tables.aggregation(num, results), flush=True)


if __name__ == '__main__':
  main()
