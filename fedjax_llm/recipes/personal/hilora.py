"""HiLoRA: factors of all clients, then of clusters, then of each client.

arXiv 2603.02785 (2026).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, server, tree
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.aggregators import low_rank
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank, Tiers
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.scopes import clusters
from fedjax_llm.scopes.spectral import by_subspace
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
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
  Shared,
  Traits,
  Uploads,
)

# What the config of each method changes.
NEEDS = {
  # All of ten clients in every round; two more are held back as new ones.
  'hilora': dict(
    clients=dict(cohort_size=10),
    population=dict(max_clients=12),
    algorithm=dict(first_rounds=3, cluster_rounds=3),
  ),
}

NONE = LowRank(None, None, None)


def hilora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  first_rounds: int = 15,
  cluster_rounds: int = 20,
  most: int = 10,
  strength: float = 0.1,
  leaf_strength: float = 0.1,
  smoothing: float = 0.9,
  **parts: Any,
) -> FederatedAlgorithm:
  """HiLoRA: factors of all clients, then of clusters, then of each client.

      W + s (a_r b_r + a_c b_c + a_l b_l), each tier trained in turn while the
      earlier ones are frozen, on the loss
        + strength (||b_r b_c'||^2 + ||b_r b_l'||^2)
        + leaf_strength ||b_c b_l'||^2,
      root:     s a_r b_r = SVD_R(sum_k w_k s a_k b_k) over all clients,
      clusters: the same over each cluster's clients; clusters are made once,
                from the subspaces of a moving mean of b_r (`by_subspace`),
      leaves:   trained and kept by each client

  arXiv 2603.02785 (2026). The paper ends a tier when its product stands still,
  at a tolerance that is not known here: tiers last fixed numbers of rounds, a
  third party's. The weights of the penalties and of the moving mean are that
  party's too. A client that took part in no round of the first tier joins the
  largest cluster; the paper's rule for new clients, which compares subspaces,
  is left out, and they are served the root.

  Args:
    num_clients: N.
    first_rounds, cluster_rounds: of the root and of the clusters; leaves take
      the rest.
    most: clusters are from two up to this number.
    smoothing: of the moving mean of b_r / ||b_r||_F that a client keeps.

  Raises:
    Error: a negative strength, a smoothing not in [0, 1), a tier without a
      round, `most` below two; a scope or an aggregator in `parts`; from `init`,
      no low-rank factors.

  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> method = hilora(None, local.optimizer('sgd'), num_clients=3, most=2)
  >>> state = method.init(jax.random.key(0), {'layers': {'q': node}})
  >>> state.params['layers']['q'].middle.a.shape  # of two clusters
  (2, 2, 5, 4)
  """
  for section in ('scope', 'aggregator'):
    refuse('hilora', section, parts)
  for name, value in (('strength', strength), ('leaf_strength', leaf_strength)):
    if value < 0:
      raise Error(f'hilora: {name}={value} must not be negative.')
  if not 0 <= smoothing < 1:
    raise Error(f'hilora: smoothing={smoothing} must be from 0 to below 1.')
  policy = by_subspace(most, first_rounds, cluster_rounds)
  parts.pop('fold', None)  # there are no residuals
  update = local.sgd(penalised(loss, strength, leaf_strength), optimizer)
  algorithm = server.on_part(
    functools.partial(
      compose,
      tiered(update, smoothing),
      scope=_scope(),
      aggregator=by_tier(),
      **{'measure': None, **parts},
    ),
    wrap=lambda key, params: widened(jax.random.fold_in(key, 1), params, most),
    get=lambda params: params,
    put=lambda params, part: part,
  )

  def first(params: Params) -> tuple[dict[str, np.ndarray], Any]:
    roots = _roots(params)
    if not roots:
      raise Error('hilora needs low-rank factors: adapter.name=lora.')
    none = np.zeros(num_clients, np.int32)
    due = np.zeros(num_clients, bool)
    size = sum(x.b.size for x in roots)
    plan = {'tier': none, 'cluster': none, 'due': due}
    return plan, np.zeros(size, np.float32)

  def decide(params: Params):
    return clusters.on_flat(policy, [x.b.shape for x in _roots(params)])

  return server.planned(
    algorithm,
    decide,
    first=first,
    num_clients=num_clients,
    sent=lambda row: row['due'],
  )


# -------------------------------------------------------------------- nodes --


def _is_node(x: Any) -> bool:
  return isinstance(x, Tiers)


def _is_leaf(x: Any) -> bool:
  return x is None or isinstance(x, Tiers)


def _nodes(params: Params) -> list[Tiers]:
  return [x for x in jax.tree.leaves(params, is_leaf=_is_node) if _is_node(x)]


def _roots(params: Params) -> list[LowRank]:
  """Returns the factors of the root; `params` may be widened or not."""
  bare = jax.tree.map(
    lambda x: x.root if _is_node(x) else x, params, is_leaf=_is_node
  )
  leaves = jax.tree.leaves(bare, is_leaf=low_rank.is_node)
  return [x for x in leaves if low_rank.is_node(x)]


def widened(key: Key, params: Params, most: int) -> Params:
  """Returns every low-rank node as `Tiers` with `most` clusters.

  The new a are drawn as `adapters.lora` draws them, the new b are zero.
  """
  keys = jax.random.split(key, most + 1)
  drawn = jax.vmap(lambda one: multi.fresh(one, params))(keys)

  def node(x, new):
    if not low_rank.is_node(x):
      return x
    lead = x.scale.ndim
    pool = lambda z: jnp.moveaxis(z[:-1], 0, lead)
    return Tiers(
      root=x._replace(residual=None),
      middle=LowRank(pool(new.a), pool(new.b), pool(new.scale)),
      leaf=LowRank(new.a[-1], new.b[-1], x.scale),
      cluster=jnp.zeros((*x.scale.shape, most), jnp.float32),
    )

  return jax.tree.map(node, params, drawn, is_leaf=low_rank.is_node)


def _scope() -> Scope:
  """Returns a scope: a client trains one tier, and holds those before it."""

  def labels(params: Params) -> Any:
    shared = LowRank(Shared, Shared, Frozen)
    node = Tiers(shared, shared, LowRank(Private, Private, Frozen), Private)
    return jax.tree.map(
      lambda x: node if _is_node(x) else Shared, params, is_leaf=_is_node
    )

  def mask(start: Params, state: Any, context: Any) -> Masks:
    del state
    tier, cluster = (context.profile[k] for k in ('tier', 'cluster'))

    def node(x: Tiers, trained: bool) -> Any:
      at = lambda i: tier == i if trained else tier >= i
      mine = jnp.arange(x.cluster.shape[-1]) == cluster
      pool = (mine & at(1))[:, None, None]
      both = lambda m: LowRank(m, m, None)
      mark = jnp.bool_(not trained)
      # A leaf that is not trained yet has no influence, as its b is zero.
      leaf = at(2) if trained else jnp.bool_(True)
      return Tiers(both(at(0)), both(pool), both(leaf), mark)

    part = lambda trained: jax.tree.map(
      lambda x: node(x, trained) if _is_node(x) else jnp.bool_(True),
      start,
      is_leaf=_is_node,
    )
    return Masks(part(False), part(True))

  return Scope(labels, mask)


# ------------------------------------------------------------------ clients --


def penalised(loss: Loss, strength: float, leaf_strength: float) -> Loss:
  """Returns the token mean of the loss plus the overlaps of the tiers' b.

  >>> from fedjax_llm.types import LossSum
  >>> plain = lambda *_: LossSum(jnp.float32(0), jnp.float32(3), 0.0)
  >>> low = lambda b: LowRank(jnp.ones((1, 1)), jnp.full((1, 2), b), 1.0)
  >>> pool = LowRank(jnp.ones((1, 1, 1)), 2 * jnp.ones((1, 1, 2)), None)
  >>> node = Tiers(low(1.0), pool, low(0.0), jnp.ones(1))
  >>> float(penalised(plain, 0.5, 9.0)(None, {'q': node}, None, None).total)
  24.0
  """

  def whole(base, params, batch, key):
    sums = loss(base, params, batch, key)
    square = lambda x, y: jnp.sum(
      jnp.square(low_rank.dot(x.b, jnp.swapaxes(y.b, -1, -2)))
    )
    extra = jnp.float32(0)
    for x in _nodes(params):
      middle = x.chosen()
      overlap = square(x.root, middle) + square(x.root, x.leaf)
      extra += strength * overlap + leaf_strength * square(middle, x.leaf)
    return sums._replace(total=sums.total + sums.count * extra)

  return whole


class Smoothed(NamedTuple):
  """A client's moving mean of its factors b_r, and the state inside."""

  mean: Any  # [sum of L R F] float32
  inner: Any


