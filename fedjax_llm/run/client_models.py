"""The section `client_models` of a config: clients whose models differ.

`build` loads the models, encodes the clients' texts with their tokenizers and
aligns the public texts; `personal` is the evaluator of the clients' models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import clients, data, evals, models, tree
from fedjax_llm.data import alignment
from fedjax_llm.local.knowledge import Alignment
from fedjax_llm.recipes.two_models.fed_mkt import MODELS, Group
from fedjax_llm.run import builders, client_texts, public, tasks, texts
from fedjax_llm.server.exchange import client_params
from fedjax_llm.types import Batch, Error, Evaluator, Population

_TOKENIZERS = {
  'bytes': data.tokenizers.bytes,
  'pairs': data.tokenizers.pairs,
}


class Groups(NamedTuple):
  """The clients' models of a run, and all that is in their tokens."""

  groups: list[Group]  # for the recipe
  loaded: list[models.LoadedModel]
  bases: list[dict[str, Any]]  # `base[MODELS]`
  of_client: np.ndarray  # [N] int32, the group of each client
  public: Batch  # [M, B, T], in the server's tokens
  owned: list[list[Any]]  # [N] examples, each in the client's tokens
  heldout: list[list[Any]]  # [N]
  pad_ids: list[int]  # [groups]
  width: int  # columns of the longest example of any client


class Section(NamedTuple):
  """The fields of the section, checked."""

  models: Sequence[Mapping[str, Any]]
  shares: Sequence[float] | None


def client_models(
  models: Sequence[Mapping[str, Any]],
  shares: Sequence[float] | None = None,
) -> Section:
  """Returns the models of the clients, one for each group of them.

  Args:
    models: sections as `model`; one drawn at random also takes `tokenizer`,
      'bytes' or 'pairs'.
    shares: relative weights with which a client's group is drawn, of any sum;
      equal if None.

  Raises:
    Error: no model, an entry that is no section, shares of another number.

  >>> client_models(({'name': 'random'},)).shares
  """
  if not models:
    raise Error('client_models.models is empty: it takes a model a group.')
  for i, one in enumerate(models):
    if not isinstance(one, Mapping) or 'name' not in one:
      raise Error(
        f'client_models.models[{i}] must be dict(name=...), not {one!r}.'
      )
  if shares is not None and len(shares) != len(models):
    raise Error(
      f'client_models.shares has {len(shares)} entries, and there are '
      f'{len(models)} models: it takes one share a model.'
    )
  return Section(models, shares)


