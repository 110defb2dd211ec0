"""One federated round: `fed_opt` composes every named method.

    broadcast -> local training -> uploads -> aggregation -> server step

`client.py` is one client's round, `round.py` runs all clients, and this module
applies the rule and the server optimizer to their uploads. `fed_opt` returns a
`FederatedAlgorithm`. The frozen base is an argument without a client axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import checks, scopes, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.server import combinations, metrics, step
from fedjax_llm.server.client import Broadcast, initial, one_round
from fedjax_llm.server.round import Layout, Sums, Trained, train
from fedjax_llm.types import (
  Adversary,
  After,
  Aggregator,
  AnyAggregator,
  Base,
  ClientState,
  Cohort,
  Context,
  Download,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Masks,
  Metrics,
  Params,
  RoundInfo,
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
  adversary: Adversary | None = None,
  after: After | None = None,
  history: int = 1,
  block_size: int | None = None,
  widths: Sequence[int] = (),
  mesh: jax.sharding.Mesh | None = None,
  execution: str = 'shard_map',
) -> FederatedAlgorithm:
  """Returns a federated algorithm composed of its stations.

  One round of Reddi et al. 2021 (arXiv 2003.00295, algorithm 1): every client
  starts from the parameters it received, trains, and uploads end - start; the
  aggregate of the uploads, its sign flipped once, here, is a pseudo-gradient
  for the server optimizer.

  A client is left out, and its state unchanged, if it is padding, dropped out,
  sent a value that is not finite, an update beyond `step.LARGEST_NORM` or a
  weight outside of [0, `step.LARGEST_WEIGHT`]. If an aggregate is still not
  finite, the whole cohort is left out. A round without a report of positive
  weight changes nothing but its number, unless the rule acts `always`. Entries
  that no client trained keep their value and their moments under every
  optimizer.

  `round` equals `aggregate` of the result of `train`, but a streaming rule adds
  up blocks and never holds the stack.

  Args:
    local: training on one client.
    upload: the codec of updates.
    aggregator: the rule on the stack of updates.
    server: an optax transformation; it sees -delta.
    scope: the leaves that clients train, share and keep; all shared by default.
    download: the codec of parameters on their way to clients; none if None.
    fold: writes frozen dense changes into the base once a round, outside
      `vmap` (`Adapter.fold`).
    measure: `(uploads, old, new) -> metrics`, added to the round's metrics
      where the whole stack of uploads exists (a streaming rule in blocks keeps
      none).
    adversary: `(uploads, key) -> uploads`, simulates malicious clients; it sees
      the whole stack, so blocks and additive uploads are refused.
    after: a traced phase of the server after the rule, `(state, base, data,
      key) -> state`, where `data` is the argument of `round`.
    history: V, the number of versions of the parameters that the server keeps
      for clients that started earlier (`Cohort.started`); clients that started
      before them are left out.
    block_size: clients in one `vmap`; the whole cohort if None. Changes
      nothing but rounding, memory and speed.
    widths: a block's rows are cut to the smallest of these that holds its
      longest text (`narrowed`). Changes nothing but rounding and speed.
    mesh: a ('clients', 'model') mesh (`sharding.mesh`); a cohort is split over
      its first axis, and blocks are then those of one device row. A streaming
      rule costs one all-reduce a round.
    execution: how the split is compiled, 'shard_map' or 'pmap'
      (`sharding.over_clients`).

  Raises:
    Error: a block size or a width below one; a server optimizer with moments
      over a rule that changes the basis of the factors (moments of the old
      basis would be applied to the new one); a rule that writes residuals
      without `fold`, or with a history; an additive upload under a rule that
      is not linear; an adversary with blocks; a download that keeps a memory
      or decodes a sum, or a lossy one under a rule that writes residuals.
      From `round` and `train`: a cohort with `started` where history is 1.

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
  checks.as_rule(aggregator, 'aggregator')
  combinations.check_private(aggregator, upload)
  aggregator = step.watched(aggregator)
  combinations.check(
    upload, aggregator, server, fold, adversary, history, block_size, widths,
    download,
  )  # fmt: skip
  layout = Layout(block_size, widths, mesh, execution)
  client = one_round(local, scope, upload, download, aggregator)
  sums = _sums(aggregator, upload)

  def init(key: Key, params: Params) -> ServerState:
    if aggregator.traits.writes_residual:
      params = _with_residuals(params)
    labels = scope.labels(params)
    state = ServerState(
      round=jnp.int32(0),
      params=params,
      optimizer=server.init(tree.select(params, labels, Shared)),
      aggregator=aggregator.init(params, key),
      key=key,
      history=() if history == 1 else tree.broadcast(params, history),
    )
    # Every leaf has a buffer of its own: a donated buffer may appear only once.
    return jax.tree.map(jnp.copy, state)

  def keys(state: ServerState) -> jax.Array:
    """Returns keys of clients, rule, adversary, phase after, all in common."""
    key = jax.random.fold_in(state.key, state.round)
    clients, rule = jax.random.split(key)
    more = lambda name: jax.random.fold_in(key, name)
    return jnp.stack([clients, rule, more(2), more(3), more(4)])

  def trained(state, cohort, base, *, stream: bool) -> tuple[Trained, Uploads]:
    checks.one_cohort(cohort)
    params = state.params
    if fold is not None:
      base, params = fold(base, params)
    labels = scope.labels(params)
    rule = state.aggregator
    started = cohort.started
    if started is not None and history == 1:
      raise Error(
        'this cohort has clients that started in earlier rounds '
        '(Draw.started), and the server keeps no versions: set history.'
      )
    if started is None and history > 1:
      started = jnp.broadcast_to(state.round, cohort.ids.shape)
    common = Broadcast(
      base=base,
      params=params,
      history=state.history if history > 1 else None,
      rule=rule,
      round=state.round,
      key=keys(state)[0],
      news=aggregator.broadcast and aggregator.broadcast(rule),
      peers=jnp.asarray(cohort.ids) if upload.additive else None,
      round_key=keys(state)[4],
    )
    out = train(
      client,
      labels,
      common,
      cohort._replace(started=started),
      layout,
      sums=sums if stream else None,
      keep=measure is not None and mesh is None,
    )
    uploads: Any = out.uploads
    if adversary is not None:
      uploads = adversary(uploads, keys(state)[2])
    return out, uploads

  def served(state, total, uploads, base, data, ids, reported, weight):
    """Applies the rule, the server's step and the phase after.

    The last value returned is True if the rule's outcome is finite.
    """
    received, some_weight = uploads, jnp.any(reported & (weight > 0))
    labels = scope.labels(state.params)
    _, key, _, _, round_key = keys(state)
    if upload.additive:
      context = Context(
        round=state.round,
        key=key,
        peers=ids,
        reported=reported,
        round_key=round_key,
      )
      uploads = _decoded(upload, total, state, some_weight, context)
      total = None
    if isinstance(aggregator, StreamingAggregator):
      if total is None:
        zero = aggregator.zero(state.params)
        total = aggregator.accumulate(
          zero, uploads, state.aggregator, state.params
        )
      result, rule = aggregator.finalize(
        total, state.aggregator, state.params, key
      )
    else:
      result, rule = aggregator.aggregate(
        uploads, state.aggregator, state.params, key
      )
    new = step.stepped(state, result, rule, server, labels)
    sound = tree.all_finite((result.delta, result.assign))
    acts = sound if aggregator.traits.always else sound & some_weight
    keep = lambda n, o: jnp.where(acts, n, o)
    new = jax.tree.map(
      keep,
      new._replace(key=None, round=None, history=None),
      state._replace(key=None, round=None, history=None),
    )
    new = new._replace(key=state.key, round=state.round + 1)
    more = metrics.of_server(result, state.params, new.params)
    if measure is not None and received is not None and not upload.additive:
      if aggregator.weights is not None:
        received = received._replace(weight=aggregator.weights(received))
      more |= measure(received, state.params, new.params)
    if after is not None:
      new = after(new._replace(history=()), base, data, keys(state)[3])
    past = state.history
    if history > 1:
      push = lambda new, old: jnp.concatenate([new[None], old[:-1]])
      past = jax.tree.map(push, new.params, past)
    return new._replace(history=past), more, sound

  def halves_train(state: ServerState, cohort: Cohort, base: Base = None):
    out, uploads = trained(state, cohort, base, stream=False)
    return uploads, out.states, metrics.of_clients(out.rows, cohort)

  def halves_aggregate(
    state: ServerState, uploads: Uploads, base: Base = None, data: Any = None
  ) -> tuple[ServerState, Metrics]:
    total = None
    if upload.additive and sums is not None:
      total = sums.add(sums.zero(None), uploads, None)
    ids, valid, weight = uploads.ids, uploads.valid, uploads.weight
    state, more, _ = served(
      state, total, uploads, base, data, ids, valid, weight
    )
    return state, more

  def round_fn(
    state: ServerState, cohort: Cohort, base: Base = None, data: Any = None
  ) -> tuple[ServerState, ClientState, RoundInfo]:
    stream = sums is not None and adversary is None
    out, uploads = trained(state, cohort, base, stream=stream)
    info = metrics.of_clients(out.rows, cohort)
    reported = info.reported
    new, more, sound = served(
      state, out.sums, uploads, base, data, cohort.ids, reported,
      out.rows.weight,
    )  # fmt: skip
    # No client counts if the rule's outcome is not finite.
    info = info._replace(
      reported=reported & sound,
      finite=info.finite & (sound | ~reported),
      metrics={**info.metrics, **more},
    )
    keep = lambda new, old: jnp.where(sound, new, old)
    states = tree.map_present(keep, out.states, cohort.states)
    return new, states, info

  def personal(params: Params, state: ClientState | None) -> Params:
    return params if state is None else tree.merge(state.private, params)

  return FederatedAlgorithm(
    init=init,
    init_client=lambda params: initial(
      params, local, scope, upload, aggregator
    ),
    round=round_fn,
    personal=personal,
    train=halves_train,
    aggregate=halves_aggregate,
  )


