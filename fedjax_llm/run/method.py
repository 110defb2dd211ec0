"""Builds the method of a config: its recipe with the parts that it names."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fedjax_llm import local, models, recipes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.run import (
  builders,
  guarantee,
  memory,
  sections,
  tasks,
)
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  Adapter,
  Error,
  FederatedAlgorithm,
  Model,
  Params,
)

# What a builder of one's own must return.
_KINDS = {
  'task': tasks.Task,
  'model': models.LoadedModel,
  'adapter': Adapter,
  'algorithm': FederatedAlgorithm,
  'local': LocalOptimizer,
}


def make_part(conf: Mapping[str, Any], section: str, **injected: Any) -> Any:
  """Returns what the builder of a section makes of its fields."""
  result = builders.build(conf[section], SPEC.sections[section], **injected)
  return of_kind(section, conf[section], result)


def of_kind(section: str, fields: Mapping[str, Any], result: Any) -> Any:
  """Returns what a builder made; an `Error` if it is of another kind."""
  kind = _KINDS.get(section)
  if kind is not None and not isinstance(result, kind):
    raise Error(
      f'{section}.name: {fields["name"]} returned a {type(result).__name__}; '
      f'it must return a {kind.__name__}.'
    )
  return result


def algorithm(
  conf: Mapping[str, Any],
  *,
  loss: Any,
  model: Model | None,
  adapter: Adapter,
  num_clients: int,
  profiles: Mapping[str, Any] | None = None,
  num_layers: int | None = None,
  public: Any = None,
  client_models: Any = None,
  **others: Any,
) -> FederatedAlgorithm:
  """Builds the recipe of a config with the parts that the config names.

  `loss` and `model` may be None where the result only reads a trained state.
  `num_layers` is L of the model (`memory.spared`), `public` batches of the
  section of that name, `client_models` the groups of that section.

  Raises:
    Error: a part is refused; the section `public` or `client_models` with a
      method that has no use of it.
  """
  make = functools.partial(make_part, conf)
  parts = ('upload', 'download', 'aggregator', 'server')
  if loss is not None:
    loss = memory.spared(conf, loss, num_layers)
    loss = local.dropout(loss, adapter.peft.get('lora_dropout', 0.0))
    loss = memory.micro_batched(conf, loss)
  recipe, name = recipe_of(conf), conf['algorithm']['name']
  if conf.get('public') and 'public' not in builders.parameters(recipe):
    raise Error(
      f'public: algorithm.name={name} does not train its server on public '
      'texts: leave the section public out.'
    )
  if conf.get('client_models') and (
    'client_models' not in builders.parameters(recipe)
  ):
    raise Error(
      f'client_models: the clients of algorithm.name={name} have the model of '
      'the section model: leave the section client_models out.'
    )
  _check_swayed(conf, name)
  if builders.open_ended(recipe):  # one's own, which hands its parts on
    recipe = builders.onward(recipe, sections.parts)
  if conf.get('adversary'):
    others['adversary'] = make('adversary', num_clients=num_clients)
  pieces = dict(
    loss=loss,
    model=model,
    optimizer=make('local'),
    num_clients=num_clients,
    num_steps=conf['cohort']['num_steps'],
    profiles=profiles,
    public=public,
    client_models=client_models,
    fold=adapter.fold,
    **others,
    **{part: make(part) for part in parts if conf.get(part)},
  )
  pieces, private = guarantee.applied(conf, num_clients, pieces)
  result = guarantee.built(
    guarantee.part(conf),
    name,
    builders.build,
    {**conf['algorithm'], 'name': recipe},
    SPEC.sections['algorithm'],
    **pieces,
  )
  result = of_kind('algorithm', conf['algorithm'], result)
  if private is None:
    return result
  return guarantee.watched(result, name, guarantee.mechanism(conf), private)


def _check_swayed(conf: Mapping[str, Any], name: Any) -> None:
  """Raises `Error` for an adapter of which the method trains nothing."""
  if builders.named(conf.get('adapter')) != 'swayed':
    return
  needs = recipes.NEEDS.get(name) if isinstance(name, str) else None
  if needs is not None and builders.named(needs.get('adapter')) != 'swayed':
    raise Error(
      f'adapter.name=swayed has no parameter that algorithm.name={name} '
      'trains: use algorithm.name=fed_kseed_base, or another adapter.'
    )


def recipe_of(conf: Mapping[str, Any]) -> Callable[..., FederatedAlgorithm]:
  """Returns the recipe that the section `algorithm` names."""
  return builders.resolve_builder(
    'algorithm', conf['algorithm']['name'], SPEC.sections['algorithm']
  )


def counts_clients(conf: Mapping[str, Any]) -> bool:
  """Returns True if the method is built for a number of clients.

  >>> conf = {'algorithm': {'name': 'scaffold'}}
  >>> counts_clients(conf), counts_clients({'algorithm': {'name': 'fed_avg'}})
  (True, False)
  """
  return 'num_clients' in builders.parameters(recipe_of(conf))


def keeps_private(algorithm: FederatedAlgorithm, params: Params) -> bool:
  """Returns True if clients keep parts of the model private.

  >>> from fedjax_llm import local, recipes
  >>> start, sgd = {'w': jax.numpy.ones(2)}, local.optimizer('sgd')
  >>> methods = recipes.fed_avg(None, sgd), recipes.ditto(None, sgd)
  >>> [keeps_private(method, start) for method in methods]
  [False, True]
  """

  def seen_by_nobody(start):  # of what the method makes of an adapter
    return algorithm.init_client(
      algorithm.init(jax.random.key(0), start).params
    )

  newcomer = jax.eval_shape(seen_by_nobody, params)
  return newcomer.private is not None
