"""DeComFL: scalars both ways, along directions that all clients share.

Li et al. 2024, arXiv 2405.15861, algorithm 2.

    client, step s:  g_sp = (L(p + mu z_sp) - L(p)) / mu,   p = 1 ... P
                     p <- p - eta / P sum_p g_sp z_sp
    server:          g_sp <- mean over clients,
                     everyone: p <- p - eta sum_s 1/P sum_p g_sp z_sp

Defaults: mu = 1e-3, P = 5, one step a round in the paper; the mean is without
weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.seeded import fresh
from fedjax_llm.local.zeroth_order import Slope
from fedjax_llm.nodes import Seeded, directions
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.zeroth_order.seeded import (
  STILL,
  labels_of,
  on_seeded,
)
from fedjax_llm.types import (
  AnyAggregator,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  Params,
  Scope,
  ServerState,
  Shared,
)

# What the config of each method changes.
NEEDS = {
  'decomfl': dict(local=dict(name='sgd', learning_rate=1e-2)),
}


def decomfl(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_steps: int = 1,
  mu: float = 1e-3,
  perturbations: int = 5,
  distribution: str = 'normal',
  estimate: str = 'forward',
  log_rounds: int = 64,
  **parts: Any,
) -> FederatedAlgorithm:
  """DeComFL: scalars both ways, along directions that all clients share.

  Li et al. 2024, arXiv 2405.15861, algorithm 2. A client sends P scalars a step
  and receives, for every round that it missed, the mean scalars and the seed of
  that round, which it replays (`replayed`). Beyond `log_rounds` missed rounds
  it is billed for the parameters instead. With one step, one client and exact
  slopes it is SGD on random directions.

  Args:
    num_steps: S, local steps a round: `cohort.num_steps`.
    mu: the distance of the two points.
    perturbations: P, directions a step.
    distribution: of a direction.
    estimate: 'forward' differences, or 'central' (the default of the authors'
      program).
    log_rounds: rounds that the server keeps for clients that were absent.

  Raises:
    Error: an optimizer with moments, on the client or the server; a number
      below one; another estimate; a scope with private leaves.

  >>> method = decomfl(None, local.optimizer('sgd', 1e-3), num_steps=2)
  >>> state = method.init(jax.random.key(0), {'w': jnp.ones(9)})
  >>> state.params.coefficients.shape  # S, P
  (2, 5)
  """
  differences = {
    'forward': local.forward_difference,
    'central': local.two_point,
  }
  if estimate not in differences:
    raise Error(
      f"decomfl: estimate={estimate!r} is neither 'forward' nor 'central'."
    )
  return along_shared(
    'decomfl',
    loss,
    optimizer,
    differences[estimate](mu),
    num_steps=num_steps,
    perturbations=perturbations,
    distribution=distribution,
    log_rounds=log_rounds,
    **parts,
  )


class Pieces(NamedTuple):
  """The parts of a method along shared directions, for `on_pieces`."""

  update: LocalUpdate
  wrap: Callable[[Key, Params], Seeded]
  after: Callable[..., ServerState]


def pieces(
  who: str,
  loss: Loss,
  optimizer: LocalOptimizer,
  slope: Slope,
  *,
  num_steps: int,
  perturbations: int,
  distribution: str = 'normal',
  log_rounds: int = 64,
  mask: Callable[[Params], Any] | None = None,
  scope: Scope | None = None,
) -> Pieces:
  """Returns the local update, the parameters and the phase after the rule.

  Args:
    who: the method's name, for error messages.
    loss, optimizer, slope: see `local.in_basis`.
    num_steps, perturbations: S and P.
    distribution, log_rounds: see `decomfl`.
    mask: `(params) -> leaves`: the entries that directions have, not zero.
    scope: its labels say which leaves are trained.
  """
  for name, value in (
    ('num_steps', num_steps),
    ('perturbations', perturbations),
    ('log_rounds', log_rounds),
  ):
    if value < 1:
      raise Error(f'{who}: {name}={value} must be at least 1.')
  labels = labels_of(
    who, scope, 'all clients step along the same directions, so no leaf can be'
  )

  def wrap(key: Key, params: Params) -> Seeded:
    trained = tree.select(params, labels(params), Shared)
    zeros = jnp.zeros((num_steps, perturbations))
    return Seeded(
      params=params,
      coefficients=zeros,
      seed=jax.random.bits(key, (), jnp.uint32),
      mask=None if mask is None else mask(trained),
      log=jnp.broadcast_to(zeros, (log_rounds, *zeros.shape)),
    )

  def after(state, base, data, key) -> ServerState:
    del base, data, key
    now: Seeded = state.params
    round, sent = state.round - 1, now.coefficients
    params = step(now, round, sent, labels, distribution)
    log = now.log.at[round % log_rounds].set(sent)
    return state._replace(
      params=now._replace(
        params=params, coefficients=jnp.zeros_like(sent), log=log
      )
    )

  update = local.in_basis(
    loss,
    optimizer,
    slope,
    fresh(perturbations),
    labels=labels,
    distribution=distribution,
    who=who,
  )
  return Pieces(update, wrap, after)


def on_pieces(
  made: Pieces, rule: AnyAggregator, scope: Scope, **parts: Any
) -> FederatedAlgorithm:
  """Returns the method of `pieces` under a rule and a scope on `Seeded`."""
  refuse('this method', 'download', parts)
  return on_seeded(
    made.update,
    made.wrap,
    scope=scope,
    download=uploads.known(),
    aggregator=rule,
    after=made.after,
    **parts,
  )


def along_shared(
  who: str,
  loss: Loss,
  optimizer: LocalOptimizer,
  slope: Slope,
  *,
  aggregator: AnyAggregator | None = None,
  log_rounds: int = 64,
  num_steps: int,
  perturbations: int,
  distribution: str = 'normal',
  mask: Callable[[Params], Any] | None = None,
  scope: Scope | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Returns a method whose clients send [S, P] coefficients of one basis.

  Rule and server optimizer act on the coefficients; the phase after the rule
  adds the directions to the parameters. All clients of a round have the same
  basis, so the mean of the coefficients is the mean of the clients' ends.

  `aggregator` is the rule on [K, S, P] coefficients, the mean without weights
  if None; other arguments are those of `pieces` and of `compose`.
  """
  made = pieces(
    who,
    loss,
    optimizer,
    slope,
    num_steps=num_steps,
    perturbations=perturbations,
    distribution=distribution,
    log_rounds=log_rounds,
    mask=mask,
    scope=scope,
  )
  rule = aggregators.on_coefficients(aggregator or aggregators.uniform_mean())
  rule = aggregators.replaying(rule, log_rounds)
  return on_pieces(made, rule, scopes.frozen(STILL), **parts)


