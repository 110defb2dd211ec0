"""What the config of a run may say: its sections, in the order of the flow."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import optax

from fedjax_llm import (
  adapters,
  aggregators,
  builders,
  clients,
  config,
  data,
  evals,
  hosts,
  local,
  models,
  rates,
  recipes,
  server,
  tasks,
  trackers,
  uploads,
  warm,
)
from fedjax_llm.local import optimizers


class Settings(NamedTuple):
  """The scalars at the top of a config."""

  num_rounds: int
  seed: int = 0
  # Clients in one vmap; None: the whole cohort; 'auto': by speed and memory.
  block_size: int | Literal['auto'] | None = None
  widths: tuple[int, ...] = ()  # that a block's rows may have, against padding
  mesh_model: int = 1  # devices that share a copy of the base, of all there are
  execution: str = 'shard_map'  # or 'pmap', where mesh_model is 1
  # As which JAX sees a CPU; one a core is fastest, and copies the base to each.
  cpu_devices: int = 1
  checkpoint_every: int = 1
  keep_checkpoints: int = 2
  # Of several processes; all: each its share, where all see the workdir.
  checkpoint_writers: Literal['first', 'all'] = 'first'
  # Where compiled programs are kept for the next start; none: nowhere.
  compilation_cache: str | None = 'auto'


class Evals(NamedTuple):
  """The section `evals`: what is tested, and when."""

  every: int = 1  # rounds; before the first and after the last in any case
  batch_size: int = 8
  per_client: int | None = None  # held-out examples a client; None: all
  common: int = 32  # examples of everybody's, for methods with private parts
  buckets: tuple[int, ...] = (32, 64, 128)  # row widths, against padding
  samples: int = 2  # replies shown before and after
  sample_tokens: int = 48
  # The checkpoint of the best round is kept beside the newest (`best`).
  keep_best: bool = False
  patience: int | None = None  # tests without a better one that end the run
  best_by: str | None = None  # 'heldout/accuracy'; None: the held-out loss
  # How clients are tested beside what they are served: `evals.views`.
  personal: Mapping[str, Any] | None = None


def parts(
  upload: Any = None,
  aggregator: Any = None,
  server: Any = None,
  block_size: int | None = None,
  widths: tuple[int, ...] = (),
  fold: Any = None,
  mesh: Any = None,
  execution: str = 'shard_map',
) -> None:
  """What the program hands to `fed_opt` through a recipe: its signature."""


def without(namespace: Any, *names: str) -> dict[str, Any]:
  known = builders.names(namespace)
  return {name: known[name] for name in known if name not in names}


SPEC = config.Spec(
  settings=Settings,
  sections={
    'task': tasks,
    'data': data.sources,
    'partition': data.partition,
    'population': data.population.build,
    'clients': clients.sampling,
    'profiles': clients.profiles,
    'cohort': clients.cohorts.cohorts,
    'model': models,
    'adapter': {
      name: warm.startable(builder)
      for name, builder in builders.names(adapters).items()
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
    'upload': without(uploads, 'from_optax'),
    'aggregator': without(
      aggregators, 'as_stack', 'control_variates', 'from_rule'
    ),
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
    ),
    'clients': ('num_clients', 'sizes', 'seed'),
    'profiles': ('num_clients', 'seed'),
    'cohort': (
      *('examples', 'max_length', 'pad_id', 'seed', 'profiles'),
      *('collate', 'length'),
    ),
    'model': ('vocab_size', 'eos_ids', 'labels', 'place'),
    'algorithm': (
      *('loss', 'model', 'optimizer', 'num_clients', 'profiles'),
      *builders.parameters(parts),
    ),
    'evals.personal': ('loss', 'model'),
  },
  optional=(
    *('task', 'profiles', 'upload', 'aggregator', 'server'),
    *('local.schedule', 'server.schedule', 'evals.personal'),
  ),
)
