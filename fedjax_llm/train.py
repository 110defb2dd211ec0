"""Federated fine-tuning, from a config to an adapter.

    python -m fedjax_llm.train --config configs/NAME.py --workdir DIR
        [--config.section.field=value ...]

The program reads from top to bottom in the order in which data flow, holds no
mathematics, and is meant to be forked. The same command on the same workdir
goes on from the last checkpoint.
"""

import inspect
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import (
  adapters,
  aggregators,
  builders,
  checkpoint,
  clients,
  config,
  data,
  evals,
  local,
  metrics,
  models,
  recipes,
  server,
  uploads,
  workdir,
)
from fedjax_llm.adapters import peft
from fedjax_llm.types import Error, FederatedAlgorithm


class Settings(NamedTuple):
  """The scalars at the top of a config."""

  num_rounds: int
  seed: int = 0
  block_size: int | None = None  # clients in one vmap; None: the whole cohort
  checkpoint_every: int = 1
  keep_checkpoints: int = 2


class Evals(NamedTuple):
  """The section `evals`: what is tested, and when."""

  every: int = 1  # rounds; before the first and after the last in any case
  batch_size: int = 8
  per_client: int | None = None  # held-out examples a client; None: all
  common: int = 32  # examples of everybody's, for methods with private parts
  buckets: tuple[int, ...] = (32, 64, 128)  # row widths, against padding
  samples: int = 2  # replies shown before and after
  sample_tokens: int = 48


def named(recipe: Any) -> Any:
  """A recipe whose signature says which parts a config may put into it."""
  given = inspect.signature(recipe).parameters.values()
  own = [p for p in given if p.kind is not p.VAR_KEYWORD]
  parts = ('aggregator', 'server', 'upload', 'block_size', 'fold')
  names = {p.name for p in own}
  added = [
    inspect.Parameter(part, inspect.Parameter.KEYWORD_ONLY, default=None)
    for part in parts
    if part not in names
  ]

  def build(**keywords: Any) -> FederatedAlgorithm:
    said = {k: v for k, v in keywords.items() if v is not None}
    return recipe(**said)

  build.__name__ = recipe.__name__
  build.__signature__ = inspect.Signature([*own, *added])  # type: ignore
  return build


RECIPES = {name: named(getattr(recipes, name)) for name in recipes.__all__}
PARTS = ('loss', 'optimizer', 'num_clients', 'aggregator', 'server', 'upload',
         'block_size', 'fold')  # fmt: skip

SPEC = config.Spec(
  settings=Settings,
  sections={
    'data': data.sources,
    'partition': data.partition,
    'population': data.population.build,
    'clients': clients.sampling,
    'cohort': clients.cohorts.cohorts,
    'model': {'pretrained': models.pretrained, 'random': models.random},
    'adapter': adapters,
    'algorithm': RECIPES,
    'local': local.optimizer,
    'upload': uploads,
    'aggregator': aggregators,
    'server': server,
    'evals': Evals,
  },
  injected={
    'population': ('records', 'tokenizer', 'partition', 'seed'),
    'clients': ('num_clients', 'sizes', 'seed'),
    'cohort': ('examples', 'max_length', 'pad_id', 'seed', 'profiles'),
    'model': ('vocab_size', 'eos_ids'),
    'algorithm': PARTS,
  },
  optional=('upload', 'aggregator', 'server'),
)


