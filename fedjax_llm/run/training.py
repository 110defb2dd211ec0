"""Trains a run from its config to the final adapter: the body of `train`.

`train` reads from top to bottom in the order in which data flow, holds no
mathematics, and is meant to be copied and changed. The same arguments on the
same workdir go on from the last checkpoint.
"""

import contextlib
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import adapters, data, evals, models, tree
from fedjax_llm.adapters import complete, peft
from fedjax_llm.devices import compilation, exchange, hosts, sharding
from fedjax_llm.run import (
  best,
  builders,
  checkpoint,
  config,
  experiment,
  guarantee,
  metrics,
  narration,
  pace,
  profiling,
  provenance,
  rates,
  resume,
  staged,
  stalls,
  versions,
  workdir,
)
from fedjax_llm.run.ends import ends
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Cohort, Draw, Error, FederatedAlgorithm


def train(args: config.Arguments) -> None:
  conf, settings = args.config, config.settings(args.config, SPEC)
  builders.build(conf['hosts'], SPEC.sections['hosts'])  # joins other processes
  _, test = experiment.checked(conf)
  profiled = profiling.rounds(settings.profile)
  sharding.split_cpu(settings.cpu_devices)  # before JAX starts
  track = builders.build(conf['tracking'], SPEC.sections['tracking'])
  resolved = config.resolved(conf, SPEC)
  hosts.agree('the config', {**resolved, 'hosts': None})
  first = hosts.first()  # the process that reads, writes and prints
  room = workdir.open(args.workdir, resolved, mine=first)
  for note in args.notes:
    print(note)
  finished = lambda: room.finished(settings.num_rounds, test.patience)
  if report := hosts.from_first(finished):
    print(f'{report}\n{args.workdir}: this run is finished.')
    return
  if room.lost:
    print(f'{args.workdir}: made again, as lost or changed: {room.lost[0]}')
  compilation.keep(settings.compilation_cache)
  began = time.monotonic()

  # ------------- task, data, model, clients, adapter: see experiment.build --
  built = experiment.build(conf)
  mesh, assemble = built.mesh, built.assemble
  base, initial, loaded = built.base, built.initial, built.loaded
  population, tokenizer = built.population, built.tokenizer
  num_rounds, private = settings.num_rounds, built.privacy
  if private is not None and private.num_rounds < num_rounds:
    num_rounds = private.num_rounds
    print(f'privacy: the budget ends this run after round {num_rounds}')

  # ---------------------------------- local, uploads, aggregators, server --
  block_size = settings.block_size
  if block_size == 'auto':
    block_size = hosts.from_first(
      lambda: room.chosen.get('block_size') or built.block_size()
    )
    room.chosen['block_size'] = block_size
    print(f'block_size: {block_size} clients at once')
  algorithm: FederatedAlgorithm = built.method(block_size, mesh=mesh)
  # `donate` eats what the state is made of; the start is shown at the end.
  before = jax.tree.map(jnp.copy, initial)
  state = algorithm.init(built.round_key, initial)
  newcomer = algorithm.init_client(state.params)
  has_private = newcomer.private is not None
  step = sharding.compiled(algorithm.round, mesh)
  # Errors of the method are raised before anything is written.
  trial = assemble(0)[1]
  trial = trial._replace(states=tree.broadcast(newcomer, len(trial.ids)))
  meter = pace.of(
    jax.make_jaxpr(step)(state, trial, base),
    trips=rates.num_steps(trial.batches),
    rows=sharding.num_rows(mesh),
  )
  size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
  print(
    f'{loaded.name}: {size(before):,} adapter parameters beside '
    f'{size(base):,} frozen ones ({models.num_bytes(base) / 1e6:,.1f} MB)'
  )

  examine = built.examiner(algorithm)
  # Process 0 evaluates, with all processes that share its copy of the base.
  sharing = sharding.num_sharing(mesh)
  tests = first or sharing > 1

  # ----------------------------------------------------------------- resume --
  room.take()  # nothing was written before
  writers = None
  if settings.checkpoint_writers == 'all':
    writers = checkpoint.Writers(hosts.index(), hosts.count(), hosts.meet)
  saver = checkpoint.open(
    room.checkpoints,
    max_to_keep=settings.keep_checkpoints,
    mine=first,
    writers=writers,
    conf=resolved,
  )
  if room.lost and not saver.rounds():
    raise Error(
      f'{args.workdir}: {room.lost[0]} of this finished run is lost or '
      'changed, and no checkpoint is left to make it again: take another '
      'workdir.'
    )
  meta = {'data': built.digest}

  def check(restored: checkpoint.Restored) -> None:
    if {**meta, **restored.meta} != meta:
      raise Error(f'{args.workdir} holds a run on other texts or clients.')
    if private is not None:
      private.check(restored.state.aggregator)
      guarantee.same_noise(room.path, private)
    if restored.round > num_rounds:
      raise Error(
        f'{args.workdir} is at round {restored.round}, above {num_rounds=}.'
      )

  open_store = lambda number, begins: versions.open_store(
    room.states, newcomer, resolved, at_round=number, mine=first, begins=begins
  )
  restored, store = resume.newest(saver, state, open_store, check)
  done = 0
  if restored is not None:
    state, done = restored.state, restored.round
    print('\n'.join([*restored.notices, f'resuming after round {done}']))
  for field, values in room.changed.items():
    print(
      f'{field} was {values["was"]!r}, is {values["is"]!r} after round {done}'
    )
  room.save_config(done)
  kept = exchange.shared(store, newcomer) if sharing > 1 else store
  record, leave = lambda number, row: None, lambda finished: None
  judge_of = functools.partial(
    best.judge, by=test.best_by, patience=test.patience, keep=test.keep_best
  )
  judge, of_stages = judge_of(), staged.tracker(built.stages)
  if first:
    unit = built.task.metrics.unit
    sizes = data.population.sizes(population)
    room.keep('clients.json', {**sizes, 'unit': unit})
    origin = room.path / 'provenance.json'
    examples = {
      name: population.report.get(f'{name}_examples', 0)
      for name in ('train', 'heldout', 'new')
    }
    before_now = origin.read_text() if origin.is_file() else None
    room.keep(
      origin.name,
      provenance.started(
        before_now, done, resolved, data=built.digest, num_examples=examples
      ),
    )
    if private is not None:
      room.keep('privacy.json', private.record())
    record, leave = metrics.recorder(
      args.workdir,
      keep=-1 if restored is None else done,
      track=lambda kept: track(args.workdir, resolved, kept),
      say=print,
    )
    earlier = metrics.read(str(room.path / 'metrics.jsonl'))
    judge = judge_of(earlier)
    of_stages = staged.tracker(built.stages, earlier, room.path)

  def save(number: int) -> None:
    room.check()
    store.commit(number)
    kept_too = {judge.best()} - {None} if test.keep_best else ()
    saver.save(number, state, meta, kept_too)
    store.prune(min(saver.rounds(), default=number))

  if hosts.from_first(lambda: restored is None):
    if tests:
      ready = time.monotonic()
      values = examine(base, state.params, kept, built.round_key)
      values |= of_stages(0, values)
      values['time/setup'] = ready - began
      values['time/evals'] = time.monotonic() - ready
      judge.note(0, values)
      record(0, values)
    save(0)
  # All processes get the values that process 0 has read or started.
  done = hosts.from_first(lambda: done)
  hosts.meet()
  state = sharding.everywhere(exchange.copied(state), mesh)
  everybodys = sharding.widened(base, mesh)

  # ----------------------------------------------------------------- rounds --
  def prepared(number: int) -> tuple[Draw, Cohort]:
    draw, cohort = assemble(number)
    return draw, sharding.joined(cohort, mesh)

  stop, number, following = workdir.stop_after_round(), done, None
  sound = jax.jit(tree.all_finite)
  rates_of = built.rates()
  unit = f'{built.task.metrics.unit}s'
  bar = metrics.progress(
    num_rounds, done, unit=unit, file=None if first else sys.stdout
  )
  over = hosts.from_first(judge.over)  # patience has run out
  saving = 0.0  # seconds of the last checkpoint
  with contextlib.ExitStack() as at_end:
    ended = lambda: over or number == num_rounds
    at_end.push(lambda kind, *_: leave(kind is None and ended()))
    at_end.callback(bar.close)
    begins = at_end.enter_context(stalls.watched(bar.write))
    for number in range(done + 1, done + 1 if over else num_rounds + 1):
      began = time.monotonic()
      begins(number)
      draw, cohort = following or prepared(number - 1)
      own, mine = sharding.own_rows(draw, mesh)
      ids = own.ids
      states = exchange.rows_from_first(
        lambda ids=ids: store.gather(ids), newcomer, len(ids), mine
      )
      cohort = cohort._replace(states=sharding.joined(states, mesh))
      assembled = time.monotonic()
      trace = first and number in profiled
      with profiling.traced(room.path / profiling.FOLDER, number, trace):
        state, states, info = step(state, cohort, everybodys)
        computed = meter.watch(info.reported)
        # The next cohort is made and transferred while the devices compute.
        following = prepared(number) if number < num_rounds else None
        ready = time.monotonic()
        info = jax.device_get(info._replace(reports=None))
      values = metrics.summarise(info) | built.selected(draw, number - 1)
      if algorithm.plan is not None:  # on the host, for the next round
        state = algorithm.plan(state)
      trained = time.monotonic()
      values, note = narration.left_out(values, info, draw, built.names, number)
      if note:
        bar.write(note)
      if not sound(state.params):
        raise narration.Diverged(narration.not_finite(number))
      states = exchange.rows_to_first(sharding.held(states), sharing)
      store.scatter(ids, info.reported, states)
      last = number == num_rounds
      of_stage = built.stages is not None and number in built.stages.ends
      if tests and (number % test.every == 0 or last or of_stage):
        served = sharding.here(state.params, mesh)
        values |= examine(base, served, kept, built.round_key)
        values |= of_stages(number, values)
      speed = values['local/tokens'] / (trained - began)
      values |= rates_of(number, rates.num_steps(cohort.batches))
      values |= {
        'time/data': assembled - began,
        'time/round': trained - assembled,
        'time/evals': time.monotonic() - trained,
        'time/total': time.monotonic() - began,
        'time/tokens_per_second': speed,
      }
      idle = max(ready - computed(), 0.0)
      waits = pace.Waits(assembled - began, idle, saving)
      values |= meter.measured(trained - assembled, waits) if first else {}
      record(number, values)
      judge.note(number, values)
      better = False
      if test.keep_best or test.patience is not None:
        better, over = hosts.from_first(
          lambda: [test.keep_best and judge.best() == number, judge.over()]  # noqa: B023
        )
      ending = hosts.anybody(stop()) or over
      saving, since = 0.0, time.monotonic()
      due = number % settings.checkpoint_every == 0 or last or better
      if due or ending:
        save(number)
        hosts.meet()
        saving = time.monotonic() - since
      score, more = best.score(values), pace.words(values, waits)
      bar.update(number, values['local/loss'], speed, score, more)
      if note := staged.sentence(built.stages, number, values):
        bar.write(note)
      if trace:
        bar.write(profiling.note(room.path / profiling.FOLDER))
      if ending:
        break
  if number < num_rounds and not over:
    print(f'stopped after round {number}; the same command goes on from there')
    return
  if not tests:
    return

  # ----------------------------------------------------------------- record --
  state = state._replace(params=sharding.here(state.params, mesh))

  def answer(params: Any, questions: list[evals.Question]) -> list[list[int]]:
    if not questions:
      return []
    base, params = built.adapter.fold(loaded.base, params)
    return models.generate(
      loaded,
      base,
      params,
      [question.prompt for question in questions],
      max_new_tokens=test.sample_tokens,
      eos_id=ends(
        loaded, tokenizer, conf['population'].get('template', 'chat')
      ),
    )

  questions = evals.questions(
    population.heldout,
    # Classifiers and networks without a cache generate no replies.
    test.samples if built.task.writes and loaded.decoder is not None else 0,
    max_prompt=loaded.config.max_positions - test.sample_tokens,
    begin=data.tokenizers.start(tokenizer),
  )
  served = algorithm.personal(state.params, None)
  answers = {'before': answer(before, questions)}
  if has_private:  # each client answers with its own model
    row = lambda client: tree.take(kept.gather([client]), 0)
    own = lambda client: algorithm.personal(state.params, row(client))
    answers['after'] = [answer(own(q.client), [q])[0] for q in questions]
  else:
    answers['after'] = answer(served, questions)

  # Dense changes have no place in an adapter's file: they go with the base.
  base, final = built.adapter.fold(loaded.base, served)
  folded = jax.tree.structure(final) != jax.tree.structure(served)
  keep_base = folded or loaded.directory is None  # no model file holds it
  if keep_base:
    base = sharding.fetched(base)
  final = sharding.fetched(complete(final, base, built.task.head))
  if not first:
    return
  if keep_base:
    models.save(room.base, loaded.config, base)
  if reason := peft.refusal(final, loaded.config):
    note = f'{room.adapter} holds no PEFT adapter: {reason} {_way(base, final)}'
    room.adapter.mkdir(exist_ok=True)
    workdir.replace(room.adapter / 'no_adapter.txt', f'{note}\n')
    print(note)
  else:
    experiment.save_adapter(
      room.adapter,
      final,
      loaded._replace(base=base),
      built.task,
      base_model=str(room.base) if keep_base else loaded.name,
      peft_fields=built.adapter.peft,
    )
  shown = evals.samples(questions, answers, tokenizer.decode, population.names)
  room.keep('samples.json', {'round': number, 'samples': shown})
  text = '\n'.join(
    [
      narration.printable(evals.replies(questions, answers, tokenizer.decode)),
      narration.summary(args.workdir, built.task.metrics.unit),
      *narration.best(number, num_rounds, judge.best(), test),
    ]
  )
  room.finish(number, text, test.patience if over else None)
  print(text)


def _way(base: Any, final: Any) -> str:
  """Returns a sentence that says how a result without PEFT files is used."""
  if adapters.unmerged(base, final) is None:
    return 'python -m fedjax_llm.export --to merged writes the whole model.'
  return (
    'It cannot be merged either; python -m fedjax_llm.generate reads it from '
    'the checkpoints of this folder.'
  )