def _sums(aggregator: AnyAggregator, upload: Upload) -> Sums | None:
  """Returns the sums over blocks; None for a rule on the whole stack."""
  if upload.additive:
    # The shape of a message is known only with a message: None until then.
    def add(total, uploads, common):
      del common
      ones = uploads.valid.astype(jnp.float32)
      each = lambda x: (
        jnp.sum(x, 0, dtype=x.dtype)  # modulo 2^b; other rows are zero
        if jnp.issubdtype(x.dtype, jnp.unsignedinteger)
        else tree.weighted_sum(x, ones)
      )
      sums = jax.tree.map(each, uploads.update), jnp.sum(uploads.weight)
      return sums if total is None else tree.add(total, sums)

    def begun(total, uploads, common):
      del total
      shapes = jax.eval_shape(lambda x: add(None, x, common), uploads)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return Sums(lambda common: None, begun, add)
  if isinstance(aggregator, Aggregator):
    return None
  rule: StreamingAggregator = aggregator

  def zero(common):
    return rule.zero(common.params)

  def accumulate(total, uploads, common):
    return rule.accumulate(total, uploads, common.rule, common.params)

  def begun(total, uploads, common):
    del common
    return step.begun(total, uploads)

  return Sums(zero, begun, accumulate)


def _decoded(upload, total, state, some_weight, context: Context) -> Uploads:
  """Returns the decoded sum of messages as the upload of a single client."""
  message, weight = total
  update = upload.decode(message, state.params, context)
  each = tree.scale(update, 1 / jnp.where(weight > 0, weight, 1.0))
  row = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
  ones = jax.tree.map(lambda x: jnp.ones((1,) * (1 + x.ndim), bool), each)
  return Uploads(
    update=row(each),
    start=row(state.params),
    masks=Masks(ones, ones),
    weight=weight[None],
    valid=jnp.atleast_1d(some_weight),
    ids=jnp.full(1, -1, jnp.int32),
  )


def _with_residuals(params: Params) -> Params:
  """Returns parameters with zero residuals in nodes that have a scale."""

  def node(x):
    if not isinstance(x, LowRank) or x.scale is None or x.residual is not None:
      return x
    shape = (*x.a.shape[:-1], x.b.shape[-1])
    return x._replace(residual=jnp.zeros(shape, jnp.float32))

  return jax.tree.map(node, params, is_leaf=lambda x: isinstance(x, LowRank))