def run(argv: list[str]) -> int:
  args = config.parse(argv, SPEC)
  conf = args.config
  settings = config.settings(conf, SPEC)
  build = lambda section, **injected: builders.build(
    conf[section] or {}, SPEC.sections[section], **injected
  )
  room = workdir.open(args.workdir, config.resolved(conf, SPEC))
  for note in args.notes:
    print(note)
  seed = settings.seed
  seconds: dict[str, float] = {}

  # ------------------------------------------------------------------- data --
  began = time.monotonic()
  records = build('data')
  if conf['model']['name'] == 'random':
    tokenizer = data.tokenizers.bytes()
    loaded = build(
      'model',
      vocab_size=tokenizer.vocab_size,
      eos_ids=(tokenizer.eos_id,),
    )
  else:
    loaded = build('model')
    tokenizer = data.tokenizers.pretrained(str(loaded.directory))
  population = build(
    'population',
    records=records,
    tokenizer=tokenizer,
    partition=build('partition'),
    seed=seed,
  )
  print(workdir.describe(population))
  seconds['time/data'] = time.monotonic() - began

  # ---------------------------------------------------------------- clients --
  owned, cohort_conf = population.train, dict(conf.get('cohort') or {})
  sampler = build(
    'clients',
    num_clients=len(owned),
    sizes=[len(own) for own in owned],
    seed=seed,
  )
  if conf['algorithm']['name'] == 'centralised':
    # One client holds everybody's texts and takes the steps of a cohort.
    cohort_conf['num_steps'] *= len(sampler(0).ids)
    owned = (tuple(example for own in owned for example in own),)
    sampler = clients.sampling.full(1)
  every = [*owned, *population.heldout, *population.new]
  longest = max(len(e.tokens) for own in every for e in own)
  width = -(-longest // 8) * 8  # nothing is computed on columns nobody uses
  if cohort_conf.get('packing'):
    width = config.resolved(conf, SPEC)['population']['max_length']
  make_cohort = builders.build(
    cohort_conf,
    clients.cohorts.cohorts,
    examples=owned,
    max_length=width,
    pad_id=tokenizer.pad_id,
    seed=seed,
  )
  shape = {k: cohort_conf[k] for k in ('epochs', 'packing') if k in cohort_conf}
  max_targets = clients.cohorts.max_targets(
    owned, batch_size=cohort_conf['batch_size'], max_length=width, **shape
  )

  # ------------------------------------------------- model, adapter, method --
  adapter_key, round_key = jax.random.split(jax.random.key(seed))
  base = loaded.base
  adapter = build('adapter')
  initial = adapter.init(adapter_key, base)
  parts = {
    part: build(part)
    for part in ('upload', 'aggregator', 'server')
    if conf.get(part)
  }
  algorithm: FederatedAlgorithm = build(
    'algorithm',
    loss=local.causal_lm(loaded.model, max_targets=max_targets),
    optimizer=build('local'),
    num_clients=len(owned),
    block_size=settings.block_size,
    fold=adapter.fold,
    **parts,
  )
  # `donate` eats what the state is made of; the start is shown at the end.
  before = jax.tree.map(jnp.copy, initial)
  state = algorithm.init(round_key, initial)
  stateless = algorithm.init_client(state.params)
  step = jax.jit(algorithm.round, donate_argnums=0)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  print(
    f'{loaded.name}: {size(before):,} adapter parameters beside '
    f'{size(base):,} frozen ones'
  )

  # ------------------------------------------------------------------ evals --
  test = build('evals')
  heldout = [own[: test.per_client] for own in population.heldout]
  common = [
    [own[i]] if i < len(own) else []
    for i in range(max(map(len, heldout), default=0))
    for own in heldout
  ][: test.common]
  pool = [[e for own in (*heldout, *population.new) for e in own]]
  rows = lambda examples: [
    (group.batches, group.owners)
    for group in clients.cohorts.rows(
      examples,
      batch_size=test.batch_size,
      max_length=width,
      buckets=test.buckets,
      pad_id=tokenizer.pad_id,
    )
  ]
  examine = evals.loop(
    local.causal_lm(
      loaded.model,
      per_row=True,
      max_targets=clients.cohorts.max_targets(
        pool, batch_size=test.batch_size, max_length=width, epochs=1
      ),
    ),
    algorithm,
    heldout=rows(heldout),
    new=rows([own[: test.per_client] for own in population.new]),
    common=rows(common),
    names=population.names,
    new_names=population.new_names,
    has_private=stateless.private is not None,
  )

  # ----------------------------------------------------------------- resume --
  saver = checkpoint.open(
    room.checkpoints, max_to_keep=settings.keep_checkpoints
  )
  restored = saver.restore(state)
  done = 0
  if restored is not None:
    state, done = restored.state, restored.round
    for notice in restored.notices:
      print(notice)
    print(f'{args.workdir}: resuming after round {done}')
  room.save_config()
  recorder = metrics.recorder(args.workdir, done if restored else -1)
  store = clients.store.open(room.states, stateless, at_round=done)
  if restored is None:
    began = time.monotonic()
    first = examine(base, state.params, store, round_key)
    first['time/evals'] = time.monotonic() - began
    recorder.write(0, {**first, **seconds})
    store.commit(0)
    saver.save(0, state)

  # ----------------------------------------------------------------- rounds --
  stop = workdir.stop_on_sigterm()
  bar = metrics.progress(settings.num_rounds, done)
  ready = None
  for round in range(done, settings.num_rounds):
    began = time.monotonic()
    draw, cohort = ready or ((d := sampler(round)), make_cohort(d, round))
    cohort = cohort._replace(states=store.gather(draw.ids))
    assembled = time.monotonic()
    state, states, device_told = step(state, cohort, base)
    ready = None
    if round + 1 < settings.num_rounds:  # while the device works
      ready = ((d := sampler(round + 1)), make_cohort(d, round + 1))
    told = metrics.summarise(device_told)
    trained_at = time.monotonic()
    told |= workdir.left_out(told, draw, cohort, population.names, round + 1)
    store.scatter(
      draw.ids, told.pop('clients/reported'), jax.device_get(states)
    )
    number, last = round + 1, round + 1 == settings.num_rounds
    if number % test.every == 0 or last:
      told |= examine(base, state.params, store, round_key)
    tested = time.monotonic()
    told['time/data'] = assembled - began
    told['time/round'] = trained_at - assembled
    told['time/evals'] = tested - trained_at
    told['time/tokens_per_second'] = told['local/tokens'] / max(
      trained_at - began, 1e-9
    )
    recorder.write(number, told)
    if number % settings.checkpoint_every == 0 or last or stop():
      store.commit(number)
      saver.save(number, state)
      store.prune(min(saver.rounds()))
    bar.update(number, told['local/loss'], told['time/tokens_per_second'])
    if stop() and not last:
      bar.close()
      recorder.close()
      print(f'stopped after round {number}; the same command goes on from here')
      return 0
  bar.close()
  recorder.close()

  # ----------------------------------------------------------------- record --
  final = algorithm.personal(state.params, None)
  if loaded.directory is None:  # a random model: without it nobody loads this
    models.save(room.base, loaded.config, base)
  peft.save(
    room.adapter,
    final,
    module_name=lambda path, layer: models.families.hf_module_name(
      path, layer, loaded.config
    ),
    base_model=str(room.base) if loaded.directory is None else loaded.name,
    use_rslora=conf['adapter']['name'] == 'rslora',
  )
  asked = evals.questions(population.heldout, test.samples)
  if asked:
    say = lambda params: models.generate(
      loaded,
      base,
      params,
      [prompt for prompt, _ in asked],
      max_new_tokens=test.sample_tokens,
      eos_id=tokenizer.eos_id,
    )
    said = {'before': say(before), 'after': say(final)}
    print(evals.replies(asked, said, tokenizer.decode))
  print(workdir.summary(args.workdir))
  return 0


def main(argv: list[str] | None = None) -> int:
  """The command line: a mistake of the user is one sentence and status 1."""
  try:
    return run(sys.argv[1:] if argv is None else argv)
  except Error as error:
    print(f'error: {error}', file=sys.stderr)
  except OSError as error:
    print(f'error: {error.filename or ""}: {error.strerror}', file=sys.stderr)
  return 1


if __name__ == '__main__':
  sys.exit(main())
