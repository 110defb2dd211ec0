"""pFedMoAP: a mixture of the own context and those of similar clients.

Luo et al. 2025, arXiv 2410.10114.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, server, tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Context, PromptExperts
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientState,
  Error,
  FederatedAlgorithm,
  Frozen,
  Key,
  LocalUpdate,
  Loss,
  Params,
  Private,
)

# What the config of each method changes.
NEEDS = {
  'p_fed_moap': {
    **IMAGES,
    'adapter': dict(name='gated_context', length=4, size=8, heads=2),
    'algorithm': dict(num_experts=3),
  },
}


class Known(NamedTuple):
  """A client's number, -1 for a client that never trained."""

  client: Any  # [] int32


def p_fed_moap(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_experts: int = 10,
  share: float = 0.5,
  **parts: Any,
) -> FederatedAlgorithm:
  """pFedMoAP: an own context and gated contexts of similar clients.

      client k:  P_k = local steps from P on the loss of (P_k, gate_k, P_j, j in
                 the num_experts - 1 clients with the nearest latest P_j to the
                 own latest; these stay as they are),
      server:    P <- sum_k w_k P_k,   the latest P_k are kept

  Luo et al. 2025, arXiv 2410.10114; the logits are in `nodes.PromptExperts`.
  The average, from which every client of a round restarts, is that of the
  authors' code. A client in its first round has no experts and trains its
  context alone. The gate stays with the client. Served is the latest context of
  a client with its gate and experts; the average to a client that never
  trained. In that code 16 rows, gate size 128 with 8 heads, 10 rounds of 5
  epochs, and, unlike here, dropout 0.1 in the gate and a rate of its own.

  Args:
    num_clients: N.
    num_experts: contexts in the mixture, the own one included.
    share: lambda, the weight of the own logits beside the gated ones.

  Raises:
    Error: an aggregator or a scope in `parts`, fewer than two experts; from
      `init`, an adapter without a gated context.

  >>> from fedjax_llm.adapters import gated_context
  >>> from fedjax_llm.adapters.prompts.classes import sizes
  >>> params = gated_context(2, 2, 1).init(jax.random.key(0), sizes(4, 3, 2))
  >>> method = p_fed_moap(None, local.optimizer('sgd'), num_clients=3)
  >>> method.init(jax.random.key(0), params).params['latest'].shape
  (3, 2, 4)
  """
  for section in ('aggregator', 'scope'):
    refuse('p_fed_moap', section, parts)
  if num_experts < 2:
    raise Error(
      f'algorithm.num_experts is {num_experts}; it must be at least 2.'
    )
  others = min(num_experts, num_clients) - 1

  def wrap(key: Key, params: Params) -> Params:
    del key
    node = node_of('p_fed_moap', params, PromptExperts, 'gated_context')
    rest = {name: x for name, x in params.items() if name != 'scores'}
    return {
      'common': {**rest, 'scores': Context(node.rows)},
      'gate': node.heads,
      'latest': jnp.zeros((num_clients, *node.rows.shape), node.rows.dtype),
      'known': jnp.zeros(num_clients),  # 1 for a client with a context
    }

  def mixture(wrapped: Params, client: Any, rows: Any) -> Params:
    index, near = nearest(wrapped['latest'], wrapped['known'], client, others)
    node = PromptExperts(
      rows, wrapped['latest'][index], near, wrapped['gate'], jnp.float32(share)
    )
    return {**wrapped['common'], 'scores': node}

  def run(base, start, state, batches, masks, context):
    still = jax.lax.stop_gradient(
      {name: start[name] for name in ('latest', 'known')}
    )

    def total(base, params, batch, key):
      rows = params['common']['scores'].rows
      mixed = mixture({**params, **still}, context.client, rows)
      return loss(base, mixed, batch, key)

    out = local.sgd(total, optimizer).run(
      base, start, (), batches, masks, context
    )
    return out._replace(state=Known(jnp.asarray(context.client, jnp.int32)))

  def serve(wrapped: Params, state: ClientState | None) -> Params:
    if state is None:
      return wrapped['common']
    client = state.local.client
    known = (client >= 0) & (wrapped['known'][client] > 0)
    average = wrapped['common']['scores'].rows
    rows = jnp.where(known, wrapped['latest'][client], average)
    return mixture(wrapped, client, rows)

  return server.on_part(
    functools.partial(
      compose,
      LocalUpdate(lambda trainable: Known(jnp.int32(-1)), run),
      scope=scopes.labelled({'^(latest|known)$': Frozen, '^gate/': Private}),
      aggregator=_rule(others),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: wrapped['common'],
    put=lambda wrapped, part: {**wrapped, 'common': part},
    serve=serve,
  )


def nearest(
  latest: jax.Array, known: jax.Array, client: Any, number: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the clients with the nearest contexts, [X], and 1 where they are.

  `latest` [N, P, D] are contexts, `known` [N] is 1 for the clients that have
  one. A client without a context, or the number -1, has no neighbours.

  >>> latest = jnp.array([0.0, 3.0, 1.0]).reshape(3, 1, 1)
  >>> index, near = nearest(latest, jnp.array([1.0, 1.0, 0.0]), 0, 2)
  >>> index.tolist(), near.tolist()
  ([1, 0], [1.0, 0.0])
  """
  known = known > 0
  own = known[client] & (client >= 0)
  far = jnp.sum((latest - latest[client]) ** 2, (-2, -1))
  here = known & (jnp.arange(len(known)) != client) & own
  index = jnp.argsort(jnp.where(here, far, jnp.inf))[:number]
  return index, here[index].astype(jnp.float32)


def _rule(others: int) -> Aggregator:
  """Returns the mean of the contexts, which also keeps the latest of each."""
  mean = aggregators.as_stack(aggregators.mean())

  def init(params, key):
    del key
    rows = params['common']['scores'].rows
    return jnp.int32(0), jnp.int32(rows.size * rows.dtype.itemsize)

  def aggregate(uploads, state, params, key):
    result, _ = mean.aggregate(uploads, (), params, key)
    ends = tree.whole(uploads)['common']['scores'].rows
    reported = uploads.valid & (by_weight(uploads) > 0)
    place = jnp.where(reported, uploads.ids, len(params['known']))
    assign = jax.tree.map(lambda _: None, params)
    latest = params['latest'].at[place].set(ends, mode='drop')
    known = params['known'].at[place].set(1.0, mode='drop')
    assign = {**assign, 'latest': latest, 'known': known}
    count = jnp.sum(known).astype(jnp.int32)
    return Aggregate(result.delta, assign), (count, state[1])

  def num_bytes(state, seen):
    """Bills a client that took part before for the contexts of its experts."""
    before = jnp.int32(0) if isinstance(seen, tuple) else seen
    count = jnp.clip(state[0] - 1, 0, others)
    fresh = isinstance(seen, tuple)
    new = jnp.int32(0) if fresh else jnp.int32(1)
    return before * count * state[1], new

  return Aggregator(init, aggregate, num_bytes=num_bytes, weights=by_weight)
