"""The one federated round: every named method is a call of `fed_opt`.

    broadcast -> local training -> uploads -> aggregation -> server step

Clients run as `vmap` inside blocks and blocks as a `lax.scan`, so memory is
that of one block; the frozen base is an argument that no client axis touches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import sharding, tree
from fedjax_llm.clients import scopes
from fedjax_llm.server import step
from fedjax_llm.server.widths import narrowed
from fedjax_llm.types import (
  AnyAggregator,
  Base,
  ClientState,
  Cohort,
  Download,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  LowRank,
  Masks,
  Metrics,
  Params,
  Private,
  Scope,
  ServerOptimizer,
  ServerState,
  Shared,
  StreamingAggregator,
  Upload,
  Uploads,
)


def fed_opt(
  local: LocalUpdate,
  *,
  upload: Upload,
  aggregator: AnyAggregator,
  server: ServerOptimizer,
  scope: Scope | None = None,
  download: Download | None = None,
  fold: Callable[[Base, Params], tuple[Base, Params]] | None = None,
  measure: Callable[[Uploads, Params, Params], Metrics] | None = None,
  block_size: int | None = None,
  widths: Sequence[int] = (),
  mesh: jax.sharding.Mesh | None = None,
  execution: str = 'shard_map',
) -> FederatedAlgorithm:
  """Composes a federated algorithm from its stations.

  One round of Reddi et al. 2021 (arXiv 2003.00295, algorithm 1): every client
  starts from what it received, trains, and uploads end - start; the aggregate
  of the uploads, its sign flipped once, here, is a pseudo-gradient for the
  server optimizer.

  A client is left out, and its state unchanged, if it is padding, dropped out,
  or sent a value that is not finite, an update beyond `step.LARGEST_NORM` or a
  weight outside of [0, `step.LARGEST_WEIGHT`]. If an aggregate is not finite
  all the same, the whole cohort is left out. A round that nobody reports to, or
  only clients of weight zero, changes nothing but its number. Entries that
  nobody trained keep their value and their moments, whatever the optimizer.

  Args:
    local: training on one client.
    upload: how an update is coded on its way up.
    aggregator: the rule on the stack of updates.
    server: an optax transformation; it sees -delta.
    scope: what clients train, share and keep; all shared by default.
    download: how parameters are coded on their way down; as they are if None.
    fold: writes frozen dense changes into the base once a round, outside
      `vmap` (`Adapter.fold`).
    measure: `(uploads, old, new) -> metrics` of a round, told beside the
      others wherever the whole stack of uploads is at hand (a streaming rule
      in blocks keeps none).
    block_size: clients in one `vmap`; the whole cohort if None. Changes
      nothing but rounding, memory and speed.
    widths: a block's rows are cut to the smallest of these that holds its
      longest text (`narrowed`). Changes nothing but rounding and speed.
    mesh: a ('clients', 'model') mesh (`sharding.mesh`); a cohort is split over
      its first axis, and blocks are then those of one device row. A streaming
      rule costs one all-reduce a round.
    execution: how that is written, 'shard_map' or 'pmap'
      (`sharding.over_clients`).

  Raises:
    Error: a block size or a width below one; a server optimizer with moments
      over a rule that changes the basis of the factors (moments of the old
      basis would be applied to the new one); a rule that writes residuals
      without `fold`.

  >>> from fedjax_llm import aggregators, local, uploads
  >>> from fedjax_llm.server.optimizers import sgd
  >>> from fedjax_llm.types import LossSum
  >>> slope = lambda base, p, x, key: LossSum(p['w'] * x, *jnp.float32([1, 0]))
  >>> method = fed_opt(
  ...   local.sgd(slope, local.optimizer('sgd', 1.0)), server=sgd(),
  ...   upload=uploads.identity(), aggregator=aggregators.median())
  >>> state = method.init(jax.random.key(0), {'w': jnp.float32(0)})
  >>> texts, ones = jnp.array([[-1.0], [-2.0], [-900.0]]), jnp.ones(3)
  >>> cohort = Cohort(jnp.arange(3), texts, ones, ones > 0)
  >>> state, _, _ = jax.jit(method.round)(state, cohort)
  >>> float(state.params['w'])
  2.0
  """
  scope = scope or scopes.everything()
  aggregator = step.watched(aggregator)
  if block_size is not None and block_size < 1:
    raise Error(f'block_size is {block_size}; it must be at least 1.')
  if min(widths, default=1) < 1:
    raise Error(f'widths are {tuple(widths)}; each must be at least 1.')
  if aggregator.traits.changes_basis and jax.tree.leaves(
    jax.eval_shape(server.init, jnp.zeros(1))
  ):
    raise Error(
      'this aggregator changes the basis of the factors every round, so the '
      'server optimizer must keep no moments: use server.name=sgd.'
    )
  if aggregator.traits.writes_residual and fold is None:
    raise Error(
      'this aggregator writes what the factors miss into the base, so it needs '
      'fold, that of the adapter: fold=adapter.fold.'
    )

  def init(key: Key, params: Params) -> ServerState:
    if aggregator.traits.writes_residual:
      params = _with_residuals(params)
    labels = scope.labels(params)
    return ServerState(
      round=jnp.int32(0),
      params=params,
      optimizer=server.init(tree.select(params, labels, Shared)),
      aggregator=aggregator.init(params, key),
      key=key,
    )

  def init_client(params: Params) -> ClientState:
    labels = scope.labels(params)
    shared = tree.select(params, labels, Shared)
    return ClientState(
      private=_present(tree.select(params, labels, Private)),
      local=local.init(tree.select(params, labels, Shared, Private)),
      upload=upload.init(shared),
      seen=step.unseen(aggregator, params),
    )

  def personal(params: Params, state: ClientState | None) -> Params:
    return params if state is None else tree.merge(state.private, params)

  def client(base, params, labels, round, key, extra, row: Cohort):
    """One client's round, without a leading axis (`row` is a cohort's row)."""
    keys = jax.random.split(jax.random.fold_in(key, row.ids), 4)
    state = row.states
    full = tree.full_masks(params, labels)
    down_bytes: Any = ()
    received = params
    shared = tree.select(params, labels, Shared)
    if download is not None:
      message, _ = download.encode(shared, full, download.init(shared), keys[0])
      received = tree.merge(download.decode(message, params, keys[0]), params)
      down_bytes = download.num_bytes(message, _only(full, labels))
    start = tree.merge(state.private, received)
    masks = scope.mask(start, row.profiles, state, round, keys[1])
    start = tree.apply_mask(start, masks.held)
    if download is None:
      down_bytes = _dense_bytes(shared, masks.held)

    out = local.run(
      base, start, state.local, row.batches, masks, round, keys[2]
    )
    update = tree.apply_mask(out.update, out.masks.trained)
    shared_masks = _only(out.masks, labels)
    message, upload_state = upload.encode(
      tree.select(update, labels, Shared), shared_masks, state.upload, keys[3]
    )
    sent = upload.decode(message, start, keys[3])
    up_bytes = upload.num_bytes(message, shared_masks)
    private = tree.select(tree.add(start, update), labels, Private)
    owed, seen = step.owed(aggregator, extra, state.seen)
    states = ClientState(_present(private), out.state, upload_state, seen)
    finite = tree.all_finite((update, sent, out.metrics, states))
    told = {
      **{f'local/{name}': value for name, value in out.metrics.items()},
      'local/update_norm': tree.norm(_floating(update)),
      'uploads/bytes': _flat(up_bytes),
      'downloads/bytes': _flat((down_bytes, owed)),
    }
    return sent, start, out.masks, states, finite, told

  def run_block(base, params, labels, round, key, extra, block: Cohort):
    def run(batches):
      return jax.vmap(
        lambda row: client(base, params, labels, round, key, extra, row)
      )(block._replace(batches=batches))

    outs, places = narrowed(run, block.batches, widths)
    sent, start, masks, states, finite, told = outs
    if 'local/loop_steps' in told:
      # Of the whole block, told by its first client.
      steps = jnp.max(told.pop('local/loop_steps')) * len(block.ids)
      first = jnp.arange(len(block.ids)) == 0
      told['clients/places'] = jnp.where(first, steps * places, 0)
    weight = told.pop('local/weight', block.weight)
    finite &= jax.vmap(step.usable)(sent, weight)
    valid = block.valid & finite
    uploads = Uploads(
      update=tree.where(valid, sent, tree.zeros_like(sent)),
      start=start,
      masks=masks,
      weight=jnp.where(valid, weight, 0.0).astype(jnp.float32),
      valid=valid,
    )
    states = tree.where(valid, states, block.states)
    told['clients/weight'] = uploads.weight
    told['clients/non_finite'] = block.valid & ~finite
    told['clients/reported'] = valid
    return uploads, states, told

  def round_fn(
    state: ServerState, cohort: Cohort, base: Base = None
  ) -> tuple[ServerState, ClientState, Metrics]:
    num_clients = cohort.ids.shape[0]
    params = state.params
    if fold is not None:
      base, params = fold(base, params)
    labels = scope.labels(params)
    key = jax.random.fold_in(state.key, state.round)
    client_key, server_key = jax.random.split(key)
    extra = state.aggregator if aggregator.num_bytes else ()
    shared = (base, params, state.aggregator, state.round, client_key, extra)

    def train(shared, cohort):
      """The clients of one device row, block by block."""
      base, params, rule_state, round, key, extra = shared
      run = lambda block: run_block(
        base, params, labels, round, key, extra, block
      )
      num = cohort.ids.shape[0]
      size = min(block_size or num, num)
      zero = None
      if isinstance(aggregator, StreamingAggregator):
        zero = aggregator.zero(params)
      if size == num:
        uploads, states, told = run(cohort)
        if isinstance(aggregator, StreamingAggregator):
          sums = aggregator.accumulate(zero, uploads, rule_state, params)
          if measure is None or mesh is not None:
            uploads = None  # eaten: nothing of it crosses devices
        else:
          sums = None
        return sums, (uploads, states, told)

      def body(sums, block):
        uploads, states, told = run(block)
        if isinstance(aggregator, StreamingAggregator):
          sums = aggregator.accumulate(sums, uploads, rule_state, params)
          uploads = None  # eaten
        return sums, (uploads, states, told)

      blocks = jax.tree.map(
        lambda x: x.reshape(-1, size, *x.shape[1:]), _pad(cohort, size)
      )
      if isinstance(aggregator, StreamingAggregator):
        like = jax.eval_shape(run, jax.tree.map(lambda x: x[0], blocks))
        zero = step.begun(zero, like[0])
      sums, outs = jax.lax.scan(body, zero, blocks)
      return sums, jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:num], outs
      )

    if mesh is None:
      sums, rows = train(shared, cohort)
    else:
      rows_of = mesh.shape[sharding.CLIENTS]
      sums, rows = sharding.over_clients(train, mesh, execution)(
        shared, _pad(cohort, rows_of)
      )
      rows = jax.tree.map(lambda x: x[:num_clients], rows)
    uploads: Any
    uploads, states, told = rows

    if isinstance(aggregator, StreamingAggregator):
      aggregate, aggregator_state = aggregator.finalize(
        sums, state.aggregator, state.params, server_key
      )
    else:
      aggregate, aggregator_state = aggregator.aggregate(
        uploads, state.aggregator, state.params, server_key
      )
    new = step.stepped(state, aggregate, aggregator_state, server, labels)
    told, states = step.checked(aggregate, told, states, cohort)
    anybody = jnp.any(told['clients/reported'] & (told['clients/weight'] > 0))
    new = jax.tree.map(
      lambda n, o: jnp.where(anybody, n, o),
      new._replace(key=None, round=None),
      state._replace(key=None, round=None),
    )._replace(key=state.key, round=state.round + 1)
    metrics = _tell(told, cohort, aggregate, state.params, new.params)
    if measure is not None and uploads is not None:
      if aggregator.weights is not None:
        uploads = uploads._replace(weight=aggregator.weights(uploads))
      metrics |= measure(uploads, state.params, new.params)
    return new, states, metrics

  return FederatedAlgorithm(init, init_client, round_fn, personal)


def _tell(told, cohort, aggregate, old, new) -> dict[str, jax.Array]:
  """Cohort metrics: means over the clients that count, [K] where it matters."""
  valid = told['clients/reported']
  clean = lambda x: jnp.where(valid, x, 0.0)
  tokens = clean(told['local/tokens'])
  by_tokens = tree.normalise(tokens)
  by_client = tree.normalise(valid.astype(jnp.float32))
  mean = lambda name, weight: jnp.sum(weight * clean(told[name]))
  received = cohort.ids >= 0
  rows = lambda keep, x: jnp.where(keep[:, None], x, 0)
  metrics = {
    'local/loss': mean('local/loss', by_tokens),
    'local/tokens': jnp.sum(tokens),
    'local/steps': jnp.sum(clean(told['local/steps'])),
    'local/update_norm': mean('local/update_norm', by_client),
    'uploads/bytes': rows(cohort.valid, told['uploads/bytes']),
    'downloads/bytes': rows(received, told['downloads/bytes']),
    'aggregators/norm': tree.norm(aggregate.delta),
    'server/step_norm': tree.norm(tree.sub(new, old)),
    'clients/non_finite': told['clients/non_finite'],
    'clients/reported': valid,
  }
  if 'clients/places' in told:
    places = jnp.sum(told['clients/places'].astype(jnp.float32))
    texts = jnp.sum(clean(told['local/text_tokens']))
    metrics['clients/useful_tokens'] = texts / jnp.maximum(places, 1)
  if 'local/report' in told:
    metrics['clients/reports'] = told['local/report']  # for `server.planned`
  for name in ('local/grad_norm', 'local/rank', 'local/accuracy'):
    if name in told:
      weight = by_tokens if name == 'local/accuracy' else by_client
      metrics[name] = mean(name, weight)
  return metrics


def _pad(cohort: Cohort, multiple: int) -> Cohort:
  """[K, ...] to the next multiple of clients; rows added are not valid."""
  num = cohort.ids.shape[0]
  pad = -num % multiple

  def leaf(x):
    x = jnp.asarray(x)
    # The last client again, so nothing can overflow on made-up data.
    return jnp.concatenate([x, jnp.repeat(x[-1:], pad, axis=0)]) if pad else x

  padded = jax.tree.map(leaf, cohort)
  real = jnp.arange(num + pad) < num
  return padded._replace(valid=padded.valid & real)


def _with_residuals(params: Params) -> Params:
  """Zeros where a rule will write; a node without a scale is no weight."""

  def node(x):
    if not isinstance(x, LowRank) or x.scale is None or x.residual is not None:
      return x
    shape = (*x.a.shape[:-1], x.b.shape[-1])
    return x._replace(residual=jnp.zeros(shape, jnp.float32))

  return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, LowRank))


def _floating(update: Any) -> Any:
  """What a client moved; notes that it keeps in whole numbers are no step."""
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return jax.tree.map(lambda x: x if is_float(x) else None, update)


def _present(part: Any) -> Any:
  """`None` for a tree without a leaf: clients without state store nothing."""
  return part if jax.tree.leaves(part) else None


def _only(masks: Masks, labels: Any) -> Masks:
  """The masks of what is shared."""
  return Masks(*(tree.select(m, labels, Shared) for m in masks))


def _dense_bytes(params: Params, mask: Any) -> Any:
  """Bytes of the entries held, one int32 count a leaf."""

  def leaf(p, m):
    entries = jnp.broadcast_to(m, p.shape) if m.ndim else m * p.size
    return jnp.sum(entries, dtype=jnp.int32) * p.dtype.itemsize

  return tree.map_present(leaf, params, mask)


def _flat(counts: Any) -> jax.Array:
  leaves = [jnp.ravel(x) for x in jax.tree.leaves(counts)]
  return jnp.concatenate(leaves) if leaves else jnp.zeros(1, jnp.int32)
