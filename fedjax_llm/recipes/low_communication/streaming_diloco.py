"""Streaming DiLoCo: one fragment of the parameters is synchronised at a time.

Douillard et al. 2025, arXiv 2501.18512.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.sgd import contents, descend
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.low_communication.diloco import outer
from fedjax_llm.types import (
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Scope,
  known,
)

# What the config of each method changes.
NEEDS = {
  'streaming_diloco': dict(
    clients=dict(name='full'),
    population=dict(max_clients=4),
    algorithm=dict(num_fragments=2, mixing=0.5),
  ),
}


def streaming_diloco(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_fragments: int = 3,
  overlap: int = 0,
  mixing: float = 0.0,
  server_learning_rate: float = 0.4,
  momentum: float = 0.9,
  **parts: Any,
) -> FederatedAlgorithm:
  """Streaming DiLoCo: one fragment of the parameters is synchronised at a time.

      after the S steps of round r:  fragment p = r mod P,
        delta_p = p_p - (1 / K) sum_k p_k,p,   p_p <- Nesterov(delta_p)
      after `overlap` steps of round r + 1:  p_k,p <- a p_k,p + (1 - a) p_p

  Douillard et al. 2025, arXiv 2501.18512, algorithm 2. Every worker trains all
  of its own parameters without a break; a fragment of them is sent each round,
  so that the largest message is a P-th of DiLoCo's, and the answer may come
  `overlap` steps late, while the workers train on. Each fragment has its own
  outer momentum. P S steps lie between two synchronisations of a fragment:
  the paper's H is P times `cohort.num_steps`. Layers are dealt to fragments in
  strides, l mod P, and what is outside of layers is the last fragment's. One
  fragment, no overlap and no mixing is DiLoCo. `--config.upload.name=quantised`
  adds the paper's quantised outer gradients. A worker that comes back after
  some rounds receives all fragments that were synchronised since.

  Args:
    num_fragments: P; at most as many as layers.
    overlap: inner steps before a worker has the new fragment; below S.
    mixing: a, the part of its own fragment that a worker keeps.
    server_learning_rate, momentum: of the outer optimizer; the learning rate is
      the paper's.

  Raises:
    Error: a server, a scope or an aggregator in `parts`, a number out of range;
      from the round, an adapter without layers or with fewer than P.

  >>> from fedjax_llm import local
  >>> method = streaming_diloco(None, local.optimizer('sgd'))
  >>> params = {'layers': {'q': jnp.ones((3, 2))}}
  >>> method.init_client(params).local.own['layers']['q'].shape
  (3, 2)
  """
  for section in ('server', 'scope', 'aggregator'):
    refuse('streaming_diloco', section, parts)
  if num_fragments < 1:
    raise Error(
      f'streaming_diloco: num_fragments={num_fragments} must be at least 1.'
    )
  if overlap < 0:
    raise Error(f'streaming_diloco: overlap={overlap} must be 0 or more.')
  if known(mixing) and not 0 <= mixing < 1:
    raise Error(
      f'streaming_diloco: mixing={mixing} must be at least 0 and below 1.'
    )
  return compose(
    worker(loss, optimizer, overlap, mixing),
    scope=fragments(num_fragments),
    aggregator=aggregators.uniform_mean(),
    server=outer('streaming_diloco', server_learning_rate, momentum),
    **parts,
  )


class Worker(NamedTuple):
  """The state of a worker: its own parameters, which no round replaces whole.

  `anchor` are the server's parameters as the worker last received them.
  """

  last: Any  # [] int32: its rounds end with this one; -1: it is new
  own: Params
  anchor: Params
  optimizer: Any


def fragments(num_fragments: int) -> Scope:
  """Returns a scope: a worker receives some fragments and sends one.

  It holds the fragments that were synchronised since its last round, all if it
  is new, and trains, in the sense of sending, the one of this round.

  Raises:
    Error: from `mask`, an adapter without layers or with too few.
  """
  inner = scopes.everything()

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    fragment = tree.like(_fragment_of(start, num_fragments), masks.held)
    last, now = state.local.last, context.round
    # Rounds since a fragment was synchronised, 0 for that of the last round.
    age = (now - 1 - jnp.arange(num_fragments)) % num_fragments
    fresh = (last < 0) | (now - 1 - age >= last)
    due = jnp.arange(num_fragments) == now % num_fragments

    def of(chosen):
      return tree.map_present(
        lambda f, x: jnp.asarray(chosen)[f].reshape(
          f.shape + (1,) * (x.ndim - f.ndim)
        ),
        fragment,
        start,
      )

    return Masks(held=of(fresh), trained=of(due))

  return Scope(inner.labels, mask)


def worker(
  loss: Loss,
  optimizer: LocalOptimizer,
  overlap: int,
  mixing: float,
) -> LocalUpdate:
  """Returns the training of a worker that keeps its parameters and moments."""

  def init(trainable):
    return Worker(
      jnp.int32(-1), trainable, trainable, optimizer.init(trainable)
    )

  def run(base, start, state, batches, masks, context):
    num = jax.tree.leaves(batches)[0].shape[0]
    if overlap >= num:
      raise Error(
        f'streaming_diloco: overlap={overlap} must be below the {num} steps of '
        'a round (cohort.num_steps).'
      )
    take = lambda one, other: tree.map_present(
      jnp.where, masks.held, one, other
    )
    anchor = take(tree.like(start, masks.held), state.anchor)
    new = state.last < 0
    own = tree.map_present(lambda a, o: jnp.where(new, a, o), anchor, state.own)
    whole = tree.map_present(lambda x: jnp.bool_(True), own)
    everything = Masks(whole, whole)

    def merged(own):
      mix = jnp.where(new, 1.0, mixing)  # it began with the server's
      blend = lambda o, a: (mix * o + (1 - mix) * a).astype(o.dtype)
      return take(tree.map_present(blend, own, anchor), own)

    def between(index, own):
      now = index == overlap
      pick = lambda m, o: jnp.where(now, m, o)
      return tree.map_present(pick, merged(own), own)

    out = descend(
      loss,
      optimizer,
      base,
      tree.merge(own, start),
      state.optimizer,
      batches,
      everything,
      context,
      between=between,
    )
    # A client whose steps end before the answer comes has it at the end.
    early = contents(batches, num)[1] <= overlap
    last = lambda m, o: jnp.where(early, m, o)
    end = tree.map_present(last, merged(out.end), out.end)
    return ClientOutput(
      update=tree.sub(end, anchor),
      masks=masks,
      state=Worker(context.round + 0, end, anchor, out.optimizer),
      work=out.work,
      metrics=out.metrics,
    )

  return LocalUpdate(init, run)


def _fragment_of(params: Params, num_fragments: int) -> Params:
  """Returns the fragment of each layer, [L] a leaf, [] outside of layers.

  >>> params = {'layers': {'q': jnp.ones((3, 2))}, 'head': jnp.ones(2)}
  >>> found = _fragment_of(params, 2)
  >>> found['layers']['q'].tolist(), int(found['head'])
  ([0, 1, 0], 1)
  """
  below = params.get('layers') if isinstance(params, Mapping) else None
  stacked = [x.shape[0] for x in jax.tree.leaves(below) if jnp.ndim(x)]
  if num_fragments > 1 and (not stacked or max(stacked) < num_fragments):
    raise Error(
      f'streaming_diloco: algorithm.num_fragments is {num_fragments}, but this '
      f'adapter has leaves of {max(stacked, default=0)} layers.'
    )

  def leaf(path, x):
    layered = bool(path) and getattr(path[0], 'key', None) == 'layers'
    if layered and jnp.ndim(x):
      return jnp.arange(x.shape[0]) % num_fragments
    return jnp.int32(num_fragments - 1)

  return jax.tree_util.tree_map_with_path(leaf, params)
