"""SLoRA: sparse full fine-tuning first, then LoRA from its result.

Babakniya et al. 2023, arXiv 2308.06522.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import linalg, local, scopes, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import (
  refuse,
)
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  Masks,
  Params,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  # Both stages within the few rounds of a small run.
  'slora': dict(algorithm=dict(first_rounds=2)),
}


class Sparse(NamedTuple):
  """A dense change with few entries: values [L, n] at places [L, n] of D F."""

  values: Any
  places: Any  # int32


class Staged(NamedTuple):
  """The parameters of SLoRA's two stages."""

  sparse: Any  # a `Sparse` for every low-rank node
  factors: Any


def slora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  first_rounds: int = 5,
  density: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """SLoRA: sparse full fine-tuning first, then LoRA from its result.

      rounds t < T1:  D <- sum_k w_k D_k,   D zero outside a random pattern that
                      all clients share, W' = W + D
      at T1:          D = U S V':   a = U_r,   b = S_r V_r' / s,   D <- 0
      then:           FedIT

  Babakniya et al. 2023, arXiv 2308.06522. The pattern is drawn from the seed,
  so only values travel. r is the rank of the adapter; the part of D beyond rank
  r is lost at T1. A client's D is written out as a matrix for each target:
  memory is that of dense changes.

  Args:
    first_rounds: T1; the paper spends a share of its budget on it.
    density: the share of the entries of D that may change; None takes as many
      as the factors have, so that both stages send the same.

  Raises:
    Error: first_rounds below one, a density not above 0 or above 1; a scope or
      an aggregator in `parts`; from `init`, no low-rank factors.

  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method = slora(None, local.optimizer('adamw'), density=0.5)
  >>> start = method.init(jax.random.key(0), params).params
  >>> start.sparse.values.shape  # half of 4 x 3 entries
  (6,)
  """
  for section in ('scope', 'aggregator'):
    refuse('slora', section, parts)
  if first_rounds < 1:
    raise Error(f'slora: first_rounds={first_rounds} must be at least 1.')
  if density is not None and not 0 < density <= 1:
    raise Error(f'slora: density={density} must be above 0 and at most 1.')

  def wrap(key: Key, params: Params) -> Staged:
    here = jax.random.fold_in(key, 1)
    return Staged(_pattern(here, params, density), params)

  def build(**more: Any) -> FederatedAlgorithm:
    stage = lambda part: fed_avg(
      local.viewed(loss, _together),
      optimizer,
      scope=_only(part),
      **{**parts, **more},
    )
    return server.stages(
      (stage('sparse'), first_rounds),
      (stage('factors'), None),
      between=[_factored],
    )

  return server.on_part(
    build,
    wrap=wrap,
    get=lambda params: params.factors,
    put=lambda params, part: params._replace(factors=part),
    serve=lambda params, state: _together(params),
    fold=parts.pop('fold', None),
  )


def _only(part: str) -> Scope:
  """Returns a scope that trains one part of `Staged` and keeps the other."""
  inner = scopes.everything()

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    none = lambda m: jax.tree.map(jnp.zeros_like, m)
    narrow = lambda m: none(m)._replace(**{part: getattr(m, part)})
    return Masks(*map(narrow, masks))

  return inner._replace(mask=mask)


def _pattern(key: Key, params: Params, density: float | None) -> Params:
  is_node = lambda x: isinstance(x, LowRank)
  nodes, treedef = jax.tree.flatten(params, is_leaf=is_node)
  if not any(map(is_node, nodes)):
    raise Error('slora needs low-rank factors: adapter.name=lora.')

  def one(index, x):
    if not is_node(x):
      return None
    d, f, rank = x.a.shape[-2], x.b.shape[-1], x.a.shape[-1]
    num = round(density * d * f) if density else rank * (d + f)
    num = min(max(num, 1), d * f)
    lead = x.a.shape[:-2]
    layers = max(1, lead[0] if lead else 1)
    draw = lambda key: jax.random.permutation(key, d * f)[:num]
    keys = jax.random.split(jax.random.fold_in(key, index), layers)
    places = jax.lax.map(draw, keys).reshape(*lead, num).astype(jnp.int32)
    return Sparse(jnp.zeros((*lead, num), x.a.dtype), places)

  sparse = [one(i, x) for i, x in enumerate(nodes)]
  return jax.tree.unflatten(treedef, sparse)


def _dense(sparse: Sparse, node: LowRank) -> jax.Array:
  """Returns the change of one node as a matrix, [..., D, F]."""
  *lead, d, _ = node.a.shape
  f = node.b.shape[-1]

  def one(values, places):
    return jnp.zeros(d * f, values.dtype).at[places].set(values)

  for _ in lead:
    one = jax.vmap(one)
  return one(sparse.values, sparse.places).reshape(*lead, d, f)


def _together(params: Staged) -> Params:
  """Returns the sum of both stages, as low-rank nodes with residuals."""

  def node(x, sparse):
    if not isinstance(x, LowRank):
      return x
    dense = _dense(sparse, x)
    old = x.residual
    return x._replace(residual=dense if old is None else old + dense)

  return _by_node(node, params)


def _factored(params: Staged) -> Staged:
  """Moves the first stage's change into the factors, by its SVD."""

  def node(x, sparse):
    if not isinstance(x, LowRank):
      return x
    rank = x.a.shape[-1]
    dense = _dense(sparse, x)
    u, s, v = linalg.svd(dense)
    b = s[..., :rank, None] * v[..., :rank, :] / x.scale[..., None, None]
    return x._replace(a=u[..., :rank].astype(x.a.dtype), b=b.astype(x.b.dtype))

  return Staged(
    jax.tree.map(
      lambda x: x._replace(values=jnp.zeros_like(x.values)),
      params.sparse,
      is_leaf=lambda x: isinstance(x, Sparse),
    ),
    _by_node(node, params),
  )


def _by_node(change: Any, params: Staged) -> Params:
  is_node = lambda x: isinstance(x, LowRank)
  return jax.tree.map(change, params.factors, params.sparse, is_leaf=is_node)
