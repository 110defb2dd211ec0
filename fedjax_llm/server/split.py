"""Split learning: a scan over steps, and in each step all clients together.

Federated averaging is `vmap(client) of scan(step)`; here the loops change
places, because the server takes a step of its own part of the network in every
step of its clients. `split` returns a `FederatedAlgorithm`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_llm import tree
from fedjax_llm.nodes import Halves
from fedjax_llm.server import split_steps
from fedjax_llm.server.split_steps import Ends as Ends
from fedjax_llm.server.split_steps import Stepper as Stepper
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
  Scope,
  ServerState,
  Shared,
)

ORDERS = ('sequential', 'parallel')


class Moments(NamedTuple):
  """Optimizer states of the server: of averaged parts, and of its own part."""

  clients: Any
  server: Any


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
    Error: another order; several devices; a private rule or upload, since
      states are neither clipped nor noised; a download codec or a history; a
      part with nothing to train (from `init`).

  >>> import functools
  >>> import jax.numpy as jnp
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
  step = split_steps.joint_step(loss, above, order, block_size)

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
    ends, upper, moments = split_steps.run(
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
    info = split_steps.billed(info, messages, whole, params, cohort)
    return new, states, info

  def exchanged(params: Halves, base: Any, batches: Any) -> tuple[int, int]:
    """Returns bytes up and down in the steps of a client, [K, S, ...]."""
    up, down = split_steps.sizes(messages, base, params, batches)
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
  rule, upload = parts.get('aggregator'), parts.get('upload')
  central = rule is not None and rule.traits.private is not None
  if central or (upload is not None and upload.private):
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
