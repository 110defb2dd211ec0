"""FedLEASE: clusters of clients train an expert each and use all of them.

As in the authors' code, lei-wang-link/FedLEASE (2025).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, local, server
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Leased, LowRank
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.scopes import clusters
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Frozen,
  Key,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Private,
  Scope,
  ServerState,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  # All of ten clients in every round; two more are held back as new ones.
  'fedlease': dict(
    clients=dict(cohort_size=10),
    population=dict(max_clients=12),
    algorithm=dict(first_rounds=2, most=3),
  ),
}


def fedlease(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  first_rounds: int = 5,
  most: int = 4,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedLEASE: clusters of clients train an expert each and use all of them.

      rounds t < T0:  each client trains factors of its own, sent at the end,
      at T0:          clients are clustered by their b (`clusters.by_factors`);
                      expert e <- the mean of the factors of cluster e,
      then:           y = x W + s sum_{i in top M} g_i x A_e(i) B_e(i), where a
                      client trains its cluster's expert and router;
                      both <- sum_k w_k over the clients of the cluster

  As in the authors' code, lei-wang-link/FedLEASE (2025). M is the number of
  clusters; the router has 2 M - 1 outputs, of which those from M on stand for
  the client's own expert, and the M largest count (`nodes.Leased`). Experts of
  other clusters are frozen for a client, and it downloads all of them. Every
  client keeps its factors of the warm-up. A client that took part in no round
  of the warm-up joins the largest cluster; one that never took part is served
  the base.

  Args:
    num_clients: N.
    first_rounds: T0.
    most: clusters are from two up to this number.

  Raises:
    Error: `first_rounds` below one, `most` below two; a scope or an aggregator
      in `parts`; from `init`, no low-rank factors.

  >>> from fedjax_llm import local
  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> method = fedlease(None, local.optimizer('sgd'), num_clients=3, most=2)
  >>> state = method.init(jax.random.key(0), {'layers': {'q': node}})
  >>> state.params['layers']['q'].router.shape  # of two experts
  (2, 2, 5, 3)
  """
  for section in ('scope', 'aggregator'):
    refuse('fedlease', section, parts)
  policy = clusters.by_factors(most, first_rounds)
  parts.pop('fold', None)  # there are no residuals
  algorithm = server.on_part(
    functools.partial(
      compose,
      placed(local.sgd(loss, optimizer)),
      scope=_scope(),
      aggregator=aggregators.masked_mean('mask'),
      **{'measure': None, **parts},
    ),
    wrap=lambda key, params: widened(jax.random.fold_in(key, 1), params, most),
    get=own,
    put=lambda params, part: params,
    serve=lambda params, state: own(params) if state is None else params,
  )

  def first(params: Params) -> tuple[dict[str, np.ndarray], Any]:
    if not _factors(params):
      raise Error('fedlease needs low-rank factors: adapter.name=lora.')
    none = np.zeros(num_clients, np.int32)
    due = np.zeros(num_clients, bool)
    shape = jax.eval_shape(_report, params)
    report = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shape)
    return {'cluster': none, 'experts': none, 'due': due}, report

  def decide(params: Params):
    shapes = [x.b.shape for x in _factors(params)]
    return clusters.on_flat(policy, shapes, lambda values: values['b'])

  planned = server.planned(
    algorithm,
    decide,
    first=first,
    num_clients=num_clients,
    sent=lambda row: {'a': row['due'], 'b': row['due']},
  )

  def plan(state: ServerState) -> ServerState:
    assert planned.plan is not None
    new = planned.plan(state)
    if int(new.round) != first_rounds:
      return new
    rule = new.aggregator
    started = np.asarray(rule.reports.round) >= 0
    return new._replace(
      params=_leased(
        new.params, rule.reports.values, rule.profiles['cluster'], started
      )
    )

  return planned._replace(plan=plan)


# -------------------------------------------------------------------- parts --


def _is_node(x: Any) -> bool:
  return isinstance(x, Leased)


def _factors(params: Params) -> list[LowRank]:
  """Returns the factors of the warm-up; `params` may be widened or not."""
  is_low = lambda x: isinstance(x, LowRank)
  leaves = jax.tree.leaves(own(params), is_leaf=is_low)
  return [x for x in leaves if is_low(x)]


def _map(change, params: Params, *rest: Any) -> Any:
  """Maps `change` over the nodes; other leaves stay."""
  return jax.tree.map(
    lambda x, *xs: change(x, *xs) if _is_node(x) else x,
    params,
    *rest,
    is_leaf=lambda x: x is None or _is_node(x),
  )


