"""FedKSeed on the weights of the base, which no client copies.

Qin et al. 2024, arXiv 2312.06353, with the perturbation inside the product:

    round:   W(a) = W_0 + sum_j a_j Z_j, written once, shared by all clients
    client:  W_s = W(a) + sum_{i < s} c_i Z_i;  x W_s is computed as
             x W(a) + x (sum_i c_i Z_i +- eps Z_s), Z drawn again by blocks
             g = (L(W_s + eps Z_s) - L(W_s - eps Z_s)) / (2 eps),
             c_s = -eta g, h_j += c_s for the seed j of step s
    server:  a <- a + sum_k w_k h_k

Defaults as `fed_kseed`: K = 4096, eps = 5e-4.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, server, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.seeded import plain_sgd
from fedjax_llm.nodes import Seeded, Swayed
from fedjax_llm.nodes.swayed import key_data
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  LossSum,
  Params,
  Work,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_kseed_base': dict(
    adapter=dict(name='swayed'),
    local=dict(name='sgd', learning_rate=1e-4),
    algorithm=dict(candidates=64),
  ),
}


def fed_kseed_base(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  candidates: int = 4096,
  eps: float = 5e-4,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedKSeed on whole weights, perturbed inside of the product.

  Qin et al. 2024, arXiv 2312.06353. The state is a histogram [K] alone; it is
  written into the base once a round, outside of the clients' `vmap`, so the
  base of all clients is one. A client holds a block of a direction at a time
  and the coefficients of its steps, and step s draws the directions of s + 1
  steps: memory is that of inference, time grows with the square of the steps.
  The weights are those of `adapter.name=swayed`. The served model draws every
  seed of the histogram in each product: `export --to merged` writes the
  weights.

  Args:
    candidates: K, the size of the pool.
    eps: the distance of the two points.

  Raises:
    Error: no candidate, `eps` not positive, an optimizer with moments, a scope;
      from `init`, another adapter.

  >>> from fedjax_llm import local
  >>> node = Swayed(jnp.zeros((2, 1, 2), jnp.uint32), jnp.zeros((2, 1)),
  ...               jnp.ones(2, jnp.int32))
  >>> method = fed_kseed_base(
  ...   None, local.optimizer('sgd'), candidates=16, fold=lambda b, p: (b, p))
  >>> method.init(jax.random.key(0), {'q': node}).params.coefficients.shape
  (16,)
  """
  refuse('fed_kseed_base', 'scope', parts)
  plain_sgd(optimizer, 'fed_kseed_base')
  if candidates < 1:
    raise Error(f'fed_kseed_base: candidates={candidates} must be at least 1.')
  if known(eps) and not eps > 0:
    raise Error(f'fed_kseed_base: eps={eps} must be above 0.')
  fold = parts.pop('fold', None)
  if fold is None:
    raise Error(
      'fed_kseed_base writes its directions into the base once a round, so it '
      "needs fold, the adapter's function: fold=adapter.fold."
    )

  def wrap(key, params) -> Seeded:
    nodes = jax.tree.leaves(params, is_leaf=_is_swayed)
    if not nodes or not all(map(_is_swayed, nodes)):
      raise Error(
        'fed_kseed_base perturbs whole weights inside of their products, and '
        'only nodes of adapter.name=swayed are drawn there.'
      )
    seed = jax.random.bits(key, (), jnp.uint32)
    return Seeded(params, jnp.zeros(candidates), seed)

  def model(state: Seeded) -> Params:
    keys = _keys(state.seed, jnp.arange(candidates))
    return swayed(state.params, keys, state.coefficients, candidates)

  rule = parts.pop('aggregator', None) or aggregators.mean()
  update = in_product(loss, optimizer, eps, candidates)

  def build(**more: Any) -> FederatedAlgorithm:
    return compose(
      update,
      scope=scopes.everything(),
      aggregator=aggregators.on_coefficients(rule),
      **{'upload': uploads.nonzero(), 'measure': None, **parts, **more},
    )

  return server.on_part(
    build,
    wrap=wrap,
    get=model,
    put=lambda state, part: state,  # the histogram stays the server's
    fold=fold,
  )


def in_product(
  loss: Loss, optimizer: LocalOptimizer, eps: float, candidates: int
) -> LocalUpdate:
  """Returns S steps of two points each on the weights of a folded base.

  The update holds a coefficient a candidate; see `fed_kseed_base`.
  """

  def run(base, start: Seeded, state, batches, masks, context) -> ClientOutput:
    num = jax.tree.leaves(batches)[0].shape[0]
    draws = jax.random.fold_in(context.key, candidates)
    places = jax.random.randint(draws, (num,), 0, candidates)
    keys = _keys(start.seed, places)

    def value(sizes, count, batch, key) -> tuple[jax.Array, LossSum]:
      params = swayed(start.params, keys, sizes, count)
      sums = loss(base, params, batch, key)
      return sums.total / jnp.maximum(sums.count, 1.0), sums

    def step(index, carry):
      sizes, totals = carry
      batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)
      key = jax.random.fold_in(context.key, index)
      at = lambda size: sizes.at[index].set(size)
      above, sums = value(at(eps), index + 1, batch, key)
      # The second pass begins after the first: memory is that of one.
      sizes, above = jax.lax.optimization_barrier((sizes, above))
      below, more = value(at(-eps), index + 1, batch, key)
      slope = (above - below) / (2 * eps)
      sums = jax.tree.map(lambda x, y: 0.5 * (x + y), sums, more)
      real = sums.count > 0
      rate = optimizer.learning_rate(context.round * num + index)
      now = (sums, jnp.int32(1), jnp.abs(slope))
      totals = jax.tree.map(lambda t, x: t + jnp.where(real, x, 0), totals, now)
      return sizes.at[index].set(jnp.where(real, -rate * slope, 0)), totals

    zero = jnp.float32(0)
    totals = (LossSum(zero, zero, zero), jnp.int32(0), zero)
    # All steps: the number of directions is then the same for all clients.
    sizes, totals = jax.lax.fori_loop(0, num, step, (jnp.zeros(num), totals))
    sums, taken, slope = totals
    histogram = jnp.zeros(candidates).at[places].add(sizes)
    none = jax.tree.map(lambda _: None, start)
    return ClientOutput(
      update=none._replace(coefficients=histogram),
      masks=masks,
      work=Work(tokens=sums.count, steps=taken),
      metrics={
        'loss': sums.total / jnp.maximum(sums.count, 1.0),
        'accuracy': sums.correct / jnp.maximum(sums.count, 1.0),
        'slope': slope / jnp.maximum(taken, 1),
      },
    )

  return LocalUpdate(lambda trainable: (), run)


def swayed(params: Params, keys: Any, sizes: Any, count: Any) -> Params:
  """Returns the nodes with the same directions J, each of its own weight.

  Args:
    params: a tree of `Swayed` nodes.
    keys: [J], of the directions.
    sizes: [J].
    count: of the directions that are used.
  """

  def node(path, one: Swayed) -> Swayed:
    num = one.count.shape[0]
    every = jnp.broadcast_to(sizes, (num, *sizes.shape))
    which = key_data(keys, tree.path_name(path), num)
    number = jnp.broadcast_to(jnp.asarray(count, jnp.int32), (num,))
    return Swayed(which, every, number)

  return jax.tree_util.tree_map_with_path(node, params, is_leaf=_is_swayed)


def _keys(seed: Any, places: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), places)


def _is_swayed(x: Any) -> bool:
  return isinstance(x, Swayed)
