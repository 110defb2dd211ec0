"""FLASC: compares loss and bytes with dense LoRA.

Kuo et al. 2024 (arXiv 2406.05233) report that top-k of LoRA both ways, with
dense local training, matches dense LoRA at a fraction of the bytes, and beats a
LoRA of a smaller rank at the same bytes. The server uses FedAdam for all
methods; its rate is tuned on other roles for each method. Bytes count values
and places, both ways. The paper selects entries over all factors together; the
selection by leaf is tested too, because b starts at zero.
"""

import numpy as np
from reproductions import bench as lab
from reproductions.verdicts import Claim, Outcome

import fedjax_llm as fl

TITLE = 'FLASC: loss against bytes'
PAPER = '2406.05233'
CLIENTS, ROUNDS, STEPS, RANK, RATE = 8, 8, 4, 16, 4e-3
DENSITIES, SERVER_RATES = (1 / 4, 1 / 16), (3e-3, 1e-2)
KEPT = 0.95  # share of the dense gain that counts as "matches"


def run(bench: lab.Bench, seeds) -> Outcome:
  rounds, rates, densities = ROUNDS, SERVER_RATES, DENSITIES
  if bench.smoke:
    rounds, rates, densities = 1, (3e-3,), (1 / 4,)
  test = lab.tester(bench)
  common = dict(b1=0.9, b2=0.99, tau=1e-3, measure=None)

  def sparse(density, per):
    return lambda numbers: fl.recipes.flasc(
      bench.loss(),
      lab.adamw(RATE),
      download_density=density,
      upload_density=density,
      per=per,
      server_learning_rate=numbers['rate'],
      **common,
    )

  def dense(numbers):
    return fl.recipes.fed_adam(
      bench.loss(),
      lab.adamw(RATE),
      server_learning_rate=numbers['rate'],
      scope=fl.scopes.ranks(),
      **common,
    )

  plain = lab.program(dense, CLIENTS)  # FLASC of density one
  methods = {'LoRA/1': (plain, RANK)}
  for density in densities:
    part = round(1 / density)
    for per, label in (('tree', 'FLASC'), ('leaf', 'FLASC by leaf')):
      program = lab.program(sparse(density, per), CLIENTS)
      methods[f'{label}/{part}'] = program, RANK
    methods[f'LoRA/{part}'] = plain, max(1, round(RANK * density))

  def one(name, rate, seed):
    program, rank = methods[name]
    people = lab.people(seed, CLIENTS)
    profiles = {'rank': np.full(CLIENTS, rank, np.int32)}
    state, _, infos = lab.train(
      program,
      {'rate': rate},
      bench.adapter(seed, RANK),
      lab.assembler(people, seed, steps=STEPS, profiles=profiles),
      bench.base,
      rounds=rounds,
      seed=seed,
    )
    sent = sum(int(m.bytes_up.sum()) + int(m.bytes_down.sum()) for m in infos)
    traffic[name] = sent / 1e6
    return test(state.params, people)

  losses, chosen, traffic = {}, {}, {}
  for name in methods:
    best, tried = lab.tuned(
      lambda rate, seed, n=name: one(n, rate, seed), rates
    )
    chosen[name] = best
    losses[name] = [one(name, best, seed) for seed in seeds]
    bench.say(
      f'{name}: {np.mean(losses[name]):.4f}, {traffic[name]:.2f} MB '
      f'(rates {tried})'
    )
  before = np.array([test(None, lab.people(seed, CLIENTS)) for seed in seeds])
  gain = lambda name: before - losses[name]
  first = round(1 / densities[0])
  claims = [
    Claim(
      f'share of the dense gain that FLASC keeps at density 1/{first}',
      (gain(f'FLASC/{first}') / gain('LoRA/1')).tolist(),
      bound=KEPT,
    )
  ]
  for density in densities:
    part = round(1 / density)
    claims.append(
      Claim(
        f'FLASC of density 1/{part} ends lower than LoRA of 1/{part} of the '
        'rank, nats a byte',
        (gain(f'FLASC/{part}') - gain(f'LoRA/{part}')).tolist(),
      )
    )
    claims.append(
      Claim(
        f'chosen by leaf it ends lower than over the tree at 1/{part}',
        (gain(f'FLASC by leaf/{part}') - gain(f'FLASC/{part}')).tolist(),
        published=False,
      )
    )
  measured = {
    'losses': losses,
    'megabytes': traffic,
    'before': before.tolist(),
  }
  settings = {
    'clients': CLIENTS,
    'rounds': rounds,
    'local_steps': STEPS,
    'rank': RANK,
    'local_adamw_learning_rate': RATE,
    'server_learning_rates': chosen,
    'learning_rates_tried': list(rates),
  }
  return Outcome(claims, measured, settings)


def draw(figure, measured):
  axes = figure.subplots()
  series: dict[str, list] = {}
  for name, values in measured['losses'].items():
    series.setdefault(name.split('/')[0], []).append(
      (measured['megabytes'][name], np.array(values))
    )
  dense = series['LoRA'][0]
  for label, points in series.items():
    points = sorted([*points, *([] if label == 'LoRA' else [dense])], key=first)
    xs = [x for x, _ in points]
    rows = np.array([values for _, values in points])
    name = 'LoRA of a smaller rank' if label == 'LoRA' else label
    (line,) = axes.semilogx(xs, rows.mean(1), marker='o', label=name)
    axes.semilogx(xs, rows, color=line.get_color(), alpha=0.2, lw=0.8)
  axes.axhline(np.mean(measured['before']), color='0.6', ls=':', lw=1)
  axes.set_xlabel('MB sent, both ways')
  axes.set_ylabel('held-out loss, nats a byte')
  axes.legend(frameon=False)


def first(pair):
  return pair[0]
