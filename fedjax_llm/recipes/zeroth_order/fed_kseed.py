"""FedKSeed and FedKSeed-Pro: a model is a histogram over a pool of seeds.

Qin et al. 2024, arXiv 2312.06353.

    model:   w(a) = w_0 + sum_j a_j z(s_j),  j = 1 ... K candidate seeds
    client:  w = w(a); S times: draw j,  g = (L(w + eps z_j) - L(w - eps z_j))
             / (2 eps),  w <- w - eta g z_j,  h_j <- h_j - eta g
    server:  a <- a + sum_k w_k h_k

The Pro form draws seeds of large slopes more often:

    p = softmax(minmax(m)),  m_j = mean |clip(g)| of all slopes along z_j

Defaults: K = 4096, eps = 5e-4. The paper takes 200 steps a round and a rate of
3e-7 on all weights of models of billions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, tree, uploads
from fedjax_llm.aggregators.weights import equal
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.seeded import Basis
from fedjax_llm.nodes import Seeded, directions
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.zeroth_order.seeded import labels_of, on_seeded
from fedjax_llm.types import (
  Codec,
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
  Scope,
  Shared,
  StreamingAggregator,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_kseed': dict(local=dict(name='sgd', learning_rate=2e-3)),
  'fed_kseed_pro': dict(local=dict(name='sgd', learning_rate=2e-3)),
}


def fed_kseed(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  candidates: int = 4096,
  eps: float = 5e-4,
  distribution: str = 'normal',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedKSeed: clients step along directions of a pool and send a histogram.

  Qin et al. 2024, arXiv 2312.06353, algorithm 1. The server's model is the
  histogram [K] of the pool; clients and evaluations build the parameters from
  it, so every client has the same ones however long it was absent. A client
  receives 4 K bytes and sends a pair of a seed's number and a sum for every
  seed that it drew. The server optimizer acts on the histogram.

  Args:
    candidates: K, the size of the pool.
    eps: the distance of the two points.
    distribution: of a direction.

  Raises:
    Error: no candidate, an optimizer with moments, a scope with private leaves.

  >>> method = fed_kseed(None, local.optimizer('sgd', 1e-3), candidates=16)
  >>> state = method.init(jax.random.key(0), {'w': jnp.ones(9)})
  >>> state.params.coefficients.shape
  (16,)
  """
  basis, wrap, model, labels = _pool(
    'fed_kseed', candidates, distribution, parts.pop('scope', None)
  )
  update = local.in_basis(
    loss, optimizer, local.two_point(eps), basis,
    labels=labels, distribution=distribution, who='fed_kseed',
  )  # fmt: skip
  rule = parts.pop('aggregator', None) or aggregators.mean()
  return on_seeded(
    update,
    wrap,
    serve=model,
    aggregator=aggregators.on_coefficients(rule),
    **{'upload': uploads.nonzero(), **parts},
  )


def fed_kseed_pro(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_steps: int = 1,
  candidates: int = 4096,
  eps: float = 5e-4,
  clip: float = 1000.0,
  distribution: str = 'normal',
  **parts: Any,
) -> FederatedAlgorithm:
  """FedKSeed-Pro: seeds with large slopes are drawn more often.

  Qin et al. 2024, arXiv 2312.06353, section 4.3. The server draws the seeds of
  a client's S steps and sends their numbers beside the histogram, and the
  client returns a slope a step: 4 K + 4 S bytes down and 4 S up. The paper does
  not say how a seed without a slope counts: here as the mean of the others.

  Args:
    num_steps: S, local steps a round: `cohort.num_steps`.
    candidates, eps, distribution: see `fed_kseed`.
    clip: the largest slope that the means count.

  Raises:
    Error: as `fed_kseed`; `clip` is not positive; an aggregator or an upload in
      `parts`: the server needs every slope; a download in `parts`.

  >>> method = fed_kseed_pro(None, local.optimizer('sgd', 1.0), candidates=4)
  >>> state = method.init(jax.random.key(0), {'w': jnp.ones(9)})
  >>> state.params.log.tolist()  # the probabilities of the seeds
  [0.25, 0.25, 0.25, 0.25]
  """
  if known(clip) and not clip > 0:
    raise Error(f'fed_kseed_pro: clip={clip} must be above 0.')
  for section in ('aggregator', 'upload'):
    if section in parts:
      raise Error(
        f'fed_kseed_pro: the server needs every slope of a client: leave the '
        f'{section} section out, or use fed_kseed.'
      )
  refuse('fed_kseed_pro', 'download', parts)
  basis, wrap, model, labels = _pool(
    'fed_kseed_pro', candidates, distribution, parts.pop('scope', None), True
  )
  update = local.in_basis(
    loss, optimizer, local.two_point(eps), basis, labels=labels,
    distribution=distribution, report=True, who='fed_kseed_pro',
  )  # fmt: skip

  def after(state, base, data, key):
    del base, data, key
    p = probabilities(state.aggregator.total, state.aggregator.count)
    return state._replace(params=state.params._replace(log=p))

  return on_seeded(
    update,
    wrap,
    serve=model,
    aggregator=_counting(clip),
    upload=_billed(0, 4 * num_steps),
    download=_billed(4, 4 * num_steps),
    after=after,
    **parts,
  )


