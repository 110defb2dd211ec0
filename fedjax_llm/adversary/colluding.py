"""Attacks of clients that know each other's updates, or those of all clients.

Builders return an `Adversary`; all malicious clients send the same update. The
arguments `clients`, `fraction`, `seed` and `num_clients` are those of
`malicious.ids`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.adversary.malicious import attack
from fedjax_llm.types import Adversary, Error, known


def alie(
  *,
  z: float | None = None,
  omniscient: bool = True,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns ALIE, "a little is enough": u_k <- mean - z * std, an entry each.

  Mean and standard deviation are those of the updates that the attackers know.
  Without `z` it is the largest at which enough honest clients lie further out
  than the attackers to make a majority with them: with n clients of which m are
  malicious,

      s = floor(n / 2 + 1) - m,    Phi(z) = (n - m - s) / (n - m)

  (Baruch et al. 2019, arXiv 1902.06156, algorithm 3, which adds z * std: take
  a negative z for that side). The update stays near the honest ones, so rules
  that look for outliers keep it.

  Args:
    z: deviations from the mean; None: by the formula.
    omniscient: attackers know the honest updates. False, as in the paper: only
      the updates that they trained themselves.

  Raises:
    Error: as `malicious.ids`.

  >>> from fedjax_llm.types import Uploads
  >>> update, ones = jnp.array([1.0, 3.0, 0.0]), jnp.ones(3)
  >>> sent = Uploads(update, None, None, ones, ones > 0, ids=jnp.arange(3))
  >>> alie(z=1.5, clients=[2])(sent, None).update.tolist()  # 2 - 1.5 * 1
  [1.0, 3.0, 0.5]
  """

  def act(uploads, side, key):
    del key
    share = _equal(side.honest if omniscient else side.malicious)
    mean = tree.weighted_sum(uploads.update, share)
    square = jax.tree.map(
      lambda u, m: jnp.square(u.astype(jnp.float32) - m), uploads.update, mean
    )
    variance = tree.weighted_sum(square, share)
    deviations = _largest(side) if z is None else z
    return jax.tree.map(
      lambda u, m, v: _to_all(m - deviations * jnp.sqrt(v), u),
      uploads.update,
      mean,
      variance,
    )

  return attack('alie', act, clients, fraction, seed, num_clients)


def ipm(
  *,
  scale: float = 0.5,
  clients: Sequence[int] = (),
  fraction: float = 0.2,
  seed: int = 0,
  num_clients: int | None = None,
) -> Adversary:
  """Returns inner product manipulation: u_k <- -scale * (mean of honest ones).

  With m of n clients malicious, the mean of all points against the honest mean
  once scale > (n - m) / m; a small scale keeps the attackers near the honest
  clients (Xie et al. 2019, IPM, arXiv 1903.03936, section 3).

  Raises:
    Error: a negative scale; as `malicious.ids`.

  >>> from fedjax_llm.types import Uploads
  >>> update, ones = jnp.array([1.0, 3.0, 9.0]), jnp.ones(3)
  >>> sent = Uploads(update, None, None, ones, ones > 0, ids=jnp.arange(3))
  >>> ipm(clients=[2])(sent, None).update.tolist()
  [1.0, 3.0, -1.0]
  """
  if known(scale) and scale < 0:
    raise Error(f'ipm: scale={scale} must be 0 or more.')

  def act(uploads, side, key):
    del key
    mean = tree.weighted_sum(uploads.update, _equal(side.honest))
    return jax.tree.map(
      lambda u, m: _to_all(-scale * m, u), uploads.update, mean
    )

  return attack('ipm', act, clients, fraction, seed, num_clients)


def _equal(rows: jax.Array) -> jax.Array:
  return tree.normalise(rows.astype(jnp.float32))


def _to_all(row: jax.Array, stack: jax.Array) -> jax.Array:
  return jnp.broadcast_to(row, stack.shape).astype(stack.dtype)


def _largest(side) -> jax.Array:
  """Returns the z of the formula of `alie`."""
  bad, good = (jnp.sum(x.astype(jnp.float32)) for x in side)
  supporters = jnp.floor((bad + good) / 2 + 1) - bad
  below = (good - supporters) / jnp.maximum(good, 1.0)
  # At 0 and 1 z is infinite; the attack would be left out as not finite.
  return jax.scipy.special.ndtri(jnp.clip(below, 1e-4, 1 - 1e-4))