def widened(key: Key, params: Params, most: int) -> Params:
  """Returns every low-rank node as a `Leased` with `most` experts of zero.

  Routers are uniform in +-1/sqrt(D), one for each cluster, drawn alike.
  """
  is_low = lambda x: isinstance(x, LowRank)
  drawn = multi.fresh(key, jax.tree.map(_wide(most), params, is_leaf=is_low))

  def node(x, router):
    if not is_low(x):
      return x
    lead = x.scale.shape
    each = lambda z: jnp.zeros((*lead, most, *z.shape[len(lead) :]), z.dtype)
    scale = jnp.broadcast_to(x.scale[..., None], (*lead, most))
    wide = router.a[..., None, :, :]
    return Leased(
      own=x._replace(residual=None),
      pool=LowRank(each(x.a), each(x.b), scale),
      router=jnp.broadcast_to(wide, (*lead, most, *wide.shape[-2:])),
      cluster=jnp.zeros((*lead, most), jnp.float32),
      live=jnp.zeros((*lead, most), jnp.float32),
    )

  return jax.tree.map(node, params, drawn, is_leaf=is_low)


def _wide(most: int):
  """Returns a function that gives a low-rank node 2 `most` - 1 columns."""

  def node(x):
    if not isinstance(x, LowRank):
      return x
    columns = 2 * most - 1
    a = jnp.zeros((*x.a.shape[:-1], columns), x.a.dtype)
    return LowRank(a, jnp.zeros((*x.b.shape[:-2], columns, 1)), x.scale)

  return node


def own(params: Params) -> Params:
  """Returns the factors of the warm-up in place of every node."""
  return _map(lambda x: x.own, params)


def _report(params: Params) -> dict[str, jax.Array]:
  flat = lambda xs: jnp.concatenate([jnp.ravel(x) for x in xs])
  nodes = _factors(params)
  return {'a': flat([x.a for x in nodes]), 'b': flat([x.b for x in nodes])}


def _leased(params: Params, values: Any, cluster: Any, started: Any) -> Params:
  """Returns experts that are the means of their clusters' reported factors."""
  at = {'a': 0, 'b': 0}

  def node(x: Leased) -> Leased:
    num = x.live.shape[-1]
    member = np.asarray(cluster)[:, None] == np.arange(num)
    share = member * started[:, None]
    share = share / np.maximum(share.sum(0), 1)  # [N, E]
    new = {}
    for name in ('a', 'b'):
      factor = getattr(x.own, name)
      rows = values[name][:, at[name] : at[name] + factor.size]
      at[name] += factor.size
      mean = jnp.einsum(
        'ne,np->ep', jnp.asarray(share, jnp.float32), rows,
        precision=jax.lax.Precision.HIGHEST,
      ).reshape(num, *factor.shape)  # fmt: skip
      lead = x.live.ndim - 1
      new[name] = jnp.moveaxis(mean, 0, lead).astype(factor.dtype)
    return x._replace(pool=x.pool._replace(**new))

  return _map(node, params)


def _scope() -> Scope:
  """Returns a scope: own factors in the warm-up, then a cluster's expert."""

  def labels(params: Params) -> Any:
    def node(x: Leased) -> Any:
      return Leased(
        own=LowRank(Private, Private, Frozen),
        pool=LowRank(Shared, Shared, Frozen),
        router=Shared,
        cluster=Private,
        live=Private,
      )

    return jax.tree.map(
      lambda x: node(x) if _is_node(x) else Shared, params, is_leaf=_is_node
    )

  def mask(start: Params, state: Any, context: Any) -> Masks:
    del state
    cluster, experts = (context.profile[k] for k in ('cluster', 'experts'))
    early = experts == 0

    def node(x: Leased, trained: bool) -> Any:
      places = jnp.arange(x.live.shape[-1])
      mine = (places == cluster) & ~early
      column = lambda m: m[:, None, None]
      pool = column(mine if trained else places < experts)
      here = early if trained else jnp.bool_(True)
      mark = jnp.bool_(not trained)
      both = LowRank(pool, pool, None)
      return Leased(LowRank(here, here, None), both, column(mine), mark, mark)

    part = lambda trained: jax.tree.map(
      lambda x: node(x, trained) if _is_node(x) else jnp.bool_(True),
      start,
      is_leaf=_is_node,
    )
    return Masks(part(False), part(True))

  return Scope(labels, mask)


def placed(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner` on the client's place in the plan, with its report.

  The plan's 'cluster' and 'experts' of the client are written into its nodes
  before it trains and kept as its private values. It reports its own factors
  after training.
  """

  def run(base, start, state, batches, masks, context):
    cluster, experts = (context.profile[k] for k in ('cluster', 'experts'))

    def node(x: Leased) -> Leased:
      places = jnp.arange(x.live.shape[-1])
      wide = lambda m: jnp.broadcast_to(m, x.live.shape).astype(jnp.float32)
      live = places < experts
      return x._replace(
        cluster=wide((places == cluster) & live), live=wide(live)
      )

    start = _map(node, start)
    out = inner.run(base, start, state, batches, masks, context)
    ends = _map(
      lambda x, u: x._replace(
        own=x.own._replace(a=x.own.a + u.own.a, b=x.own.b + u.own.b)
      ),
      start,
      out.update,
    )
    none = LowRank(None, None, None)
    kept = jax.tree.map(
      lambda x: (
        Leased(none, none, None, x.cluster, x.live) if _is_node(x) else None
      ),
      start,
      is_leaf=_is_node,
    )
    return out._replace(private=kept, report=_report(ends))

  return LocalUpdate(inner.init, run)
