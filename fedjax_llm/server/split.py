"""Split learning: a scan over steps, and in each step all clients together.

Federated averaging is `vmap(client) of scan(step)`; here the loops change
places, because the server takes a step of its own part of the network in every
step of its clients. `split` returns a `FederatedAlgorithm`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import batching, tree
from fedjax_llm.nodes import Halves
from fedjax_llm.types import (
  ClientOutput,
  Cohort,
  Error,
  FederatedAlgorithm,
  Frozen,
  LocalUpdate,
  LossSum,
  Params,
  Private,
  RoundInfo,
  Scope,
  ServerState,
  Shared,
  Work,
)

ORDERS = ('sequential', 'parallel')


class Stepper(NamedTuple):
  """An optimizer's step on the trained leaves of one part.

  `init(trained) -> moments`; `step(grads, moments, trained, mask, count, real)
  -> (trained, moments, grads)`, where `count` is the number of the step in the
  run and nothing changes where `real` is False.

  >>> def step(grads, moments, trained, mask, count, real):
  ...   return tree.sub(trained, grads), moments, grads
  >>> plain = Stepper(lambda trained: (), step)  # SGD with a rate of 1
  >>> plain.step({'w': 0.5}, (), {'w': 2.0}, {'w': True}, 0, True)[0]
  {'w': 1.5}
  """

  init: Callable[[Params], Any]
  step: Callable[..., tuple[Params, Any, Params]]


class Moments(NamedTuple):
  """Optimizer states of the server: of averaged parts, and of its own part."""

  clients: Any
  server: Any


class Ends(NamedTuple):
  """The clients of a round after its steps, [K, ...]."""

  end: Any  # trained leaves of their parts
  moments: Any
  work: Work
  metrics: dict[str, Any]


class _Row(NamedTuple):
  """The inputs of one client's step."""

  mine: Any  # its trained leaves
  start: Any  # its part as received
  batch: Any
  key: Any
  valid: Any


