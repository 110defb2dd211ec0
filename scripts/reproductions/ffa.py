"""FFA-LoRA beside LoRA when every update is noisy.

Sun et al. 2024 (arXiv 2403.12313, section 3): noise on both factors,

    (a + x)(b + y) - a b = a y + x b + x y,

has a term that is quadratic in the noise, and with one factor frozen there is
none, so private training loses less. Here every client's update is clipped to
norm `CLIP` and gets Gaussian noise on each entry that travels; the learning
rate is tuned on other roles for each method and noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome, slope

import fedjax_llm as fl
from fedjax_llm.types import Codec

TITLE = 'FFA-LoRA and LoRA under noise on updates'
PAPER = '2403.12313'
CLIENTS, ROUNDS, STEPS, RANK, CLIP = 8, 6, 4, 8, 1.0
NOISE, RATES = (0.0, 0.03, 0.1), (2e-3, 8e-3)
FACTORS = ('lora', 'ffa')


def run(bench: lab.Bench, seeds) -> Outcome:
  rounds, noises, rates = ROUNDS, NOISE, RATES
  if bench.smoke:
    rounds, noises, rates = 1, (0.0, 0.1), (3e-3,)
  test = lab.tester(bench)

  def maker(recipe):
    return lambda numbers: recipe(
      bench.loss(),
      lab.adamw(numbers['rate']),
      upload=noisy(CLIP, numbers['noise']),
      measure=None,
    )

  makers = {'lora': fl.recipes.fed_it, 'ffa': fl.recipes.ffa_lora}
  programs = {k: lab.program(maker(v), CLIENTS) for k, v in makers.items()}
  kept = {}

  def one(name, noise, rate, seed):
    people = lab.people(seed, CLIENTS)
    state, _, _ = lab.train(
      programs[name],
      {'rate': rate, 'noise': noise},
      bench.adapter(seed, RANK),
      lab.assembler(people, seed, steps=STEPS),
      bench.base,
      rounds=rounds,
      seed=seed,
    )
    if not noise:
      kept[name, seed] = state.params
    return test(state.params, people)

  losses, chosen = {}, {}
  for name in FACTORS:
    for noise in noises:
      best, tried = lab.tuned(
        lambda rate, seed, n=name, x=noise: one(n, x, rate, seed), rates
      )
      chosen[f'{name} at noise {noise:g}'] = best
      found = [one(name, noise, best, seed) for seed in seeds]
      losses[f'{name}/{noise:g}'] = found
      bench.say(
        f'{name}, noise {noise:g}: {np.mean(found):.4f} (rates {tried})'
      )
  before = [test(None, lab.people(seed, CLIENTS)) for seed in seeds]
  of = lambda name, noise: np.array(losses[f'{name}/{noise:g}'])
  lost = lambda name, noise: of(name, noise) - of(name, 0.0)
  growth = {
    name: [exponent(kept[name, s], noises[-1], s, name) for s in seeds]
    for name in FACTORS
  }
  largest = noises[-1]
  claims = [
    *(
      Claim(
        f'LoRA loses more than FFA-LoRA at noise {noise:g}, nats a byte',
        (lost('lora', noise) - lost('ffa', noise)).tolist(),
      )
      for noise in noises[1:]
    ),
    Claim(
      f"the error of LoRA's product grows faster than the noise at {largest:g}"
      ' (exponent above 1)',
      growth['lora'],
      bound=1.0 + 1e-3,
    ),
    Claim(
      'FFA-LoRA ends lower than LoRA at the largest noise, nats a byte',
      (of('lora', largest) - of('ffa', largest)).tolist(),
      published=False,
    ),
    Claim(
      'LoRA ends lower than FFA-LoRA without noise, nats a byte',
      (of('ffa', 0.0) - of('lora', 0.0)).tolist(),
      published=False,
    ),
  ]
  measured = {
    'noise': list(noises),
    'losses': losses,
    'before': before,
    'exponents': growth,
  }
  settings = {
    'clients': CLIENTS,
    'rounds': rounds,
    'local_steps': STEPS,
    'rank': RANK,
    'clip': CLIP,
    'learning_rates': chosen,
    'learning_rates_tried': list(rates),
  }
  return Outcome(claims, measured, settings)


def noisy(clip, noise) -> Codec:
  """Updates clipped to a norm, then N(0, noise^2) on all that was trained."""
  inner = fl.uploads.identity()

  def encode(update, masks, state, context):
    message, state = inner.encode(update, masks, state, context)
    shrink = jnp.minimum(1.0, clip / (fl.tree.norm(message) + 1e-12))
    leaves, treedef = jax.tree.flatten(message)
    drawn = [
      shrink * x
      + noise * jax.random.normal(jax.random.fold_in(context.key, i), x.shape, x.dtype)
      for i, x in enumerate(leaves)
    ]
    return inner.encode(jax.tree.unflatten(treedef, drawn), masks, state, context)

  return inner._replace(encode=encode)


def exponent(params, noise, seed, name) -> float:
  """p of error ~ noise^p of the products, around `noise`."""
  around = [noise / 2, noise, 2 * noise]
  return slope(around, [float(error(params, x, seed, name)) for x in around])


def error(params, noise, seed, name):
  """The norm of the change of all products when noise is on the factors."""
  is_node = fl.aggregators.low_rank.is_node
  total = 0.0
  for i, node in enumerate(jax.tree.leaves(params, is_leaf=is_node)):
    one, two = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
    x = noise * jax.random.normal(one, node.a.shape) * (name == 'lora')
    y = noise * jax.random.normal(two, node.b.shape)
    total += jnp.sum(jnp.square((node.a + x) @ (node.b + y) - node.a @ node.b))
  return jnp.sqrt(total)


def draw(figure, measured):
  left, right = figure.subplots(1, 2)
  noises = measured['noise']
  places = np.arange(len(noises))
  for name, label in (('lora', 'LoRA (FedIT)'), ('ffa', 'FFA-LoRA')):
    rows = np.array([measured['losses'][f'{name}/{x:g}'] for x in noises])
    (line,) = left.plot(places, rows.mean(1), marker='o', label=label)
    left.plot(places, rows, color=line.get_color(), alpha=0.25, lw=0.8)
    right.plot(
      [label] * len(measured['exponents'][name]),
      measured['exponents'][name],
      'o',
      color=line.get_color(),
    )
  left.axhline(np.mean(measured['before']), color='0.6', ls=':', lw=1)
  left.annotate('before', (0, np.mean(measured['before'])), fontsize=8)
  left.set_xticks(places, [f'{x:g}' for x in noises])
  left.set_xlabel('noise on each entry of an update')
  left.set_ylabel('held-out loss, nats a byte')
  left.legend(frameon=False)
  right.set_ylabel("exponent of the product's error")
  right.set_ylim(0.9, 2.1)
  right.margins(x=0.4)
