"""Mixing matrices of networks of clients without a server.

`topology` returns a symmetric matrix [N, N] of weights whose rows sum to one,
`spectral_gap` how fast it mixes, and `over` makes it a function for
`mixing.mixed`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error

_EDGES = 321  # purpose of the random stream


def topology(
  name: str, num_clients: int, *, degree: int = 2, seed: int = 0
) -> np.ndarray:
  """Returns the Metropolis weights of a network, [N, N] float64.

      W_ij = 1 / (1 + max(d_i, d_j)) for an edge,   W_ii = 1 - sum_j W_ij

  W is symmetric and doubly stochastic, so the mean of the clients stays (Xiao
  and Boyd, Systems and Control Letters 53, 2004).

  Args:
    name: 'ring'; 'complete', where W = 1 / N; 'star', all with client 0;
      'random', in which every client chooses `degree` others.
    num_clients: N.
    degree: of 'random'.
    seed: of 'random'.

  Raises:
    Error: another name; a degree below 1 or above N - 1.

  >>> topology('ring', 4)[0].round(3).tolist()
  [0.333, 0.333, 0.0, 0.333]
  """
  number = np.arange(num_clients)
  edges = np.zeros((num_clients, num_clients), bool)
  if name == 'ring':
    edges[number, (number + 1) % num_clients] = True
  elif name == 'complete':
    edges[:] = True
  elif name == 'star':
    edges[0] = True
  elif name == 'random':
    if not 1 <= degree < max(num_clients, 2):
      raise Error(
        f'degree is {degree}: it is at least 1 and below the {num_clients} '
        'clients.'
      )
    rng = np.random.default_rng((seed, _EDGES))
    for i in number:
      others = np.delete(number, i)
      edges[i, rng.choice(others, min(degree, len(others)), False)] = True
  else:
    raise Error(f'topology is {name!r}: it is ring, complete, star or random.')
  edges = (edges | edges.T) & ~np.eye(num_clients, dtype=bool)
  count = edges.sum(1)
  weights = edges / (1.0 + np.maximum(count[:, None], count))
  return weights + np.diag(1 - weights.sum(1))


def spectral_gap(matrix: np.ndarray) -> float:
  """Returns 1 - |lambda_2|: differences shrink by |lambda_2| in each round.

  0: the network is not connected; 1: one round gives the mean.

  >>> round(spectral_gap(topology('ring', 4)), 4)  # 1 - 1 / 3
  0.6667
  >>> round(spectral_gap(topology('complete', 4)), 4)
  1.0
  """
  sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
  return float(1 - sizes[-2]) if len(sizes) > 1 else 1.0


def over(matrix: np.ndarray) -> Callable[..., jax.Array]:
  """Returns the weights of the clients of a round, `(stack, weight, ids)`.

  The weight of a neighbour that takes no part goes to the client itself, so the
  part of W stays doubly stochastic.

  >>> weights = over(topology('ring', 4))
  >>> ids, ones = jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0])
  >>> np.asarray(weights(None, ones, ids), float).round(3).tolist()
  [[0.667, 0.333, 0.0], [0.333, 0.667, 0.0], [0.0, 0.0, 1.0]]
  """
  table = jnp.asarray(matrix, jnp.float32)

  def weights(stack, weight, ids):
    del stack
    here = jnp.asarray(weight) > 0
    ids = jnp.maximum(ids, 0)
    part = table[ids][:, ids] * (here & here[:, None])
    part = part * (1 - jnp.eye(len(ids)))
    return part + jnp.diag(1 - part.sum(1))

  return weights
