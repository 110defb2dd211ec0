"""What a run made, from its folder: the structure by its config, the values
from its newest checkpoint. Nothing is trained, and texts are only read where
names of clients or of classes are needed.
"""

import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import (
  builders,
  checkpoint,
  clients,
  config,
  data,
  experiment,
  models,
  tasks,
  tree,
  workdir,
)
from fedjax_llm.adapters import Dora, peft
from fedjax_llm.models import LoadedModel, families, quantised, tenants
from fedjax_llm.sections import SPEC
from fedjax_llm.types import (
  Adapter,
  Error,
  LowRank,
  Params,
  ServerState,
)


class Made(NamedTuple):
  """What is served after a run, or so far.

  `params` change `loaded.base`, as it was before the run: what went into the
  base in the meantime is in their residuals.
  """

  config: dict[str, Any]
  loaded: LoadedModel
  task: tasks.Task
  params: Params
  what: str  # whose, and when
  notes: Sequence[str] = ()  # what else is to be said of it


def open(path: str, *, client: str | None = None) -> Made:
  """Reads the folder of a run.

  What an interrupted round left behind is removed, as when the run goes on.

  Args:
    path: the workdir.
    client: whose model; None: what everybody is served.

  Raises:
    Error: no folder of a run, a run at work, one without any checkpoint; a
      client that is not of this run, or of a method that keeps nothing of its
      clients apart.
  """
  folder = pathlib.Path(path)
  raw = read_config(folder)
  room = workdir.open(path, raw)
  conf, _ = config.override(raw, [], SPEC, str(folder / 'config.json'))
  build = lambda section, **injected: builders.build(
    conf[section], SPEC.sections[section], **injected
  )
  if not any(x.is_dir() for x in (room.checkpoints, room.adapter)):
    raise Error(f'{path}: this run has written no checkpoint yet.')
  room.take()  # a run at work prunes its checkpoints

  task = build('task') if conf.get('task') else tasks.causal_lm()
  recipe = builders.resolve_builder(
    'algorithm', conf['algorithm']['name'], SPEC.sections['algorithm']
  )
  # The names of clients, their number, and those of classes are in the texts.
  counts = client is not None or 'num_clients' in builders.parameters(recipe)
  records = build('data') if counts or conf.get('task') else []
  labels = task.labels(records)
  tokenizer = data.tokenizers.bytes()
  loaded: LoadedModel = build(
    'model',
    vocab_size=tokenizer.vocab_size,
    eos_ids=(tokenizer.eos_id,),
    labels=labels,
  )
  adapter: Adapter = build('adapter')
  seed = conf.get('seed', 0)
  names: tuple[str, ...] = ('all',)
  if counts and conf['algorithm']['name'] != 'centralised':
    if loaded.directory is not None:
      tokenizer = data.tokenizers.pretrained(str(loaded.directory))
    names = build(
      'population',
      records=records,
      tokenizer=tokenizer,
      partition=build('partition'),
      labels=labels,
      seed=seed,
    ).names

  algorithm = experiment.algorithm(
    conf,
    loss=None,  # nothing is trained
    model=None,
    adapter=adapter,
    num_clients=len(names),
    profiles=build('profiles', num_clients=len(names), seed=seed)
    if counts and conf.get('profiles')
    else None,
  )
  adapter_key, round_key = jax.random.split(jax.random.key(seed))

  def start() -> ServerState:
    return algorithm.init(round_key, adapter.init(adapter_key, loaded.base))

  shapes = jax.eval_shape(start)
  private = jax.eval_shape(algorithm.init_client, shapes.params).private
  if client is not None and private is None:
    raise Error(
      f'--client {client}: {conf["algorithm"]["name"]} keeps nothing of its '
      'clients apart, everybody is served the same.'
    )
  if client is not None and client not in names:
    near = difflib.get_close_matches(client, names, 3, 0.3) or names[:3]
    raise Error(
      f'--client {client} is none of the {len(names)} clients that train, '
      f'such as {", ".join(near)}.'
    )

  if not room.checkpoints.is_dir() and client is not None:
    raise Error(
      f'{path} has no checkpoints any more, which hold what is of {client}.'
    )
  if not room.checkpoints.is_dir():
    params, notes = _finished(room, loaded), []
    return Made(conf, loaded, task, params, 'the adapter of the end', notes)
  found = checkpoint.open(room.checkpoints).restore(shapes)
  if found is None:
    raise Error(f'{path}: this run has written no checkpoint yet.')
  state, notes, what = found.state, list(found.notices), None
  if client is not None:
    # A client that was never seen has what the run began with.
    newcomer = algorithm.init_client(start().params)
    store = clients.store.open(room.states, newcomer, at_round=found.round)
    number = names.index(client)
    what = jax.tree.map(jnp.asarray, tree.take(store.gather([number]), 0))
    if number not in store.seen():
      notes.append(f'{client}: no round has trained this client yet.')
  elif private is not None:
    notes.append(
      'Only what clients share is here: --client NAME adds what one keeps.'
    )
  params = algorithm.personal(state.params, what)
  of = f'client {client}' if client is not None else 'what everybody is served'
  told = f'{of} after round {found.round}'
  return Made(conf, loaded, task, params, told, notes)


