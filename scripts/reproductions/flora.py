"""FLoRA's restart: compares few long rounds with many short ones.

FLoRA (Wang et al. 2024, arXiv 2409.05976) merges the exact mean of the products
into the base and draws new factors after every round, while FedIT continues
with the mean factors. The paper reports that FLoRA is better; users report that
it is worse when rounds are short, since b starts at zero in each round. All
runs have the same tokens: rounds times local steps is constant. The learning
rate is tuned on other roles for each method and schedule.
"""

import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome

import fedjax_llm as fl

TITLE = 'FLoRA and FedIT, few long rounds to many short ones'
PAPER = '2409.05976'
CLIENTS, TOTAL, RANK, ROUNDS = 4, 32, 8, (1, 2, 8, 32)
RATES = (2e-3, 8e-3, 3e-2)
NAMES = ('fed_it', 'flora')


def run(bench: lab.Bench, seeds) -> Outcome:
  total, rates, schedules = TOTAL, RATES, ROUNDS
  if bench.smoke:
    total, rates, schedules = 2, (2e-3,), (1, 2)
  test = lab.tester(bench)

  def maker(name):
    recipe = getattr(fl.recipes, name)
    more = {'scope': fl.scopes.everything()} if name == 'flora' else {}
    return lambda numbers: recipe(
      bench.loss(),
      lab.adamw(numbers['rate']),
      fold=fl.adapters.fold,
      measure=None,
      **more,
    )

  programs = {name: lab.program(maker(name), CLIENTS) for name in NAMES}

  def one(name, rounds, rate, seed):
    people = lab.people(seed, CLIENTS)
    cohort_of = lab.assembler(people, seed, steps=total)
    state, _, _ = lab.train(
      programs[name],
      {'rate': rate},
      bench.adapter(seed, RANK),
      lambda number: lab.shortened(cohort_of(number), total // rounds),
      bench.base,
      rounds=rounds,
      seed=seed,
    )
    return test(state.params, people)

  losses, chosen = {}, {}
  for rounds in schedules:
    for name in NAMES:
      best, tried = lab.tuned(
        lambda rate, seed, n=name, r=rounds: one(n, r, rate, seed), rates
      )
      results = [one(name, rounds, best, seed) for seed in seeds]
      chosen[f'{name}, {rounds} rounds'] = best
      losses[f'{name}/{rounds}'] = results
      bench.say(
        f'{name}, {rounds} x {total // rounds}: {np.mean(results):.4f} '
        f'(rates {tried})'
      )
  before = [test(None, lab.people(seed, CLIENTS)) for seed in seeds]
  lead = lambda rounds: (
    np.array(losses[f'fed_it/{rounds}']) - losses[f'flora/{rounds}']
  )
  few, many = schedules[1], schedules[-1]
  claims = [
    Claim(
      f'FLoRA ends lower in {few} rounds of {total // few} steps, nats a byte',
      lead(few).tolist(),
    ),
    Claim(
      f'FLoRA ends higher in {many} rounds of {total // many}, nats a byte',
      (-lead(many)).tolist(),
    ),
    Claim(
      'its lead falls from few long rounds to many short ones, nats a byte',
      (lead(few) - lead(many)).tolist(),
    ),
  ]
  measured = {
    'rounds': list(schedules),
    'total_steps': total,
    'losses': losses,
    'before': before,
  }
  settings = {
    'clients': CLIENTS,
    'total_local_steps': total,
    'rank': RANK,
    'learning_rates': chosen,
    'learning_rates_tried': list(rates),
  }
  return Outcome(claims, measured, settings)


def draw(figure, measured):
  left, right = figure.subplots(1, 2)
  rounds = measured['rounds']
  places = np.arange(len(rounds))
  label = [f'{r} x {measured["total_steps"] // r}' for r in rounds]
  rows = {
    name: np.array([measured['losses'][f'{name}/{r}'] for r in rounds])
    for name in NAMES
  }
  for name, text in (('fed_it', 'FedIT'), ('flora', 'FLoRA')):
    (line,) = left.plot(places, rows[name].mean(1), marker='o', label=text)
    left.plot(places, rows[name], color=line.get_color(), alpha=0.25, lw=0.8)
  left.set_ylabel('held-out loss, nats a byte')
  left.legend(frameon=False)
  lead = rows['fed_it'] - rows['flora']
  right.axhline(0, color='0.6', lw=1)
  right.plot(places, lead, color='k', alpha=0.25, lw=0.8)
  right.plot(places, lead.mean(1), 'ko-')
  right.set_ylabel('lead of FLoRA, nats a byte')
  for axes in (left, right):
    axes.set_xticks(places, label)
    axes.set_xlabel('rounds x local steps')
