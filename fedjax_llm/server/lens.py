"""Methods on parameters that hold the adapter's parameters as a part.

`on_part` returns a `FederatedAlgorithm`.
"""

from collections.abc import Callable
from typing import Any

from fedjax_llm.types import (
  Base,
  ClientState,
  FederatedAlgorithm,
  Key,
  Params,
)


def on_part(
  build: Callable[..., FederatedAlgorithm],
  *,
  wrap: Callable[[Key, Params], Params],
  get: Callable[[Params], Params],
  put: Callable[[Params, Params], Params],
  serve: Callable[[Params, ClientState | None], Params] | None = None,
  fold: Callable[[Base, Params], tuple[Base, Params]] | None = None,
) -> FederatedAlgorithm:
  """Returns a method on parameters that hold the adapter's as a part.

  Args:
    build: `(fold=...) -> FederatedAlgorithm` on the wrapped parameters; without
      the keyword where `fold` is None.
    wrap: `(key, params) -> wrapped`, called once.
    get: `(wrapped) -> part`, the parameters that the adapter's functions take.
    put: `(wrapped, part) -> wrapped`, with another part.
    serve: `(wrapped, client state) -> params` of a client's own model, after
      its private leaves are in place; `get` if None.
    fold: `Adapter.fold`; it acts on the part.

  >>> from fedjax_llm.types import ServerState
  >>> bare = FederatedAlgorithm(
  ...   init=lambda key, p: ServerState(0, p, (), (), key), init_client=None,
  ...   round=None, personal=lambda params, state: params)
  >>> method = on_part(
  ...   lambda: bare, wrap=lambda key, p: {'mine': p, 'rounds': 0},
  ...   get=lambda p: p['mine'], put=lambda p, mine: {**p, 'mine': mine})
  >>> params = method.init(None, 5).params
  >>> params, method.personal(params, None)
  ({'mine': 5, 'rounds': 0}, 5)
  """
  parts: dict[str, Any] = {}
  if fold is not None:

    def on_wrapped(base: Base, params: Params) -> tuple[Base, Params]:
      base, part = fold(base, get(params))
      return base, put(params, part)

    parts['fold'] = on_wrapped
  algorithm = build(**parts)

  def init(key: Key, params: Params):
    return algorithm.init(key, wrap(key, params))

  def personal(params: Params, state: ClientState | None) -> Params:
    whole = algorithm.personal(params, state)
    return get(whole) if serve is None else serve(whole, state)

  return algorithm._replace(init=init, personal=personal)
