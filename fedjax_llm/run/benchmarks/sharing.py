"""Parts that the evaluators of tasks have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.evals import choosing, intervals
from fedjax_llm.types import Error, FederatedAlgorithm


def served_model(
  built: Any, algorithm: FederatedAlgorithm, base: Any, params: Any
) -> tuple[Any, Any]:
  """Returns the base and parameters that are served, with changes folded in."""
  return built.adapter.fold(base, algorithm.personal(params, None))


def own_models(
  built: Any, algorithm: FederatedAlgorithm, base: Any, params: Any, store: Any
) -> Mapping[str, Callable[[], tuple[Any, Any]]]:
  """Returns builders of the models of clients that have trained, by name."""

  def model(place: int) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
      state = tree.take(store.gather([place]), 0)
      state = jax.tree.map(jnp.asarray, state)
      return built.adapter.fold(base, algorithm.personal(params, state))

    return make

  return {built.population.names[i]: model(i) for i in store.seen()}


def _groups(built: Any, clients: Sequence[str | None]) -> dict[str, np.ndarray]:
  """Returns the places of examples by group: seen, unseen, or all together."""
  people = built.population
  fresh = np.array([c is not None and c in people.new_names for c in clients])
  known = np.array([c is not None and c in people.names for c in clients])
  if not fresh.any():
    return {'': np.arange(len(clients))}
  groups = {'seen/': known, 'unseen/': fresh, 'others/': ~(fresh | known)}
  return {k: np.flatnonzero(x) for k, x in groups.items() if x.any()}


def summary(
  built: Any,
  title: str,
  scores: intervals.Scores,
  clients: Sequence[str | None],
  num_resamples: int,
) -> dict[str, Any]:
  """Returns the metrics of each group of examples."""
  people = built.population
  names, owners = choosing.owners(clients, people.names, people.new_names)
  metrics: dict[str, Any] = {}
  for group, places in _groups(built, clients).items():
    part = scores._replace(statistics=scores.statistics[places])
    metrics |= intervals.summarised(
      f'{title}/{group}'.rstrip('/'),
      part,
      owners[places],
      names,
      num_resamples=num_resamples,
      seed=built.settings.seed,
    )
  return metrics


def personal(
  built: Any,
  title: str,
  own: Mapping[str, Callable[[], tuple[Any, Any]]],
  clients: Sequence[str | None],
  scores: Callable[..., intervals.Scores],
  num_resamples: int,
) -> dict[str, Any]:
  """Returns the metrics of clients' own models on their own examples."""
  parts, whose = [], []
  for name, model in own.items():
    places = [i for i, client in enumerate(clients) if client == name]
    if places:
      parts.append(scores(places, *model()))
      whose += [name] * len(places)
  if not parts:
    return {}
  together = parts[0]._replace(
    statistics=np.concatenate([part.statistics for part in parts])
  )
  return summary(built, f'{title}/personal', together, whose, num_resamples)


def check(title: str, num_resamples: int, **least: int | None) -> None:
  if not title or '/' in title:
    raise Error(f'evals.evaluators: title is {title!r}; it must be a word.')
  for name, value in {'num_resamples': num_resamples, **least}.items():
    if value is not None and value < 1:
      raise Error(f'evals.evaluators: {name} is {value}; it must be above 0.')


def check_writes(built: Any, name: str) -> None:
  if not built.task.writes or not built.loaded.config.writes:
    raise Error(
      f'evals.evaluators: {name} needs a task with a causal network that '
      f'writes replies; {built.loaded.name} of this config does not.'
    )


def room(built: Any, title: str, max_new_tokens: int) -> int:
  """Returns the most tokens of a prompt before `max_new_tokens` new ones.

  Raises:
    Error: the new tokens alone fill the positions of the network.
  """
  most = built.loaded.config.max_positions
  if max_new_tokens >= most:
    raise Error(
      f'evals.evaluators: {title}: max_new_tokens is {max_new_tokens}; it must '
      f'be below the {most} positions of {built.loaded.name}.'
    )
  return most - max_new_tokens