def read_config(folder: pathlib.Path) -> Any:
  """What a run wrote into its config.json; Error where there is none."""
  file = folder / 'config.json'
  if not file.is_file():
    what = 'holds no run' if folder.is_dir() else 'is no folder'
    raise Error(f'--workdir {folder} {what}: there is no config.json in it.')
  try:
    found = json.loads(file.read_text())
  except ValueError as error:
    raise Error(f'{file} is damaged ({error}).') from error
  if not isinstance(found, Mapping):
    raise Error(f'{file} is damaged (it holds no object).')
  return found


def _finished(room: workdir.Workdir, loaded: LoadedModel) -> Params:
  """The adapter that a finished run wrote, at the base as it was before."""
  params = load_adapter(room.adapter, loaded)
  if not room.base.is_dir():
    return params
  base = models.pretrained(room.base).base

  def node(leaf: Any, new: Any, old: Any) -> Any:
    if isinstance(leaf, Mapping):
      return {name: node(leaf[name], new[name], old[name]) for name in leaf}
    if isinstance(leaf, Dora):
      return leaf._replace(direction=node(leaf.direction, new, old))
    if not isinstance(leaf, LowRank):
      return leaf
    moved = new['kernel'] - quantised.dense(old['kernel'], jnp.float32)
    return leaf._replace(residual=moved) if jnp.any(moved) else leaf

  return node(params, base, loaded.base)


_EMBEDDING = ('embed_tokens', 'embedding')


def _saved_whole(
  tensors: Mapping[str, np.ndarray], loaded: LoadedModel
) -> Mapping[tuple[str, ...], np.ndarray]:
  """Leaves of what an adapter saves whole, where that means the same here."""
  leaves = families.from_checkpoint(tensors, loaded.config)
  if loaded.config.tied and _EMBEDDING in leaves:
    raise Error(
      f'it saves the embedding whole ({min(tensors)}), which is also the '
      'output head of this model (tie_word_embeddings): PEFT changes the '
      'embedding alone, which a tied model cannot do.'
    )
  return leaves


def _is_of_base(tensors: Mapping[str, np.ndarray], loaded: LoadedModel) -> bool:
  """Whether these are an embedding or an output head as the base has them."""
  again = families.copies(loaded.config)
  named = {t.path: t.name for t in families.tensors(loaded.config)}
  table = {again.get(name, name): value for name, value in tensors.items()}
  if not set(table) <= {
    named.get(path) for path in (_EMBEDDING, ('lm_head', 'kernel'))
  }:
    return False
  for path, value in families.from_checkpoint(table, loaded.config).items():
    leaf: Any = loaded.base
    for name in path:
      leaf = leaf[name]
    if not np.array_equal(
      np.asarray(leaf, np.float32), np.asarray(value, np.float32)
    ):
      raise Error(
        f'{min(tensors)} beside the adapter differs from the base, which '
        'modules_to_save does not say.'
      )
  return True


def load_adapter(directory: pathlib.Path, loaded: LoadedModel) -> Params:
  """A PEFT directory as an adapter of this model."""
  if not directory.is_dir():
    raise Error(f'{directory}: there is no such directory.')
  if not (directory / peft.CONFIG).is_file():
    raise Error(
      f'{directory} has no {peft.CONFIG}, so it is no adapter directory.'
    )
  params = peft.load(
    directory,
    path_of=lambda name: families.our_paths(name, loaded.config),
    fused=lambda path: families.fused_rows(loaded.config, path),
    from_tensors=lambda found: _saved_whole(found, loaded),
    of_base=lambda found: _is_of_base(found, loaded),
    num_layers=loaded.config.num_layers,
  )
  tenants.check(loaded.base, params, str(directory))
  return params