def split(
  loss: Callable[..., LossSum],
  messages: Callable[..., tuple[Any, Any]],
  *,
  build: Callable[..., FederatedAlgorithm],
  client: Stepper,
  above: Stepper,
  scope: Scope,
  order: str = 'sequential',
  keep_optimizer: bool = False,
  fold: Callable[..., Any] | None = None,
  block_size: int | None = None,
  mesh: Any = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Returns split learning on parameters `Halves(client, server)`.

  Vepakomma et al. 2018 (arXiv 1812.00564), and SplitFed's averaging of the
  clients' parts (Thapa et al. 2020, arXiv 2004.12088). In step s a client k
  computes the loss l_k(c_k, v) of its own part c_k and the server's part v:

      c_k <- c_k - eta grad_c l_k(c_k, v)                     for every k
      parallel:    v <- v - eta_v grad_v (sum_k T_k l_k / sum_k T_k)
      sequential:  v <- v - eta_v grad_v l_k(c_k, v)          for k = 1 ... K

  T_k is the number of loss tokens of client k, so the parallel step is that of
  the pooled batch. In the sequential form client k sees the v that its
  predecessor left; their order is that of the cohort. After S steps the round
  ends as that of `build`, which sees the clients' parts alone: their scope,
  upload, rule and server optimizer act as in federated averaging.

  What crosses the cut are states and their gradients, so a step computes the
  gradient of the composed model; `messages` says what is sent, and the bytes of
  every step are added to the round's. A client without a loss token in a step
  changes nothing in it, and the server's part stays where its gradient is not
  finite. The algorithm has no halves `train` and `aggregate`: the server learns
  between them.

  Args:
    loss: `(base, Halves, batch, key) -> LossSum` of the composed model.
    messages: `(base, Halves, batch) -> (up, down)`, pytrees of the arrays that
      one client sends and receives in one step; called for their shapes.
    build: `(LocalUpdate, scope=..., **parts) -> FederatedAlgorithm`, such as
      `fed_opt` with its codec, rule and server optimizer.
    client: the optimizer of a client's part; it starts afresh in every round,
      or is kept by the client (`keep_optimizer`).
    above: the optimizer of the server's part, whose moments are part of the
      server's state.
    scope: on `Halves`; clients share or keep the leaves of `client`, and the
      server trains the leaves of `server` that are not frozen.
    order: 'sequential' or 'parallel'.
    fold: `Adapter.fold` on `Halves`.
    block_size: clients in one `vmap` in the parallel form.

  Raises:
    Error: another order; several devices; a private rule, since states are
      neither clipped nor noised; a download codec or a history; a part with
      nothing to train (from `init`).

  >>> import functools
  >>> from fedjax_llm import aggregators, scopes, server, uploads
  >>> def product(base, p, x, key):
  ...   return LossSum(p.client * p.server * x, *jnp.float32([1, 0]))
  >>> def step(grads, moments, trained, mask, count, real):
  ...   return tree.sub(trained, grads), moments, grads
  >>> plain = Stepper(lambda trained: (), step)
  >>> build = functools.partial(
  ...   server.fed_opt, upload=uploads.identity(), server=server.sgd(),
  ...   aggregator=aggregators.mean())
  >>> method = split(
  ...   product, lambda base, params, x: (x, x), build=build, client=plain,
  ...   above=plain, scope=scopes.everything())
  >>> start = Halves(jnp.float32(3), jnp.float32(5))
  >>> state = method.init(jax.random.key(0), start)
  >>> ones = jnp.ones(1)
  >>> cohort = Cohort(jnp.arange(1), ones[None], ones, ones > 0)
  >>> state, _, _ = jax.jit(method.round)(state, cohort)
  >>> [float(x) for x in state.params]  # 3 - 5, 5 - 3
  [-2.0, 2.0]
  """
  if order not in ORDERS:
    raise Error(
      f'algorithm.order is {order!r}; it must be one of {", ".join(ORDERS)}.'
    )
  if block_size is not None and block_size < 1:
    raise Error(f'block_size is {block_size}; it must be at least 1.')
  if mesh is not None:
    raise Error(
      'split learning exchanges states in every step, which is not built for '
      'several devices: run it on one (cpu_devices=1, mesh_model=1).'
    )
  _check(parts)
  parts = {k: v for k, v in parts.items() if k not in ('widths', 'execution')}
  at_clients = _at_clients(scope)
  started = build(
    _asking(client, keep_optimizer), scope=at_clients, fold=fold, **parts
  )
  ended = build(
    _ending(client, keep_optimizer), scope=at_clients, fold=fold, **parts
  )
  assert started.train is not None
  start = started.train
  step = _step(loss, client, above, order, block_size)

  def init(key, params) -> ServerState:
    for name, mine in _trained(scope, params)._asdict().items():
      if not jax.tree.leaves(mine):
        raise Error(
          f'the cut leaves the {name} nothing to train: choose another '
          'algorithm.cut or adapter.targets.'
        )
    state = ended.init(key, params)
    own = above.init(_trained(scope, params).server)
    return state._replace(optimizer=Moments(state.optimizer, own))

  def round(state, cohort: Cohort, base=None, data=None):
    if cohort.started is not None:
      raise Error(
        'split learning has no clients that started in earlier rounds.'
      )
    fed = state._replace(optimizer=state.optimizer.clients)
    # What every client starts from, as the stations of the round decide.
    uploads, _, _ = start(fed, cohort._replace(batches=()), base)
    whole, params = (
      (base, state.params) if fold is None else fold(base, state.params)
    )
    ends, upper, moments = _steps(
      step, client, whole, params, _trained(scope, params).server, uploads,
      state, cohort, keep_optimizer,
    )  # fmt: skip
    new, states, info = ended.round(
      fed, cohort._replace(batches=ends), base, data
    )
    new = new._replace(
      optimizer=Moments(new.optimizer, moments),
      params=new.params._replace(server=tree.merge(upper, new.params.server)),
    )
    return new, states, _billed(info, messages, whole, params, cohort)

  def exchanged(params: Halves, base: Any, batches: Any) -> tuple[int, int]:
    """Returns bytes up and down in the steps of a client, [K, S, ...]."""
    up, down = _sizes(messages, base, params, batches)
    num_steps = jax.tree.leaves(batches)[0].shape[1]
    return num_steps * up, num_steps * down

  return FederatedAlgorithm(
    init=init,
    init_client=ended.init_client,
    round=round,
    personal=ended.personal,
    exchanged=exchanged,
  )


def _check(parts: dict[str, Any]) -> None:
  rule = parts.get('aggregator')
  if rule is not None and rule.traits.private is not None:
    raise Error(
      'privacy: the server of split learning reads the states of every client, '
      'which are neither clipped nor noised: take another method.'
    )
  if parts.get('download') is not None:
    raise Error('split learning has no codec of downloads: leave download out.')
  if parts.get('history', 1) != 1:
    raise Error('split learning keeps one version: leave history out.')


# ------------------------------------------------------------ the stations --


def _trained(scope: Scope, params: Params) -> Any:
  return tree.select(params, scope.labels(params), Shared, Private)


def _at_clients(scope: Scope) -> Scope:
  """Returns the scope with the server's part frozen for all clients."""

  def labels(params):
    chosen = scope.labels(params)
    still = jax.tree.map(lambda _: Frozen, chosen.server)
    return chosen._replace(server=still)

  def mask(start, state, context):
    masks = scope.mask(start, state, context)
    own = labels(start)
    return type(masks)(*(tree.select(m, own, Shared, Private) for m in masks))

  return Scope(labels, mask)


def _kept(client: Stepper, keep: bool):
  return lambda trainable: client.init(trainable) if keep else ()


def _asking(client: Stepper, keep: bool) -> LocalUpdate:
  """Returns a local update that does nothing but report its key."""

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    del base, batches
    return ClientOutput(
      update=tree.zeros_like(tree.like(start, masks.trained)),
      masks=masks,
      state=state,
      report=jax.random.key_data(context.key),
    )

  return LocalUpdate(_kept(client, keep), run)


def _ending(client: Stepper, keep: bool) -> LocalUpdate:
  """Returns a local update whose batches are the client's `Ends`."""

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    del base, state, context
    ends: Ends = batches
    return ClientOutput(
      update=tree.sub(ends.end, tree.like(start, masks.trained)),
      masks=masks,
      state=ends.moments if keep else (),
      work=ends.work,
      metrics=ends.metrics,
    )

  return LocalUpdate(_kept(client, keep), run)


# ---------------------------------------------------------------- the steps --


def _step(loss, client: Stepper, above: Stepper, order, block_size):
  """Returns one step of all clients and of the server."""
  in_turn = order == 'sequential'

  def learn(upper, moments, grads, tokens, count):
    grads = tree.scale(grads, 1 / jnp.maximum(tokens, 1.0))
    real = (tokens > 0) & tree.all_finite(grads)
    grads = tree.map_present(lambda g: jnp.where(real, g, 0), grads)
    mask = tree.map_present(lambda _: jnp.bool_(True), upper)
    return above.step(grads, moments, upper, mask, count, real)[:2]

  def step(base, params, upper, moments, rows: _Row, count):
    """Returns the clients' gradients and sums [K], the part and its moments."""

    def total(mine, upper, block: _Row):
      def one(mine, row):
        whole = Halves(tree.merge(mine, row.start), tree.merge(upper, params))
        return loss(base, whole, row.batch, row.key)

      sums = jax.vmap(one)(mine, block)
      real = block.valid & (sums.count > 0)
      sums = jax.tree.map(lambda x: jnp.where(real, x, 0), sums)
      return jnp.sum(sums.total), sums

    def body(carry, block: _Row):
      upper, moments, grads, tokens = carry
      slope = jax.grad(total, (0, 1), has_aux=True)
      (own, more), sums = slope(block.mine, upper, block)
      if in_turn:
        upper, moments = learn(upper, moments, more, jnp.sum(sums.count), count)
      else:
        grads, tokens = tree.add(grads, more), tokens + jnp.sum(sums.count)
      share = 1 / jnp.maximum(sums.count, 1)  # a client's own token mean
      own = tree.map_present(lambda g: g * tree.rows(share, g), own)
      return (upper, moments, grads, tokens), (own, sums)

    num = rows.valid.shape[0]
    size = 1 if in_turn else min(block_size or num, num)
    carry = (upper, moments, tree.zeros_like(upper), jnp.float32(0))
    if size == num:
      carry, (own, sums) = body(carry, rows)
    else:
      carry, outs = jax.lax.scan(body, carry, _blocks(rows, size))
      flat = lambda x: x.reshape(-1, *x.shape[2:])[:num]
      own, sums = jax.tree.map(flat, outs)
    upper, moments, grads, tokens = carry
    if not in_turn:
      upper, moments = learn(upper, moments, grads, tokens, count)
    return own, sums, upper, moments

  return step


def _steps(
  step, client: Stepper, base, params, upper, uploads, state, cohort, keep
):
  """Returns `Ends` [K, ...], the server's trained leaves and its moments."""
  keys = jax.random.wrap_key_data(
    uploads.reports, impl=jax.random.key_impl(state.key)
  )
  masks = uploads.masks.trained.client
  start = uploads.start.client
  mine = tree.like(start, masks)
  both = lambda trained: Halves(
    trained, jax.tree.map(lambda _: None, params.server)
  )
  moments = cohort.states.local
  if not keep:
    moments = jax.vmap(lambda trained: client.init(both(trained)))(mine)
  batches = jax.tree.map(jnp.asarray, cohort.batches)
  num_steps = jax.tree.leaves(batches)[0].shape[1]
  some = _real(batches, cohort.valid)
  last = jnp.max(jnp.where(some, jnp.arange(num_steps) + 1, 0))
  zero = jnp.zeros(len(cohort.ids), jnp.float32)

  def turn(index, carry):
    mine, moments, upper, above, totals = carry
    count = state.round * num_steps + index
    rows = _Row(
      mine,
      start,
      jax.tree.map(lambda x: x[:, index], batches),
      jax.vmap(lambda key: jax.random.fold_in(key, index))(keys),
      cohort.valid,
    )
    own, sums, upper, above = step(
      base, params.server, upper, above, rows, count
    )
    real = sums.count > 0

    def one(grads, moments, trained, mask, real):
      new, moments, grads = client.step(
        both(grads), moments, both(trained), both(mask), count, real
      )
      return new.client, moments, tree.norm(grads)

    mine, moments, norm = jax.vmap(one)(own, moments, mine, masks, real)
    now = (*sums, jnp.where(real, norm, 0), real.astype(jnp.float32))
    totals = jax.tree.map(jnp.add, totals, now)
    return mine, moments, upper, above, totals

  carry = (mine, moments, upper, state.optimizer.server, (zero,) * 5)
  mine, moments, upper, above, totals = jax.lax.fori_loop(0, last, turn, carry)
  nats, tokens, correct, norm, taken = totals
  ends = Ends(
    end=jax.vmap(both)(mine),
    moments=moments,
    work=Work(tokens, taken.astype(jnp.int32), turns=taken.astype(jnp.int32)),
    metrics={
      'loss': nats / jnp.maximum(tokens, 1),
      'accuracy': correct / jnp.maximum(tokens, 1),
      'grad_norm': norm / jnp.maximum(taken, 1),
    },
  )
  return ends, upper, above


def _blocks(rows: _Row, size: int) -> _Row:
  """Returns rows [K, ...] as [blocks, size, ...], padded with invalid ones."""
  num = rows.valid.shape[0]
  pad = -num % size

  def leaf(x):
    x = jnp.concatenate([x, jnp.repeat(x[-1:], pad, axis=0)]) if pad else x
    return x.reshape(-1, size, *x.shape[1:])

  new = jax.tree.map(leaf, rows)
  real = (jnp.arange(num + pad) < num).reshape(-1, size)
  return new._replace(valid=new.valid & real)


# ---------------------------------------------------------------- the bytes --


def _real(batches: Any, valid: Any) -> jax.Array:
  """Returns the steps in which a client sends something, [K, S] bool."""
  some = batching.real(batches)
  if some is None:
    some = jnp.ones(jax.tree.leaves(batches)[0].shape[:2], bool)
  return some & valid[:, None]


def _sizes(messages, base, params: Halves, batches) -> tuple[int, int]:
  """Returns the bytes that one client sends and receives in one step."""
  step = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), batches
  )
  shapes = jax.eval_shape(messages, base, params, step)
  size = lambda x: sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
  return size(shapes[0]), size(shapes[1])


def _billed(info: RoundInfo, messages, base, params, cohort) -> RoundInfo:
  """Returns the outcome with one more column of bytes for every step."""
  up, down = _sizes(messages, base, params, cohort.batches)
  some = _real(cohort.batches, cohort.valid).astype(jnp.int32)
  columns = lambda old, size: jnp.concatenate([old, size * some], axis=1)
  return info._replace(
    bytes_up=columns(info.bytes_up, up),
    bytes_down=columns(info.bytes_down, down),
  )
