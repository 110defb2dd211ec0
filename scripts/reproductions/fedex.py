"""FedEx-LoRA: measures the error of averaging the factors.

Singhal et al. 2025 (arXiv 2410.09432) report that the deviation of the mean of
the factors from the mean of the products,

    ||mean_k a_k b_k - (mean_k a_k)(mean_k b_k)||_F,

grows with local training and falls with the rank. It is reported as an absolute
number and relative to the norm of the mean product, with two scales of LoRA:
alpha / R with a fixed alpha, as in papers, and the same scale for every rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome, slope

import fedjax_llm as fl

TITLE = 'FedEx-LoRA: the deviation of averaged factors'
PAPER = '2410.09432'
CLIENTS, ROUNDS, RATE, MIDDLE = 4, 2, 1e-3, 8
STEPS, RANKS = (1, 2, 4, 8, 16), (2, 4, 8, 16)


def run(bench: lab.Bench, seeds) -> Outcome:
  all_steps, ranks = ((1, 4), (2, 4)) if bench.smoke else (STEPS, RANKS)
  middle = 2 if bench.smoke else MIDDLE
  scope = fl.scopes.ranks()

  def make(numbers):
    return fl.recipes.fed_it(
      bench.loss(), lab.adamw(numbers['rate']), scope=scope, measure=deviation
    )

  method = lab.program(make, CLIENTS)

  def one(seed, steps, rank, scale):
    """Returns the last round's deviation, absolute and relative."""
    people = lab.people(seed, CLIENTS)
    profiles = {'rank': np.full(CLIENTS, rank, np.int32)}
    cohort_of = lab.assembler(
      people, seed, steps=max(all_steps), profiles=profiles
    )
    params = scaled(bench.adapter(seed, max(ranks)), scale)
    _, _, metrics = lab.train(
      method,
      {'rate': RATE},
      params,
      lambda number: lab.shortened(cohort_of(number), steps),
      bench.base,
      rounds=ROUNDS,
      seed=seed,
    )
    last = metrics[-1].metrics
    return [float(last['missed']), float(last['missed'] / last['wanted'])]

  by_steps, by_rank, by_rank_same = [], [], []
  for seed in seeds:
    by_steps.append([one(seed, s, middle, 16 / middle) for s in all_steps])
    by_rank.append([one(seed, middle, r, 16 / r) for r in ranks])
    by_rank_same.append([one(seed, middle, r, 1.0) for r in ranks])
    bench.say(f'seed {seed}: relative deviation by steps '
              f'{[round(x[1], 4) for x in by_steps[-1]]}, by rank '
              f'{[round(x[1], 4) for x in by_rank[-1]]}')  # fmt: skip
  power = lambda xs, rows, which: [
    slope(xs, [point[which] for point in row]) for row in rows
  ]
  fall = lambda rows, which: [-p for p in power(ranks, rows, which)]
  claims = [
    Claim(
      'relative deviation grows with local steps (exponent)',
      power(all_steps, by_steps, 1),
    ),
    Claim(
      'absolute deviation grows with local steps (exponent)',
      power(all_steps, by_steps, 0),
    ),
    Claim(
      'absolute deviation falls with the rank at fixed alpha (exponent)',
      fall(by_rank, 0),
    ),
    Claim(
      'relative deviation falls with the rank at fixed alpha (exponent)',
      fall(by_rank, 1),
    ),
    Claim(
      'relative deviation falls with the rank at a fixed scale (exponent)',
      fall(by_rank_same, 1),
      published=False,
    ),
    Claim(
      'absolute deviation falls with the rank at a fixed scale (exponent)',
      fall(by_rank_same, 0),
      published=False,
    ),
  ]
  measured = {
    'steps': list(all_steps),
    'ranks': list(ranks),
    'by_steps': by_steps,
    'by_rank_at_fixed_alpha': by_rank,
    'by_rank_at_fixed_scale': by_rank_same,
  }
  settings = {
    'clients': CLIENTS,
    'rounds': ROUNDS,
    'adamw_learning_rate': RATE,
    'rank_of_the_steps': middle,
    'steps_of_the_ranks': middle,
  }
  return Outcome(claims, measured, settings)


def deviation(uploads, old, new):
  """Returns the norms of the deviation and of the mean product, all nodes."""
  weight = fl.tree.normalise(uploads.weight)
  nodes = _nodes(fl.tree.whole(uploads))
  served = _nodes(new)
  low_rank = fl.aggregators.low_rank
  square = lambda node: jnp.sum(jnp.square(low_rank.fro_norm(node)))
  missed = sum(
    square(low_rank.residual(x, weight, y)) for x, y in zip(nodes, served)
  )
  wanted = sum(square(low_rank.stack(x, weight)) for x in nodes)
  return {'missed': jnp.sqrt(missed), 'wanted': jnp.sqrt(wanted)}


def _nodes(params):
  is_node = fl.aggregators.low_rank.is_node
  return [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]


def scaled(params, scale):
  is_node = fl.aggregators.low_rank.is_node
  change = lambda x: x._replace(scale=jnp.full_like(x.scale, scale))
  return jax.tree.map(change, params, is_leaf=is_node)


def draw(figure, measured):
  steps, by_rank, size = figure.subplots(1, 3)
  ranks = measured['ranks']
  alpha = measured['by_rank_at_fixed_alpha']
  same = measured['by_rank_at_fixed_scale']
  band(steps, measured['steps'], measured['by_steps'], 1, f'rank {MIDDLE}')
  steps.set_xlabel('local steps a round')
  steps.set_ylabel('deviation / mean product')
  for axes, which in ((by_rank, 1), (size, 0)):
    band(axes, ranks, alpha, which, 'scale 16 / rank')
    band(axes, ranks, same, which, 'scale 1')
    axes.set_xlabel('rank')
  by_rank.set_ylim(steps.get_ylim())
  size.set_ylabel('deviation, absolute')
  size.legend(frameon=False, fontsize=8)


def band(axes, xs, values, which, label):
  rows = np.asarray(values)[..., which]
  (line,) = axes.plot(xs, rows.mean(0), marker='o', label=label)
  axes.plot(xs, rows.T, color=line.get_color(), alpha=0.25, lw=0.8)
  axes.set_xscale('log')
  axes.set_xticks(xs, [str(x) for x in xs])
  axes.minorticks_off()
  axes.set_ylim(bottom=0)
