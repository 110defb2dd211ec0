"""PFPT: clients' prompts are samples of a few summarising prompts.

Weng et al. 2024, NeurIPS, arXiv 2502.19752.

    w_tj ~ N(theta_i, diag s(theta_i)^2),  theta_i is taken with chance
    q(theta_i),  i = z_t(j);  s and q are sigmoids of networks of one layer

The equations, their solver and its defaults are as in the authors' program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_llm import scopes, tree
from fedjax_llm.adapters.prompts.draws import affine
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Affine, Prompt
from fedjax_llm.recipes.composing import only, with_rule
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
  Traits,
  known,
)

# What the config of each method changes.
NEEDS = {
  'pfpt': dict(
    adapter=dict(name='soft_prompt'), algorithm=dict(hidden=16, sweeps=2)
  ),
}

_FAR = 1e9  # the cost of a prompt of a client that does not count


class Networks(NamedTuple):
  """The networks of s and of q, each of two layers with a ReLU between."""

  spread: tuple[Affine, Affine]  # [D, H], [H, D]
  taken: tuple[Affine, Affine]  # [D, H], [H, 1]


def pfpt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  hidden: int = 128,
  sweeps: int = 10,
  server_rate: float = 1e-3,
  **parts: Any,
) -> FederatedAlgorithm:
  """PFPT: the server summarises the clients' sets of prompt rows.

      l_t = sum_j log N(w_tj; theta_z(j), s(theta_z(j))^2) + log q(theta_z(j))
      theta, s, q <- a step of Adam on -l_t,
      z_t <- the matching of largest sum over j of
             log N(w_tj; theta_i, s(theta_i)^2) + c_i log q_i
             + (1 - c_i) log(1 - q_i),   c_i = 1 if z_t had taken theta_i

  for each client t in turn, `sweeps` times (Weng et al. 2024, arXiv
  2502.19752). theta starts as the rows of all clients, z_t as any distinct rows
  of them, the networks as new ones in every round; a matching takes no theta_i
  twice. In the authors' program every theta_i that some client takes is a row
  of the next prompt, so its length changes from round to round. A network here
  has a prompt of one length: the P rows that most clients take stay, in the
  order of theta. Clients count the same; other leaves are averaged by weight.

  Args:
    hidden: H of both networks.
    sweeps: passes over the clients.
    server_rate: the learning rate of Adam.

  Raises:
    Error: an aggregator in `parts`, a number out of range; from `init`, an
      adapter without a soft prompt.

  >>> from fedjax_llm import local
  >>> pfpt(None, local.optimizer('sgd'), sweeps=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.sweeps is 0; it must be at least 1.
  """
  for name, number in (('hidden', hidden), ('sweeps', sweeps)):
    if number < 1:
      raise Error(f'algorithm.{name} is {number}; it must be at least 1.')
  if known(server_rate) and server_rate <= 0:
    raise Error(f'algorithm.server_rate is {server_rate}; it must be above 0.')
  inner = parts.pop('scope', None) or scopes.everything()
  hint = 'summarises soft prompts: adapter.name=soft_prompt.'
  scope = only('pfpt', inner, _prompted, hint)
  rule = summarised(hidden, sweeps, server_rate)
  return with_rule('pfpt', rule, loss, optimizer, {**parts, 'scope': scope})


def _prompted(params: Params) -> bool:
  node = params.get('inputs') if isinstance(params, dict) else None
  return isinstance(node, Prompt)


def summarised(
  hidden: int = 128, sweeps: int = 10, rate: float = 1e-3
) -> Aggregator:
  """Returns the rule of `pfpt` for the node `Prompt` at 'inputs'."""

  def aggregate(uploads, state, params, key):
    weight = tree.normalise(by_weight(uploads))
    start, update = uploads.start['inputs'], uploads.update['inputs']
    rows = (start.rows + update.rows).astype(jnp.float32)  # [K, P, D]
    new = summary(rows, counted(uploads), key, hidden, sweeps, rate)
    delta = tree.map_present(
      lambda u, p: tree.weighted_sum(u, weight).astype(p.dtype),
      uploads.update,
      params,
    )
    old = params['inputs'].rows
    moved = Prompt((new - old).astype(old.dtype))
    return Aggregate({**delta, 'inputs': moved}), state

  return Aggregator(
    lambda params, key: (),
    aggregate,
    traits=Traits(changes_basis=True),  # rows have no place of their own
    weights=lambda uploads: counted(uploads).astype(jnp.float32),
  )


def begun(key: Key, valid: Any, rows: Any, hidden: int) -> tuple[Any, Networks]:
  """Returns the first matchings, the rows [K, P] that are taken, and networks.

  Layers start uniform in +-1 / sqrt of their inputs.
  """
  number, size, width = rows.shape
  keys = jax.random.split(key, 5)
  order = jax.random.uniform(keys[0], (number, number * size))
  order = jnp.where(jnp.repeat(valid, size), order, 2.0)
  taken = jnp.argsort(order, axis=-1)[:, :size]
  return taken, Networks(
    (affine(keys[1], width, hidden), affine(keys[2], hidden, width)),
    (affine(keys[3], width, hidden), affine(keys[4], hidden, 1)),
  )


def likelihood(
  theta: Any, networks: Networks, rows: Any, taken: Any
) -> tuple[Any, Any]:
  """Returns l_t of a client's rows [P, D], and the worth of matchings [P, G].

  >>> zero = Affine(jnp.zeros((1, 1)), jnp.zeros(1))  # s = q = 1 / 2
  >>> value, worth = likelihood(jnp.zeros((2, 1)),
  ...   Networks((zero, zero), (zero, zero)), jnp.zeros((1, 1)), jnp.array([0]))
  >>> round(float(value), 4), worth.shape  # log N(0; 0, 1/4) + log 1/2
  (-0.9189, (1, 2))
  """
  out = lambda pair: pair[1](jax.nn.relu(pair[0](theta)))
  log_s = jax.nn.log_sigmoid(out(networks.spread))  # [G, D]
  apart = (rows[:, None] - theta) * jnp.exp(-log_s)
  log_2pi = jnp.log(2 * jnp.pi)
  near = jnp.sum(-0.5 * (apart**2 + log_2pi) - log_s, -1)  # [P, G]
  chance = out(networks.taken)[:, 0]
  here = jnp.zeros(len(theta)).at[taken].set(1)
  log_q, log_not = jax.nn.log_sigmoid(chance), jax.nn.log_sigmoid(-chance)
  prior = here * log_q + (1 - here) * log_not
  worth = near + prior
  return jnp.sum(worth[jnp.arange(len(rows)), taken]), worth


def summary(
  rows: jax.Array,
  valid: Any,
  key: Key,
  hidden: int = 128,
  sweeps: int = 10,
  rate: float = 1e-3,
) -> jax.Array:
  """Returns the P summarising rows of sets of rows [K, P, D] of clients."""
  number, size, width = rows.shape
  taken, networks = begun(key, valid, rows, hidden)
  columns = jnp.repeat(valid, size)  # [G]
  adam = optax.adam(rate)
  start = rows.reshape(-1, width), networks

  def step(turn, carry):
    now, moments, taken = carry
    t = turn % number
    of = lambda now: likelihood(now[0], now[1], rows[t], taken[t])
    grads, worth = jax.grad(of, has_aux=True)(now)
    loss = jax.tree.map(jnp.negative, grads)
    updates, moving = adam.update(loss, moments)
    cost = jnp.where(columns, -worth, _FAR)
    i, j = optax.assignment.hungarian_algorithm(cost)
    mine = jnp.zeros(size, taken.dtype).at[i].set(j.astype(taken.dtype))
    new = (optax.apply_updates(now, updates), moving, taken.at[t].set(mine))
    keep = lambda x, y: jnp.where(valid[t], x, y)
    return jax.tree.map(keep, new, carry)

  (theta, _), _, taken = jax.lax.fori_loop(
    0, sweeps * number, step, (start, adam.init(start), taken)
  )
  votes = (
    jnp.zeros(number * size)
    .at[taken]
    .add(jnp.broadcast_to(valid[:, None], taken.shape).astype(jnp.float32))
  )
  _, best = jax.lax.top_k(votes, size)
  return theta[jnp.sort(best)]
