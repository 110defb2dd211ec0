"""Methods whose parameters have more structure than two factors.

Adapters other than `lora` are named where a method needs one. Every recipe
takes a loss and a local optimizer, and hands further keywords (`server`,
`upload`, `block_size`, ...) to `fed_opt`.
Examples that train nothing have no loss, `None`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import adapters, aggregators, linalg, local
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.recipes.homogeneous import refuse
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Key,
  Loss,
  LowRank,
  Masks,
  Params,
  Scope,
)


def fed_tt_plus(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedTT+: of every tensor train one core is trained in a round, in turn.

      round t: G_i <- sum_k w_k G_i,k,   i = n - t mod n,   the others stay

  Ghiasvand et al. 2025, arXiv 2410.13097, on the adapter `tensor_train`. The
  change is linear in one core, so the mean is exact, and an n-th travels up.
  The last core, which starts at zero, is the first. FedTT trains all cores in
  every round: it is `fed_avg` on that adapter. The paper leaves open here how
  many cores take part in a round, and in which order.

  >>> turns = scopes.in_turn('/cores/([0-9]+)$')
  >>> train = {'q': {'cores': [jnp.ones(1)] * 3}}
  >>> masks = turns.mask(train, (), None, jnp.int32(1), None)
  >>> [bool(m) for m in masks.trained['q']['cores']]  # the second round
  [False, True, False]
  >>> method = fed_tt_plus(None, local.optimizer('adamw'))
  """
  refuse('fed_tt_plus', 'scope', parts)
  scope = scopes.in_turn('/cores/([0-9]+)$')
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, scope=scope, **parts
  )


