"""The settings and sections of a run's config, in the order of the data flow.

`SPEC` lists them for `run.config`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optax

from fedjax_llm import (
  adapters,
  adversary,
  aggregators,
  clients,
  data,
  evals,
  local,
  models,
  privacy,
  recipes,
  server,
  uploads,
)
from fedjax_llm.devices import hosts
from fedjax_llm.local import optimizers
from fedjax_llm.run import (
  builders,
  client_models,
  config,
  images,
  memory,
  preferences,
  rates,
  reward_models,
  rewarded,
  tasks,
  trackers,
  warm,
)


class Settings(NamedTuple):
  """The scalars at the top of a config."""

  num_rounds: int
  seed: int = 0
  # Clients in one vmap; None: the whole cohort; 'auto': by speed and memory.
  block_size: int | Literal['auto'] | None = None
  widths: tuple[int, ...] = ()  # row widths of blocks, to reduce padding
  mesh_model: int = 1  # the number of devices that share a copy of the base
  # How clients are split over devices; pmap only where mesh_model is 1.
  execution: Literal['shard_map', 'pmap'] = 'shard_map'
  # The devices that JAX makes of a CPU; one a core is fastest, and each holds a
  # copy of the base.
  cpu_devices: int = 1
  checkpoint_every: int = 1
  keep_checkpoints: int = 2
  # With several processes; all: each writes its share, where all see the
  # workdir.
  checkpoint_writers: Literal['first', 'all'] = 'first'
  # The folder of compiled programs for the next start; none: they are not kept.
  compilation_cache: str | None = 'auto'
  # Rounds of which a trace is written to the workdir: see `run.profiling`.
  profile: int | tuple[int, ...] | None = None


class Evals(NamedTuple):
  """The section `evals`: the evaluations of a run and their rounds."""

  every: int = 1  # rounds; also before the first and after the last
  batch_size: int = 8
  per_client: int | None = None  # held-out examples a client; None: all
  common: int = 32  # examples from all clients, for methods with private parts
  buckets: tuple[int, ...] = (32, 64, 128)  # row widths, to reduce padding
  samples: int = 2  # replies shown before and after
  sample_tokens: int = 48
  # The checkpoint of the best round is kept beside the newest (`best`).
  keep_best: bool = False
  patience: int | None = None  # evaluations without a better one before the end
  best_by: str | None = None  # 'heldout/accuracy'; None: the held-out loss
  # The evaluations, in this order: `run.evaluators`.
  evaluators: Sequence[Mapping[str, Any]] = ({'name': 'likelihood'},)
  # One more: a view of clients besides the model they are served.
  personal: Mapping[str, Any] | None = None


def parts(
  upload: Any = None,
  download: Any = None,
  adversary: Any = None,
  aggregator: Any = None,
  server: Any = None,
  block_size: int | None = None,
  widths: tuple[int, ...] = (),
  fold: Any = None,
  mesh: Any = None,
  execution: str = 'shard_map',
) -> None:
  """Has the signature of the arguments that recipes pass on to `fed_opt`."""


def pooled(of: Mapping[str, Any] = {'name': 'natural'}) -> Any:
  """Returns `data.partition.pooled` of the partition that a section names."""
  return data.partition.pooled(builders.build(of, _PARTITIONS))


def clusters(
  num_clients: int,
  num_clusters: int | None = None,
  alpha: float | None = None,
  embed: str | None = None,
) -> Any:
  """Returns `data.drift.clusters`; `embed` is the import path of a function."""
  function = None
  if embed is not None:
    function = builders.resolve_builder(
      'partition',
      embed,
      {'hashed_words': data.drift.hashed_words},
      'partition.embed',
    )
  return data.drift.clusters(num_clients, num_clusters, alpha, function)


def within(
  of: Mapping[str, Any] = {'name': 'soft_prompt'},
  towers: Sequence[str] = ('vision',),
) -> Any:
  """Returns `adapters.within`: a section's adapter in towers of a dual encoder.

  >>> from jax import numpy as jnp, random
  >>> base = {'text': {'bias': jnp.ones(2)}, 'vision': {'bias': jnp.ones(3)}}
  >>> sorted(within({'name': 'bitfit'}).init(random.key(0), base))
  ['vision']
  """
  return adapters.within(builders.build(of, adapters), *towers)


def bucketing(of: Mapping[str, Any] = {'name': 'median'}, size: int = 2) -> Any:
  """Returns `aggregators.bucketing` before the rule that a section names."""
  return aggregators.bucketing(builders.build(of, aggregators), size=size)


def nearest_mixing(
  of: Mapping[str, Any] = {'name': 'median'},
  byzantine_fraction: float = 0.2,
) -> Any:
  """Returns `aggregators.nearest_mixing` before the rule of a section."""
  return aggregators.nearest_mixing(
    builders.build(of, aggregators), byzantine_fraction=byzantine_fraction
  )


def in_products(of: Mapping[str, Any] = {'name': 'geometric_median'}) -> Any:
  """Returns `aggregators.in_products` of the rule that a section names."""
  return aggregators.in_products(builders.build(of, aggregators))


def implied(
  conf: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a config with the partition that its method cannot do without.

  A partition that `recipes.NEEDS` names for the method takes that of the config
  as its `of`. It is removed again where `before`, the config without this
  change of its method, had it for the method of then.

  >>> conf = dict(algorithm={'name': 'centralised'}, partition={'name': 'iid'})
  >>> pool = implied(conf, conf)
  >>> pool['partition']
  {'name': 'pooled', 'of': {'name': 'iid'}}
  >>> implied({**pool, 'algorithm': {'name': 'fed_avg'}}, pool)['partition']
  {'name': 'iid'}
  """

  def needed(conf: Mapping[str, Any]) -> Any:
    name = builders.named(conf.get('algorithm'))
    needs = recipes.NEEDS.get(name, {}) if isinstance(name, str) else {}
    return needs.get('partition')

  was, need, new = needed(before), needed(conf), dict(conf)
  if was and not need and new.get('partition') == before.get('partition'):
    inner = new['partition']
    if builders.named(inner) == was['name']:
      new['partition'] = dict(inner.get('of') or {'name': 'natural'})
  inner = new.get('partition')
  pool = need and builders.named(inner) != need['name']
  if pool and isinstance(inner, Mapping):
    new['partition'] = {**need, 'of': inner}
  return new


