"""Rounds that can be differentiated with respect to their inputs.

`rounds` returns several rounds as one function, `mixed` a personalised
algorithm, `learn_client_weights` the weights of clients.

A round is one jitted function, so `jax.grad` goes through it as soon as its
local training has a gradient in reverse:

    optimizer = local.optimizer('sgd', 0.1, differentiable=True)

The variable is an argument of the function that builds the algorithm or its
cohorts: the server's learning rate, weights of clients, a mixing matrix, a
parameter of a user's own aggregation rule, the base. Selections (Krum, a
median, top-k) count as fixed, rounding (quantised uploads) has the gradient
zero, and rules that factorise (`flexlora`, `fedsvd`, `fedrot`) have no
gradient where singular values coincide.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm import checks, scopes, tree
from fedjax_llm.types import (
  Base,
  ClientState,
  Cohort,
  Error,
  FederatedAlgorithm,
  Params,
  RoundInfo,
  Scope,
  ServerState,
  Shared,
)


def rounds(
  algorithm: FederatedAlgorithm, *, remat: bool = True
) -> Callable[..., tuple[ServerState, ClientState, RoundInfo]]:
  """Returns several rounds as one function, a scan that has a gradient.

  With remat the backward pass computes a round again, so only the state at its
  beginning is kept (parameters, moments, client states), not the values inside
  it (Chen et al. 2016, arXiv 1604.06174).

  Args:
    algorithm: its optimizer is built with `differentiable=True`.
    remat: False keeps all values that the gradient needs: faster, with more
      memory.

  Returns:
    `run(state, cohorts, base=None, states=ClientState())
    -> (state, states, info)`. Leaves of `cohorts` begin with the axis of
    rounds, [rounds, K, ...] (`tree.stack` of cohorts). `states` holds the
    states of all N clients, [N, ...] by id, if the method's clients keep any:
    `tree.broadcast(algorithm.init_client(state.params), N)` at the start.
    `RoundInfo` comes as [rounds, ...] and carries no gradient: an objective
    is computed from the state.

    The gradient of a server's learning rate, with clients that move from 0 to 1
    and an optimum at 3:

  >>> from fedjax_llm import recipes, server, types
  >>> def algorithm(rate):
  ...   def train(base, start, state, batches, masks, context):
  ...     return types.ClientOutput(jnp.float32(1), masks)
  ...   update = types.LocalUpdate(lambda params: (), train)
  ...   return recipes.compose(update, server=server.sgd(rate), measure=None)
  >>> one = jnp.ones(2)
  >>> cohort = Cohort(jnp.arange(2), one, one, one > 0)
  >>> def error(rate):
  ...   method = algorithm(rate)
  ...   state = method.init(jax.random.key(0), jnp.float32(0))
  ...   state, _, _ = rounds(method)(state, tree.stack([cohort, cohort]))
  ...   return (state.params - 3) ** 2
  >>> float(jax.grad(error)(1.0))  # of (2 rate - 3)^2
  -4.0
  """

  def one(carry, cohort: Cohort, base: Base):
    state, states = carry
    num = jax.tree.leaves(states)[0].shape[0] if jax.tree.leaves(states) else 0
    held = cohort._replace(states=tree.take(states, cohort.ids))
    state, new, info = algorithm.round(state, held, base)
    # An index out of range is dropped: such a client keeps its state.
    place = jnp.where(info.reported, cohort.ids, num)
    put = lambda all, rows: all.at[place].set(rows, mode='drop')
    states = jax.tree.map(put, states, new)
    # Norms of metrics at zero would otherwise spoil the gradient.
    return (state, states), jax.lax.stop_gradient(info)

  # The base is an argument, so no round keeps a copy of it for the gradient.
  step = jax.checkpoint(one, prevent_cse=False) if remat else one

  def run(
    state: ServerState,
    cohorts: Cohort,
    base: Base = None,
    states: ClientState = ClientState(),  # noqa: B008
  ) -> tuple[ServerState, ClientState, RoundInfo]:
    checks.one_cohort(cohorts)
    (state, states), info = jax.lax.scan(
      lambda carry, cohort: step(carry, cohort, base), (state, states), cohorts
    )
    return state, states, info

  return run


def mixed(
  algorithm: FederatedAlgorithm,
  matrix: jax.Array,
  *,
  scope: Scope | None = None,
) -> FederatedAlgorithm:
  """Returns an algorithm with a model a client, mixed by a matrix each round.

      theta_k <- sum_j M_kj theta_j'    where j trained theta_j to theta_j'

  Personalised aggregation: the rows of a matrix [K, K] usually sum to one; the
  identity is local training, 1 / K everywhere federated averaging. With a
  gradient the matrix can be learned, as the weights of FedFomo (Zhang et al.
  2021, arXiv 2012.08565) are estimated.

  Every field of the server's state is stacked, [K, ...]; row k belongs to the
  client in row k of every cohort, and `personal` returns the stack. Scalar
  metrics come as [K]. Local training, uploads and the server's optimizer are
  those of `algorithm`, a client at a time; its aggregator sees one client.

  Args:
    algorithm: of one client.
    matrix: [K, K].
    scope: its shared leaves are mixed; by default all trained leaves.

  Raises:
    Error: the matrix is not square, or the cohort has another number of
      clients.
  """
  if jnp.ndim(matrix) != 2 or matrix.shape[0] != matrix.shape[1]:
    raise Error(f'mixed: the matrix is {jnp.shape(matrix)}, not [K, K].')
  labels = (scope or scopes.everything()).labels

  def init(key, params) -> ServerState:
    return tree.broadcast(algorithm.init(key, params), len(matrix))

  def round(state, cohort: Cohort, base: Base = None):
    if len(cohort.ids) != len(matrix):
      raise Error(
        f'mixed: a matrix of {len(matrix)} clients met a cohort of '
        f'{len(cohort.ids)}.'
      )
    alone = jax.tree.map(lambda x: jnp.asarray(x)[:, None], cohort)
    state, states, info = jax.vmap(algorithm.round, (0, 0, None))(
      state, alone, base
    )
    of_one = lambda x: x[:, 0] if x.ndim > 1 else x
    shared = tree.select(state.params, labels(state.params), Shared)
    sums = tree.weighted_sum(shared, matrix)
    blend = jax.tree.map(lambda x, old: x.astype(old.dtype), sums, shared)
    state = state._replace(params=tree.merge(blend, state.params))
    states = jax.tree.map(lambda x: x[:, 0], states)
    return state, states, jax.tree.map(of_one, info)

  return FederatedAlgorithm(
    init, algorithm.init_client, round, lambda params, state: params
  )


class Learned(NamedTuple):
  """The clients' weights and the loss before each of n steps and after them."""

  weight: jax.Array  # [n + 1, N], mean 1
  loss: jax.Array  # [n + 1], the held-out loss