def probabilities(total: jax.Array, count: jax.Array) -> jax.Array:
  """Returns softmax(minmax(total / count)), [K]; see `fed_kseed_pro`.

  >>> p = probabilities(jnp.array([2.0, 0.0, 9.0]), jnp.array([2.0, 0.0, 3.0]))
  >>> [round(float(x), 3) for x in p]  # means 1, (2), 3
  [0.186, 0.307, 0.506]
  """
  some = count > 0
  mean = total / jnp.maximum(count, 1.0)
  typical = jnp.sum(mean) / jnp.maximum(jnp.sum(some), 1)
  mean = jnp.where(some, mean, typical)
  low, high = jnp.min(mean), jnp.max(mean)
  wide = high > low
  return jax.nn.softmax(
    jnp.where(wide, (mean - low) / jnp.where(wide, high - low, 1.0), 0.0)
  )


class Counted(NamedTuple):
  """The state of FedKSeed-Pro's rule."""

  inner: Any
  total: Any  # [K] float32, sums of |clip(g)| by seed
  count: Any  # [K] float32, slopes by seed


def _counting(clip: float) -> StreamingAggregator:
  """Returns the weighted mean of histograms, which keeps slopes by seed."""
  inner: Any = aggregators.on_coefficients(aggregators.mean())

  def init(params, key):
    zeros = jnp.zeros(params.coefficients.shape)
    return Counted(inner.init(params, key), zeros, zeros)

  def zero(params):
    zeros = jnp.zeros(params.coefficients.shape)
    return Counted(inner.zero(params), zeros, zeros)

  def accumulate(sums, uploads, state, params):
    place, slope = uploads.reports  # [K, S, n]
    took = (place >= 0) & (equal(uploads) > 0)[:, None, None]
    to = jnp.where(took, place, sums.count.size).ravel()
    put = lambda x: jnp.zeros_like(sums.count).at[to].add(x, mode='drop')
    size = jnp.minimum(jnp.abs(slope), clip).ravel()
    return Counted(
      inner.accumulate(sums.inner, uploads, state.inner, params),
      sums.total + put(size),
      sums.count + put(jnp.ones_like(size)),
    )

  def finalize(sums, state, params, key):
    result, new = inner.finalize(sums.inner, state.inner, params, key)
    total, count = state.total + sums.total, state.count + sums.count
    return result, Counted(new, total, count)

  traits = inner.traits._replace(linear=False)  # it reads single reports
  return inner._replace(
    init=init, zero=zero, accumulate=accumulate, finalize=finalize,
    traits=traits,
  )  # fmt: skip


def _billed(entry: int, more: int) -> Codec:
  """Returns an identity codec that bills `entry` bytes a number and `more`."""

  def num_bytes(message, masks):
    del masks
    size = sum(x.size for x in jax.tree.leaves(message))
    return jnp.int32(entry * size + more)

  encode = lambda update, masks, state, context: (update, state)
  decode = lambda message, start, context: message
  return Codec(lambda _: (), encode, decode, num_bytes)


def _pool(
  who: str,
  candidates: int,
  distribution: str,
  scope: Scope | None,
  by_chance: bool = False,
):
  """Returns the basis of a pool, `wrap`, the model of a histogram, labels."""
  if candidates < 1:
    raise Error(f'{who}: candidates={candidates} must be at least 1.')
  labels = labels_of(
    who,
    scope,
    'the histogram moves all leaves for all clients, so no leaf can be',
  )

  def keys(seed, round, place):
    del round
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), place)

  def place(start, context, step):
    key = jax.random.fold_in(jax.random.fold_in(context.key, candidates), step)
    if by_chance:
      return jax.random.choice(key, candidates, (1,), p=start.log)
    return jax.random.randint(key, (1,), 0, candidates)

  def model(start: Seeded) -> Params:
    trained = tree.select(start.params, labels(start.params), Shared)
    every = keys(start.seed, None, jnp.arange(candidates))
    moved = directions.combined(
      trained, every, start.coefficients, distribution
    )
    return tree.merge(moved, start.params)

  def wrap(key: Key, params: Params) -> Seeded:
    labels(params)
    return Seeded(
      params=params,
      coefficients=jnp.zeros(candidates),
      seed=jax.random.bits(key, (), jnp.uint32),
      log=jnp.full(candidates, 1 / candidates) if by_chance else None,
    )

  return Basis(place, keys, model), wrap, model, labels
