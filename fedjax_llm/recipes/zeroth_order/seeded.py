"""Puts `nodes.Seeded` around the parameters: for methods that send scalars."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm import scopes, server
from fedjax_llm.nodes import Seeded
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Params,
  Private,
  Scope,
)

# The leaves of `Seeded` that clients neither train nor send.
STILL = r'^(params|mask|log)(/|$)'


def labels_of(
  who: str, scope: Scope | None, because: str
) -> Callable[[Params], Any]:
  """Returns the labels of a scope, which must not have private leaves.

  Args:
    who: the method's name, for the message.
    scope: None: everything is shared.
    because: the beginning of the message, up to "no leaf can be".

  Raises:
    Error: from the result, for a scope with a private leaf.

  >>> labels_of('decomfl', None, 'so no leaf can be')({'w': 1.0})
  {'w': <Label.SHARED: 'shared'>}
  """
  scope = scope or scopes.everything()

  def labels(params: Params) -> Any:
    chosen = scope.labels(params)
    if Private in jax.tree.leaves(chosen):
      raise Error(
        f'{who}: {because} private: use a scope that shares or freezes.'
      )
    return chosen

  return labels


def on_seeded(
  update: LocalUpdate,
  wrap: Callable[[Key, Params], Seeded],
  *,
  scope: Scope | None = None,
  serve: Callable[[Seeded], Params] | None = None,
  fold: Callable[..., Any] | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Returns the method of a local update on `Seeded` parameters.

  Args:
    update: trains the coefficients.
    wrap: `(key, params) -> Seeded`.
    scope: of `Seeded`; None: only coefficients are trained and sent.
    serve: returns the parameters that are served; None: `Seeded.params`.
    fold: of the adapter.
    **parts: of `compose`.
  """
  whole = scope or scopes.frozen(STILL)
  served = {} if serve is None else {'serve': lambda params, _: serve(params)}
  return server.on_part(
    functools.partial(
      compose, update, scope=whole, **{'measure': None, **parts}
    ),
    wrap=wrap,
    get=lambda params: params.params,
    put=lambda params, part: params._replace(params=part),
    fold=fold,
    **served,
  )
