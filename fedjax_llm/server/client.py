"""One client's round: download, local training, upload.

`one_round` returns that function, `initial` a new client's state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.server import combinations, step
from fedjax_llm.types import (
  AnyAggregator,
  ClientState,
  Cohort,
  Context,
  Download,
  LocalUpdate,
  Masks,
  Metrics,
  Params,
  Private,
  Scope,
  Shared,
  Upload,
  Work,
)


class Returned(NamedTuple):
  """One client's round as the server receives it; stacked, [K] of each."""

  sent: Any  # the decoded update, or the message of an additive upload
  start: Params
  masks: Masks
  states: ClientState
  weight: Any  # [] float32
  report: Any
  finite: Any  # [] bool: every number that it returned
  work: Work
  metrics: Metrics
  bytes_up: Any  # [leaves] int32
  bytes_down: Any  # [leaves] int32


class Broadcast(NamedTuple):
  """The values that all clients of a round receive."""

  base: Any
  params: Params
  history: Any  # parameters of the last V rounds [V, ...], the newest first
  rule: Any  # the aggregator's state
  round: Any
  key: Any
  news: Any
  peers: Any  # [K] int32
  round_key: Any


def initial(
  params: Params,
  local: LocalUpdate,
  scope: Scope,
  upload: Upload,
  aggregator: AnyAggregator,
) -> ClientState:
  """Returns the state of a client that was never seen before."""
  labels = scope.labels(params)
  shared = tree.select(params, labels, Shared)
  return ClientState(
    private=present(tree.select(params, labels, Private)),
    local=local.init(tree.select(params, labels, Shared, Private)),
    upload=upload.init(shared),
    seen=step.unseen(aggregator, params),
  )


def one_round(
  local: LocalUpdate,
  scope: Scope,
  upload: Upload,
  download: Download | None,
  aggregator: AnyAggregator,
) -> Callable[[Broadcast, Any, Cohort], Returned]:
  """Returns the function of one client's round, without a client axis.

  It takes a `Broadcast`, the labels of the parameters and the client's row of
  the cohort.
  """

  def run(common: Broadcast, labels: Any, row: Cohort) -> Returned:
    params = common.params
    if row.started is not None:  # beyond V: the oldest, and not valid
      age = jnp.maximum(common.round - row.started, 0)
      params = tree.take(common.history, age)
    keys = jax.random.split(jax.random.fold_in(common.key, row.ids), 4)
    context = Context(
      client=row.ids,
      round=common.round,
      profile=row.profiles,
      news=common.news,
      peers=common.peers,
      round_key=common.round_key,
    )
    at = lambda i: context._replace(key=keys[i])
    state = row.states

    full = tree.full_masks(params, labels)
    bytes_down: Any = ()
    received = params
    shared = tree.select(params, labels, Shared)
    if download is not None:
      message, _ = download.encode(shared, full, download.init(shared), at(0))
      received = tree.merge(download.decode(message, params, at(0)), params)
      bytes_down = download.num_bytes(message, only_shared(full, labels))
    start = tree.merge(state.private, received)
    masks = scope.mask(start, state, at(1))
    start = tree.apply_mask(start, masks.held)
    if download is None:
      bytes_down = _dense_bytes(shared, masks.held)

    out = local.run(common.base, start, state.local, row.batches, masks, at(2))
    if upload.private:
      combinations.check_alone(out, masks)
    weight = row.weight if out.weight is None else out.weight
    update = tree.apply_mask(out.update, out.masks.trained)
    own_masks = only_shared(out.masks, labels)
    own = tree.select(update, labels, Shared)
    if upload.additive:
      own = tree.scale(own, weight)
    sent, upload_state = upload.encode(own, own_masks, state.upload, at(3))
    bytes_up = upload.num_bytes(sent, own_masks)
    if not upload.additive:
      sent = upload.decode(sent, start, at(3))
    private = tree.select(tree.add(start, update), labels, Private)
    private = tree.like(tree.merge(out.private, private), private)
    owed, seen = step.owed(aggregator, common.rule, state.seen)
    states = ClientState(present(private), out.state, upload_state, seen)
    metrics = dict(out.metrics)
    finite = tree.all_finite(
      (update, sent, metrics, out.work, out.report, weight, states)
    )
    finite &= step.usable(own, weight)
    return Returned(
      sent=sent,
      start=start,
      masks=out.masks,
      states=states,
      weight=weight,
      report=out.report,
      finite=finite,
      work=jax.tree.map(jnp.asarray, out.work),
      metrics={**metrics, 'update_norm': tree.norm(update)},
      bytes_up=_flat(bytes_up),
      bytes_down=_flat((bytes_down, owed, _bytes_of(common.news))),
    )

  return run


def present(part: Any) -> Any:
  """Returns `None` for a tree without a leaf: nothing of it is stored."""
  return part if jax.tree.leaves(part) else None


def only_shared(masks: Masks, labels: Any) -> Masks:
  """Returns the masks of shared leaves, `None` on the others."""
  return Masks(*(tree.select(m, labels, Shared) for m in masks))


def _dense_bytes(params: Params, mask: Any) -> Any:
  """Returns the bytes of the entries held, one int32 count a leaf."""

  def leaf(p, m):
    entries = jnp.broadcast_to(m, p.shape) if m.ndim else m * p.size
    return jnp.sum(entries, dtype=jnp.int32) * p.dtype.itemsize

  return tree.map_present(leaf, params, mask)


def _bytes_of(news: Any) -> Any:
  return jax.tree.map(lambda x: jnp.int32(x.size * x.dtype.itemsize), news)


def _flat(counts: Any) -> jax.Array:
  leaves = [jnp.ravel(x) for x in jax.tree.leaves(counts)]
  return jnp.concatenate(leaves) if leaves else jnp.zeros(1, jnp.int32)