def learn_client_weights(
  algorithm: FederatedAlgorithm,
  state: ServerState,
  cohorts: Cohort,
  base: Base,
  heldout: Callable[[Base, Params], jax.Array],
  *,
  num_clients: int,
  num_steps: int = 20,
  learning_rate: float = 0.3,
  states: ClientState = ClientState(),  # noqa: B008
) -> Learned:
  """Returns weights of clients, learned by gradients through the rounds.

      min over z of heldout(params after the rounds),
      client k counting N softmax(z)_k times its weight

  by Adam from z = 0, every step through all rounds from the same `state`. A
  client with updates that raise the held-out loss, such as one with corrupted
  labels, gets a small weight (as examples do in Ren et al. 2018, arXiv
  1803.09050).

  Args:
    algorithm: its optimizer is built with `differentiable=True`, and its
        aggregator uses weights (`mean`).
    state: where the rounds begin.
    cohorts: [rounds, K, ...], as in `rounds`.
    base: the frozen weights.
    heldout: `(base, params) -> []`, a loss on trusted text.
    num_clients: N; ids are below N.
    num_steps: of Adam.
    learning_rate: of Adam, on z.
    states: as in `rounds`.
  """
  run = rounds(algorithm)
  adam = optax.adam(learning_rate)

  def objective(logits, state, cohorts, base, states):
    weight = num_clients * jax.nn.softmax(logits)
    each = cohorts.weight * weight[cohorts.ids]
    end, _, _ = run(state, cohorts._replace(weight=each), base, states)
    return heldout(base, algorithm.personal(end.params, None)), weight

  @jax.jit
  def descend(state, cohorts, base, states):
    def step(carry, _):
      logits, moments = carry
      (loss, weight), grads = jax.value_and_grad(objective, has_aux=True)(
        logits, state, cohorts, base, states
      )
      updates, moments = adam.update(grads, moments)
      return (optax.apply_updates(logits, updates), moments), (weight, loss)

    start = jnp.zeros(num_clients)
    _, seen = jax.lax.scan(
      step, (start, adam.init(start)), length=num_steps + 1
    )
    return Learned(*seen)

  return descend(state, cohorts, base, states)
