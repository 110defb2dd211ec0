"""Rank collapse: how much of the change lies beyond the smallest rank.

raFLoRA (arXiv 2602.13486) reports that with clients of several ranks the energy
of the averaged change, sum of squared singular values, collapses to the
smallest rank in FlexLoRA: directions beyond it count as zero for every small
client, so their share shrinks by a factor in each round. The mean of factors
that are padded with zeros does the same. Averaging each rank over its holders,
as products, keeps it. Same clients, texts, steps and rate for all rules.
"""

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome, slope

import fedjax_llm as fl
from fedjax_llm.aggregators import low_rank

TITLE = 'Rank collapse: the energy beyond the smallest rank'
PAPER = '2602.13486'
CLIENTS, ROUNDS, STEPS, RANKS, RATE = 9, 8, 4, (4, 16), 8e-3
SHARES = (2, 1)  # six clients of rank 4 and three of rank 16
LABELS = {
  'zero_padding': 'zero padding',
  'flexlora': 'FlexLoRA',
  'raflora': 'raFLoRA',
}


@jax.jit
def beyond(params):
  """Returns the share of sum s^2 beyond the smallest rank, over all weights."""
  nodes = jax.tree.leaves(params, is_leaf=low_rank.is_node)
  shares = []
  for node in filter(low_rank.is_node, nodes):
    square = jnp.square(low_rank.svd(node, 1)[1])  # [L, R]
    late = jnp.sum(square[..., min(RANKS) :], axis=-1)
    shares.append(jnp.ravel(late / jnp.sum(square, axis=-1)))
  return jnp.mean(jnp.concatenate(shares))


def run(bench: lab.Bench, seeds) -> Outcome:
  rounds, names = ROUNDS, tuple(LABELS)
  if bench.smoke:
    rounds, names = 2, ('flexlora', 'raflora')

  def maker(name):
    recipe = getattr(fl.recipes, name)
    return lambda numbers: recipe(
      bench.loss(), lab.adamw(numbers['rate']), measure=None
    )

  programs = {name: lab.program(maker(name), CLIENTS) for name in names}
  numbers = {'rate': jnp.float32(RATE)}

  def one(name, seed):
    people = lab.people(seed, CLIENTS)
    profiles = fl.clients.profiles.ranks(
      RANKS, SHARES, num_clients=CLIENTS, seed=seed
    )
    cohort_of = lab.assembler(people, seed, steps=STEPS, profiles=profiles)
    params = bench.adapter(seed, max(RANKS))
    state, states = programs[name].init(numbers, seed, params)
    shares = []
    for number in range(rounds):
      cohort = cohort_of(number)._replace(states=states)
      state, states, _ = programs[name].round(
        numbers, state, cohort, bench.base
      )
      shares.append(float(beyond(state.params)))
    return shares

  shares = {}
  for name in names:
    shares[name] = [one(name, seed) for seed in seeds]
    bench.say(f'{name}: {np.round(np.mean(shares[name], 0), 5).tolist()}')
  # Of round 1 the factors are small clients' and large clients' alike.
  number = np.arange(1, rounds + 1)
  fall = lambda x: -slope(np.exp(number), x)  # of log(share) a round
  falls = {name: [fall(x) for x in shares[name]] for name in names}
  claims = [
    Claim(
      f'{LABELS[name]}: the share beyond rank {min(RANKS)} falls, '
      'log(share) a round',
      falls[name],
      published=name == 'flexlora',
    )
    for name in names
    if name != 'raflora'
  ]
  claims += [
    Claim(
      f'it falls faster with {LABELS[name]} than with raFLoRA, log(share) a '
      'round',
      (np.array(falls[name]) - falls['raflora']).tolist(),
      published=name == 'flexlora',
    )
    for name in names
    if name != 'raflora'
  ]
  claims.append(
    Claim(
      'raFLoRA ends with more than twice the share of FlexLoRA, ratio',
      [x[-1] / y[-1] for x, y in zip(shares['raflora'], shares['flexlora'])],
      bound=2.0,
    )
  )
  settings = {
    'clients': CLIENTS,
    'ranks': list(RANKS),
    'shares': list(SHARES),
    'rounds': rounds,
    'local_steps': STEPS,
    'learning_rate': RATE,
  }
  return Outcome(claims, {'shares': shares, 'falls': falls}, settings)


def draw(figure, measured):
  axes = figure.subplots()
  for name, runs in measured['shares'].items():
    number = np.arange(1, len(runs[0]) + 1)
    (line,) = axes.plot(number, np.mean(runs, 0), label=LABELS[name])
    axes.plot(number, np.transpose(runs), color=line.get_color(), alpha=0.3)
  axes.set_yscale('log')
  axes.set_xlabel('round')
  axes.set_ylabel(f'energy beyond rank {min(RANKS)}, share')
  axes.legend(frameon=False)
