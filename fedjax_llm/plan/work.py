"""The round of a config as shapes: traced, never run.

`read` returns a `Work`; `trace` counts its operations and memory.
"""

import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import batching, data, models, tree
from fedjax_llm.devices import sharding
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families, quantised
from fedjax_llm.models.files import load
from fedjax_llm.plan import published
from fedjax_llm.plan.light import floats, light, no_network
from fedjax_llm.run import (
  builders,
  config,
  costs,
  experiment,
  guarantee,
  memory,
  selecting,
  tasks,
)
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  Cohort,
  Error,
  FederatedAlgorithm,
)


class Sizes(NamedTuple):
  """The sizes of the axes K, m, S, B, T of a round on one device."""

  clients: int
  block: int
  steps: int
  batch: int
  tokens: int

  @property
  def num_blocks(self) -> int:
    return -(-self.clients // self.block)


class Work(NamedTuple):
  """A round: its method and the shapes of all its inputs."""

  algorithm: FederatedAlgorithm
  state: Any
  cohort: Cohort
  base: Any
  sizes: Sizes
  optimizer: Any  # shapes of one client's optimizer state
  profiles: Any  # the profiles of the first clients
  model: load.LoadedModel
  light: FederatedAlgorithm  # the same method on a loss without a model
  filled: Callable[[int, int, int, int], Any]  # K, S, B, T -> full batches
  loss: Any  # of the task and the model, with the memory modes
  initial: Any  # the adapter's parameters
  privacy: Any = None  # the plan of the section `privacy`

  @property
  def arguments(self) -> int:
    """Returns the bytes of all inputs."""
    return costs.num_bytes((self.state, self.cohort, self.base))


def network(
  section: Mapping[str, Any],
  name_or_path: str = '',
  labels: Any = None,
  num_layers: int | None = None,
) -> load.LoadedModel:
  """Returns the model of a config, with shapes for weights.

  `name_or_path` names another one: a directory, a `config.json`, a hub name of
  known shapes (`published`), or ''. `num_layers` keeps the first layers.

  Raises:
    Error: the shapes of that name are not known.
  """
  section = dict(section)
  name = section.pop('name')
  if name != 'pretrained' and not name_or_path:
    build = getattr(models, name, None)
    if build is None:
      raise Error(f'model.name is {name!r}: give --model, a directory.')
    more = {} if labels is None else {'labels': labels}
    if name == 'random':  # as in training, which brings a tokenizer of bytes
      more |= {'vocab_size': 259, 'eos_ids': (258,)}
    if num_layers:
      section['num_layers'] = num_layers
    drawn: list[load.LoadedModel] = []

    def init():
      drawn.append(build(**{**more, **section}))
      return drawn[0].base

    base = jax.eval_shape(init)
    return drawn[0]._replace(base=base)
  path = name_or_path or section.pop('path', '')
  section.pop('path', None)
  read = config_of(path, labels)
  if num_layers:
    read = read._replace(
      num_layers=num_layers,
      windows=read.windows[:num_layers],
      layer_ropes=read.layer_ropes[:num_layers],
    )
  known = builders.parameters(load.assemble)
  kind = section.pop('quantisation', None)
  dtype = np.dtype(jnp.dtype(section.pop('dtype', 'float32')))
  base = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, dtype),
    config_lib.shapes(read),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  if kind not in (None, 'none'):
    base = jax.eval_shape(lambda base: quantised.base(base, kind), base)
  settings = {k: v for k, v in section.items() if k in known}
  return load.assemble(read, base, name=path, **settings)


def config_of(path: str, labels: Any = None) -> Any:
  """Returns the network's configuration, from a directory or `published`."""
  folder = pathlib.Path(path).expanduser()
  if folder.name == 'config.json':
    folder = folder.parent
  if (folder / 'config.json').is_file():
    return families.read_config(folder, labels=labels)
  fields = published.find(path)
  if fields is None:
    known = ', '.join(published.CONFIGS)
    raise Error(
      f'{path} is no directory here, and its shapes are not known: give '
      f'--model, a directory with its config.json, or one of {known}.'
    )
  with tempfile.TemporaryDirectory() as new:
    text = json.dumps(fields)
    (pathlib.Path(new) / 'config.json').write_text(text)
    return families.read_config(new, labels=labels)


