"""Builds all parts of a run from its config, in the order of the data flow.

`build` returns an `Experiment`; it trains nothing and writes nothing. `train`
runs an experiment, `sweep` runs several at once, `replay` runs some of its
rounds again.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fedjax_llm import clients, data, models
from fedjax_llm.adapters import complete, peft
from fedjax_llm.devices import hosts, sharding
from fedjax_llm.models.network import prompts
from fedjax_llm.run import (
  builders,
  client_models,
  client_texts,
  clock,
  config,
  evaluators,
  guarantee,
  memory,
  narration,
  poisoned,
  public,
  selecting,
  staged,
  tasks,
  texts,
  warm,
)
from fedjax_llm.run.assembled import Experiment as Experiment
from fedjax_llm.run.assembled import Tests as Tests
from fedjax_llm.run.method import algorithm as algorithm
from fedjax_llm.run.method import counts_clients as counts_clients
from fedjax_llm.run.method import keeps_private as keeps_private
from fedjax_llm.run.method import make_part
from fedjax_llm.run.method import recipe_of as recipe_of
from fedjax_llm.run.sections import SPEC, Evals, Settings
from fedjax_llm.types import (
  Cohort,
  Draw,
  Error,
  Params,
  Sampler,
)


def checked(conf: Mapping[str, Any]) -> tuple[Settings, Evals]:
  """Returns the settings and the section `evals` of a config, checked.

  Raises:
    Error: a number is out of range.
  """
  settings, test = config.settings(conf, SPEC), make_part(conf, 'evals')
  config.at_least(settings, num_rounds=1, seed=0, block_size=1, mesh_model=1)
  config.at_least(
    settings, cpu_devices=1, checkpoint_every=1, keep_checkpoints=1
  )
  config.at_least(test, 'evals.', every=1, batch_size=1, per_client=0)
  config.at_least(test, 'evals.', patience=1)
  config.at_least(test, 'evals.', common=0, samples=0, sample_tokens=1)
  evaluators.check(test.evaluators)
  guarantee.check(conf)
  memory.check(conf)
  staged.check(conf)
  clock.check(builders.named(conf.get('clients')), bool(conf.get('system')))
  clock.check_tiers(conf['algorithm'], conf.get('clients'))
  return settings, test


def build(
  conf: Mapping[str, Any],
  say: Callable[[str], None] = print,
  *,
  model: models.LoadedModel | None = None,
) -> Experiment:
  """Builds the `Experiment` of a config.

  Args:
    conf: a checked config, as `config.parse` returns it.
    say: prints the sentences about the clients and their texts.
    model: the loaded model, where another run on the same data has loaded it.

  Raises:
    Error: a builder refuses its section.
  """
  settings, test = checked(conf)
  sharding.split_cpu(settings.cpu_devices)
  make = functools.partial(make_part, conf)
  seed = settings.seed

  # ------------------------------------------------------------- data, model --
  task = make('task') if conf.get('task') else tasks.causal_lm()
  records = make('data')
  reading = None
  if conf.get('stages'):
    reading = staged.read(conf, records, SPEC.sections['data'])
    records = reading.split.records
  labels = task.labels(records)
  mesh = near = None
  if max(jax.device_count(), settings.mesh_model) > 1:
    mesh = sharding.mesh(settings.mesh_model)
    near = sharding.nearby(mesh)
  where = None if near is None else sharding.placement(near)
  loaded = model or texts.model(make, labels or task.scores, where)
  task.check(loaded)
  tokenizer = texts.tokenizer_of(loaded)
  alter = poisoned.altering(conf) if conf.get('poison') else None
  trained: dict[int, Any] = {}
  if conf.get('client_models'):
    alter = client_texts.watched(alter, trained)
  population = texts.population(
    make,
    task=task,
    records=records,
    labels=labels,
    tokenizer=tokenizer,
    seed=seed,
    alter=alter,
    encode=None if reading is None else reading.encode(task.encode),
  )
  digest = data.population.digest(population)
  hosts.agree('the texts', digest)
  say(narration.describe(population))
  if note := narration.unused_clients(conf):
    say(note)
  longest = data.population.longest(
    population,
    vocab_size=loaded.config.vocab_size,
    max_positions=loaded.config.max_positions,
    length=task.length,
  )
  width = -(-longest // 8) * 8  # no column is longer than all examples
  selection = selecting.of(conf)
  population = selecting.prepared(
    selection, population, loaded, task, seed, width, tokenizer.pad_id
  )
  stages = None
  if reading is not None:
    stages = staged.of(reading, population, settings.num_rounds, seed)
    say(staged.describe(stages))

  # ---------------------------------------------------------------- adapter --
  adapter_key, round_key = jax.random.split(jax.random.key(seed))
  if near is not None:  # parts of the base that are on no device yet
    loaded = loaded._replace(base=sharding.place(loaded.base, near))
  adapter = make('adapter', tokenizer=tokenizer)
  initial = sharding.fetched(adapter.init(adapter_key, loaded.base))
  initial = warm.start(initial, conf['adapter'].get('path'), loaded)
  complete(initial, loaded.base, task.head)  # raises if not exportable
  prompts.check(
    loaded.config,
    prompts.front(initial),
    width,
    remedy='; lower adapter.length or population.max_length',
  )
  if task.prepare is not None:
    takes = 'start' in builders.parameters(task.prepare)
    begin = {'start': initial} if takes else {}
    population = task.prepare(loaded, population, **begin)

  shared, small = None, None
  if conf.get('client_models'):
    small = client_models.build(
      conf,
      make,
      settings=config.resolved(conf, SPEC)['population'],
      task=task,
      records=records,
      population=population,
      tokenizer=tokenizer,
      key=jax.random.fold_in(adapter_key, 1),
      seed=seed,
      trained=trained,
    )
    shared, width = small.public, max(width, small.width)
  elif conf.get('public'):
    shared = public.batches(
      make('public'),
      config.resolved(conf, SPEC)['population'],
      task=task,
      tokenizer=tokenizer,
      labels=labels,
      batch_size=conf['cohort']['batch_size'],
      width=width,
      seed=seed,
    )

  # ---------------------------------------------------------------- clients --
  del records
  names, owned = data.population.trainers(population)
  if small is not None:
    owned = small.owned
  cohort_conf = dict(conf['cohort'])
  sizes = [len(own) for own in population.train]
  fleet = None
  if conf.get('system'):
    fleet = make('system', num_clients=len(sizes), seed=seed)

  def sampler_of(ids: Any) -> Sampler:  # of clients by their ids
    return make(
      'clients',
      num_clients=len(ids),
      sizes=[sizes[i] for i in ids],
      seed=seed,
      names=[population.names[i] for i in ids],
      system=fleet,
      job=lambda: clock.job(
        built.method(), built.initial, built.base, make_cohort
      ),
    )

  if stages is None or population.pooled:
    sampler = sampler_of(range(len(sizes)))
  else:
    sampler = stages.sampler(sampler_of, len(sizes))
  if population.pooled:  # one client takes the steps of a cohort
    if fleet is not None:
      raise Error(
        f'clients.name={builders.named(conf["clients"])} has a clock, and with '
        'pooled clients nobody arrives late: leave the section system out and '
        'take another sampler.'
      )
    cohort_conf['num_steps'] *= len(sampler(0).ids)
    sampler, sizes = clients.sampling.full(1), [sum(sizes)]
  carry = None
  if conf.get('profiles'):
    carry = make('profiles', num_clients=len(owned), seed=seed)
  if small is not None:
    carry = {**(carry or {}), 'group': small.of_client}
  if selection.scored is not None:
    cohort_conf['num_steps'] *= selection.scored.pool
  orders = None if selection.order is None else selection.order(owned)
  passes, size_of = orders, None
  if stages is not None:
    if orders is not None:
      raise Error(
        f'selection.name={conf["selection"]["name"]} orders the examples of a '
        'client, and so does the section stages: leave one of them out.'
      )
    passes = stages.pools.orders()
    size_of = passes.kept
  packing = cohort_conf.get('packing', False)
  row = width
  if packing:
    row = config.resolved(conf, SPEC)['population']['max_length']
  make_cohort = builders.build(
    cohort_conf,
    clients.cohorts.cohorts,
    examples=owned,
    max_length=row,
    pad_id=tokenizer.pad_id,
    seed=seed,
    profiles=carry,
    collate=task.collate,
    length=task.length,
    rate=guarantee.example_rate(conf),
    orders=passes,
    sizes=size_of,
    mixed=selection.scored is not None,
  )
  device_rows = 1 if near is None else near.shape[sharding.CLIENTS]

  def assemble(round: int) -> tuple[Draw, Cohort]:
    draw = sampler(round)
    if mesh is not None and hosts.several():  # only the rows of this process
      draw = sharding.dealt(draw, sizes, mesh)
      padded, mine = sharding.own_rows(draw, mesh)
      return draw, make_cohort(jax.tree.map(lambda x: x[mine], padded), round)
    cohort = make_cohort(draw, round)
    return clients.cohorts.by_size(draw, cohort, num_rows=device_rows)

  built = Experiment(
    conf=conf,
    settings=settings,
    test=test,
    task=task,
    labels=labels,
    tokenizer=tokenizer,
    loaded=loaded,
    population=population,
    digest=digest,
    owned=owned,
    names=names,
    sampler=sampler,
    profiles=carry,
    make_cohort=make_cohort,
    assemble=assemble,
    selected=_counts(
      selecting.counts(population, orders, population.pooled), stages
    ),
    adapter=adapter,
    initial=initial,
    round_key=round_key,
    mesh=mesh,
    near=near,
    width=width,
    public=shared,
    stages=stages,
    small=small,
    beside={} if task.beside is None else _placed(task.beside(loaded), near),
  )
  return built


def _placed(weights: Mapping[str, Any], mesh: Any) -> Mapping[str, Any]:
  """Returns the weights beside those of the model, on the devices of a mesh."""
  return weights if mesh is None else sharding.place(weights, mesh)


def _counts(
  selected: Callable[[Draw, int], dict[str, float]],
  stages: staged.Staged | None,
) -> Callable[[Draw, int], dict[str, float]]:
  """Returns the metrics of a selection and the number of the stage."""
  if stages is None:
    return selected
  return lambda draw, round: selected(draw, round) | stages.metrics(round)


def save_adapter(
  folder: pathlib.Path,
  params: Params,
  loaded: models.LoadedModel,
  task: tasks.Task,
  *,
  base_model: str,
  peft_fields: Mapping[str, Any],
) -> None:
  """Writes a PEFT directory, with the names of the classes where there are any.

  A randomly drawn head is in no checkpoint, so the adapter holds it in full.
  """
  families = models.families
  peft.save(
    folder,
    complete(params, loaded.base, task.head),
    module_name=lambda path, layer: families.hf_module_name(
      path, layer, loaded.config, part=True
    ),
    fused=lambda path: families.fused_rows(loaded.config, path),
    to_tensors=lambda leaves: families.to_checkpoint(leaves, loaded.config),
    base_model=base_model,
    task_type=task.peft_type,
    use_rslora=bool(peft_fields.get('use_rslora')),
    lora_dropout=peft_fields.get('lora_dropout', 0.0),
    network=loaded.config,
  )
  if loaded.config.labels:
    labels = json.dumps(loaded.config.labels)
    (folder / 'labels.json').write_text(f'{labels}\n')
