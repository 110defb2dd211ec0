"""Profiles: capacities of the clients, drawn once for a whole run.

Builders return a mapping of arrays [N], one row a client. `Cohort.profiles`
holds the rows of the clients that take part in a round.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_llm.types import Error

__all__ = ['budgets', 'devices', 'layers', 'ranks', 'widths']

_RANKS, _LAYERS, _BUDGETS, _DEVICES, _WIDTHS = (
  201,
  202,
  203,
  204,
  205,
)  # purposes of the random streams


def ranks(
  choices: Sequence[int],
  shares: Sequence[float] | None = None,
  *,
  num_clients: int,
  seed: int = 0,
) -> Mapping[str, np.ndarray]:
  """Draws a LoRA rank for every client: {'rank': [N] int32}.

  The shares are met as nearly as N allows; which client gets which rank is
  drawn. A client with a rank above the adapter's holds the whole adapter.

  Args:
    choices: the possible ranks, e.g. (4, 8, 16).
    shares: of the clients that get each choice; equal if None.
    num_clients: N.
    seed: of the draw.

  Raises:
    Error: no choice, a rank below one, shares that are not one a choice, not
      positive in sum, or negative; a negative seed.

  >>> ranks((2, 8), (0.75, 0.25), num_clients=8)['rank'].tolist()
  [2, 2, 2, 2, 8, 8, 2, 2]
  """
  return {'rank': _drawn(choices, shares, num_clients, (seed, _RANKS))}


def layers(
  choices: Sequence[int],
  shares: Sequence[float] | None = None,
  *,
  num_clients: int,
  seed: int = 0,
) -> Mapping[str, np.ndarray]:
  """Draws how many layers each client can hold: {'layers': [N] int32}.

  Arguments and errors as in `ranks`.

  >>> layers((1, 3), num_clients=4)['layers'].tolist()
  [1, 1, 3, 3]
  """
  return {'layers': _drawn(choices, shares, num_clients, (seed, _LAYERS))}


def budgets(
  choices: Sequence[int],
  shares: Sequence[float] | None = None,
  *,
  num_clients: int,
  seed: int = 0,
) -> Mapping[str, np.ndarray]:
  """Draws how many parameters each client can train: {'budget': [N] int32}.

  Arguments and errors as in `ranks`.

  >>> budgets((500, 2000), num_clients=4)['budget'].tolist()
  [500, 2000, 500, 2000]
  """
  return {'budget': _drawn(choices, shares, num_clients, (seed, _BUDGETS))}


def widths(
  choices: Sequence[float],
  shares: Sequence[float] | None = None,
  *,
  num_clients: int,
  seed: int = 0,
) -> Mapping[str, np.ndarray]:
  """Draws the share of neurons each client can hold: {'width': [N] float32}.

  Arguments and errors as in `ranks`, for choices above 0 and up to 1.

  >>> widths((0.25, 1.0), num_clients=4)['width'].tolist()
  [0.25, 1.0, 1.0, 0.25]
  """
  values = np.asarray(list(choices), np.float32)
  if not values.size or not ((values > 0) & (values <= 1)).all():
    raise Error(
      f'profiles.choices is {list(choices)}: widths are above 0 and at most 1.'
    )
  numbers = range(1, len(values) + 1)
  drawn = _drawn(numbers, shares, num_clients, (seed, _WIDTHS))
  return {'width': values[drawn - 1]}


def devices(
  phones: float = 0.5,
  laptops: float = 0.3,
  servers: float = 0.2,
  *,
  num_clients: int,
  seed: int = 0,
) -> Mapping[str, np.ndarray]:
  """Draws a kind of device for every client: {'device': [N] int32}.

  1 is a phone, 2 a laptop, 3 a server; the shares are met as nearly as N
  allows.

  Args:
    phones, laptops, servers: shares of the clients, in any unit.
    num_clients, seed: as in `ranks`.

  Raises:
    Error: a negative share, or none above zero; a negative seed.

  >>> devices(2, 1, 1, num_clients=8)['device'].tolist()
  [2, 3, 1, 1, 3, 1, 2, 1]
  """
  shares = (phones, laptops, servers)
  return {'device': _drawn((1, 2, 3), shares, num_clients, (seed, _DEVICES))}


def _drawn(
  choices: Sequence[int],
  shares: Sequence[float] | None,
  num_clients: int,
  key: tuple[int, int],
) -> np.ndarray:
  values = [int(c) for c in choices]
  if not values or min(values) < 1:
    raise Error(f'profiles.choices is {list(choices)}: they start at 1.')
  weight = np.ones(len(values)) if shares is None else np.asarray(shares, float)
  if weight.shape != (len(values),) or (weight < 0).any() or weight.sum() <= 0:
    raise Error(
      f'profiles.shares is {shares}: it takes one share of at least 0 for each '
      f'of the {len(values)} choices.'
    )
  if key[0] < 0:
    raise Error(f'seed is {key[0]}: it is a whole number of at least 0.')
  draw = np.random.default_rng(key).random(num_clients)
  place = (np.argsort(np.argsort(draw)) + 0.5) / num_clients
  edges = np.cumsum(weight)[:-1] / weight.sum()
  which = np.searchsorted(edges, place, side='right')
  return np.asarray(values, np.int32)[which]