def tiered(inner: LocalUpdate, smoothing: float) -> LocalUpdate:
  """Returns `inner` with the client's cluster written in, and its report.

  The report is the moving mean of b_r / ||b_r||_F of every matrix, which moves
  in the first tier; its first value is taken as it is.
  """

  def init(trainable):
    size = sum(x.root.b.size for x in _nodes(trainable))
    return Smoothed(jnp.zeros(size, jnp.float32), inner.init(trainable))

  def run(base, start, state, batches, masks, context):
    tier, cluster = (context.profile[k] for k in ('tier', 'cluster'))

    def place(x: Tiers) -> Tiers:
      mine = (jnp.arange(x.cluster.shape[-1]) == cluster) & (tier > 0)
      wide = jnp.broadcast_to(mine, x.cluster.shape)
      return x._replace(cluster=wide.astype(jnp.float32))

    start = jax.tree.map(
      lambda x: place(x) if _is_node(x) else x, start, is_leaf=_is_node
    )
    out = inner.run(base, start, state.inner, batches, masks, context)
    ends = _roots(tree.add(start, out.update))
    norm = lambda b: tree.root(jnp.sum(b**2, axis=(-1, -2), keepdims=True))
    now = jnp.concatenate(
      [jnp.ravel(x.b / jnp.maximum(norm(x.b), 1e-30)) for x in ends]
    )
    old = jnp.where(jnp.any(state.mean != 0), state.mean, now)
    mixed = smoothing * old + (1 - smoothing) * now
    mean = jnp.where(tier == 0, mixed, state.mean)
    kept = jax.tree.map(
      lambda x: Tiers(NONE, NONE, NONE, x.cluster) if _is_node(x) else None,
      start,
      is_leaf=_is_node,
    )
    return out._replace(
      private=kept, report=mean, state=Smoothed(mean, out.state)
    )

  return LocalUpdate(init, run)


