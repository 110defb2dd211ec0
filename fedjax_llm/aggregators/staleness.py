"""Rules for clients that started in earlier rounds: late updates count less.

Builders return a `StreamingAggregator` or an `Aggregator`; both read
`Uploads.staleness`, the rounds since a client started.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.averaging import Sums
from fedjax_llm.aggregators.weights import counted, equal
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  StreamingAggregator,
  Uploads,
  known,
)


def discount(
  staleness: jax.Array,
  kind: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
) -> jax.Array:
  """Returns the factor s(tau) of a client that is tau rounds late.

      constant     1
      polynomial   (1 + tau)^-a
      hinge        1 if tau <= b, else 1 / (a (tau - b) + 1)

  Xie et al. 2019 (arXiv 1903.03934), section 5.2.

  Args:
    staleness: tau, [...] whole numbers.
    kind: one of the three.
    exponent: a.
    after: b.

  Raises:
    Error: another kind, a negative a or b.

  >>> discount(jnp.array([0, 3]), 'polynomial', 0.5).tolist()
  [1.0, 0.5]
  >>> discount(jnp.array([4, 6]), 'hinge', 0.5, after=4).tolist()
  [1.0, 0.5]
  """
  check(kind, exponent, after)
  late = jnp.asarray(staleness, jnp.float32)
  if kind == 'constant':
    return jnp.ones_like(late)
  if kind == 'polynomial':
    return (1 + late) ** -exponent
  return 1 / (exponent * jnp.maximum(late - after, 0) + 1)


def check(kind: str, exponent: float, after: int) -> None:
  """Raises an `Error` for a kind or a number that `discount` does not take."""
  if kind not in ('constant', 'polynomial', 'hinge'):
    raise Error(f'staleness is {kind!r}: it is constant, polynomial or hinge.')
  for field, value in (('exponent', exponent), ('after', after)):
    if known(value) and not value >= 0:
      raise Error(f'{field} is {value}: it must be 0 or more.')


def buffered_mean(
  staleness: str = 'polynomial', exponent: float = 0.5, after: int = 4
) -> StreamingAggregator:
  """Returns FedBuff's rule: (1 / n) sum_k s(tau_k) u_k.

  u_k is the client's end minus the parameters that it started from, and n the
  clients of the buffer, not the sum of the factors: a buffer of late clients
  moves the server less (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1,
  where s is 1 / sqrt(1 + tau)). Clients count the same whatever their weight.

  Args and errors as in `discount`.

  >>> from fedjax_llm.aggregators.averaging import as_stack
  >>> uploads = Uploads(
  ...   jnp.array([2.0, 2.0]), None, None, jnp.ones(2), jnp.ones(2, bool),
  ...   staleness=jnp.array([0, 3]))
  >>> rule = as_stack(buffered_mean())
  >>> rule.aggregate(uploads, (), jnp.float32(0), None)[0].delta.item()
  1.5
  """
  check(staleness, exponent, after)

  def factors(uploads: Uploads) -> jax.Array:
    late = uploads.staleness
    late = jnp.zeros(equal(uploads).shape) if late is None else late
    return equal(uploads) * discount(late, staleness, exponent, after)

  def zero(params):
    return Sums(tree.zeros_like(params, jnp.float32), jnp.float32(0))

  def accumulate(sums, uploads, state, params):
    del state, params
    more = tree.weighted_sum(uploads.update, factors(uploads))
    return Sums(tree.add(sums.total, more), sums.weight + equal(uploads).sum())

  def finalize(sums, state, params, key):
    del key
    each = 1 / jnp.maximum(sums.weight, 1)
    delta = tree.map_present(
      lambda total, p: (total * each).astype(p.dtype), sums.total, params
    )
    return Aggregate(delta), state

  return StreamingAggregator(
    lambda params, key: (), zero, accumulate, finalize, weights=factors
  )


def one_after_another(
  alpha: float = 0.9,
  staleness: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
) -> Aggregator:
  """Returns FedAsync's rule: clients are mixed in one after another.

      p <- (1 - a_k) p + a_k p_k,   a_k = alpha s(tau_k)

  Xie et al. 2019 (arXiv 1903.03934), algorithm 1, where p_k are the client's
  whole parameters at its end. With one client a round it is the paper's;
  several clients of a round are mixed in one after another, those that started
  first before the others, then by id. Unlike a mean of updates the rule pulls
  the server towards where the client began.

  Args and errors as in `discount`, and
    alpha: above 0 and at most 1.

  >>> uploads = Uploads(
  ...   jnp.array([1.0]), jnp.array([5.0]), None, jnp.ones(1),
  ...   jnp.ones(1, bool), jnp.array([7]), staleness=jnp.array([3]))
  >>> rule = one_after_another(alpha=0.5)
  >>> rule.aggregate(uploads, (), jnp.float32(2), None)[0].delta.item()
  1.0
  """
  check(staleness, exponent, after)
  if known(alpha) and not 0 < alpha <= 1:
    raise Error(f'alpha is {alpha}: it must be above 0 and at most 1.')

  def weights(uploads: Uploads) -> jax.Array:
    """Returns the share of each client in the result, [K]."""
    here = counted(uploads)
    late = uploads.staleness
    late = jnp.zeros(here.shape, jnp.int32) if late is None else late
    ids = jnp.arange(len(here)) if uploads.ids is None else uploads.ids
    mix = jnp.where(here, alpha * discount(late, staleness, exponent, after), 0)
    order = jnp.lexsort((jnp.asarray(ids), -late))
    kept = jnp.cumprod((1 - mix[order])[::-1])[::-1]
    later = jnp.append(kept[1:], 1.0)  # what the clients after it leave
    share = mix[order] * later
    return jnp.zeros_like(share).at[order].set(share)

  return _mixed(weights)


def all_together(
  num_clients: int = 1,
  alpha: float = 0.9,
  staleness: str = 'polynomial',
  exponent: float = 0.5,
  after: int = 4,
) -> Aggregator:
  """Returns FedCompass's rule: the clients of a round are mixed in at once.

      p <- (1 - sum_k a_k) p + sum_k a_k p_k,   a_k = alpha s(tau_k) / N

  Li et al. 2023 (arXiv 2309.14675), where p_k are the client's whole parameters
  at its end. A client counts the same whoever arrives with it: the rest of the
  weight stays with the server, which `one_after_another` divides.

  Args and errors as in `discount`, and
    num_clients: N, of the federation.
    alpha: above 0 and at most 1.

  >>> uploads = Uploads(
  ...   jnp.array([2.0, 2.0]), jnp.zeros(2), None, jnp.ones(2),
  ...   jnp.ones(2, bool), jnp.array([0, 1]), staleness=jnp.array([0, 3]))
  >>> rule = all_together(4, alpha=1.0)
  >>> rule.aggregate(uploads, (), jnp.float32(0), None)[0].delta.item()
  0.75
  """
  check(staleness, exponent, after)
  if num_clients < 1:
    raise Error(f'num_clients is {num_clients}: it must be at least 1.')
  if known(alpha) and not 0 < alpha <= 1:
    raise Error(f'alpha is {alpha}: it must be above 0 and at most 1.')

  def weights(uploads: Uploads) -> jax.Array:
    here = counted(uploads)
    late = uploads.staleness
    late = jnp.zeros(here.shape, jnp.int32) if late is None else late
    mix = alpha * discount(late, staleness, exponent, after) / num_clients
    return jnp.where(here, mix, 0)

  return _mixed(weights)


def _mixed(weights: Callable[[Uploads], jax.Array]) -> Aggregator:
  """Returns the rule p <- (1 - sum_k c_k) p + sum_k c_k p_k of shares c [K]."""

  def aggregate(uploads, state, params, key):
    del key
    share = weights(uploads)

    def leaf(u, s, p):  # sum_k c_k (p_k - p), since p keeps 1 - sum_k c_k
      apart = s.astype(jnp.float32) + u - p
      return tree.weighted_sum(apart, share).astype(p.dtype)

    start = tree.like(uploads.start, uploads.update)
    delta = tree.map_present(leaf, uploads.update, start, params)
    return Aggregate(delta), state

  return Aggregator(lambda params, key: (), aggregate, weights=weights)