def read(
  conf: Mapping[str, Any],
  *,
  model: str = '',
  num_clients: int | None = None,
  devices: int = 1,
  cohort_size: int | None = None,
  block_size: int | None = None,
  num_steps: int | None = None,
  num_layers: int | None = None,
  mesh: Any = None,
) -> Work:
  """Returns the round of a checked config as shapes.

  Sizes that depend on the texts take their largest values: rows are as long as
  `population.max_length`, every token has a loss, no step is padding.

  Args:
    conf: a config, as `config.parse` returns it.
    model: see `network`.
    num_clients: N, where the config does not set it.
    devices: the number of devices, of which `mesh_model` share a copy of the
      base; K and the result are those of one row of devices.
    cohort_size, block_size, num_steps, num_layers: instead of the config's.
    mesh: the round of this mesh, with the clients of all its rows, in place of
      that of one row; it may be abstract.

  Raises:
    Error: the number of clients is not known.
  """
  settings = config.settings(conf, SPEC)
  full: Any = config.resolved(conf, SPEC)
  build = lambda section, **more: builders.build(
    conf[section], SPEC.sections[section], **more
  )
  task = build('task') if conf.get('task') else tasks.causal_lm()
  labels = task.scores
  if task.labels is not tasks.no_labels:
    labels = full['task'].get('labels') or ('0', '1')
  loaded = network(conf['model'], model, labels, num_layers)

  sampling = full['clients']
  K = cohort_size or sampling.get('cohort_size')
  N = (
    num_clients
    or (full['partition'].get('of') or full['partition']).get('num_clients')
    or full['population'].get('max_clients')
    or K
  )
  if sampling['name'] == 'full' and cohort_size is None:
    K = N
  K = K or N  # without a size, all clients take part
  known = num_clients or full['partition'].get('num_clients')
  if conf.get('privacy') and not known:
    raise Error(
      'privacy counts with the number of clients, and the config does not set '
      'it: give --clients.'
    )
  if not K:
    raise Error(
      f'clients.name={sampling["name"]} takes all clients, and the config does '
      'not set how many there are: give --clients.'
    )
  row = full['cohort']
  S, B = num_steps or row['num_steps'], row['batch_size']
  T = full['population']['max_length']
  if isinstance(build('partition'), data.partition.Pooled):
    S, K, N = S * K, 1, 1
  sharding.check_mesh(settings.mesh_model, devices, settings.execution)
  rows = devices // settings.mesh_model
  K = -(-K // rows)
  block = block_size or settings.block_size
  if block == 'auto':
    from fedjax_llm.run import blocks

    block = blocks.rule(B * T, K)
  m = min(int(block or K), K)

  adapter = build('adapter', tokenizer=data.tokenizers.bytes())  # for shapes
  optimizer = build('local')
  words = loaded.config.vocab_size, loaded.config
  public = None
  if conf.get('public'):
    texts = batches_of(task, (1, 1, B, T), *words)
    public = tree.take(texts, 0)
  profiles: Any = ()
  if conf.get('profiles'):
    profiles = build('profiles', num_clients=N, seed=settings.seed)
  drawn: Any = profiles  # those of a cohort, with what the sampler adds
  if conf['clients']['name'] == 'tiered' and not hasattr(profiles, 'shape'):
    drawn = {**dict(profiles), 'tier': np.zeros(N, np.int32)}
  method = lambda loss, model, mesh=None: experiment.algorithm(
    conf,
    loss=loss,
    model=model,
    adapter=adapter,
    num_clients=N,
    profiles=profiles or None,
    num_layers=loaded.config.num_layers,
    public=public,
    block_size=m,
    mesh=mesh,
    execution=settings.execution,
  )
  algorithm = method(task.loss(loaded), loaded.model, mesh)
  by_row = task.loss(loaded, per_row=True)
  algorithm = selecting.scored(conf, algorithm, by_row)
  offered = S * selecting.pool(conf)
  params = jax.eval_shape(adapter.init, jax.random.key(0), loaded.base)
  state = jax.eval_shape(algorithm.init, jax.random.key(0), params)
  newcomer = jax.eval_shape(algorithm.init_client, state.params)

  def filled(K: int, S: int, B: int, T: int) -> Any:
    return batches_of(task, (K, S, B, T), *words)

  stacked = lambda x: jax.ShapeDtypeStruct((K, *x.shape), x.dtype)
  cohort = Cohort(
    ids=jax.ShapeDtypeStruct((K,), np.int32),
    batches=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), filled(K, offered, B, T)
    ),
    weight=jax.ShapeDtypeStruct((K,), np.float32),
    valid=jax.ShapeDtypeStruct((K,), bool),
    profiles=jax.tree.map(lambda x: stacked(np.asarray(x)[0]), drawn),
    states=jax.tree.map(stacked, newcomer),
  )
  if mesh is not None:  # the cohort of all rows
    every = lambda x: jax.ShapeDtypeStruct((rows * K, *x.shape[1:]), x.dtype)
    cohort = jax.tree.map(every, cohort)
  kept = jax.eval_shape(optimizer.init, floats(state.params))
  return Work(
    algorithm,
    state,
    cohort,
    _base(task, loaded),
    Sizes(K, m, S, B, T),
    kept,
    drawn,
    loaded,
    method(light(task.loss(loaded)), no_network(len(labels or ()))),
    filled,
    memory.micro_batched(
      conf, memory.spared(conf, task.loss(loaded), loaded.config.num_layers)
    ),
    params,
    guarantee.of(conf, N),
  )


