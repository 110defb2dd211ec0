"""FedAMoLE: experts of a pool choose the clients that they suit best.

Zhang et al. 2024, arXiv 2411.19128.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters, aggregators, local, server
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  compose,
  refuse,
)
from fedjax_llm.scopes import assignment, policies
from fedjax_llm.types import FederatedAlgorithm, Loss, Metrics, Params, Uploads

# What the config of each method changes.
NEEDS = {
  # Ten clients, all of them in every round.
  'fed_amole': dict(clients=dict(name='full'), population=dict(max_clients=12)),
}


def fed_amole(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_experts: int = 30,
  clients_per_expert: int = 2,
  min_experts: int = 2,
  max_experts: int = 8,
  balance: float = 0.001,
  weighted: bool = False,
  policy: Callable[[int, Any, Any], Any] | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAMoLE: experts of a pool choose the clients that they suit best.

      client:  y = x W + s x A B + sum_{e in top 2 of its own} g_e s x A_e B_e
               minimises loss + balance * sum over weights of the router's
               balance, and reports the means of x P and of x A_e,
      server:  A, B, P  <- mean over clients,
               A_e, B_e <- mean over the clients that held e, or as they were,
      host:    in every weight, z = argmax sum_ej S_ej z_ej, where each expert
               chooses `clients_per_expert` clients and each client gets
               `min_experts` to `max_experts`; S = softmax over clients of
               <mean x A_e, mean x P> / sqrt(R), and random at first

  Zhang et al. 2024, arXiv 2411.19128, with the defaults of the authors' code,
  which also decides what the paper leaves open: A_e serves as the key of expert
  e in the router (`adapters.experts`), balances are summed over weights, and
  clients count the same unless `weighted`. It takes any adapter of low-rank
  factors of one rank in the layers, which become the shared experts.

  The authors measure embeddings on a twentieth of a client's texts that is held
  back from training; here they are measured on the texts of its round. In their
  experiments every client takes part in every round; here the last report
  counts of a client that does not. Dropout, and noise on the embeddings, are
  left out.

  A client is served the server's experts, those that it held in its last round.
  A client that has never taken part gets the shared expert alone, a plain LoRA,
  and a run exports the same. The pool is one array for all clients, so a round
  computes all its experts for each client; only the assigned ones travel.

  Args:
    num_clients: N.
    num_experts: E, of each weight.
      policy: writes the entry 'experts' [N, M, E] of the profiles;
        `policies.by_affinity` if None.

  Raises:
    Error: bounds that no assignment satisfies; a scope or an aggregator in
      `parts`.

  >>> from fedjax_llm.nodes import LowRank
  >>> node = LowRank(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 3)), jnp.ones(2))
  >>> method = fed_amole(
  ...   None, local.optimizer('sgd'), num_clients=3, num_experts=5)
  >>> state = method.init(jax.random.key(0), {'layers': {'q': node}})
  >>> plan = state.aggregator.profiles['experts']  # [N, M, E]
  >>> plan.sum(0).tolist()  # each expert of both layers has chosen two
  [[2, 2, 2, 2, 2], [2, 2, 2, 2, 2]]
  """
  for section in ('scope', 'aggregator'):
    refuse('fed_amole', section, parts)
  bounds = dict(
    per_expert=clients_per_expert, least=min_experts, most=max_experts
  )
  policies.check_bounds(num_experts, num_clients, **bounds)
  decide = policies.by_affinity(**bounds) if policy is None else policy
  update = local.sgd(local.balanced(loss, balance), optimizer)
  fold = parts.pop('fold', None)
  algorithm = server.on_part(
    functools.partial(
      compose,
      local.routed(local.reported(update, local.embeddings(loss))),
      scope=assignment.assigned(),
      aggregator=aggregators.masked_mean('mask', weighted=weighted),
      **{'measure': _of_shared(weighted), 'fold': fold, **parts},
    ),
    wrap=lambda key, params: adapters.experts.pooled(
      jax.random.fold_in(key, 1), params, num_experts
    ),
    get=adapters.experts.shared,
    put=lambda params, part: part,
    serve=lambda params, state: (
      adapters.experts.shared(params) if state is None else params
    ),
  )

  def first(params: Params) -> tuple[dict[str, np.ndarray], Any]:
    places, rank = assignment.places(params)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    report = {
      'experts': zeros(places, num_experts, rank),
      'tokens': zeros(places, rank),
      'held': zeros(places, num_experts),
    }
    none = np.zeros((num_clients, places, num_experts), bool)
    return {'experts': none}, report

  def sent(plan):
    return {
      'experts': plan['experts'][..., None],
      'tokens': jnp.bool_(True),
      'held': jnp.bool_(False),  # the server knows its own plan
    }

  return server.planned(
    algorithm,
    lambda params: decide,
    first=first,
    num_clients=num_clients,
    sent=sent,
  )


def _of_shared(weighted: bool) -> Callable[[Uploads, Params, Params], Metrics]:
  """Returns `aggregators.measure` of shared experts: only they have a mean."""
  view = adapters.experts.shared

  def measure(uploads: Uploads, old: Params, new: Params) -> Metrics:
    weight = uploads.weight
    if not weighted:
      weight = uploads.valid.astype(jnp.float32)
    masks = uploads.masks
    seen = Uploads(
      update=view(uploads.update),
      start=view(uploads.start),
      masks=masks._replace(held=view(masks.held), trained=view(masks.trained)),
      weight=weight,
      valid=uploads.valid,
    )
    return aggregators.measure(seen, view(old), view(new))

  return measure