def step(
  start: Seeded,
  round: Any,
  coefficients: jax.Array,
  labels: Callable[[Params], Any],
  distribution: str = 'normal',
) -> Params:
  """Returns the parameters after the step of one round, p + sum_j c_j z_j.

  >>> start = Seeded({'w': jnp.ones(3)}, None, jnp.uint32(7))
  >>> labels = scopes.everything().labels
  >>> step(start, 2, jnp.zeros((2, 5)), labels)['w'].tolist()
  [1.0, 1.0, 1.0]
  """
  flat = coefficients.ravel()
  keys = fresh(1).keys(start.seed, round, jnp.arange(flat.size))
  trained = tree.select(start.params, labels(start.params), Shared)
  moved = directions.combined(trained, keys, flat, distribution, start.mask)
  return tree.merge(moved, start.params)


def replayed(
  start: Seeded,
  log: jax.Array,
  begin: Any,
  end: Any,
  *,
  distribution: str = 'normal',
  scope: Scope | None = None,
) -> Params:
  """Returns a client's parameters after the rounds that it missed.

  Args:
    start: the parameters at the beginning of round `begin`, and the seed.
    log: [H, S, P], the server's `Seeded.log`.
    begin, end: the first round that is replayed, and the one after the last, at
      most H rounds.
    distribution, scope: of the method.

  >>> start = Seeded({'w': jnp.ones(3)}, None, jnp.uint32(7))
  >>> replayed(start, jnp.zeros((4, 2, 5)), 0, 3)['w'].tolist()
  [1.0, 1.0, 1.0]
  """
  labels = (scope or scopes.everything()).labels

  def body(round, params):
    now = start._replace(params=params)
    return step(now, round, log[round % len(log)], labels, distribution)

  return jax.lax.fori_loop(begin, end, body, start.params)