def batches_of(
  task: tasks.Task,
  shape: tuple[int, int, int, int],
  vocab_size: int,
  config: config_lib.Config | None = None,
) -> Any:
  """Returns NumPy batches [K, S, B, ...] of artificial examples of length T.

  `config` is that of a network of images, whose size the examples have.

  Raises:
    Error: the task has no artificial example.
  """
  K, S, B, T = shape
  if task.example is None:
    raise Error(
      'task.name: this task has no `example(length, vocab_size)`, so the '
      'shapes of its batches are not known before a run.'
    )
  more = {}
  if 'config' in builders.parameters(task.example):
    more['config'] = config
  one = task.example(T, vocab_size, **more)
  step = batching.bounded(task.collate([one], T, 0)([[one]] * B))
  return jax.tree.map(lambda x: np.broadcast_to(x, (K, S, *x.shape)), step)


def _base(task: tasks.Task, loaded: load.LoadedModel) -> Any:
  """Returns the shapes of the base of a run, with what stands beside it."""
  if task.beside is None:
    return loaded.base
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return {**loaded.base, **jax.tree.map(shape, dict(task.beside(loaded)))}


def trace(work: Work) -> costs.Costs:
  """Returns the operations and the memory of one round of a device row."""
  program = jax.make_jaxpr(work.algorithm.round)(
    work.state, work.cohort, work.base
  )
  return costs.of(program, trips=work.sizes.steps)


def travel(work: Work) -> tuple[float, float]:
  """Returns the bytes up and down of a round, counted by the method itself.

  It runs two rounds of at most eight clients on one token, with a loss that
  needs no model, since methods may alternate uploads or differ by client.
  """
  K, S = work.sizes.clients, work.sizes.steps
  k = min(K, 8)
  algorithm = work.light
  # Any values do that are not zero and not equal.
  rng = np.random.default_rng(0)

  def fresh(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jnp.zeros(x.shape, x.dtype)

  keyed = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  state = jax.tree.map(
    lambda x: jax.random.key(0) if keyed(x) else fresh(x), work.state
  )
  if algorithm.plan is not None:  # the plan sets the downloads
    state = algorithm.plan(state)
  cohort = Cohort(
    ids=jnp.arange(k, dtype=jnp.int32),
    batches=jax.tree.map(jnp.asarray, work.filled(k, S, 1, 2)),
    weight=jnp.ones(k),
    valid=jnp.ones(k, bool),
    profiles=jax.tree.map(lambda x: np.asarray(x)[:k], work.profiles),
    states=tree.broadcast(algorithm.init_client(state.params), k),
  )
  base = jax.tree.map(lambda x: jnp.zeros((), x.dtype), work.base)
  total = np.zeros(2)
  step = jax.jit(algorithm.round)
  for _ in range(2):
    state, states, info = step(state, cohort, base)
    cohort = cohort._replace(states=states)
    for i, counts in enumerate((info.bytes_up, info.bytes_down)):
      total[i] += np.asarray(counts, np.float64).sum() / 2
  up, down = (math.ceil(x) * K / k for x in total)
  if algorithm.exchanged is None or work.algorithm.exchanged is None:
    return up, down
  # The messages within steps have the size of the real states and batches.
  params = work.state.params
  real = work.algorithm.exchanged(params, work.base, work.cohort.batches)
  run = algorithm.exchanged(params, base, cohort.batches)
  return up + K * (real[0] - run[0]), down + K * (real[1] - run[1])