def fed_sb(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Fed-SB: an R x R matrix between frozen bases is all that is averaged.

      C <- sum_k w_k C_k,   so that   p C q = sum_k w_k p C_k q   exactly

  Singhal et al. 2025, arXiv 2502.15436: R^2 numbers a matrix travel, whatever
  its sides are and however many clients there are. On the adapter `lora_xs`,
  whose bases are those of the weights; the paper takes them from the singular
  vectors of a first gradient of full fine-tuning, which needs clients' data
  before the first round, and that start is left out.

  >>> method = fed_sb(None, local.optimizer('adamw'))
  >>> base, key = {'q': {'kernel': jnp.ones((4, 3))}}, jax.random.key(0)
  >>> params = adapters.lora_xs(rank=2, targets=['q']).init(key, base)
  >>> scopes.leaf_paths(method.init(None, params).params)
  ['q/core', 'q/p', 'q/q', 'q/scale']
  """
  refuse('fed_sb', 'scope', parts)
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, scope=_on_cores('fed_sb'), **parts
  )


def ravan(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """RAVAN: several heads between frozen bases, each with a gain of its own.

      client: trains C_h and g_h (from 1) of  W + s sum_h g_h p_h C_h q_h,
      server: C_h <- sum_k w_k g_h,k C_h,k

  Raje et al. 2025, arXiv 2506.05568, on the adapter `ravan`: clients send the
  products, so the mean is exact and the gains cost nothing. Every client trains
  all heads; the paper's choice of a few heads for weak clients is left out.

  >>> method = ravan(None, local.optimizer('adamw'))
  >>> method.init(None, {'w': jnp.ones(2)})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ravan trains matrices between frozen bases: ...
  """
  refuse('ravan', 'scope', parts)
  update = local.lifted(
    local.sgd(loss, optimizer, clip_norm=clip_norm),
    adapters.cores.with_gains,
    adapters.cores.without_gains,
  )
  return averaging.compose(update, scope=_on_cores('ravan'), **parts)


def _on_cores(name: str) -> Scope:
  inner = scopes.everything()

  def labels(params):
    if not any(path.endswith('/core') for path in scopes.leaf_paths(params)):
      raise Error(
        f'{name} trains matrices between frozen bases: adapter.name=lora_xs or '
        'ravan.'
      )
    return inner.labels(params)

  return inner._replace(labels=labels)


# ------------------------------------------------------------------ layers --


def fed_ra(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRA: in every round a client gets some layers at random, and no others.

      client: the network of its L_k layers alone, drawn anew in each round,
      server: P_l <- mean of P_l,k over the clients that held layer l

  Su et al. 2024, arXiv 2311.11227. A layer that nobody holds keeps its adapter;
  what is not in a layer is trained by everybody. L_k is the client's profile
  (`profiles.name=layers`), and a layer that a client lacks is left out of its
  forward pass: the residual stream goes past it. That simulates the shallow
  network, at the cost of the deep one. Beside the adapters of its layers a
  client receives four bytes a layer, which say that it holds it. With all
  layers for everybody it is FedIT, of clients that count the same unless
  `weighted`.

  >>> method = fed_ra(None, local.optimizer('adamw'))
  >>> params = {'layers': {'q': LowRank(
  ...   jnp.ones((6, 4, 2)), jnp.zeros((6, 2, 3)), jnp.ones(6))}}
  >>> start = method.init(None, params).params
  >>> sorted(start['layers']), sorted(method.personal(start, None)['layers'])
  (['gate', 'q'], ['q'])
  """
  for section in ('scope', 'aggregator'):
    refuse('fed_ra', section, parts)
  gate = adapters.gates.NAME
  if (fold := parts.get('fold')) is not None:

    def folded(base, params):
      base, done = fold(base, adapters.gates.without(params))
      gates = params['layers'][gate]
      return base, {**done, 'layers': {**done['layers'], gate: gates}}

    parts = {**parts, 'fold': folded}
  algorithm = averaging.fed_avg(
    loss,
    optimizer,
    clip_norm=clip_norm,
    scope=scopes.layers(scopes.untrained(f'^layers/{gate}$')),
    aggregator=aggregators.masked_mean('mask', weighted=weighted),
    **parts,
  )

  def init(key: Key, params: Params):
    return algorithm.init(key, adapters.gates.added(params))

  def personal(params, state):
    return adapters.gates.without(algorithm.personal(params, state))

  return algorithm._replace(init=init, personal=personal)


# ------------------------------------------------------------------ stages --


class Sparse(NamedTuple):
  """A dense change with few entries: values [L, n] at places [L, n] of D F."""

  values: Any
  places: Any  # int32


class Staged(NamedTuple):
  """The parameters of SLoRA's two stages."""

  sparse: Any  # a `Sparse` for every low-rank node
  factors: Any


def slora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  first_rounds: int = 5,
  density: float | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """SLoRA: sparse full fine-tuning first, whose outcome starts the factors.

      rounds t < T1:  D <- sum_k w_k D_k,   D zero outside a random pattern that
                      everybody shares, W' = W + D
      at T1:          D = U S V':   a = U_r,   b = S_r V_r' / s,   D <- 0
      then:           FedIT

  Babakniya et al. 2023, arXiv 2308.06522. The pattern follows from the seed, so
  only values travel. On a low-rank adapter, whose rank is r; what D has beyond
  rank r is lost at T1. A client's D is written out as a matrix for each target:
  memory is that of dense changes.

  Args:
    first_rounds: T1; the paper spends a share of its budget on it.
    density: entries of D that may change, of all; None takes as many as the
      factors have, so that both stages send the same.

  Raises:
    Error: first_rounds below one, a density not above 0 or above 1; another
      scope or aggregator; from `init`, no low-rank factors.

  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method = slora(None, local.optimizer('adamw'), density=0.5)
  >>> start = method.init(jax.random.key(0), params).params
  >>> start.sparse.values.shape  # half of 4 x 3 entries
  (6,)
  """
  for section in ('scope', 'aggregator'):
    refuse('slora', section, parts)
  if first_rounds < 1:
    raise Error(f'slora: first_rounds={first_rounds} must be at least 1.')
  if density is not None and not 0 < density <= 1:
    raise Error(f'slora: density={density} must be above 0 and at most 1.')
  if (fold := parts.get('fold')) is not None:

    def folded(base, params):
      base, factors = fold(base, params.factors)
      return base, params._replace(factors=factors)

    parts = {**parts, 'fold': folded}
  algorithm = averaging.fed_avg(
    local.viewed(loss, _together),
    optimizer,
    clip_norm=clip_norm,
    scope=_by_stage(first_rounds),
    **parts,
  )

  def init(key: Key, params: Params):
    here = jax.random.fold_in(key, 1)
    return algorithm.init(key, Staged(_pattern(here, params, density), params))

  def round(state, cohort, base=None):
    state, states, told = algorithm.round(state, cohort, base)
    turned = jax.lax.cond(
      state.round == first_rounds, _factored, lambda p: p, state.params
    )
    return state._replace(params=turned), states, told

  def personal(params, state):
    return _together(algorithm.personal(params, state))

  return algorithm._replace(init=init, round=round, personal=personal)


def _by_stage(first_rounds: int) -> Scope:
  inner = scopes.everything()

  def mask(start, profile, state, round, key):
    masks = inner.mask(start, profile, state, round, key)
    early = round < first_rounds
    when = lambda m, now: jax.tree.map(lambda x: x & now, m)
    narrow = lambda m: Staged(when(m.sparse, early), when(m.factors, ~early))
    return Masks(*map(narrow, masks))

  return inner._replace(mask=mask)


def _pattern(key: Key, params: Params, density: float | None) -> Params:
  is_node = lambda x: isinstance(x, LowRank)
  nodes, treedef = jax.tree.flatten(params, is_leaf=is_node)
  if not any(map(is_node, nodes)):
    raise Error('slora needs low-rank factors: adapter.name=lora.')

  def one(index, x):
    if not is_node(x):
      return None
    d, f, rank = x.a.shape[-2], x.b.shape[-1], x.a.shape[-1]
    num = round(density * d * f) if density else rank * (d + f)
    num = min(max(num, 1), d * f)
    lead = x.a.shape[:-2]
    layers = max(1, lead[0] if lead else 1)
    draw = lambda key: jax.random.permutation(key, d * f)[:num]
    keys = jax.random.split(jax.random.fold_in(key, index), layers)
    places = jax.lax.map(draw, keys).reshape(*lead, num).astype(jnp.int32)
    return Sparse(jnp.zeros((*lead, num), x.a.dtype), places)

  sparse = [one(i, x) for i, x in enumerate(nodes)]
  return jax.tree.unflatten(treedef, sparse)


def _dense(sparse: Sparse, node: LowRank) -> jax.Array:
  """[..., D, F]"""
  *lead, d, _ = node.a.shape
  f = node.b.shape[-1]

  def one(values, places):
    return jnp.zeros(d * f, values.dtype).at[places].set(values)

  for _ in lead:
    one = jax.vmap(one)
  return one(sparse.values, sparse.places).reshape(*lead, d, f)


def _together(params: Staged) -> Params:
  """What both stages have learned, as low-rank nodes with residuals."""

  def node(x, sparse):
    if not isinstance(x, LowRank):
      return x
    dense = _dense(sparse, x)
    old = x.residual
    return x._replace(residual=dense if old is None else old + dense)

  return _by_node(node, params)


def _factored(params: Staged) -> Staged:
  """The first stage's outcome moved to the factors."""

  def node(x, sparse):
    if not isinstance(x, LowRank):
      return x
    rank = x.a.shape[-1]
    dense = _dense(sparse, x)
    u, s, v = linalg.svd(dense)
    b = s[..., :rank, None] * v[..., :rank, :] / x.scale[..., None, None]
    return x._replace(a=u[..., :rank].astype(x.a.dtype), b=b.astype(x.b.dtype))

  return Staged(
    jax.tree.map(
      lambda x: x._replace(values=jnp.zeros_like(x.values)),
      params.sparse,
      is_leaf=lambda x: isinstance(x, Sparse),
    ),
    _by_node(node, params),
  )


def _by_node(change: Any, params: Staged) -> Params:
  is_node = lambda x: isinstance(x, LowRank)
  return jax.tree.map(change, params.factors, params.sparse, is_leaf=is_node)
