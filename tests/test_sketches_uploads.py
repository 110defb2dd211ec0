"""Sketches of later families between clients and server: sums and noise.

As in `test_sketches`: a part or two, a real round, a closed form; a comment
names the contract without which the test fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import averaged, close, draw

from fedjax_llm import aggregators, tree, uploads
from fedjax_llm.types import (
  Aggregate,
  Codec,
  Error,
  StreamingAggregator,
  Traits,
)

world = pytest.fixture(scope='module')(tiny.one_step)


# ------------------------------------------------------- seeds and scalars --


def seeded(num: int = 8) -> Codec:
  """J coefficients in a basis that both sides draw from the round's key."""

  def basis(context, like):
    keys = jax.random.split(context.round_key, num)
    return jax.vmap(lambda key: draw(key, like))(keys)

  def encode(update, masks, state, context):
    stack = basis(context, update)
    return jax.vmap(lambda z: tree.dot(z, update))(stack), state

  def decode(message, start, context):
    return tree.weighted_sum(basis(context, start), message / num)

  size = lambda message, masks: jnp.int32(message.size * 4)
  return Codec(lambda update: (), encode, decode, size, additive=True)


def test_the_sum_of_coefficients_is_decoded_once(world):
  """Contract: `Codec.additive`, `Context.round_key`."""
  params, cohort, each = world
  state, _, info = tiny.run(averaged(upload=seeded()), params, cohort)
  key = jax.random.fold_in(jax.random.fold_in(tiny.KEY, 0), 4)
  z = jax.vmap(lambda k: draw(k, tiny.floats(params)))(jax.random.split(key, 8))
  project = lambda update: tree.weighted_sum(
    z, jax.vmap(lambda z: tree.dot(z, update))(z) / 8
  )
  mean = tiny.mean(each, cohort.weight)
  close(tiny.moved(state.params, params), project(tree.scale(mean, 1.0)))
  assert info.bytes_up.tolist() == [[8 * 4]] * 3
  singly = averaged(upload=seeded()._replace(additive=False))
  close(tiny.run(singly, params, cohort)[0].params, state.params)
  with pytest.raises(Error, match='sees no single client'):
    averaged(upload=seeded(), aggregator=aggregators.median())


# -------------------------------------------------------------- secure sums --


def pairwise(size: float = 30.0) -> Codec:
  """Masks that cancel in the sum (Bonawitz et al. 2017), with drop-outs.

  The secrets of a pair follow from the round's key here, where a deployment
  agrees on them; the server opens only those of clients that dropped out.
  """

  def shared(context, one, counts, like):
    """The sum of the masks that a client has with those that count."""

    def add(total, other):
      peer, count = other
      pair = jnp.minimum(one, peer), jnp.maximum(one, peer)
      key = jax.random.fold_in(context.round_key, pair[0])
      noise = draw(jax.random.fold_in(key, pair[1]), like)
      sign = jnp.where(count, size * jnp.sign(peer - one), 0.0)
      return tree.add(total, tree.scale(noise, sign)), None

    zeros = tree.zeros_like(like, jnp.float32)
    return jax.lax.scan(add, zeros, (context.peers, counts))[0]

  def encode(update, masks, state, context):
    counts = context.peers >= 0
    return tree.add(update, shared(context, context.client, counts, update)), ()

  def decode(total, start, context):
    def open(total, peer):
      gone, one = peer
      rest = shared(context, one, context.reported, total)
      return tree.where(gone, tree.add(total, rest), total), None

    gone = (context.peers >= 0) & ~context.reported
    return jax.lax.scan(open, total, (gone, context.peers))[0]

  init = lambda update: ()
  return Codec(init, encode, decode, uploads.identity().num_bytes, True)


@pytest.mark.parametrize('block_size', [None, 2])
def test_a_secure_sum_with_a_drop_out_is_the_mean_of_the_others(
  world, block_size
):
  """Contract: `Context.peers`, `Context.reported`, `Codec.additive`."""
  params, cohort, each = world
  cohort = cohort._replace(valid=np.array([True, False, True]))
  algorithm = averaged(upload=pairwise(), block_size=block_size)
  state, _, info = tiny.run(algorithm, params, cohort)
  assert info.reported.tolist() == [True, False, True]
  want = tiny.mean(each, cohort.weight * cohort.valid)
  close(tiny.moved(state.params, params), want, rtol=1e-3, atol=3e-5)
  if block_size is None:
    _, sent, _ = tiny.received(algorithm, params, cohort)
    flat = lambda x: np.asarray(tree.ravel(x))[0]
    message, update = flat(sent.update), flat(each)
    cosine = message @ update / np.linalg.norm(message) / np.linalg.norm(update)
    assert abs(cosine) < 0.3
    assert np.linalg.norm(message) > 100 * np.linalg.norm(update)


# ------------------------------------------------------------------ privacy --


def private_mean(
  clip: float = 0.2, noise: float = 0.7, denominator: float = 4.0
) -> StreamingAggregator:
  """Client-level DP with a fixed denominator (McMahan et al. 2018).

  (sum_k clip(u_k) + N(0, (noise clip)^2)) / denominator
  """

  def accumulate(sums, uploads, state, params):
    norm = jax.vmap(tree.norm)(uploads.update)
    factor = jnp.where(uploads.valid, jnp.minimum(1, clip / (norm + 1e-12)), 0)
    return tree.add(sums, tree.weighted_sum(uploads.update, factor))

  def finalize(sums, state, params, key):
    noisy = tree.add(sums, tree.scale(draw(key, sums), noise * clip))
    return Aggregate(tree.scale(noisy, 1 / denominator)), state

  zero = lambda params: tree.zeros_like(params, jnp.float32)
  always = Traits(always=True)
  init = lambda params, key: ()
  return StreamingAggregator(init, zero, accumulate, finalize, always)


def test_a_private_round_of_nobody_adds_its_noise(world):
  """Contract: `Traits.always`; the rule's key."""
  params, cohort, each = world
  algorithm = averaged(aggregator=private_mean())
  noise = draw(tiny.rule_key(), tiny.floats(params))
  noise = jax.tree.map(lambda x: np.float64(x) * 0.7 * 0.2 / 4, noise)
  nobody = cohort._replace(valid=np.zeros(3, bool))
  state, _, _ = tiny.run(algorithm, params, nobody)
  close(tiny.moved(state.params, params), noise)
  state, _, _ = tiny.run(algorithm, params, cohort)
  norms = np.array(jax.vmap(tree.norm)(each))
  assert (norms > 0.2).any()
  factor = np.minimum(1, 0.2 / norms)
  some = tiny.mean(each, factor)
  want = jax.tree.map(lambda m, z: m * factor.sum() / 4 + z, some, noise)
  close(tiny.moved(state.params, params), want)
