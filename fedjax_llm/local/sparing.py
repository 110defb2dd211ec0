"""Losses that need less memory: micro-batches, and frozen lower layers.

Each function takes a loss and returns one with the same values and gradients,
up to rounding, so every method and every kind of gradient can use it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.local.observed import Observed
from fedjax_llm.nodes import frozen
from fedjax_llm.types import Base, Error, Key, Loss, LossSum, Params


def micro_batches(loss: Loss, rows: int) -> Loss:
  """Returns the loss of a batch, computed over micro-batches of some rows.

      total = sum_i total_i,  count = sum_i count_i

  The micro-batches come one after another, and each is computed again in the
  backward pass, so only the activations of one exist at a time: the memory of
  gradient accumulation, for one more forward pass. Totals and counts add up, so
  the token mean, and its gradient, are those of the large batch whatever the
  number of tokens in each part. Dropout draws other masks than in one batch.

  Args:
    loss: of batches [B, ...].
    rows: B of a micro-batch; it has to divide that of the batch, or exceed it.

  Raises:
    Error: fewer than one row; from the loss, rows that do not divide B.

  >>> loss = lambda base, p, x, key: LossSum(
  ...   jnp.sum(p['w'] * x), jnp.sum(x > 0), jnp.float32(0))
  >>> some = micro_batches(loss, 1)  # 3 tokens, then 1
  >>> batch = jnp.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
  >>> sums = some(None, {'w': jnp.float32(2)}, batch, None)
  >>> float(sums.total), int(sums.count)
  (20.0, 4)
  """
  if rows < 1:
    raise Error(f'memory.micro_batch is {rows}; it must be at least 1.')

  def parts(batch: Any) -> tuple[int, Any]:
    total = np.shape(jax.tree.leaves(batch)[0])[0]
    if total <= rows:
      return 1, batch
    if total % rows:
      raise Error(
        f'memory.micro_batch is {rows}; it must divide the {total} rows of a '
        'batch (cohort.batch_size).'
      )
    num = total // rows
    split = lambda x: jnp.asarray(x).reshape(num, rows, *x.shape[1:])
    return num, jax.tree.map(split, batch)

  def summed(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
    num, pieces = parts(batch)
    if num == 1:
      return loss(base, params, batch, key)

    def one(_, at):
      piece, index = at
      own: Any = key if key is None else jax.random.fold_in(key, index)
      return None, loss(base, params, piece, own)

    # In a rolled loop nothing of the forward pass can be merged with it.
    one = jax.checkpoint(one, prevent_cse=False)
    each = jax.lax.scan(one, None, (pieces, jnp.arange(num)))[1]
    if each.total.ndim == 1:
      return LossSum(*(jnp.sum(x) for x in each))
    return LossSum(*(x.reshape(-1) for x in each))  # one number a row

  if isinstance(loss, Observed):
    # Statistics of nodes are means over a whole batch: these stay so.
    return Observed(summed, loss.with_statistics)
  return summed


def frozen_below(
  loss: Loss,
  num_layers: int,
  applies: Callable[[Params], bool] = lambda params: True,
) -> Loss:
  """Returns the loss without derivatives of the weights of the lowest layers.

  No activation of these layers is kept for a backward pass, unless parameters
  before them, such as prompt rows, are trained. It is for parameters that are
  the same in these layers before and after a step: those of an adapter in upper
  layers, or with a mask. The network has to be one of `fedjax_llm.models`.

  Args:
    loss: of a network with layers.
    num_layers: the number of layers below; 0 returns `loss` itself.
    applies: `(params) -> bool`, whether it holds for parameters of their
      structure; all others are computed as before.

  Raises:
    Error: a negative number.

  >>> reads = lambda base, params, batch, key: sorted(params)
  >>> frozen_below(reads, 2)(None, {'layers': 1.0}, None, None)
  ['frozen_below', 'layers']
  """
  if num_layers < 0:
    raise Error(f'frozen_below: num_layers={num_layers} must be 0 or more.')
  if not num_layers:
    return loss

  def still(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_marked(base: Base, params: Params, batch: Any, key: Key):
      if isinstance(params, Mapping) and applies(params):
        params = frozen.marked(params, num_layers)
      return function(base, params, batch, key)

    return of_marked

  if isinstance(loss, Observed):
    states = loss.with_statistics
    return Observed(still(loss.loss), states and still(states))
  return still(loss)
