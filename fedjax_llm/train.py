"""Federated fine-tuning, from a config to an adapter.

    python -m fedjax_llm.train --config configs/NAME.py --workdir DIR
        [--config.section.field=value ...]

The program reads from top to bottom in the order in which data flow, holds no
mathematics, and is meant to be forked. The same command on the same workdir
goes on from the last checkpoint.
"""

import contextlib
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import (
  builders,
  checkpoint,
  clients,
  compilation,
  config,
  data,
  evals,
  exchange,
  hosts,
  metrics,
  models,
  report,
  sharding,
  tasks,
  tree,
  workdir,
)
from fedjax_llm.adapters import complete, peft
from fedjax_llm.plan import blocks
from fedjax_llm.sections import SPEC, Evals
from fedjax_llm.types import Cohort, Draw, Error, FederatedAlgorithm


def run(argv: list[str]) -> None:
  args = config.parse(argv, SPEC)
  conf, settings = args.config, config.settings(args.config, SPEC)
  build = lambda section, **injected: builders.build(
    conf[section], SPEC.sections[section], **injected
  )
  build('hosts')  # from here on this may be one process of several
  test: Evals = build('evals')
  config.at_least(settings, num_rounds=1, seed=0, block_size=1, mesh_model=1)
  config.at_least(settings, checkpoint_every=1, keep_checkpoints=1)
  config.at_least(test, 'evals.', every=1, batch_size=1, per_client=0)
  config.at_least(test, 'evals.', common=0, samples=0, sample_tokens=1)
  resolved = config.resolved(conf, SPEC)
  hosts.agree('the config', {**resolved, 'hosts': None})
  first = hosts.first()  # of the processes: it reads, writes, tests and speaks
  room = workdir.open(args.workdir, resolved, mine=first)
  for note in args.notes:
    print(note)
  if told := hosts.from_first(lambda: room.finished(settings.num_rounds)):
    print(f'{told}\n{args.workdir}: this run is finished.')
    return
  compilation.keep(settings.compilation_cache)
  seed, num_rounds = settings.seed, settings.num_rounds
  began = time.monotonic()

  # ------------------------------------------------------------- data, model --
  task = build('task') if conf.get('task') else tasks.causal_lm()
  records = build('data')
  labels = task.labels(records)  # None: no text is classified
  tokenizer = data.tokenizers.bytes()  # of models that come without their own
  mesh = near = None
  if max(jax.device_count(), settings.mesh_model) > 1:
    mesh = sharding.mesh(settings.mesh_model)  # clients over devices
    near = sharding.nearby(mesh)  # those of this process
  loaded = build(
    'model',
    vocab_size=tokenizer.vocab_size,
    eos_ids=(tokenizer.eos_id,),
    labels=labels,
    place=None if near is None else sharding.placement(near),
  )
  task.check(loaded)
  if loaded.directory is not None:
    tokenizer = data.tokenizers.pretrained(str(loaded.directory))
  population = build(
    'population',
    records=records,
    tokenizer=tokenizer,
    partition=build('partition'),
    labels=labels,
    seed=seed,
  )
  del records
  hosts.agree('the texts', data.population.digest(population))
  print(report.describe(population))
  longest = data.population.longest(
    population,
    vocab_size=loaded.config.vocab_size,
    max_positions=loaded.config.max_positions,
  )
  width = -(-longest // 8) * 8  # nothing is computed on columns nobody uses

  # ---------------------------------------------------------------- clients --
  owned, names = population.train, population.names
  cohort_conf = dict(conf['cohort'])
  sampler = build(
    'clients',
    num_clients=len(owned),
    sizes=[len(own) for own in owned],
    seed=seed,
  )
  if conf['algorithm']['name'] == 'centralised':
    # One client holds everybody's texts and takes the steps of a cohort.
    cohort_conf['num_steps'] *= len(sampler(0).ids)
    owned, names = (tuple(text for own in owned for text in own),), ('all',)
    sampler = clients.sampling.full(1)
  carry = None
  if conf.get('profiles'):
    carry = build('profiles', num_clients=len(owned), seed=seed)
  packing = cohort_conf.get('packing', False)
  row = resolved['population']['max_length'] if packing else width
  make_cohort = builders.build(
    cohort_conf,
    clients.cohorts.cohorts,
    examples=owned,
    max_length=row,
    pad_id=tokenizer.pad_id,
    seed=seed,
    profiles=carry,
  )
  device_rows = 1 if near is None else near.shape[sharding.CLIENTS]
  sizes = [len(own) for own in owned]

  def assemble(round: int) -> tuple[Draw, Cohort]:
    draw = sampler(round)
    if mesh is not None and hosts.several():  # only the rows of this process
      draw = sharding.dealt(draw, sizes, mesh)
      padded, mine = sharding.own_rows(draw, mesh)
      return draw, make_cohort(jax.tree.map(lambda x: x[mine], padded), round)
    cohort = make_cohort(draw, round)
    return clients.cohorts.by_size(draw, cohort, num_rows=device_rows)

  max_targets = clients.cohorts.max_targets(
    owned,
    batch_size=cohort_conf['batch_size'],
    max_length=row,
    epochs=cohort_conf.get('epochs'),
    packing=packing,
  )

  # ---------------------------- adapter, local, uploads, aggregators, server --
  adapter_key, round_key = jax.random.split(jax.random.key(seed))
  if near is not None:  # whatever does not lie there yet
    loaded = loaded._replace(base=sharding.place(loaded.base, near))
  base, adapter = loaded.base, build('adapter')
  initial = adapter.init(adapter_key, base)
  complete(initial, base, task.head)  # or it could not be written at the end
  parts = ('upload', 'aggregator', 'server')
  method = lambda block_size, mesh=mesh: build(
    'algorithm',
    loss=task.loss(loaded, max_targets=max_targets),
    optimizer=build('local'),
    num_clients=len(owned),
    block_size=block_size,
    widths=tuple(settings.widths),
    fold=adapter.fold,
    mesh=mesh,
    execution=settings.execution,
    **{part: build(part) for part in parts if conf.get(part)},
  )
  block_size = settings.block_size
  if block_size == 'auto':
    choose = lambda: blocks.auto(
      lambda block_size: method(block_size, near),
      initial,
      assemble(0)[1],
      base,
      num_rows=device_rows,
      num_model=settings.mesh_model,
    )
    block_size = hosts.from_first(
      lambda: room.chosen.get('block_size') or choose()
    )
    room.chosen['block_size'] = block_size
    print(f'block_size: {block_size} clients at once')
  algorithm: FederatedAlgorithm = method(block_size)
  # `donate` eats what the state is made of; the start is shown at the end.
  before = jax.tree.map(jnp.copy, initial)
  state = algorithm.init(round_key, initial)
  newcomer = algorithm.init_client(state.params)
  has_private = newcomer.private is not None
  step = sharding.compiled(algorithm.round, mesh)
  # What cannot be computed is found out before anything is written.
  trial = assemble(0)[1]
  trial = trial._replace(states=tree.broadcast(newcomer, len(trial.ids)))
  jax.eval_shape(step, state, trial, base)
  size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
  print(
    f'{loaded.name}: {size(before):,} adapter parameters beside '
    f'{size(base):,} frozen ones ({models.num_bytes(base) / 1e6:,.1f} MB)'
  )

  # ------------------------------------------------------------------ evals --
  heldout = [own[: test.per_client] for own in population.heldout]
  fresh = [own[: test.per_client] for own in population.new]
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
  tested = [[text for own in (*heldout, *fresh) for text in own]]
  examine = evals.loop(
    task.loss(
      loaded,
      per_row=True,
      max_targets=clients.cohorts.max_targets(
        tested, batch_size=test.batch_size, max_length=width, epochs=1
      ),
    ),
    algorithm,
    heldout=rows(heldout),
    new=rows(fresh),
    common=rows(evals.in_turn(heldout, test.common)),
    names=population.names,
    new_names=population.new_names,
    has_private=has_private,
    labelled=labels is not None,
  )

  # ----------------------------------------------------------------- resume --
  room.take()  # nothing was written before
  saver = checkpoint.open(
    room.checkpoints, max_to_keep=settings.keep_checkpoints, mine=first
  )
  restored, done = saver.restore(state), 0
  meta = {'data': data.population.digest(population)}
  if restored is not None:
    state, done = restored.state, restored.round
    if {**meta, **restored.meta} != meta:
      raise Error(f'{args.workdir} holds a run on other texts or clients.')
    if done > num_rounds:
      raise Error(f'{args.workdir} is at round {done}, above {num_rounds=}.')
    print('\n'.join([*restored.notices, f'resuming after round {done}']))
  room.save_config()
  store = clients.store.open(room.states, newcomer, at_round=done, mine=first)
  record = lambda number, told: None
  if first:
    keep = -1 if restored is None else done
    record = metrics.recorder(args.workdir, keep).write

  def save(number: int) -> None:
    store.commit(number)
    saver.save(number, state, meta)
    store.prune(min(saver.rounds()))

  if restored is None and first:
    ready = time.monotonic()
    told = examine(base, state.params, store, round_key)
    told['time/setup'] = ready - began
    told['time/evals'] = time.monotonic() - ready
    record(0, told)
    save(0)
  # What process 0 has found or begun, all have.
  done = hosts.from_first(lambda: done)
  hosts.meet()
  state = sharding.everywhere(exchange.copied(state), mesh)
  everybodys = sharding.widened(base, mesh)

  # ----------------------------------------------------------------- rounds --
  stop, number, following = workdir.stop_after_round(), done, None
  unit = 'labels' if labels else 'tokens'
  bar = metrics.progress(
    num_rounds, done, unit=unit, file=None if first else sys.stdout
  )
  with contextlib.ExitStack() as at_end:
    at_end.callback(bar.close)
    for number in range(done + 1, num_rounds + 1):
      began = time.monotonic()
      draw, cohort = following or assemble(number - 1)
      (ids, _), mine = sharding.own_rows(draw, mesh)
      states = exchange.rows_from_first(
        lambda ids=ids: store.gather(ids), newcomer, len(ids), mine
      )
      cohort = sharding.joined(cohort._replace(states=states), mesh)
      assembled = time.monotonic()
      state, states, on_device = step(state, cohort, everybodys)
      # The host prepares the next cohort while the device works.
      following = assemble(number) if number < num_rounds else None
      told = metrics.summarise(on_device)
      trained = time.monotonic()
      told, note = report.left_out(told, draw, names, number)
      if note:
        bar.write(note)
      states = exchange.rows_to_first(sharding.held(states))
      store.scatter(ids, told.pop('clients/reported'), states)
      last = number == num_rounds
      if first and (number % test.every == 0 or last):
        served = sharding.here(state.params, mesh)
        told |= examine(base, served, store, round_key)
      speed = told['local/tokens'] / (trained - began)
      told |= {
        'time/data': assembled - began,
        'time/round': trained - assembled,
        'time/evals': time.monotonic() - trained,
        'time/tokens_per_second': speed,
      }
      record(number, told)
      ending = hosts.anybody(stop())
      if number % settings.checkpoint_every == 0 or last or ending:
        if first:
          save(number)
        hosts.meet()
      bar.update(number, told['local/loss'], speed)
      if ending:
        break
  if number < num_rounds:
    print(f'stopped after round {number}; the same command goes on from there')
    return
  if not first:
    return

  # ----------------------------------------------------------------- record --
  state = state._replace(params=sharding.here(state.params, mesh))

  def say(params: Any, questions: list[evals.Question]) -> list[list[int]]:
    if not questions:
      return []
    base, params = adapter.fold(loaded.base, params)
    return models.generate(
      loaded,
      base,
      params,
      [question.prompt for question in questions],
      max_new_tokens=test.sample_tokens,
      eos_id=tokenizer.eos_id,
    )

  asked = evals.questions(
    population.heldout,
    # A classifier writes nothing, nor a network that has no cache.
    0 if labels or loaded.decoder is None else test.samples,
    max_prompt=loaded.config.max_positions - test.sample_tokens,
  )
  served = algorithm.personal(state.params, None)
  said = {'before': say(before, asked)}
  if has_private:  # each client answers with its own model
    kept = lambda client: tree.take(store.gather([client]), 0)
    own = lambda client: algorithm.personal(state.params, kept(client))
    said['after'] = [say(own(q.client), [q])[0] for q in asked]
  else:
    said['after'] = say(served, asked)

  # Dense changes have no place in an adapter's file: they go with the base.
  base, final = adapter.fold(base, served)
  folded = jax.tree.structure(final) != jax.tree.structure(served)
  keep_base = folded or loaded.directory is None  # nobody else has it
  if keep_base:
    models.save(room.base, loaded.config, base)
  peft.save(
    room.adapter,
    # A head that was drawn is in no checkpoint: the adapter holds it whole.
    complete(final, base, task.head),
    to_tensors=lambda leaves: models.families.to_checkpoint(
      leaves, loaded.config
    ),
    task_type=task.peft_type,
    module_name=lambda path, layer: models.families.hf_module_name(
      path, layer, loaded.config, part=True
    ),
    fused=lambda path: models.families.fused_rows(loaded.config, path),
    base_model=str(room.base) if keep_base else loaded.name,
    use_rslora=conf['adapter']['name'] == 'rslora',
  )
  if labels:
    (room.adapter / 'labels.json').write_text(json.dumps(labels) + '\n')
  told = '\n'.join(
    [
      report.printable(evals.replies(asked, said, tokenizer.decode)),
      report.summary(args.workdir),
    ]
  )
  room.finish(num_rounds, told)
  print(told)


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