def build(
  conf: Mapping[str, Any],
  make: Callable[..., Any],
  *,
  settings: Mapping[str, Any],
  task: tasks.Task,
  records: Any,
  population: Population,
  tokenizer: data.tokenizers.Tokenizer,
  key: jax.Array,
  seed: int,
  trained: Mapping[int, Sequence[data.Record]],
) -> Groups:
  """Builds the clients' models of a config, and their texts.

  Args:
    conf: a checked config.
    make: builds one of its sections.
    settings: the resolved section `population`.
    records: of the section `data`.
    population: of the server's tokenizer, whose clients all have a group.
    tokenizer: of the server's model.
    key: of the adapters.
    seed: of the draw of groups, and of the public texts.
    trained: the records that each client trains on (`client_texts.watched`).

  Raises:
    Error: sections that do not go with several tokenizers, no public texts, a
      client without texts in its tokens.
  """
  for name, why in (
    ('selection', 'scores texts by the states of one network'),
    ('task', 'exchanges predictions of tokens'),
    ('privacy', 'sends predictions, which no noise covers'),
  ):
    if conf.get(name) and builders.named(conf[name]) != 'causal_lm':
      raise Error(
        f'{name}: a run with client_models {why}: leave the section out.'
      )
  sampler = builders.named(conf.get('clients'))
  if sampler in ('buffered', 'compass'):
    raise Error(
      f'clients.name is {sampler!r}, whose clients start in earlier rounds: a '
      'run with client_models keeps no earlier versions; take another sampler.'
    )
  if population.pooled:
    raise Error(
      "partition.name is 'pooled', which leaves one client: a run with "
      'client_models has several.'
    )
  if not conf.get('public'):
    raise Error(
      'client_models: models of several architectures learn from each other on '
      'public texts: add the section public, such as public.name=packaged.'
    )
  section: Section = make('client_models')
  num = len(section.models)
  drawn = clients.profiles.ranks(
    range(1, num + 1),
    section.shares,
    num_clients=len(population.names),
    seed=seed,
  )
  of_client = drawn['rank'] - 1
  loaded = [_model(i, one) for i, one in enumerate(section.models)]
  held = client_texts.held(
    population, records, make('partition')(records, seed), trained,
    [tokenizer, *(other for _, other in loaded)], of_client, settings, task,
  )  # fmt: skip
  longest = client_texts.longest(
    held, [model.config for model, _ in loaded], of_client, task
  )
  tokenizers = [tokenizer, *(one for _, one in loaded)]
  batches = public.in_common(
    make('public'), settings, tokenizers, task=task,
    batch_size=conf['cohort']['batch_size'], seed=seed,
  )  # fmt: skip
  groups, bases = [], []
  for i, (model, _) in enumerate(loaded):
    adapter = make('adapter', tokenizer=tokenizers[1 + i])
    start = adapter.init(jax.random.fold_in(key, i), model.base)
    shapes = jax.eval_shape(lambda start=start: start)
    up, down = aligned(
      batches[0], batches[1 + i], tokenizers[0], tokenizers[1 + i]
    )
    groups.append(
      Group(task.loss(model), model.model, shapes, batches[1 + i], up, down)
    )
    bases.append({'base': model.base, 'start': start})
  return Groups(
    groups=groups,
    loaded=[model for model, _ in loaded],
    bases=bases,
    of_client=of_client,
    public=batches[0],
    owned=held.owned,
    heldout=held.heldout,
    pad_ids=[one.pad_id for _, one in loaded],
    width=-(-longest // 8) * 8,
  )


def aligned(
  here: Batch,
  there: Batch,
  mine: data.tokenizers.Tokenizer,
  theirs: data.tokenizers.Tokenizer,
) -> tuple[Alignment, Alignment]:
  """Returns how there is written for here, and here for there.

  Args:
    here, there: the same texts [M, B, T] in the tokens of `mine` and `theirs`.

  >>> one = data.tokenizers.bytes()
  >>> other = data.tokenizers.pairs()
  >>> texts = public.in_common(
  ...   [data.Record(text='then')], {'template': 'plain'}, [one, other],
  ...   task=tasks.causal_lm(), batch_size=1, seed=0)
  >>> up, down = aligned(*texts, one, other)
  >>> up.places.shape, down.places.shape, down.table.shape
  ((1, 1, 8), (1, 1, 8), (259,))
  """
  words = alignment.pieces(mine), alignment.pieces(theirs)

  def one_way(to: Batch, other: Batch, order: int) -> Alignment:
    pieces = words if order == 0 else (words[1], words[0])
    table = alignment.vocabulary(pieces[1], pieces[0])
    places = np.full(to.tokens.shape, alignment.NONE, np.int32)
    for at in np.ndindex(to.tokens.shape[:2]):
      ids = [batch.tokens[at][batch.segments[at] > 0] for batch in (to, other)]
      row = alignment.matches(ids[0].tolist(), ids[1].tolist(), pieces, table)
      places[at][: len(row)] = row
    return Alignment(places, table)

  return one_way(here, there, 0), one_way(there, here, 1)


def personal(built: Any, *, per_client: int = 4) -> Evaluator:
  """Returns the evaluator of each client's own model on its held-out texts.

  'evals/client_models/G/loss' is the mean over all tokens of group G, from 0,
  in nats a token of the group's tokenizer: those of groups with different
  tokenizers are not comparable.

  Args:
    built: an `experiment.Experiment`.
    per_client: held-out texts of a client.

  Raises:
    Error: a run without the section client_models, per_client below one.
  """
  if per_client < 1:
    raise Error(
      f'evals.evaluators: client_models: per_client={per_client} must be at '
      'least 1.'
    )
  small: Groups | None = built.small
  if small is None:
    raise Error(
      'evals.evaluators: client_models evaluates the models of the section '
      'client_models: add it, or leave the evaluator out.'
    )
  losses = [
    evals.likelihood(built.task.loss(model, per_row=True))
    for model in small.loaded
  ]

  def evaluate(base, params, store, key) -> dict[str, float]:
    del params
    sums = np.zeros((len(losses), 2))
    for client, group in enumerate(small.of_client):
      mine = small.heldout[client][:per_client]
      if not mine:
        continue
      rows = clients.cohorts.rows(
        [mine],
        batch_size=per_client,
        max_length=built.width,
        pad_id=small.pad_ids[group],
        collate=built.task.collate,
        length=built.task.length,
      )
      kept = tree.take(store.gather([client]), 0).local
      own = base[MODELS][group]
      report = losses[group](
        own['base'],
        client_params(own['start'], kept),
        [(one.batches, one.owners) for one in rows],
        key,
      )
      seen = report.clients['heldout']
      sums[group] += float(seen.total.sum()), float(seen.count.sum())
    return {
      f'evals/client_models/{i}/loss': float(total / count)
      for i, (total, count) in enumerate(sums)
      if count
    }

  return evaluate


def _model(
  number: int, section: Mapping[str, Any]
) -> tuple[models.LoadedModel, data.tokenizers.Tokenizer]:
  """Returns a group's model and its tokenizer."""
  label = f'client_models.models[{number}]'
  section = dict(builders.plain_dicts(section))
  name = section.pop('tokenizer', None)
  builder = builders.resolve_builder(
    label, section['name'], models, f'{label}.name'
  )
  fields = {k: v for k, v in section.items() if k != 'name'}
  injected = {'vocab_size', 'eos_ids', 'labels', 'place'}
  builders.check(fields, builder, injected, lambda field: f'{label}.{field}')
  tokenizer = builders.resolve_builder(
    label, name or 'bytes', _TOKENIZERS, f'{label}.tokenizer'
  )()
  loaded = builders.build(
    section,
    models,
    vocab_size=tokenizer.vocab_size,
    eos_ids=(tokenizer.eos_id,),
    labels=None,
    place=None,
  )
  if loaded.directory is None:
    return loaded, tokenizer
  if name is not None:
    raise Error(
      f'{label}.tokenizer is {name!r}, and {loaded.name} brings its own '
      'tokenizer: leave the field out.'
    )
  return loaded, texts.tokenizer_of(loaded)
