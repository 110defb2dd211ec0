"""The steps of split learning: all clients at once, and what crosses the cut.

`joint_step` returns one step of all clients and of the server, `run` takes the
steps of a round, `sizes` and `billed` count their bytes. `server.split` makes a
method of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import batching, tree
from fedjax_llm.nodes import Halves
from fedjax_llm.types import Params, RoundInfo, Work


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


def joint_step(loss, above: Stepper, order: str, block_size: int | None):
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


def run(
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


def sizes(messages, base, params: Halves, batches) -> tuple[int, int]:
  """Returns the bytes that one client sends and receives in one step."""
  step = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), batches
  )
  shapes = jax.eval_shape(messages, base, params, step)
  size = lambda x: sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
  return size(shapes[0]), size(shapes[1])


def billed(info: RoundInfo, messages, base, params, cohort) -> RoundInfo:
  """Returns the outcome with one more column of bytes for every step."""
  up, down = sizes(messages, base, params, cohort.batches)
  some = _real(cohort.batches, cohort.valid).astype(jnp.int32)
  columns = lambda old, size: jnp.concatenate([old, size * some], axis=1)
  return info._replace(
    bytes_up=columns(info.bytes_up, up),
    bytes_down=columns(info.bytes_down, down),
  )
