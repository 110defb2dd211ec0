"""The clients' texts in the tokens of several models.

Which texts are held out is decided once, in the tokens of the server's model:
else a text on which the server is evaluated could train a client. `watched`
notes the records that clients train on, `held` encodes them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm import data
from fedjax_llm.data.encoding import content
from fedjax_llm.data.population import Alter
from fedjax_llm.run import tasks
from fedjax_llm.types import Error, Population


class Held(NamedTuple):
  """The examples of N clients, each in the tokens of its own model."""

  owned: list[list[Any]]  # trained on
  heldout: list[list[Any]]


def watched(
  alter: Alter | None, trained: dict[int, Sequence[data.Record]]
) -> Alter:
  """Returns `alter`, which also writes what clients train on into `trained`.

  >>> trained = {}
  >>> watched(None, trained)(['ann'])(0, ['a record'], None), trained
  (None, {0: ['a record']})
  """

  def of(names: Sequence[str]) -> Callable[..., Any]:
    inner = None if alter is None else alter(names)

    def records(client, own, labels):
      new = None if inner is None else inner(client, own, labels)
      trained[client] = own if new is None else new
      return new

    return records

  return of


def held(
  population: Population,
  records: Sequence[data.Record],
  owners: Sequence[str],
  trained: Mapping[int, Sequence[data.Record]],
  tokenizers: Sequence[data.tokenizers.Tokenizer],
  of_client: np.ndarray,
  settings: Mapping[str, Any],
  task: tasks.Task,
) -> Held:
  """Returns the clients' examples in the tokens of their own models.

  A record is held out if all of its examples are in the population's.

  Args:
    population: in the server's tokens.
    records, owners: of the data, and their clients (a partition).
    trained: see `watched`.
    tokenizers: of the server, then of each group.
    of_client: [N], the group of each client.
    settings: the resolved section `population`.

  Raises:
    Error: a client without a text in its tokens.
  """
  template = settings.get('template', 'chat')
  length, long = settings['max_length'], settings.get('long_replies', 'drop')
  hows = [data.Encoding(x, template, length, long) for x in tokenizers]
  place = {name: k for k, name in enumerate(population.names)}
  known = [{content(x) for x in own} for own in population.heldout]
  taken = {id(record) for own in trained.values() for record in own}
  kept: list[list[data.Record]] = [[] for _ in population.names]
  for name, record in zip(owners, records, strict=True):
    k = place.get(name)
    if k is None or id(record) in taken:
      continue
    examples = task.encode(record, hows[0]).examples
    if examples and all(content(x) in known[k] for x in examples):
      kept[k].append(record)

  def encoded(k: int, some: Sequence[data.Record]) -> list[Any]:
    how = hows[1 + of_client[k]]
    return [x for record in some for x in task.encode(record, how).examples]

  owned = [encoded(k, trained[k]) for k in range(len(kept))]
  for name, group, own in zip(population.names, of_client, owned, strict=True):
    if not own:
      raise Error(
        f'client {name} has no text of at most {length} tokens in the '
        f'tokenizer of client_models.models[{group}]: raise '
        'population.max_length.'
      )
  return Held(owned, [encoded(k, some) for k, some in enumerate(kept)])


def longest(
  examples: Held,
  configs: Sequence[Any],
  of_client: np.ndarray,
  task: tasks.Task,
) -> int:
  """Returns the length of the longest example, checked against the models.

  Raises:
    Error: a text with more tokens than its model has positions.
  """
  lengths = []
  for group, config in enumerate(configs):
    mine = np.flatnonzero(of_client == group)
    if not len(mine):
      continue
    part = lambda some, mine=mine: tuple(tuple(some[k]) for k in mine)
    people = Population(
      tuple(map(str, mine)), part(examples.owned), part(examples.heldout)
    )
    lengths.append(
      data.population.longest(
        people,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        length=task.length,
      )
    )
  return max(lengths)
