"""FLTrust: updates are trusted as far as they agree with the server's own.

Cao et al. 2021, arXiv 2012.13995.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.weights import counted
from fedjax_llm.types import Aggregate, Aggregator, Error, Traits, Uploads


def fltrust(*, root: Sequence[int] = (0,)) -> Aggregator:
  """Returns FLTrust: a mean of updates that agree with a trusted one.

  With u_0 the mean update of the clients `root`, whose texts the server has
  collected itself,

      t_k = max(0, cos(u_k, u_0)),
      sum_k t_k ||u_0|| / ||u_k|| u_k / sum_k t_k     over the other clients

  (Cao et al. 2021, arXiv 2012.13995, algorithm 2). No update counts for more
  than the length of u_0, so any share of malicious clients is bounded. The
  sampler `with_root` draws the root in every round; a round without it, and one
  in which nobody agrees with it, changes nothing. Weights are not used.

  Raises:
    Error: an empty root; from the round, uploads without client ids.

  >>> update, ones = jnp.array([[1.0], [9.0], [2.0], [-5.0]]), jnp.ones(4)
  >>> uploads = Uploads(update, None, None, ones, ones > 0, ids=jnp.arange(4))
  >>> rule = fltrust(root=[0])
  >>> rule.aggregate(uploads, (), None, None)[0].delta.tolist()
  [1.0]
  """
  if not len(root):
    raise Error('fltrust: root is empty; name the ids of trusted clients.')
  trusted = jnp.asarray(tuple(root), jnp.int32)

  def factors(uploads: Uploads) -> tuple[jax.Array, jax.Array]:
    """Returns the trust t and the factor of each update, [K] float32."""
    if uploads.ids is None:
      raise Error('fltrust: the uploads have no ids of clients (Uploads.ids).')
    here = counted(uploads)
    own = here & jnp.isin(jnp.asarray(uploads.ids), trusted)
    flat = tree.ravel(uploads.update)  # [K, P] float32
    exact = jax.lax.Precision.HIGHEST
    server = jnp.matmul(
      tree.normalise(own.astype(jnp.float32)), flat, precision=exact
    )
    length = tree.root(jnp.sum(server**2))
    size = tree.root(jnp.sum(flat**2, -1))
    dot = jnp.matmul(flat, server, precision=exact)
    scale = size * length
    cosine = dot / jnp.where(scale > 0, scale, 1.0)
    trust = jnp.where(here & ~own, jnp.maximum(cosine, 0.0), 0.0)
    share = tree.normalise(trust) * length / jnp.where(size > 0, size, 1.0)
    return trust, jnp.where(trust > 0, share, 0.0)

  def init(params, key):
    del params, key
    return ()

  def aggregate(uploads, state, params, key):
    del params, key
    delta = tree.weighted_sum(uploads.update, factors(uploads)[1])
    cast = lambda d, u: d.astype(u.dtype)
    return Aggregate(jax.tree.map(cast, delta, uploads.update)), state

  return Aggregator(
    init,
    aggregate,
    Traits(rotates=True),
    weights=lambda uploads: factors(uploads)[0],
  )
