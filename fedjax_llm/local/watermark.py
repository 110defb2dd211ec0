"""Watermarks in trained parameters: embedded by a loss, verified by a z-test.

A mark is N secret bits t in {-1, 1} and N secret directions E [N, P] of the
marked parameters w [P]. `watermarked` adds a hinge to a loss that turns every
E_i w to the side of its bit; `verify` counts the bits that it finds. A model
without the mark, as that of somebody who does not know it, matches each bit
with probability 1 / 2, so does the message of a client that did not train with
it, such as a free rider (the feature-based mark of FedIPR: Li et al. 2022,
arXiv 2109.13236).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.types import Error, LocalUpdate, Loss, LossSum, Params


class Mark(NamedTuple):
  """A secret of one owner.

  >>> mark(seed=3, num_bits=8).bits.shape
  (8,)
  """

  seed: Any  # an integer; a key [] of `client_mark`
  bits: Any  # [N] float32, -1 or 1
  at: str  # a part of the names of the marked leaves; '': all


class Verified(NamedTuple):
  """The outcome of a verification.

  >>> Verified(matched=8, z=2.83).matched
  8
  """

  matched: int  # bits
  z: float  # (2 m - N) / sqrt(N): above 3 by chance once in 740 times


def mark(*, seed: int, num_bits: int = 64, at: str = '') -> Mark:
  """Returns the mark of a secret seed.

  Args:
    seed: the secret; two seeds give independent bits and directions.
    num_bits: N; far fewer than the marked parameters.
    at: leaves with this in their names are marked, such as '/b'.

  Raises:
    Error: no bits.

  >>> np.unique(mark(seed=0).bits).tolist()
  [-1.0, 1.0]
  """
  if num_bits < 1:
    raise Error(f'mark: num_bits={num_bits} must be at least 1.')
  draw = np.random.default_rng((seed, 0)).integers(0, 2, num_bits)
  return Mark(seed, (2 * draw - 1).astype(np.float32), at)


def client_mark(
  *, seed: int, client: Any, num_bits: int = 32, at: str = ''
) -> Mark:
  """Returns the mark of one client of many, by its id, which may be traced.

  Marks of two clients are independent. Of M clients' marks in a mean each keeps
  its bits where M N is far below the number of marked parameters (FedIPR: Li et
  al. 2022, arXiv 2109.13236, section 4).

  Args:
    seed: the secret of whoever deals the marks.
    client: an id.
    num_bits: N, of each client.
    at: as in `mark`.

  Raises:
    Error: no bits.

  >>> client_mark(seed=3, client=jnp.int32(5), num_bits=4).bits.shape
  (4,)
  """
  if num_bits < 1:
    raise Error(f'client_mark: num_bits={num_bits} must be at least 1.')
  own = jax.random.fold_in(jax.random.key(seed), client)
  bits, directions = jax.random.split(own)
  return Mark(directions, jax.random.rademacher(bits, (num_bits,), float), at)


def marked_clients(
  build: Callable[[Loss], LocalUpdate],
  loss: Loss,
  *,
  seed: int,
  num_bits: int = 32,
  at: str = '',
  strength: float = 0.1,
  margin: float = 0.1,
) -> LocalUpdate:
  """Returns local training in which each client embeds a mark of its own.

  The marks are those of `client_mark`, the loss that of `watermarked`. A
  message without its client's mark is that of a free rider; a model that
  leaked is that of the clients whose marks `verify` finds.

  Args:
    build: from a loss to local training, such as `lambda loss: sgd(loss, ...)`.
    loss: of the task.
    seed, num_bits, at: of `client_mark`.
    strength, margin: of `watermarked`.

  Raises:
    Error: as `client_mark` and `watermarked`.

  >>> from fedjax_llm import local
  >>> update = marked_clients(
  ...   lambda loss: local.sgd(loss, local.optimizer('sgd', 0.1)),
  ...   lambda *args: LossSum(0.0, 1.0, 0.0), seed=1)
  >>> update.init({'w': jnp.zeros(99)}) is not None
  True
  """

  def run(base, start, state, batches, masks, context):
    secret = client_mark(
      seed=seed, client=context.client, num_bits=num_bits, at=at
    )
    own = watermarked(loss, secret, strength=strength, margin=margin)
    return build(own).run(base, start, state, batches, masks, context)

  return build(loss)._replace(run=run)


def read(params: Params, secret: Mark) -> jax.Array:
  """Returns E w, [N] float32: a number for every bit, of its sign.

  Directions are standard normal divided by the root of P; they are drawn leaf
  by leaf, so one leaf of [N, size] is in memory at a time.

  Raises:
    Error: no leaf has the name of the mark, or fewer parameters than bits.

  >>> params = {'w': jnp.arange(100.0)}
  >>> read(params, mark(seed=0, num_bits=3)).shape
  (3,)
  """
  leaves = {
    name: leaf
    for name, leaf in sorted(tree.named(params).items())
    if secret.at in name and leaf is not None
  }
  size, num = sum(x.size for x in leaves.values()), len(secret.bits)
  if size < num:
    raise Error(
      f'watermark: the leaves with {secret.at!r} in their names have {size} '
      f'parameters, which do not hold {num} bits.'
    )
  whole = secret.seed
  if not jnp.issubdtype(jnp.asarray(whole).dtype, jax.dtypes.prng_key):
    whole = jax.random.key(whole)
  total = jnp.zeros(num)
  for i, leaf in enumerate(leaves.values()):
    key = jax.random.fold_in(whole, i)
    rows = jax.random.normal(key, (num, leaf.size))
    flat = leaf.astype(jnp.float32).ravel()
    total += jnp.matmul(rows, flat, precision=jax.lax.Precision.HIGHEST)
  return total / math.sqrt(size)


def watermarked(
  loss: Loss, secret: Mark, *, strength: float = 0.1, margin: float = 0.1
) -> Callable[..., LossSum]:
  """Returns a loss with the hinge of a mark: L + strength mean_i h_i.

      h_i = max(0, margin - t_i E_i w)

  in every step that has a term; recipes take it as their loss.

  Raises:
    Error: a strength or a margin that is not above 0; as `read`.

  >>> def zero(base, params, batch, key):
  ...   return LossSum(jnp.float32(0), jnp.float32(2), jnp.float32(0))
  >>> secret = mark(seed=0, num_bits=4)
  >>> marked = watermarked(zero, secret, strength=1.0, margin=0.5)
  >>> float(marked(None, {'w': jnp.zeros(9)}, None, None).total)  # 2 * 0.5
  1.0
  """
  for field, number in (('strength', strength), ('margin', margin)):
    if number <= 0:
      raise Error(f'watermarked: {field}={number} must be above 0.')

  def marked(base, params, batch, key):
    sums = loss(base, params, batch, key)
    hinge = jnp.maximum(0.0, margin - secret.bits * read(params, secret))
    more = strength * jnp.mean(hinge) * sums.count
    return sums._replace(total=sums.total + more)

  return marked


def verify(params: Params, secret: Mark) -> Verified:
  """Returns how many bits of a mark are in the parameters, and the z-score.

  >>> secret = mark(seed=5, num_bits=64)
  >>> abs(verify({'w': jnp.arange(500.0) - 250}, secret).z) < 3  # unmarked
  True
  """
  numbers, bits = np.asarray(read(params, secret)), np.asarray(secret.bits)
  num, matched = len(numbers), int(np.sum(numbers * bits > 0))
  return Verified(matched, (2 * matched - num) / math.sqrt(num))
