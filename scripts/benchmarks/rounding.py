"""Compares `svd_round` of a mean product with a dense SVD.

Clients' factors are common factors plus each client's own noise of a twentieth
of their size: singular values of the mean product fall from 1 to 1/4 over the
kept rank, and the others are smaller, so that the best product of that rank is
unique. The reference is a dense SVD in float64. Two errors are reported: that
of the product, relative to the reference, and its excess distance from the mean
product over that of the reference, relative to the latter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import records
import tables

from fedjax_llm import tree
from fedjax_llm.aggregators import low_rank
from fedjax_llm.nodes import LowRank


class Case(NamedTuple):
  width: int
  clients: int
  rank: int

  def __str__(self) -> str:
    return f'{self.clients} clients of rank {self.rank}, width {self.width}'


CASES = (Case(4096, 10, 8), Case(4096, 50, 16), Case(512, 80, 8))
QUICK = (Case(512, 10, 8), Case(512, 50, 2), Case(128, 20, 8))


def factors(case: Case, seed: int) -> LowRank:
  rng = np.random.default_rng(seed)
  num, width, rank = case.clients, case.width, case.rank
  noise = lambda *shape: rng.standard_normal(shape) / 20 / np.sqrt(width)
  side = lambda: np.linalg.qr(rng.standard_normal((width, rank)))[0]
  root = np.geomspace(1.0, 0.25, rank) ** 0.5
  a = (side() + noise(num, width, rank)) * root
  b = (side() + noise(num, width, rank)).swapaxes(1, 2) * root[:, None]
  f4 = lambda x: jnp.asarray(x, jnp.float32)
  return LowRank(f4(a), f4(b), jnp.ones(num))


def measured(case: Case, repeats: int, seed: int) -> dict[str, Any]:
  nodes, rank = factors(case, seed), case.rank
  weight = tree.normalise(jnp.ones(case.clients))

  @jax.jit
  def fast(nodes):
    return low_rank.svd_round(low_rank.stack(nodes, weight), rank)

  @jax.jit
  def dense(nodes):
    product = low_rank.dense(low_rank.stack(nodes, weight))
    u, s, v = jnp.linalg.svd(product, full_matrices=False)
    return LowRank(u[:, :rank], s[:rank, None] * v[:rank], jnp.ones(()))

  def in_numpy(dtype=np.float32):
    a, b = (np.asarray(x, dtype) for x in (nodes.a, nodes.b))
    product = np.tensordot(a, b, ((0, 2), (0, 1))) / case.clients
    u, s, v = np.linalg.svd(product, full_matrices=False)
    return product, u[:, :rank] * s[:rank] @ v[:rank]

  ours = {'ours': lambda: fast(nodes)}
  others = {'dense, jax': lambda: dense(nodes), 'dense, numpy': in_numpy}
  if case.width > 2000:  # half a minute a call: one is enough
    taken = records.seconds(ours, repeats, pause=0.1)
    taken |= records.seconds(others, 1, pause=0.1)
  else:
    taken = records.seconds(ours | others, repeats, pause=0.1)
  product, truth = in_numpy(np.float64)
  node = jax.tree.map(lambda x: np.asarray(x, np.float64), fast(nodes))
  got = node.a @ node.b
  off = np.linalg.norm
  best = off(product - truth)
  slow = min(taken['dense, jax'], taken['dense, numpy'])
  return {
    'seconds': taken,
    'times_faster': slow / taken['ours'],
    'relative_error': float(off(got - truth) / off(truth)),
    'relative_excess': float(off(product - got) / best - 1),
  }


def main() -> None:
  parser = records.arguments(__doc__, 'rounding.json')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  repeats = args.repeats or (3 if args.quick else 7)
  kept = records.Records(args.out, seed=args.seed, repeats=repeats)
  for case in QUICK if args.quick else CASES:
    measure = lambda case=case: measured(case, repeats, args.seed)
    kept.keep('svd_round', case, measure)
  print(tables.rounding(kept.results['svd_round']))


if __name__ == '__main__':
  main()
