"""Parts of split learning that its recipes share.

`compose` returns a `FederatedAlgorithm` on an adapter that is cut in two,
`states` the states that cross a cut.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm import scopes, server, tree
from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.sgd import stepped
from fedjax_llm.nodes import Halves
from fedjax_llm.recipes import composing
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Frozen,
  Loss,
  Masks,
  Model,
  Params,
  Private,
  Scope,
  Shared,
)

PARTS = ('averaged', 'private')


def compose(
  loss: Loss,
  optimizer: LocalOptimizer,
  messages: Callable[..., tuple[Any, Any]],
  cut: Callable[[Params], Halves],
  *,
  client_part: str = 'averaged',
  scope: Scope | None = None,
  fold: Any = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Returns `server.split` on an adapter, with one optimizer for both parts.

  Args:
    loss: on the whole adapter.
    optimizer: of the clients' parts and of the server's.
    messages: `(base, params, batch) -> (up, down)`, of the whole adapter.
    cut: returns the two parts of an adapter.
    client_part: 'averaged' over clients at the end of a round, or 'private'.
    scope: which leaves of `Halves` are trained; patterns see names such as
      'client/layers/self_attn/q_proj/kernel/a'.
    fold: `Adapter.fold`.
  """
  check_part(client_part)
  inner = scope or scopes.everything()
  stepper = server.Stepper(
    optimizer.init, functools.partial(stepped, optimizer)
  )
  whole = halves.joined
  return on_halves(
    functools.partial(
      server.split,
      lambda base, params, batch, key: loss(base, whole(params), batch, key),
      lambda base, params, batch: messages(base, whole(params), batch),
      build=composing.compose,
      client=stepper,
      above=stepper,
      scope=kept_by_clients(inner) if client_part == 'private' else inner,
      **parts,
    ),
    cut,
    fold=fold,
  )


def on_halves(
  build: Callable[..., FederatedAlgorithm],
  cut: Callable[[Params], Halves],
  *,
  fold: Any = None,
) -> FederatedAlgorithm:
  """Returns a method on `Halves` as one on the whole adapter."""
  return server.on_part(
    build,
    wrap=lambda key, params: cut(params),
    get=halves.joined,
    put=lambda params, part: cut(part),
    fold=fold,
  )


def kept_by_clients(inner: Scope, *, frozen: bool = False) -> Scope:
  """Returns a scope: clients keep what `inner` shares of their part.

  With `frozen` nobody trains it.
  """
  label = Frozen if frozen else Private

  def labels(params: Halves) -> Halves:
    chosen = inner.labels(params)
    kept = lambda x: label if x is Shared else x
    return chosen._replace(client=jax.tree.map(kept, chosen.client))

  def mask(start: Halves, state: Any, context: Any) -> Masks:
    masks = inner.mask(start, state, context)
    own = labels(start)
    return Masks(*(tree.select(m, own, Shared, Private) for m in masks))

  return Scope(labels, mask)


def check_part(client_part: str) -> None:
  """Raises `Error` if this is no name of what happens to a client's part."""
  if client_part not in PARTS:
    raise Error(
      f'algorithm.client_part is {client_part!r}; it must be one of '
      f'{", ".join(PARTS)}.'
    )


def states(
  model: Model, base: Any, params: Params, batch: Any, cut: int
) -> Any:
  """Returns the states that cross the cut at a layer, [B, T, D].

  Raises:
    Error: the network has no function of its parts.

  >>> numbers = lambda base, params, batch, numbers, ends: list(numbers)
  >>> network = Model(hidden=None, logits=None, layers=numbers)
  >>> states(network, None, {}, None, 2)
  [0, 1]
  """
  return layers_of(model)(base, params, batch, range(cut), ends=False)


def layers_of(model: Model) -> Callable[..., jax.Array]:
  """Returns `Model.layers`, or raises `Error`."""
  if model is None or model.layers is None:
    raise Error(
      'this network has no `Model.layers`, so it cannot be cut at a layer: '
      'take one of the models here.'
    )
  return model.layers
