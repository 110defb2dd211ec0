"""The section `poison` of a config: texts that clients are made to train on.

`altering` is an argument of `data.population.build`; `of` returns the `Poison`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedjax_llm.adversary import poisoning
from fedjax_llm.run import builders


def of(conf: Mapping[str, Any], num_clients: int) -> poisoning.Poison:
  """Returns the `Poison` of a config with N clients.

  >>> conf = {'poison': {'name': 'label_flip', 'fraction': 0.5}}
  >>> len(of(conf, 4).clients)
  2
  """
  return builders.build(conf['poison'], poisoning, num_clients=num_clients)


def altering(
  conf: Mapping[str, Any],
) -> Callable[[Sequence[str]], Callable[..., Any]]:
  """Returns the `data.population.Alter` of a config with a section `poison`."""

  def alter(names: Sequence[str]) -> Callable[..., Any]:
    poison = of(conf, len(names))
    some = set(poison.clients.tolist())

    def records(client, own, labels):
      return poison.alter(client, own, labels) if client in some else None

    return records

  return alter
