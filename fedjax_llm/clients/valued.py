"""A sampler that draws clients by the values of an earlier run.

`replay --values shapley --json FILE` writes them.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from fedjax_llm.clients.sampling import weighted_by_logs
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
  as one of the mean value, z = 0. The draw is that of `by_size`; a client
  without examples is never drawn.

  Args:
    path: the JSON file that `replay --json` wrote.
    temperature: tau; large: all clients are equally probable.
    names: of the N clients.
    sizes: [N], their numbers of examples; None: all have some.
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
  if not temperature > 0:
    raise Error(f'clients.temperature is {temperature}; it must be above 0.')
  logs = importance(_read(path), names or (), temperature)
  if len(logs) != num_clients:
    raise Error(
      f'by_value needs the names of {num_clients} clients, not {len(logs)}.'
    )
  if sizes is not None:
    if len(sizes) != num_clients:
      raise Error(
        f'sizes has {len(sizes)} numbers for {num_clients} clients: it needs '
        'one a client.'
      )
    logs = np.where(np.asarray(sizes) > 0, logs, -np.inf)
  return weighted_by_logs(logs, cohort_size, availability, dropout, seed)


def importance(
  values: dict[str, float], names: Sequence[str], temperature: float
) -> np.ndarray:
  """Returns z / temperature of each client, [N], the logs of its importance.

  >>> importance({'ann': 1.0, 'bob': 3.0}, ['ann', 'bob', 'eve'], 0.5)
  array([-2.,  2.,  0.])
  """
  known = np.array([values[name] for name in names if name in values])
  if not len(known):
    raise Error('clients.path: the file has no value of any of these clients.')
  mean, spread = known.mean(), known.std()
  z = [values.get(name, mean) - mean for name in names]
  z = np.asarray(z) / (spread if spread > 0 else 1.0)
  largest = np.finfo(np.float64).max
  with np.errstate(over='ignore'):
    return np.clip(z / temperature, -largest / 4, largest / 4)


def _read(path: str) -> dict[str, float]:
  try:
    content = json.loads(pathlib.Path(path).expanduser().read_text())
    return {str(k): float(v) for k, v in content['values'].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise Error(
      f'clients.path is {path}: it is no file of `replay --values ... --json`.'
    ) from error
