"""Checks of the combinations of parts that `fed_opt` composes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.types import (
  Adversary,
  AnyAggregator,
  ClientOutput,
  Download,
  Error,
  Masks,
  ServerOptimizer,
  Upload,
)


def check(
  upload: Upload,
  aggregator: AnyAggregator,
  server: ServerOptimizer,
  fold: Callable[..., Any] | None,
  adversary: Adversary | None,
  history: int,
  block_size: int | None,
  widths: Sequence[int],
  download: Download | None = None,
) -> None:
  """Raises `Error` if parts of `fed_opt` cannot be combined."""
  traits = aggregator.traits
  if block_size is not None and block_size < 1:
    raise Error(f'block_size is {block_size}; it must be at least 1.')
  if min(widths, default=1) < 1:
    raise Error(f'widths are {tuple(widths)}; each must be at least 1.')
  if history < 1:
    raise Error(f'history is {history}; it must be at least 1.')
  kept = jax.tree.leaves(jax.eval_shape(server.init, jnp.zeros(1)))
  # A schedule's count of rounds is no moment.
  moments = [x for x in kept if jnp.issubdtype(x.dtype, jnp.inexact)]
  if traits.changes_basis and moments:
    raise Error(
      'this aggregator changes the basis of the factors every round, so the '
      'server optimizer must keep no moments: use server.name=sgd.'
    )
  if traits.writes_residual and fold is None:
    raise Error(
      "this aggregator writes the factors' error into the base, so it needs "
      "fold, the adapter's function: fold=adapter.fold."
    )
  if traits.writes_residual and history > 1:
    raise Error(
      'this aggregator writes into the base, and the server keeps one version '
      'of the base: it needs history=1, and no clients that started earlier.'
    )
  if upload.additive and not traits.linear:
    raise Error(
      'this upload is decoded after the sum, so the aggregator sees no single '
      'client: use one that is linear in the updates, such as mean.'
    )
  if adversary is not None and block_size is not None:
    raise Error(
      'an adversary sees the whole stack of uploads: leave block_size out.'
    )
  if adversary is not None and upload.additive:
    raise Error(
      'an adversary acts on single uploads, and this upload is decoded after '
      'the sum: use another upload.'
    )
  if download is not None:
    _check_download(download, aggregator)


def check_private(aggregator: AnyAggregator, upload: Upload) -> None:
  """Raises `Error` if parts of `fed_opt` break a rule's guarantee of privacy.

  A rule with the trait `private` clips and noises all that clients send.
  """
  private = aggregator.traits.private
  if private is None:
    return
  if getattr(aggregator, 'finalize', None) is not private:
    raise Error(
      'privacy: this method wraps the aggregator in a rule of its own, which '
      'would see updates that are neither clipped nor noised: use a method '
      'with one linear rule, such as fed_avg or ffa_lora.'
    )
  if upload.additive:
    raise Error(
      'privacy: the messages of this upload are summed before they are '
      'decoded, so no single update can be clipped: use another upload.'
    )


def check_alone(out: ClientOutput, masks: Masks) -> None:
  """Raises `Error` if a client sends more than the update of a private codec.

  Args:
    out: the result of local training, traced.
    masks: those that the client received, before training.
  """
  same = [
    a is b for a, b in zip(jax.tree.leaves(out.masks), jax.tree.leaves(masks))
  ]
  for sends, what in (
    (out.report is not None, 'reports'),
    (out.weight is not None, 'weights'),
    (not all(same), 'a choice of the entries that they train'),
  ):
    if sends:
      raise Error(
        f'privacy: the clients of this method send {what} of their own beside '
        'their updates, which no noise covers: take another method.'
      )


def _check_download(download: Download, aggregator: AnyAggregator) -> None:
  if download.additive:
    raise Error(
      'this codec decodes a sum over clients, and a download has no sum: use '
      'it as the upload.'
    )
  memory = jax.eval_shape(download.init, {'w': jnp.zeros((32, 32))})
  if jax.tree.leaves(memory):
    raise Error(
      'this codec keeps a memory from round to round, and a download keeps '
      "none: use one without, such as memory='none'."
    )
  if download.lossy and aggregator.traits.writes_residual:
    raise Error(
      "this aggregator writes into the base what the clients' factors leave of "
      'those of the server, so its downloads must be without loss.'
    )
