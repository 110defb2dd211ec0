"""What parts of a network tell beside its output, gathered while it is traced.

A loss term or a report may need what a node deep inside the network computed,
and a network gives hidden states alone. Whoever wants to know listens around
the call (`listening`); the network gathers what its nodes `tell` layer by layer
(`heard`) and passes it on. Nobody listens: nothing is computed. All of it
happens while a function is traced, within one trace, so programs stay pure.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_listener: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
  'listener', default=None
)
_layer: contextvars.ContextVar[tuple[Any, dict[int, Any]] | None] = (
  contextvars.ContextVar('layer', default=None)
)


@contextlib.contextmanager
def listening() -> Iterator[list[Any]]:
  """A list of what is told inside: for each call of a network, a tree.

  The tree is that of the adapter, stacked over layers, with what was told in
  the place of the node that told it and `None` elsewhere.

  >>> node = ('a node',)
  >>> def network():
  ...   out, told = heard(lambda: tell(node, lambda where: 2 * where), node, 3)
  ...   pass_on(told)
  >>> with listening() as found:
  ...   network()
  >>> found, network()  # the second time nobody listens
  ([6], None)
  """
  found: list[Any] = []
  token = _listener.set(found)
  try:
    yield found
  finally:
    _listener.reset(token)


def heard(run: Callable[[], Any], params: Any, where: Any) -> tuple[Any, Any]:
  """`run()`, and the tree of what nodes in `params` told during it.

  For a network, around a layer. `where` marks the tokens that are real. The
  tree is None where nobody listens.
  """
  if _listener.get() is None:
    return run(), None
  told: dict[int, Any] = {}
  token = _layer.set((where, told))
  try:
    out = run()
  finally:
    _layer.reset(token)
  found = jax.tree.map(
    lambda node: told.get(id(node), (None,))[0],
    params,
    is_leaf=lambda x: id(x) in told,
  )
  return out, found


def tell(node: Any, what: Callable[[Any], Any]) -> None:
  """Tells `what(where)` of a node, the very object that the layer holds."""
  layer = _layer.get()
  if layer is not None:
    where, told = layer
    told[id(node)] = what(where), node  # kept, or its id might be another's


def pass_on(tree: Any) -> None:
  """Hands what a network heard in its layers to who listens."""
  found = _listener.get()
  if found is not None:
    found.append(tree)
