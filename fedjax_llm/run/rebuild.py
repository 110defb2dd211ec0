"""Rebuilds the result of a run from its folder.

`open` returns a `Made`: its structure comes from the config, its values from a
checkpoint. Nothing is trained, and texts are only read where names of clients
or of classes are needed.
"""

import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import clients, data, models, tree
from fedjax_llm.adapters import Dora
from fedjax_llm.models import LoadedModel, quantised
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import (
  best,
  builders,
  checkpoint,
  config,
  experiment,
  metrics,
  resume,
  staged,
  tasks,
  texts,
  versions,
  workdir,
)
from fedjax_llm.run.sections import SPEC
from fedjax_llm.run.warm import load_adapter as load_adapter
from fedjax_llm.types import Adapter, ClientState, Error, Params, ServerState


class Made(NamedTuple):
  """The model of a run, at its end or at a checkpoint.

  `params` apply to `loaded.base` as it was before the run: changes that the run
  wrote into the base are in their residuals.
  """

  config: dict[str, Any]
  loaded: LoadedModel
  task: tasks.Task
  adapter: Adapter
  params: Params
  what: str  # the owner of the parameters and their round, as text
  notes: Sequence[str] = ()  # sentences to print with it


# Allows import paths in a workdir's config.json.
TRUST = '--trust-code'


def open(
  path: str,
  *,
  client: str | None = None,
  round: int | Literal['best'] | None = None,
  trusted: bool = False,
) -> Made:
  """Reads the folder of a run; nothing in it is changed.

  Args:
    path: the workdir.
    client: the name of a client, for its personal model; None: the model that
      all clients are served.
    round: the number of a round with a kept checkpoint; 'best': the round with
      the best held-out loss (see `best`); None: the newest undamaged one.
    trusted: True allows import paths in the workdir's config.json, which run
      code.

  Raises:
    Error: the folder holds no run, a run that is at work, or one without that
      checkpoint; the client is not in this run, or the method has no personal
      models; config.json names a function outside the project.
  """
  file = str(pathlib.Path(path) / 'config.json')
  with builders.confined(file, TRUST, trusted):
    return _open(path, client, round)


def _tokenizer(conf: Any, loaded: LoadedModel) -> data.tokenizers.Tokenizer:
  """Returns the tokenizer of an adapter; those without a text read no file."""
  if conf['adapter'].get('text') is None:
    return data.tokenizers.bytes()
  return texts.tokenizer_of(loaded)


