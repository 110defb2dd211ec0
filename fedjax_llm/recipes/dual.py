"""Methods on a shared and a personal part: `fed_opt` for `Dual` parameters.

`compose` returns a `FederatedAlgorithm`. The server averages the shared part,
every client keeps its own personal one (`clients/store.py`), and
`FederatedAlgorithm.personal` returns a client's model from both. A client that
never trained gets the shared part. Recipes make both parts from the adapter of
the config, such as `lora`.

In methods that train the parts in separate phases, `private_steps` is the
number of a client's S batches for the private part; the shared one takes the
rest. Without it both take all S, which doubles a round's computation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, server, tree
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.nodes import Dual
from fedjax_llm.recipes import composing
from fedjax_llm.types import (
  ClientState,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Masks,
  Params,
  Private,
  Scope,
  Shared,
)

OWN = scopes.frozen('^shared/')  # trains the personal part
COMMON = scopes.frozen('^personal/')


def compose(
  update: LocalUpdate,
  serve: Callable[[Dual, Any], Params],
  parts: dict[str, Any],
  split: Callable[[Key, Params], Dual],
) -> FederatedAlgorithm:
  """Returns `on_both` of a single local update.

  The first state of the local update, or the whole state, counts the client's
  rounds.
  """

  def trained(state):
    count = state.local
    count = count if isinstance(count, local.Counted) else count[0]
    return count.rounds > 0

  build = functools.partial(composing.compose, update)
  return on_both(build, serve, parts, split, trained)


def on_both(
  build: Callable[..., FederatedAlgorithm],
  serve: Callable[[Dual, Any], Params],
  parts: dict[str, Any],
  split: Callable[[Key, Params], Dual],
  trained: Callable[[ClientState], Any],
) -> FederatedAlgorithm:
  """Returns a method on `Dual` parameters; clients keep the personal part.

  `build(scope=..., aggregator=..., **parts)` returns the algorithm on both
  parts; `trained(state)` is True if the client has trained its personal part.

  `split(key, params)` makes them from the adapter's parameters;
  `serve(params, seen)` returns a client's model, with that as `seen`.
  """
  parts = dict(parts)
  fold = parts.pop('fold', None)
  rule = parts.pop('aggregator', None) or aggregators.mean()
  inner = parts.pop('scope', None) or scopes.everything()

  def wrap(key, params):
    both = split(jax.random.fold_in(key, 1), params)
    # Two buffers: a donated state must not hold one buffer twice.
    own = jax.tree.map(jnp.copy, both.personal)
    return both._replace(personal=own)

  def served(params, state):
    if state is None:
      return serve(params, jnp.bool_(False))
    return serve(params, trained(state))

  return server.on_part(
    functools.partial(
      build,
      scope=_at_home(inner),
      aggregator=aggregators.on_shared(rule),
      **parts,
    ),
    wrap=wrap,
    get=shared,
    # Residuals belong to the shared part: the base holds them once.
    put=lambda both, part: Dual(part, multi.without_residuals(both.personal)),
    serve=served,
    fold=fold,
  )


def _at_home(inner: Scope) -> Scope:
  """Returns `inner` on both parts, with the personal one private."""

  def labels(params):
    chosen = inner.labels(params)
    own = jax.tree.map(lambda x: Private if x is Shared else x, chosen.personal)
    return chosen._replace(personal=own)

  return inner._replace(labels=labels)


def only(part: str, inner: Scope) -> Scope:
  """Returns `inner`, training `part` of a `Dual` and nothing of the other."""

  def mask(start, state, context):
    held, trained = inner.mask(start, state, context)
    none = jax.tree.map(jnp.zeros_like, trained)
    return Masks(held, none._replace(**{part: getattr(trained, part)}))

  return inner._replace(mask=mask)


def shared(params: Dual) -> Params:
  return params.shared


def personal(params: Dual) -> Params:
  return params.personal


def own_or_shared(params: Dual, seen: Any) -> Params:
  own = multi.with_residuals(params.personal, params.shared)
  return where(seen, own, params.shared)


def weighed(weight: float) -> Callable[[Dual, Any], Params]:
  def serve(params, seen):
    share = jnp.where(seen, weight, 0.0)
    return multi.mix(
      (multi.without_residuals(params.personal), params.shared),
      (share, 1 - share),
    )

  return serve


def where(seen: Any, one: Params, other: Params) -> Params:
  return tree.map_present(lambda x, y: jnp.where(seen, x, y), one, other)


def first_steps(steps: int | None) -> tuple[int, ...] | None:
  """Returns the steps of the first of two phases, for `local.phases`."""
  return None if steps is None else (steps,)
