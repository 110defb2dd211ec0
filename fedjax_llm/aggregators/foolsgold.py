"""FoolsGold: clients whose updates all point one way lose their weight.

Fung et al. 2018, arXiv 1808.04866.
"""

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import counted, equal
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits, Uploads


def foolsgold(
  *, confidence: float = 1.0, num_clients: int | None = None
) -> Aggregator:
  """Returns FoolsGold: a mean with less weight for clients that are alike.

  With the cosines c_kj of the clients' updates and v_k = max_(j != k) c_kj,

      c_kj <- c_kj v_k / v_j   where v_j > v_k (pardoning)
      a_k = 1 - max_(j != k) c_kj,  cut to [0, 1],  a_k <- a_k / max_j a_j
      a_k <- confidence * (ln(a_k / (1 - a_k)) + 1 / 2),  cut to [0, 1]

  and the result is sum_k a_k u_k / sum_k a_k (Fung et al. 2018, arXiv
  1808.04866, algorithm 1, without the importance of features; there the sum is
  not divided, as its updates are single gradients). It is meant for several
  clients of one attacker with one goal, and for honest clients with different
  data: if all updates point the same way, all weights and the result are zero.

  Args:
    confidence: kappa of the paper.
    num_clients: N: cosines are those of the sums of all past updates of each
      client, kept on the server, [N, ...] float32 a leaf. None: of this round.

  Raises:
    Error: N below 1; from the round, a memory without client ids.

  >>> update = jnp.array([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0], [-9.0, -9.0]])
  >>> ones = jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0)
  >>> rule = jax.jit(foolsgold().aggregate)
  >>> rule(uploads, (), None, None)[0].delta.tolist()
  [0.5, 0.5]
  """
  if num_clients is not None and num_clients < 1:
    raise Error(f'foolsgold: num_clients={num_clients} must be at least 1.')

  def init(params, key):
    del key
    if num_clients is None:
      return ()
    return tree.zeros_like(tree.broadcast(params, num_clients), jnp.float32)

  def weights(update, here):
    return learned(_cosines(update), here, confidence)

  def aggregate(uploads, state, params, key):
    del params, key
    update, here = uploads.update, counted(uploads)
    past = update
    if num_clients is not None:
      if uploads.ids is None:
        raise Error('foolsgold: a memory needs the ids of clients.')
      # A row of padding has the id -1 and writes nothing.
      place = jnp.where(here, jnp.asarray(uploads.ids), num_clients)
      add = lambda h, u: h.at[place].add(u.astype(jnp.float32), mode='drop')
      own = jax.tree.map(add, tree.like(state, update), update)
      past = tree.take(own, jnp.where(here, place, 0))
      state = tree.merge(own, state)
    return Aggregate(tree.weighted_mean(update, weights(past, here))), state

  def of_round(uploads: Uploads) -> jax.Array:
    return weights(uploads.update, counted(uploads))

  return Aggregator(
    init,
    aggregate,
    Traits(rotates=num_clients is None),
    weights=of_round if num_clients is None else equal,
  )


def learned(cosine: jax.Array, here: jax.Array, confidence) -> jax.Array:
  """Returns the weights a [K] of FoolsGold from cosines [K, K].

  Clients outside of `here` [K] are not compared and get the weight zero.

  >>> alike = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
  >>> jax.jit(learned)(alike, jnp.ones(3, bool), 1.0).tolist()
  [1.0, 0.0, 0.0]
  """
  num = cosine.shape[0]
  other = here[:, None] & here & ~jnp.eye(num, dtype=bool)
  most = lambda c: jnp.max(jnp.where(other, c, -1.0), axis=1)
  top = most(cosine)
  pardon = top[None, :] > top[:, None]
  ratio = top[:, None] / jnp.where(pardon, top[None, :], 1.0)
  # Divided by a cosine of zero or less: nothing to pardon.
  cosine = jnp.where(pardon & (top[None, :] > 0), cosine * ratio, cosine)
  alone = jnp.where(here, jnp.clip(1 - most(cosine), 0.0, 1.0), 0.0)
  best = jnp.max(alone)
  alone = alone / jnp.where(best > 0, best, 1.0)
  inside = (alone > 0) & (alone < 1)
  safe = jnp.where(inside, alone, 0.5)
  logit = confidence * (jnp.log(safe / (1 - safe)) + 0.5)
  return jnp.where(inside, jnp.clip(logit, 0.0, 1.0), (alone >= 1) * 1.0)


def _cosines(stack) -> jax.Array:
  flat = tree.ravel(stack)
  size = tree.root(jnp.sum(flat**2, -1, keepdims=True))
  flat = flat / jnp.where(size > 0, size, 1.0)
  return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