def without(namespace: Any, *names: str) -> dict[str, Any]:
  known = builders.names(namespace)
  return {name: known[name] for name in known if name not in names}


_PARTITIONS = {
  **without(data.partition, 'pooled'),
  **builders.names(data.skew),
  **builders.names(data.drift),
  'clusters': clusters,
}

# Aggregators that take a rule or a function, which no section can hold.
_TAKE_RULES = ('as_stack', 'control_variates', 'from_rule')

SPEC = config.Spec(
  settings=Settings,
  sections={
    'task': {
      **builders.names(tasks),
      **builders.names(preferences),
      **builders.names(reward_models),
      **builders.names(rewarded),
      **builders.names(images),
    },
    'data': {
      **builders.names(data.sources),
      **builders.names(data.preferences),
      **builders.names(data.pictures),
      'hub': data.named.hub,
    },
    'public': data.sources,
    'client_models': client_models.client_models,
    'partition': {**_PARTITIONS, 'pooled': pooled},
    'partition.of': _PARTITIONS,
    'population': data.population.build,
    'poison': adversary.poisoning,
    'stages': data.stages,
    'selection': data.selection,
    'system': clients.system,
    'clients': {
      **builders.names(clients.sampling),
      'by_value': clients.valued.by_value,
      **builders.names(clients.timed),
      'compass': clients.compass.compass,
    },
    'profiles': clients.profiles,
    'cohort': clients.cohorts.cohorts,
    'model': models,
    'adapter': {
      name: warm.startable(builder)
      for name, builder in {
        **builders.names(adapters),
        'within': within,
      }.items()
    },
    'algorithm': {
      name: config.onward(recipe, parts)
      for name, recipe in builders.names(recipes).items()
    },
    'local': {
      name: config.onward(
        functools.partial(local.optimizer, name), getattr(optax, name)
      )
      for name in optimizers.names()
    },
    'local.schedule': {
      name: getattr(optax, name) for name in optimizers.schedule_names()
    },
    'memory': memory.Memory,
    'upload': without(uploads, 'from_optax'),
    'download': without(uploads, 'from_optax'),
    'adversary': adversary,
    'aggregator': {
      **without(aggregators, *_TAKE_RULES),
      'bucketing': bucketing,
      'in_products': in_products,
      'nearest_mixing': nearest_mixing,
    },
    'aggregator.of': without(
      aggregators, *_TAKE_RULES, 'bucketing', 'in_products', 'nearest_mixing'
    ),
    'privacy': privacy.section,
    'server': {
      name: rates.scheduled(builder)
      for name, builder in builders.names(server).items()
    },
    'server.schedule': {
      name: getattr(optax, name) for name in optimizers.schedule_names()
    },
    'evals': Evals,
    'evals.personal': evals.views,
    'tracking': trackers.tracking,
    'hosts': hosts.join,
  },
  injected={
    'population': (
      *('records', 'tokenizer', 'partition', 'labels', 'seed', 'encode'),
      'alter',
    ),
    'system': ('num_clients', 'seed'),
    'clients': ('num_clients', 'sizes', 'seed', 'names', 'system', 'job'),
    'profiles': ('num_clients', 'seed'),
    'cohort': (
      *('examples', 'max_length', 'pad_id', 'seed', 'profiles'),
      *('collate', 'length', 'rate', 'orders', 'mixed', 'sizes'),
    ),
    'adapter': ('tokenizer',),
    'model': ('vocab_size', 'eos_ids', 'labels', 'place'),
    'algorithm': (
      *('loss', 'model', 'optimizer', 'num_clients', 'profiles'),
      *('num_steps', 'public', 'client_models'),
      *builders.parameters(parts),
    ),
    'adversary': ('num_clients',),
    'poison': ('num_clients',),
    'privacy': (
      *('rate', 'num_clients', 'cohort_size', 'num_rounds', 'separation'),
      *('turns', 'batch_size', 'num_steps'),
    ),
    'evals.personal': ('loss', 'model'),
  },
  optional=(
    *('task', 'profiles', 'upload', 'download', 'adversary', 'aggregator'),
    *('server', 'local.schedule', 'server.schedule', 'evals.personal'),
    *('privacy', 'poison', 'public', 'system', 'memory', 'selection'),
    *('stages', 'client_models'),
  ),
  # Old runs and runs without these sections record nothing of them.
  unrecorded=(
    *('adversary', 'download', 'poison', 'privacy', 'public', 'system'),
    *('memory', 'selection', 'stages', 'client_models'),
  ),
  implied=implied,
)
