"""Turns a user's network into a client model: Flax modules, plain functions.

    own(module) -> base, bind, loss, model, loaded

`base` holds the frozen weights as nested dicts, in which adapters find their
targets ('hidden', 'layers/0/up', '.*'); `bind` returns the network with a
client's adapter applied, `loss` and `model` the `Loss` and `Model` that recipes
take.

Low-rank factors on a matrix [D, F] of `nnx.Linear` and `linen.Dense` are
computed as a separate product, so that under `vmap` over clients the product
with the base is one unbatched matmul. Every other change (of layers that a scan
stacks, of convolutions, of biases, of plain functions) is written into the
weights, which costs a copy of these weights for each client: suitable for small
modules. A node that cannot be written into a weight (experts, bottlenecks,
prompts) is refused with its reason. Statistics of nodes are not supported.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import changes
from fedjax_llm.models import families
from fedjax_llm.models.config import Config
from fedjax_llm.models.files.load import LoadedModel
from fedjax_llm.nodes import LowRank, protocol
from fedjax_llm.types import (
  Base,
  Batch,
  Error,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
)

Path = tuple[str, ...]
# Fields of `Config` that are unknown for a user's network.
_UNKNOWN = (
  'hidden_size', 'intermediate_size', 'num_layers', 'num_heads',
  'num_kv_heads', 'head_dim',
)  # fmt: skip
Network = Callable[..., Any]


class Own(NamedTuple):
  """A user's network, with its weights and functions on them.

  `bind(base, params, key=None) -> net` returns the network with the adapter
  applied, to be called like the original; the key is for dropout.

  `loss(score)` returns a `Loss`. `score(net, batch)` returns a loss for each
  example or token (an array of any shape), a pair of such losses and a mask (a
  step with an empty mask is padding), or a `LossSum`.

  `model(hidden, logits)` returns a `Model` of tokens, for `local.causal_lm`,
  with `hidden(net, batch) -> [B, T, D]` and `logits(net, x [..., D]) ->
  [..., V]`; without `logits`, `hidden` returns the logits.

  `loaded(model, vocab_size=V, max_positions=T, name='own')` returns the
  `LoadedModel` for a builder that a config names:
  `--config.model.name=my_lab.models:build`. Such a run generates no replies,
  and saves base and adapter under the network's own names.

  >>> twice = own(lambda weights, x: weights['w'] * x, {'w': jnp.float32(2)})
  >>> float(twice.bind(twice.base, {})(3.0))
  6.0
  """

  base: Base
  bind: Callable[..., Network]
  loss: Callable[[Callable[[Network, Any], Any]], Loss]
  model: Callable[..., Model]
  loaded: Callable[..., LoadedModel]


def own(network: Any, weights: Any = None) -> Own:
  """Turns a Flax module or a function into a client model.

  Args:
    network: an `nnx.Module` with its weights in it; a `linen.Module`; or a
      function f(weights, ...).
    weights: the result of Linen's `init`, or the weights of the function:
      nested dicts.

  State that is no parameter (batch statistics, counters) never changes. For an
  NNX module `net` is an NNX module too, with its methods; for a Linen module a
  method is called as `net(..., method='name')`.

  Raises:
    Error: weights that are missing or superfluous, or a network of another
      kind; from `bind`, an adapter that does not fit the weights.

  >>> import optax
  >>> import fedjax_llm as fl
  >>> from flax import nnx
  >>> class Net(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.inner = nnx.Linear(4, 16, rngs=rngs)
  ...     self.out = nnx.Linear(16, 3, rngs=rngs)
  ...   def __call__(self, x):
  ...     return self.out(nnx.relu(self.inner(x)))
  >>> mine = fl.models.own(Net(nnx.Rngs(0)))
  >>> def score(net, batch):
  ...   return optax.softmax_cross_entropy_with_integer_labels(
  ...     net(batch['x']), batch['y'])
  >>> adapter = fl.adapters.lora(rank=2, targets=['inner', 'out'])
  >>> params = adapter.init(jax.random.key(0), mine.base)
  >>> algorithm = fl.recipes.fed_avg(
  ...   mine.loss(score), fl.local.optimizer('sgd', 0.1))
  >>> x = jax.random.normal(jax.random.key(1), (5, 2, 8, 4))  # K, S, B, D
  >>> cohort = fl.types.Cohort(
  ...   ids=jnp.arange(5), batches={'x': x, 'y': jnp.argmax(x[..., :3], -1)},
  ...   weight=jnp.ones(5), valid=jnp.ones(5, bool))
  >>> state = algorithm.init(jax.random.key(2), params)
  >>> state, _, info = jax.jit(algorithm.round)(state, cohort, mine.base)
  >>> bool(info.metrics['local/loss'] > 0)
  True
  """
  homes = [c.__module__.split('.') for c in type(network).__mro__]
  kinds = {home[1] for home in homes if home[0] == 'flax' and len(home) > 1}
  if 'linen' in kinds:
    return _door(*_linen(network, weights))
  if 'nnx' in kinds:
    if weights is not None:
      raise Error('own(module, weights): an NNX module holds its weights.')
    return _door(*_nnx(network))
  if isinstance(network, type) or not callable(network):
    raise Error(
      f'own(...) takes an NNX or Linen module or a function of its weights, '
      f'got {network!r}.'
    )

  def bind(base, params, key):
    del key  # a function takes random keys as its own arguments
    return functools.partial(network, changes.merge(base, params))

  return _door(_nested(weights, 'own(function, weights)'), bind)


def _door(base: Base, assemble: Callable[..., Network]) -> Own:
  if 'kernel' in base:
    raise Error(
      'own(...) is a single matrix, whose weight has no name: give a module '
      'that holds it.'
    )

  def bind(base: Base, params: Params, key: Key | None = None) -> Network:
    base, params = changes.overlay(base, params)
    changes.check(base, params)
    return assemble(base, params, key)

  def loss(score: Callable[[Network, Any], Any]) -> Loss:
    def run(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
      losses = score(bind(base, params, key), batch)
      return losses if isinstance(losses, LossSum) else _summed(losses)

    return run

  def model(
    hidden: Callable[[Network, Batch], jax.Array],
    logits: Callable[[Network, jax.Array], jax.Array] = lambda net, x: x,
  ) -> Model:
    return Model(
      lambda base, params, batch: hidden(bind(base, params), batch),
      lambda base, params, x: logits(bind(base, params), x).astype(jnp.float32),
    )

  def loaded(
    model: Model,
    *,
    vocab_size: int,
    max_positions: int,
    name: str = families.OWN,
  ) -> LoadedModel:
    config = Config(
      family=families.OWN,
      vocab_size=vocab_size,
      max_positions=max_positions,
      **dict.fromkeys(_UNKNOWN, 0),
    )
    nothing: Any = None  # no cache, so no text is generated
    return LoadedModel(config, model, nothing, base, name)

  return Own(base, bind, loss, model, loaded)


def _summed(losses: Any) -> LossSum:
  nats, mask = losses if isinstance(losses, tuple) else (losses, None)
  nats = jnp.asarray(nats).astype(jnp.float32)
  if nats.ndim == 0:
    raise Error(
      'score(net, batch) gave one number; it has to give the loss of each '
      'example, so that clients with unequal batches count as they should.'
    )
  mask = jnp.ones(nats.shape, bool) if mask is None else jnp.asarray(mask) > 0
  if mask.shape != nats.shape:
    raise Error(
      f'score(net, batch) gave losses {list(nats.shape)} with a mask '
      f'{list(mask.shape)}; they must have one shape.'
    )
  total = jnp.sum(jnp.where(mask, nats, 0.0))
  return LossSum(total, jnp.sum(mask).astype(jnp.float32), jnp.float32(0))


# ------------------------------------------------------------------ leaves --


def _nested(tree: Any, what: str) -> dict[str, Any]:
  """Converts nested mappings to dicts; raises `Error` for any other tree."""
  if not isinstance(tree, Mapping) or not tree:
    raise Error(f'{what} must be nested dicts of arrays, got {tree!r:.60}.')
  plain = lambda x: (
    {str(k): plain(v) for k, v in x.items()} if isinstance(x, Mapping) else x
  )
  return plain(tree)


def _apart(
  params: Any, beside: Callable[[Path], bool], path: Path = ()
) -> tuple[dict[Path, LowRank], Any]:
  """Splits an adapter into (LoRA beside its matrix, changes to write in)."""
  if not isinstance(params, Mapping):
    node = protocol.factors(params)
    if node is not None and jnp.ndim(node.a) == 2:
      module = path[:-1] if path[-1] == 'kernel' else path
      if beside(module):
        return {module: node}, None
    return {}, params
  acting, written = {}, {}
  for name, child in params.items():
    nodes, written[name] = _apart(child, beside, (*path, name))
    acting |= nodes
  return acting, written


def _added(y: jax.Array, x: jax.Array, node: LowRank) -> jax.Array:
  """Adds a node's change to y, in y's dtype."""
  return node.act(x.astype(y.dtype), y)


# --------------------------------------------------------------------- nnx --


@functools.cache
def _adapted_linear() -> Any:
  from flax import nnx

  class Adapted(nnx.Linear):
    """An `nnx.Linear` with LoRA factors beside its matrix."""

    def __call__(self, inputs, *args, **keywords):
      y = super().__call__(inputs, *args, **keywords)
      read = lambda x: None if x is None else x[...]
      factors = self.factors  # type: ignore[attr-defined]
      node = LowRank(*(read(factors.get(f)) for f in LowRank._fields))
      return _added(y, inputs, node)

  return Adapted


def _nnx(module: Any) -> tuple[Base, Callable[..., Network]]:
  from flax import nnx

  graph, weights, rest = nnx.split(module, nnx.Param, ...)
  base: dict[str, Any] = {}
  variables = list(nnx.to_flat_state(weights))
  names = [tuple(map(str, path)) for path, _ in variables]
  for path, (_, variable) in zip(names, variables, strict=True):
    parent = base
    for name in path[:-1]:
      parent = parent.setdefault(name, {})
    parent[path[-1]] = variable[...]
  nodes = {
    tuple(map(str, path)): type(node) for path, node in nnx.iter_graph(module)
  }
  streams = {
    str(node.tag)
    for _, node in nnx.iter_graph(module)
    if isinstance(node, nnx.RngKey)
  }

  def leaf(tree, path):
    for name in path:
      tree = tree[name]
    return tree

  def bind(base, params, key):
    # Exactly `nnx.Linear`: a user's subclass may use its kernel differently.
    beside = lambda path: nodes.get(path) is nnx.Linear
    acting, written = _apart(params, beside)
    base = changes.merge(base, written)
    state = nnx.from_flat_state(
      [
        (path, variable.replace(leaf(base, name)))
        for name, (path, variable) in zip(names, variables, strict=True)
      ]
    )
    net = nnx.merge(graph, state, rest, copy=True)
    there = {tuple(map(str, p)): node for p, node in nnx.iter_graph(net)}
    for path, factors in acting.items():
      node = there[path]
      arrays = {k: v for k, v in factors._asdict().items() if v is not None}
      node.factors = nnx.Dict({k: nnx.Variable(v) for k, v in arrays.items()})
      object.__setattr__(node, '__class__', _adapted_linear())
    if key is not None and streams:
      keys = jax.random.split(key, len(streams))
      nnx.reseed(net, **dict(zip(sorted(streams), keys)))
    return net

  return base, bind


# ------------------------------------------------------------------- linen --


def _linen(module: Any, variables: Any) -> tuple[Base, Callable[..., Network]]:
  from flax import linen

  what = "own(module, variables): variables['params'] of a Linen module"
  if not isinstance(variables, Mapping) or 'params' not in variables:
    raise Error(f'{what} is missing: give what module.init(...) returned.')
  rest = {k: v for k, v in variables.items() if k != 'params'}

  def bind(base, params, key):
    rngs = None if key is None else {'params': key}  # of every stream

    def call(weights, dense, *args, **keywords):
      def interceptor(onward, args, keywords, context):
        y = onward(*args, **keywords)
        plain = type(context.module) is linen.Dense
        if plain and context.method_name == '__call__':
          return dense(context.module.scope.path, y, *args, **keywords)
        return y

      with linen.intercept_methods(interceptor):
        return module.apply(
          {**rest, 'params': weights}, *args, rngs=rngs, **keywords
        )

    def net(*args, **keywords):
      # A traced call lists the matrices that belong to `Dense` modules.
      seen = set()
      note = lambda path, y, *_, **__: (seen.add(path), y)[1]
      jax.eval_shape(lambda: call(base, note, *args, **keywords))
      acting, written = _apart(params, seen.__contains__)

      def dense(path, y, inputs):
        return _added(y, inputs, acting[path]) if path in acting else y

      return call(changes.merge(base, written), dense, *args, **keywords)

    return net

  return _nested(variables['params'], what), bind
