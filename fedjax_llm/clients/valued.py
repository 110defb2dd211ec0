"""A sampler that draws clients by the values of an earlier run.

`replay --values shapley --json FILE` writes them.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from fedjax_llm.clients.sampling import weighted
from fedjax_llm.types import Error, Sampler


def by_value(
  num_clients: int,
  cohort_size: int,
  *,
  path: str,
  temperature: float = 1.0,
  names: Sequence[str] | None = None,
  sizes: Sequence[float] | np.ndarray | None = None,
  availability: float = 1.0,
  dropout: float = 0.0,
  seed: int = 0,
) -> Sampler:
  """Returns a sampler of K clients in turn, with probability ~ exp(z / tau).

  z are the clients' values, standardised: how far a client's update lowered the
  held-out loss of a round (`replay --values`). A client without a value counts
  as one of the mean value, z = 0. The draw is that of `by_size`.

  Args:
    path: the JSON file that `replay --json` wrote.
    temperature: tau; large: all clients are equally probable.
    names: of the N clients.
    others: see `sampling.uniform`.

  Raises:
    Error: as `uniform`; a temperature that is not positive; no such file, or
      one without values of these clients.

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
  ...   _ = file.write('{"values": {"ann": 9.0, "bob": 1.0}}')
  ...   file.flush()
  ...   sample = by_value(
  ...     2, 1, path=file.name, temperature=0.1, names=['ann', 'bob'])
  >>> {int(sample(round).ids[0]) for round in range(20)}
  {0}
  """
  del sizes
  if not temperature > 0:
    raise Error(f'clients.temperature is {temperature}; it must be above 0.')
  size = importance(_read(path), names or (), temperature)
  if len(size) != num_clients:
    raise Error(
      f'by_value needs the names of {num_clients} clients, not {len(size)}.'
    )
  return weighted(size, cohort_size, availability, dropout, seed)


def importance(
  values: dict[str, float], names: Sequence[str], temperature: float
) -> np.ndarray:
  """Returns exp(z / temperature) of each client, [N].

  >>> importance({'ann': 1.0, 'bob': 3.0}, ['ann', 'bob', 'eve'], 1.0).round(3)
  array([0.368, 2.718, 1.   ])
  """
  known = np.array([values[name] for name in names if name in values])
  if not len(known):
    raise Error('clients.path: the file has no value of any of these clients.')
  mean, spread = known.mean(), known.std()
  z = [values.get(name, mean) - mean for name in names]
  return np.exp(np.asarray(z) / (spread if spread > 0 else 1.0) / temperature)


def _read(path: str) -> dict[str, float]:
  try:
    content = json.loads(pathlib.Path(path).expanduser().read_text())
    return {str(k): float(v) for k, v in content['values'].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise Error(
      f'clients.path is {path}: it is no file of `replay --values ... --json`.'
    ) from error