def _open(
  path: str, client: str | None, round: int | Literal['best'] | None
) -> Made:
  folder = pathlib.Path(path)
  raw = read_config(folder)
  room = workdir.open(path, raw)
  conf, _ = config.override(
    workdir.settings_of(raw), [], SPEC, str(folder / 'config.json')
  )
  build = lambda section, **injected: builders.build(
    conf[section], SPEC.sections[section], **injected
  )
  if not any(x.is_dir() for x in (room.checkpoints, room.adapter)):
    raise Error(f'{path}: this run has written no checkpoint yet.')
  room.hold()  # a run at work prunes its checkpoints

  task = build('task') if conf.get('task') else tasks.causal_lm()
  # The number and names of clients, and the names of classes, are in the texts.
  counts = client is not None or experiment.counts_clients(conf)
  records = build('data') if counts or conf.get('task') else []
  if records:
    records = staged.records(conf, records, SPEC.sections['data'])
  labels = task.labels(records)
  loaded = texts.model(build, labels or task.scores)
  adapter: Adapter = build('adapter', tokenizer=_tokenizer(conf, loaded))
  seed = conf.get('seed', 0)
  names: tuple[str, ...] = ('all',)
  digest = None
  if counts:
    population = texts.population(
      build,
      task=task,
      records=records,
      labels=labels,
      tokenizer=texts.tokenizer_of(loaded),
      seed=seed,
    )
    names, _ = data.population.trainers(population)
    digest = data.population.digest(population)

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
  recipe = experiment.recipe_of(conf)
  if client is not None and 'client_models' in builders.parameters(recipe):
    raise Error(
      f'--client {client}: the models of the clients of '
      f'{conf["algorithm"]["name"]} stay in the states of the run, and only '
      'the one that is served is opened: leave --client out.'
    )
  if client is not None and private is None:
    raise Error(
      f'--client {client}: {conf["algorithm"]["name"]} keeps nothing of its '
      'clients apart; all clients are served the same model.'
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
  if not room.checkpoints.is_dir() and round is not None:
    raise Error(f'--round {round}: {path} has no checkpoints any more.')
  if not room.checkpoints.is_dir():
    params, notes = _finished(room, loaded), []
    return Made(
      conf, loaded, task, adapter, params, 'the adapter of the end', notes
    )
  saver = checkpoint.open(room.checkpoints, read_only=True, conf=conf)
  number = _round_of(folder, conf, round, saver.rounds())

  def open_store(at: int, begins: bool) -> clients.store.Store:
    if client is None:
      return clients.store.open(room.states, ClientState(), at_round=at)
    # A client that has never trained has the initial state.
    newcomer = algorithm.init_client(start().params)
    return versions.open_store(
      room.states, newcomer, conf, at_round=at, read_only=True, begins=begins
    )

  def check(restored: checkpoint.Restored) -> None:
    if number is not None and restored.round != number:
      raise Error('\n'.join(restored.notices))
    # The index of a client's name is the index of its state.
    if client is not None and restored.meta.get('data', digest) != digest:
      raise Error(
        f'{path} holds a run on other texts or clients than {file_of(conf)} '
        f'has now: which model is that of {client} is not known.'
      )

  whole, store = resume.newest(saver, shapes, open_store, check, up_to=number)
  if whole is None:
    raise Error(f'{path}: this run has written no checkpoint yet.')
  state, notes, what = whole.state, list(whole.notices), None
  if client is not None:
    place = names.index(client)
    what = jax.tree.map(jnp.asarray, tree.take(store.gather([place]), 0))
    if place not in store.seen():
      notes.append(f'{client}: no round has trained this client yet.')
  elif private is not None:
    notes.append(
      'Only what clients share is here: --client NAME adds what one keeps.'
    )
  params = algorithm.personal(state.params, what)
  of = f'client {client}' if client is not None else 'what everybody is served'
  description = f'{of} after round {whole.round}'
  return Made(conf, loaded, task, adapter, params, description, notes)


def _round_of(
  folder: pathlib.Path,
  conf: Mapping[str, Any],
  round: int | Literal['best'] | None,
  kept: Sequence[int],
) -> int | None:
  """Returns the number of the selected round; Error if it is not kept."""
  number = round
  if round == 'best':
    records = metrics.read(str(folder / 'metrics.jsonl'))
    by = (conf.get('evals') or {}).get('best_by')
    number = best.best(records, by)
    if number is None:
      raise Error(f'--round best: {folder} has no record of a test.')
  if number is not None and number not in kept:
    some = ', '.join(map(str, kept)) or 'no round'
    of = f'best is round {number}, which' if round == 'best' else round
    raise Error(
      f'--round {of} has no checkpoint any more; those of {some} are kept '
      '(evals.keep_best and keep_checkpoints say which are).'
    )
  return number  # type: ignore


def file_of(conf: Mapping[str, Any]) -> str:
  """Returns the source of a config's texts, as text.

  >>> file_of({'data': {'name': 'jsonl', 'path': 'a.jsonl'}})
  'a.jsonl'
  """
  section = conf['data']
  return str(section.get('path') or section.get('dataset') or section['name'])


def read_config(folder: pathlib.Path) -> Any:
  """Returns the content of a run's config.json; Error if there is none."""
  file = folder / 'config.json'
  if not file.is_file():
    what = 'holds no run' if folder.is_dir() else 'is no folder'
    raise Error(f'--workdir {folder} {what}: there is no config.json in it.')
  try:
    content = json.loads(file.read_text())
  except (ValueError, RecursionError) as error:
    raise Error(f'{file} is damaged ({error}).') from error
  if not isinstance(content, Mapping):
    raise Error(f'{file} is damaged (it holds no object).')
  return versions.translated(content)


def _finished(room: workdir.Workdir, loaded: LoadedModel) -> Params:
  """Returns the adapter that a finished run wrote, for the original base."""
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
