"""The protocol of nodes: the methods of a change of a network.

A node is a `NamedTuple` of arrays in an adapter's tree, at the path of a
weight. It has methods, of which only the first is required:

    act(x, y, weight) -> y'     changes y [..., F], which is x @ weight before
                                the bias; x [..., D] are the module's inputs
    write(weight) -> weight'    writes the node into the weight; raises `Error`
                                with the reason if that is impossible
    check(shape, path)          raises `Error` if it does not fit a weight
                                [L, D, F] at `path`, which ends in 'kernel'
    fold(weight) -> (weight', node')   moves frozen dense parts into the weight,
                                once a round
    peft() -> Peft              returns its form in PEFT, or raises `Error`
    neutral() -> node            returns one of the same shapes that changes
                                nothing, for requests without it in a batch
    act_with_statistics(x, y, weight, real) -> (y', statistics)
    no_statistics()             returns the statistics of zero tokens
    act_on_texts(x, y, weight, real) -> y'   instead of `act`, for a node that
                                reads whole texts: `real` [B, T] is True for
                                tokens, or None for all; a causal network
                                refuses it

and class attributes `FROZEN`, the names of fields that are never trained, and
`PLACES`, the allowed places: ('kernel',) by default. Over layers all arrays
have a leading L axis; `act` gets one layer, the other methods all layers.

A node with a method `factors() -> LowRank` needs no other: it acts as its
factors do. `weight_shape() -> tuple` may replace `check`. A node with a method
`replacement() -> weight` instead of `act` replaces the weight before anything
is computed. A plain array means `Added`.

Other places than weights:

    {'input': node}, {'output': node}   of a module: y is the module's input,
                                        or its output with the bias
    params['inputs']                    prompt rows: `nodes.Prompt`
    params['layers']['self_attn']['prefix']     `nodes.Prefix`

where the last two have `length() -> P` and `before(x)` instead of `act`, and

    choose(x, real) -> Prompt   instead of `before`: rows that depend on the
                                text, from its embedded tokens; `statistics` of
                                the same arguments are those of the choice

    params['layers']['mlp']['parallel']     x is the input of the whole module
    params['layers']['self_attn']['parallel']     and y its output
    params['generator']                     a node for many places
    params['scores']                        of a dual encoder: `nodes.scores`

Nodes that are computed from other parameters have one of these methods instead:

    plain() -> node                         the node that it stands for
    generate() -> {name: ...}               a tree of nodes, of a 'generator'

`plain` (the function) computes them before the network is run, an adapter is
checked, merged or written; what is trained and sent are their parameters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm.nodes.dense import Added, add
from fedjax_llm.types import Error

# Names of a module's main weight, which a leaf without a name changes.
MAIN = ('kernel', 'scale', 'embedding')
# Places of a network that are no weights.
BESIDE = ('input', 'output', 'inputs', 'prefix', 'parallel', 'scores')
GENERATOR = 'generator'  # the place of a node that makes others

_METHODS = (
  *('act', 'act_on_texts', 'factors', 'replacement', 'before', 'plain'),
  *('generate', 'scores'),
)


class Peft(NamedTuple):
  """The form of a node in PEFT: factors, or the values of another kind.

  `kind` is the config's `peft_type`, and `fields` are further fields of it.
  """

  factors: Any  # a `LowRank`; None for another kind
  magnitude: Any = None  # [L, F] of a DoRA
  kind: str = 'LORA'
  values: Any = None  # rows [P, D], a `Prefix`, or factors [L, F] of (IA)3
  fields: Mapping[str, Any] = {}


class Record(NamedTuple):
  """The tokens of a layer, and the statistics of its nodes while it is traced.

  `real` is True for the tokens that count, [B, T]. `statistics` maps id(node)
  to (node, statistics), or is None if nobody asks for them; keeping the node
  keeps its id unique.
  """

  real: Any
  statistics: dict[int, tuple[Any, Any]] | None = None


def is_node(leaf: Any) -> bool:
  """Returns True for a leaf with one of the methods of a node.

  >>> is_node(Added(1.0)), is_node(1.0)
  (True, False)
  """
  return any(callable(getattr(leaf, name, None)) for name in _METHODS)


def plain(params: Any, *, keep: str = '') -> Any:
  """Returns the tree with computed nodes in the place of their parameters.

  Nodes with a method of the name `keep` are left as they are.

  Raises:
    Error: a generator makes a node at a place that has one already.

  >>> from fedjax_llm.nodes import Prompt
  >>> class Zeros(NamedTuple):
  ...   length: int
  ...   def plain(self): return Prompt(jax.numpy.zeros((self.length, 4)))
  >>> plain({'inputs': Zeros(2)})['inputs'].length()
  2
  """
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_node)
  computed = [hasattr(x, 'plain') and not hasattr(x, keep) for x in leaves]
  if any(computed):
    leaves = [x.plain() if c else x for x, c in zip(leaves, computed)]
    params = jax.tree.unflatten(treedef, leaves)
  if not isinstance(params, Mapping) or GENERATOR not in params:
    return params
  rest = {name: x for name, x in params.items() if name != GENERATOR}
  node = params[GENERATOR]
  if node is None:
    return rest
  if not hasattr(node, 'generate'):
    raise Error(
      f'a {kind(node)} node cannot act as the {GENERATOR}: it has no method '
      '`generate`.'
    )
  return _joined(rest, node.generate(), ())


def _joined(first: Any, second: Any, path: tuple[str, ...]) -> Any:
  if first is None or second is None:
    return second if first is None else first
  if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
    raise Error(
      f'the {GENERATOR} makes a node at {"/".join(path)}, where the adapter '
      'has one already.'
    )
  return {
    name: _joined(first.get(name), second.get(name), (*path, name))
    for name in {**first, **second}
  }


def kind(leaf: Any) -> str:
  return type(leaf).__name__ if is_node(leaf) else 'array'


def at(leaf: Any, name: str, main: str = 'kernel') -> Any:
  """Returns the node or array at the place `name` of a module, or None.

  A leaf that is no dict belongs to the module's `main` weight.
  """
  if isinstance(leaf, Mapping):
    return leaf.get(name)
  return leaf if name == main else None


def factors(leaf: Any) -> Any:
  """Returns the `LowRank` that a leaf acts as; None if it is not low-rank."""
  method = getattr(leaf, 'factors', None)
  return method() if callable(method) else None


def act(
  leaf: Any, x: Any, y: jax.Array, weight: Any, record: Record | None = None
) -> jax.Array:
  """Returns y with the leaf's change, in y's dtype; None changes nothing."""
  if leaf is None:
    return y
  real, statistics = record or Record(None)
  if hasattr(leaf, 'act_on_texts'):
    return leaf.act_on_texts(x, y, weight, real).astype(y.dtype)
  if not hasattr(leaf, 'act'):
    leaf = factors(leaf) or Added(leaf)
  if statistics is not None and hasattr(leaf, 'act_with_statistics'):
    y, mine = leaf.act_with_statistics(x, y, weight, real)
    statistics[id(leaf)] = leaf, mine
    return y
  return leaf.act(x, y, weight).astype(y.dtype)


def refuse_whole_texts(params: Any) -> None:
  """Raises `Error` for a node that reads whole texts: in a causal network."""
  for leaf in jax.tree.leaves(params, is_leaf=is_node):
    if hasattr(leaf, 'act_on_texts'):
      raise Error(
        f'a {kind(leaf)} node reads whole texts, so in a causal model a token '
        'would see those that come after it: use an encoder, such as '
        'model.name=random_encoder.'
      )


def statistics_of(params: Any, record: Record | None) -> Any:
  """Returns the tree of recorded statistics, with None at other leaves."""
  if record is None or record.statistics is None:
    return None
  kept = record.statistics
  return jax.tree.map(
    lambda leaf: kept[id(leaf)][1] if id(leaf) in kept else None,
    params,
    is_leaf=lambda x: id(x) in kept or is_node(x),
  )


def write(leaf: Any, weight: Any) -> Any:
  """Returns the weight with the leaf written into it."""
  if hasattr(leaf, 'write'):
    return leaf.write(weight)
  node = factors(leaf)
  if node is not None:
    return node.write(weight)
  if is_node(leaf):
    raise Error(
      f'a {kind(leaf)} node cannot be written into a weight: serve it beside '
      'the base.'
    )
  return add(weight, leaf)


def fold(leaf: Any, weight: Any) -> tuple[Any, Any]:
  """Returns (weight, leaf) with frozen dense parts moved into the weight."""
  return leaf.fold(weight) if hasattr(leaf, 'fold') else (weight, leaf)


def check(leaf: Any, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
  """Raises `Error` if a leaf does not fit a place of this shape.

  `path` ends in the name of the place.
  """
  module, place = '/'.join(path[:-1]), path[-1]
  if not is_node(leaf):
    here = getattr(leaf, 'shape', None)
    if place in BESIDE:
      raise Error(f'it has an array at {"/".join(path)}, which is no weight.')
    if here != shape:
      raise mismatch(path, here or (), shape)
    return
  places = getattr(leaf, 'PLACES', ('kernel',))
  if place not in places:
    raise Error(
      f'a {kind(leaf)} node cannot act on {place} of {module or "the model"}, '
      f'only on: {", ".join(places)}.'
    )
  if hasattr(leaf, 'check'):
    leaf.check(shape, path)
    return
  if not hasattr(leaf, 'weight_shape'):
    leaf = factors(leaf)
  if leaf is not None and leaf.weight_shape() != shape:
    raise mismatch(path, leaf.weight_shape(), shape)


def mismatch(path: tuple[str, ...], here: Any, there: Any) -> Error:
  """Returns the `Error` for a leaf at `path` with a wrong shape."""
  where = '/'.join(path[:-1] if path[-1] in MAIN else path)
  return Error(
    f'its {where} is {list(here)}, that of the model is {list(there)}.'
  )


def replacement(leaf: Any) -> tuple[bool, Any]:
  """Returns (whether a leaf replaces its weight, the replacement or None)."""
  if not hasattr(leaf, 'replacement'):
    return False, None
  return True, leaf.replacement()


def peft(leaf: Any) -> Peft | None:
  """Returns the form of a leaf in PEFT; None for an array, which has none.

  Raises:
    Error: the node has no form in PEFT, with its reason.
  """
  if hasattr(leaf, 'peft'):
    return leaf.peft()
  node = factors(leaf)
  if node is not None:
    return Peft(node)
  if is_node(leaf):
    raise Error(f'a {kind(leaf)} node has no form in PEFT.')
  return None