# --------------------------------------------------------------------- rule --


def by_tier() -> Aggregator:
  """Returns the rule: the best product of rank R over each tier's clients.

  Only factors that some client of the round trained change. Leaves outside of
  `Tiers` nodes get the weighted mean of their updates.
  """

  def aggregate(uploads: Uploads, state, params, key):
    del key
    weight = by_weight(uploads)
    mean = tree.weighted_mean(uploads.update, weight)

    def best(nodes: LowRank, weight, server: LowRank) -> LowRank:
      share = tree.normalise(weight)
      summed = low_rank.stack(nodes, share)
      new = low_rank.svd_round(
        summed, server.a.shape[-1], scale=server.scale, split='both'
      )
      some = jnp.sum(weight) > 0
      pick = lambda x, y: jnp.where(some, x, y).astype(y.dtype)
      return LowRank(pick(new.a, server.a), pick(new.b, server.b), None)

    def node(p: Tiers, whole: Tiers, trained: Tiers) -> Tiers:
      root = best(whole.root, weight * trained.root.a, p.root)
      lead = p.cluster.ndim - 1
      each = lambda x, axis: jnp.moveaxis(x, axis, 0)
      nodes = jax.tree.map(lambda x: each(x, lead + 1), whole.middle)
      here = trained.middle.a[..., 0, 0]  # [K, C]
      server = jax.tree.map(lambda x: each(x, lead), p.middle)
      pool = jax.vmap(best)(nodes, weight[None] * here.T, server)
      middle = jax.tree.map(lambda x: jnp.moveaxis(x, 0, lead), pool)
      return Tiers(root, middle, NONE, None)

    assign = jax.tree.map(
      lambda p, *xs: node(p, *xs) if _is_node(p) else None,
      params,
      tree.whole(uploads),
      uploads.masks.trained,
      is_leaf=_is_leaf,
    )
    delta = jax.tree.map(
      lambda p, d: Tiers(NONE, NONE, NONE, None) if _is_node(p) else d,
      params,
      mean,
      is_leaf=_is_leaf,
    )
    return Aggregate(delta, assign), state

  return Aggregator(
    lambda params, key: (), aggregate, Traits(changes_basis=True),
    weights=by_weight,
  )  # fmt: skip
