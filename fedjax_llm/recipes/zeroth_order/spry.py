"""SPRY: every client trains a few matrices by forward-mode differentiation.

Panchal et al. 2024, arXiv 2405.15551.

    server:    deals the factor pairs of the model to the M clients of a round
    client k:  g = <grad L, v> v,  v on the leaves of its pairs alone (one jvp)
    server:    mean of every leaf over the clients that trained it, FedYogi

Defaults: one direction a step, ranks of one in the paper, and FedYogi's server.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, local, scopes
from fedjax_llm import server as servers
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import LowRank
from fedjax_llm.recipes.composing import SLOWLY, compose, refuse
from fedjax_llm.scopes.allotment import rank_sizes
from fedjax_llm.scopes.ranks import of_profile
from fedjax_llm.types import (
  Cohort,
  FederatedAlgorithm,
  Loss,
  Params,
  RoundInfo,
  Scope,
  ServerOptimizer,
)

# What the config of each method changes.
NEEDS = {
  'spry': SLOWLY,
}


def spry(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  directions: int = 1,
  distribution: str = 'normal',
  server_learning_rate: float = 1e-2,
  server: ServerOptimizer | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """SPRY: clients train dealt matrices by forward-mode differentiation.

  Panchal et al. 2024, arXiv 2405.15551, algorithm 1, in its form with an
  exchange once a round. The pairs (a, b) of all layers are dealt in their order
  to the valid clients of a round in the order of their ids; with more clients
  than pairs several clients train the same pair, and leaves that are no factors
  (a classifier) are trained by all. A direction acts on a client's own leaves,
  so that the variance of its gradient grows with these alone. The authors'
  aggregation is not published: mean and server follow the paper's text. A
  client receives eight bytes that say which pairs are its own.

  Args:
    directions: directions a step, one pass each.
    distribution: of a direction.
    server_learning_rate: of FedYogi.
    server: another server optimizer.

  Raises:
    Error: a scope or an aggregator in `parts`; from the round, no low-rank
      factors.

  >>> from fedjax_llm.local import optimizer
  >>> method = spry(None, optimizer('sgd', 1e-3))
  >>> method.init_client({'q': LowRank(
  ...   jnp.ones((4, 1)), jnp.ones((1, 3)), jnp.float32(1))}).private is None
  True
  """
  for section in ('scope', 'aggregator'):
    refuse('spry', section, parts)
  gradient = local.along(
    local.forward_mode(), directions=directions, distribution=distribution
  )
  algorithm = compose(
    local.sgd(loss, optimizer, gradient=gradient),
    scope=dealt_pairs(),
    aggregator=aggregators.masked_mean('mask'),
    server=server or servers.fed_yogi(server_learning_rate),
    **parts,
  )
  return _dealing(algorithm)


def deal(turn: Any, turns: Any, num: int) -> jax.Array:
  """Returns the pairs of the client `turn` of `turns`, booleans [num].

  Pair i goes to client i mod turns; a client beyond the last pair gets pair
  turn mod num.

  >>> [deal(k, 2, 3).astype(int).tolist() for k in range(2)]
  [[1, 0, 1], [0, 1, 0]]
  >>> [deal(k, 4, 3).astype(int).tolist() for k in range(4)]
  [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
  """
  pair = jnp.arange(num)
  return (pair % jnp.maximum(turns, 1) == turn) | (turn % num == pair)


def dealt_pairs() -> Scope:
  """Returns a scope: a client holds all and trains the pairs dealt to it.

  The profile's entry 'turn' [2] holds the client's place among the clients of
  the round, and their number.

  >>> from fedjax_llm.types import Context
  >>> node = LowRank(jnp.ones((3, 5, 2)), jnp.ones((3, 2, 4)), jnp.ones(3))
  >>> mine = Context(profile={'turn': jnp.array([0, 2])})
  >>> masks = dealt_pairs().mask({'q': node}, None, mine)
  >>> masks.trained['q'].a[:, 0, 0].astype(int).tolist()  # of three layers
  [1, 0, 1]
  """
  inner = scopes.everything()

  def mask(start, state, context):
    turn = of_profile(context.profile, 'turn', 'place in the round')
    masks = inner.mask(start, state, context)
    mine = deal(turn[0], turn[1], num_pairs(start))
    at = 0

    def node(x, m):
      nonlocal at
      if not isinstance(x, LowRank):
        return m
      lead = x.a.shape[:-2]
      num = int(np.prod(lead))
      own = mine[at : at + num].reshape(*lead, 1, 1)
      at += num
      return m._replace(a=m.a & own, b=m.b & own)

    is_leaf = lambda x: x is None or isinstance(x, LowRank)
    trained = jax.tree.map(node, start, masks.trained, is_leaf=is_leaf)
    return masks._replace(trained=trained)

  return inner._replace(mask=mask)


def num_pairs(params: Params) -> int:
  """Returns the number of factor pairs, one a weight and layer.

  Raises:
    Error: there are none.

  >>> num_pairs({'q': LowRank(jnp.ones((3, 5, 2)), jnp.ones((3, 2, 4)), None)})
  3
  """
  sizes, _ = rank_sizes(params)
  return len(sizes)


def _dealing(algorithm: FederatedAlgorithm) -> FederatedAlgorithm:
  """Returns the algorithm whose clients know their place in the round."""

  def placed(cohort: Cohort) -> Cohort:
    ids = jnp.where(cohort.valid, cohort.ids, jnp.iinfo(jnp.int32).max)
    place = jnp.argsort(jnp.argsort(ids))
    turns = jnp.broadcast_to(jnp.sum(cohort.valid), place.shape)
    turn = jnp.stack([place, turns], axis=1).astype(jnp.int32)
    present = cohort.profiles if isinstance(cohort.profiles, Mapping) else {}
    return cohort._replace(profiles={**present, 'turn': turn})

  def billed(info: RoundInfo, cohort: Cohort) -> RoundInfo:
    more = jnp.where(cohort.ids >= 0, 8, 0).astype(jnp.int32)
    down = jnp.concatenate([info.bytes_down, more[:, None]], axis=1)
    return info._replace(bytes_down=down)

  def round(state, cohort, base=None, data=None):
    state, states, info = algorithm.round(state, placed(cohort), base, data)
    return state, states, billed(info, cohort)

  def train(state, cohort, base=None):
    assert algorithm.train is not None
    uploads, states, info = algorithm.train(state, placed(cohort), base)
    return uploads, states, billed(info, cohort)

  return algorithm._replace(round=round, train=train)
