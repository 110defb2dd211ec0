"""FedSA-LoRA: tests whether clients agree on A and differ in B.

Guo et al. 2025 (arXiv 2410.01463, section 3) fine-tune LoRA on each client
alone, from one initial adapter, and report that the mean cosine between two
clients' A is above that of their B, in every layer, and that their B are less
similar if their texts are less similar. Their A is a here, the factor that
multiplies the input.

All a start from the same random values, and b from zero, so the a are similar
before any training. The cosine of the learned changes, a - a_0 and b, is
therefore reported too.
"""

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome

import fedjax_llm as fl

TITLE = 'FedSA-LoRA: clients agree on a, and differ in b'
PAPER = '2410.01463'
CLIENTS, STEPS, RATE, RANK = 8, 32, 1e-3, 8


def run(bench: lab.Bench, seeds) -> Outcome:
  steps = 2 if bench.smoke else STEPS

  def make(numbers):
    return fl.recipes.local_only(
      bench.loss(),
      lab.adamw(numbers['rate']),
      keep_optimizer=False,
      measure=None,
    )

  method = lab.program(make, CLIENTS)

  def one(seed, partition):
    """Returns the cosines [layers] of a, of b, and of the change of a."""
    people = lab.people(seed, CLIENTS, partition)
    params = bench.adapter(seed, RANK)
    _, states, metrics = lab.train(
      method,
      {'rate': RATE},
      params,
      lab.assembler(people, seed, steps=steps),
      bench.base,
      rounds=1,
      seed=seed,
    )
    loss = float(metrics[0].metrics['local/loss'])
    bench.say(f'seed {seed}, {partition}: {loss:.3f} nats a byte in training')
    return jax.tree.map(lambda x: np.asarray(x).tolist(), alike(
      states.private, params
    ))  # fmt: skip

  own = [one(seed, 'natural') for seed in seeds]
  mixed = [one(seed, 'iid') for seed in seeds]
  of = lambda rows, name: np.array([row[name] for row in rows])  # [n, L]
  mean = lambda rows, name: of(rows, name).mean(1)
  gap = of(own, 'a') - of(own, 'b')
  claims = [
    Claim('cosine of a minus cosine of b', gap.mean(1).tolist()),
    Claim('the same in the layer where it is least', gap.min(1).tolist()),
    Claim(
      "cosine of b on shuffled texts minus on each role's own",
      (mean(mixed, 'b') - mean(own, 'b')).tolist(),
    ),
    Claim(
      'cosine of what was learned of a minus cosine of b',
      (mean(own, 'learned') - mean(own, 'b')).tolist(),
      published=False,
    ),
  ]
  measured = {'roles': own, 'shuffled': mixed}
  settings = {
    'clients': CLIENTS,
    'local_steps': steps,
    'adamw_learning_rate': RATE,
    'rank': RANK,
  }
  return Outcome(claims, measured, settings)


@jax.jit
def alike(own, start):
  """Returns the mean cosine over pairs of clients and targets, [L] each."""
  is_node = fl.aggregators.low_rank.is_node
  flat = lambda tree: jax.tree.leaves(tree, is_leaf=is_node)
  cosines = {'a': [], 'b': [], 'learned': []}
  for node, first in zip(flat(own), flat(start)):
    cosines['a'].append(pairwise(node.a))
    cosines['b'].append(pairwise(node.b))
    cosines['learned'].append(pairwise(node.a - first.a))
  return {name: sum(x) / len(x) for name, x in cosines.items()}


def pairwise(x: jax.Array) -> jax.Array:
  """Returns the mean cosine over pairs of clients, [K, L, ...] -> [L]."""
  num, layers = x.shape[:2]
  flat = x.reshape(num, layers, -1)
  flat = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-9)
  gram = jnp.einsum('klp,jlp->lkj', flat, flat)
  total = jnp.sum(gram, (1, 2)) - jnp.trace(gram, axis1=1, axis2=2)
  return total / (num * (num - 1))


def draw(figure, measured):
  panels = figure.subplots(1, 2, sharey=True)
  for axes, (title, runs) in zip(panels, measured.items()):
    for name in ('a', 'learned', 'b'):
      rows = np.array([row[name] for row in runs])
      layers = np.arange(1, rows.shape[1] + 1)
      label = {'learned': 'a - a₀'}.get(name, name)
      (line,) = axes.plot(layers, rows.mean(0), marker='o', label=label)
      axes.plot(layers, rows.T, color=line.get_color(), alpha=0.25, lw=0.8)
    axes.set_xlabel(f'layer ({title})')
    axes.set_xticks(layers)
    axes.set_ylim(0, 1.05)
  panels[0].set_ylabel('mean cosine of two clients')
  panels[0].legend(frameon=False)
