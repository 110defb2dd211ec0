"""Clients of ranks 4, 8 and 16: compares zero padding with later rules.

FlexLoRA (Bai et al. 2024, arXiv 2402.11505), HLoRA and FLoRA (Wang et al. 2024,
arXiv 2409.05976) each report that averaging factors padded with zeros, the
baseline, is worse than averaging products: rounded by an SVD in the first two,
stacked and merged into the base in the third. Same clients, texts and steps;
the learning rate is tuned on other roles for each rule.
"""

import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome

import fedjax_llm as fl

TITLE = 'Mixed ranks: zero padding, FlexLoRA, HLoRA, stacking'
PAPER = '2402.11505'
CLIENTS, ROUNDS, STEPS, RANKS = 9, 6, 4, (4, 8, 16)
RATES = (2e-3, 8e-3, 2e-2, 5e-2)
NAMES = ('zero_padding', 'flexlora', 'hlora', 'flora')
LABELS = {
  'zero_padding': 'zero padding',
  'flexlora': 'FlexLoRA',
  'hlora': 'HLoRA',
  'flora': 'stacking (FLoRA)',
  'fed_it': 'FedIT, 16 for all',
}


def run(bench: lab.Bench, seeds) -> Outcome:
  rounds, rates, names = ROUNDS, RATES, (*NAMES, 'fed_it')
  if bench.smoke:
    rounds, rates, names = 1, (2e-3,), ('zero_padding', 'flexlora')
  test = lab.tester(bench)

  def maker(name):
    recipe = getattr(fl.recipes, name)
    return lambda numbers: recipe(
      bench.loss(),
      lab.adamw(numbers['rate']),
      fold=fl.adapters.fold,
      measure=None,
    )

  programs = {name: lab.program(maker(name), CLIENTS) for name in names}

  def one(name, rate, seed):
    people = lab.people(seed, CLIENTS)
    profiles = fl.clients.profiles.ranks(RANKS, num_clients=CLIENTS, seed=seed)
    state, _, _ = lab.train(
      programs[name],
      {'rate': rate},
      bench.adapter(seed, max(RANKS)),
      lab.assembler(people, seed, steps=STEPS, profiles=profiles),
      bench.base,
      rounds=rounds,
      seed=seed,
    )
    return test(state.params, people)

  losses, chosen = {}, {}
  for name in names:
    best, tried = lab.tuned(
      lambda rate, seed, n=name: one(n, rate, seed), rates
    )
    chosen[name] = best
    losses[name] = [one(name, best, seed) for seed in seeds]
    bench.say(f'{name}: {np.mean(losses[name]):.4f} (rates {tried})')
  before = [test(None, lab.people(seed, CLIENTS)) for seed in seeds]
  gain = lambda name: np.array(losses['zero_padding']) - losses[name]
  claims = [
    Claim(
      f'{LABELS[name]} ends lower than zero padding, nats a byte',
      gain(name).tolist(),
      published=name != 'fed_it',
    )
    for name in names[1:]
  ]
  measured = {'losses': losses, 'before': before}
  settings = {
    'clients': CLIENTS,
    'ranks': list(RANKS),
    'rounds': rounds,
    'local_steps': STEPS,
    'learning_rates': chosen,
    'learning_rates_tried': list(rates),
  }
  return Outcome(claims, measured, settings)


def draw(figure, measured):
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  losses = measured['losses']
  names = [name for name in LABELS if name in losses]
  base = np.array(losses['zero_padding'])
  for place, name in enumerate(names):
    values = np.array(losses[name])
    left.plot(values - base, np.full(len(values), place), 'o', alpha=0.5)
    left.plot([np.mean(values - base)], [place], 'k|', ms=16)
    right.plot([np.mean(values)], [place], 'ks')
  left.axvline(0, color='0.6', lw=1)
  left.set_yticks(range(len(names)), [LABELS[name] for name in names])
  left.invert_yaxis()
  left.set_xlabel('loss minus that of zero padding, a seed')
  right.axvline(np.mean(measured['before']), color='0.6', ls=':', lw=1)
  right.set_yticks([])
  right.invert_yaxis()
  right.set_xlabel('held-out loss (dotted: before)')
