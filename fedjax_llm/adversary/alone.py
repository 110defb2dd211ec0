"""Attacks of single clients, which know only their own update.

Builders return an `Adversary`. Their common arguments: `clients`, ids of the
malicious clients; where it is empty, `fraction` of the `num_clients` clients of
the population, drawn by `seed` (`malicious.ids`).
"""

from collections.abc import Sequence

import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.adversary.malicious import attack, noise
from fedjax_llm.types import Adversary, Error, known


def sign_flip(
  *,
  scale: float = 1.0,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns sign flipping: u_k <- -scale * u_k for malicious clients k.

  It ascends the loss that the client descends (Li et al. 2019, RSA, arXiv
  1811.03761, section 5; there with a scale above one).

  Raises:
    Error: a negative scale; as `malicious.ids`.

  >>> import jax
  >>> from fedjax_llm.types import Uploads
  >>> ones = jnp.ones(3)
  >>> sent = Uploads(ones, None, None, ones, ones > 0, ids=jnp.arange(3))
  >>> sign_flip(scale=2.0, clients=[1])(sent, None).update.tolist()
  [1.0, -2.0, 1.0]
  """
  _not_negative('sign_flip', 'scale', scale)

  def act(uploads, side, key):
    del side, key
    return tree.scale(uploads.update, -scale)

  return attack('sign_flip', act, clients, fraction, seed, num_clients)


def gaussian(
  *,
  std: float = 1.0,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns Gaussian attackers: u_k <- std * n, n ~ N(0, I).

  Their updates have nothing in common with those of honest clients (Blanchard
  et al. 2017, arXiv 1703.02757, section 6; there with a standard deviation of
  200 on gradients).

  Raises:
    Error: a negative std; as `malicious.ids`.

  >>> import jax
  >>> from fedjax_llm.types import Uploads
  >>> ones = jnp.ones(4)
  >>> sent = Uploads(ones, None, None, ones, ones > 0, ids=jnp.arange(4))
  >>> changed = gaussian(clients=[0, 3])(sent, jax.random.key(0)).update != 1
  >>> changed.tolist()
  [True, False, False, True]
  """
  _not_negative('gaussian', 'std', std)

  def act(uploads, side, key):
    del side
    return tree.scale(noise(uploads.update, uploads.ids, key), std)

  return attack('gaussian', act, clients, fraction, seed, num_clients)


def free_riders(
  *,
  std: float = 0.0,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns free riders: they train nothing and report the model they received.

      u_k <- std * n,  n ~ N(0, I)

  With std = 0 they are plain free riders, with another one disguised (Fraboni
  et al. 2021, arXiv 2006.11901, sections 3.2 and 3.3; there std decays with the
  rounds).

  Raises:
    Error: a negative std; as `malicious.ids`.

  >>> import jax
  >>> from fedjax_llm.types import Uploads
  >>> ones = jnp.ones(3)
  >>> sent = Uploads(ones, None, None, ones, ones > 0, ids=jnp.arange(3))
  >>> free_riders(clients=[2])(sent, jax.random.key(0)).update.tolist()
  [1.0, 1.0, 0.0]
  """
  _not_negative('free_riders', 'std', std)

  def act(uploads, side, key):
    del side
    if known(std) and std == 0:
      return tree.zeros_like(uploads.update)
    return tree.scale(noise(uploads.update, uploads.ids, key), std)

  return attack('free_riders', act, clients, fraction, seed, num_clients)


def model_replacement(
  *,
  scale: float | None = None,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns model replacement: u_k <- scale * u_k.

  With scale = sum_j w_j / sum_(malicious j) w_j, the default, the weighted mean
  of all updates is the mean of the malicious updates plus the honest part,
  which is small once the model has converged (Bagdasaryan et al. 2020, arXiv
  1807.00459, equation 3). The malicious goal is in the data of these clients.

  Raises:
    Error: a negative scale; as `malicious.ids`.

  >>> import jax
  >>> from fedjax_llm.types import Uploads
  >>> update, ones = jnp.array([0.0, 5.0, 0.0, 0.0]), jnp.ones(4)
  >>> sent = Uploads(update, None, None, ones, ones > 0, ids=jnp.arange(4))
  >>> model_replacement(clients=[1])(sent, None).update.tolist()
  [0.0, 20.0, 0.0, 0.0]
  """
  if scale is not None:
    _not_negative('model_replacement', 'scale', scale)

  def act(uploads, side, key):
    del key
    factor = scale
    if factor is None:
      weight = jnp.where(uploads.valid, uploads.weight, 0.0)
      own = jnp.sum(jnp.where(side.malicious, weight, 0.0))
      factor = jnp.sum(weight) / jnp.where(own > 0, own, 1.0)
    return tree.scale(uploads.update, factor)

  return attack('model_replacement', act, clients, fraction, seed, num_clients)


def _not_negative(name: str, field: str, number: float) -> None:
  if known(number) and number < 0:
    raise Error(f'{name}: {field}={number} must be 0 or more.')
