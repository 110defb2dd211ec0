"""The halves of a round, and the memory that a streaming round needs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_methods
import tiny

from fedjax_llm import recipes, tree
from fedjax_llm.types import Cohort, LossSum


def cheap(base, params, batch, key):
  """A loss without a network: halves are about all but the network."""
  count = jnp.float32(1) * jnp.sum(batch.segments > 0)
  floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
  return LossSum(
    count * sum(jnp.sum((x - 1) ** 2) for x in floats), count, count
  )


# One of each kind; `test_methods` has all of them.
@pytest.mark.parametrize(
  'name', ['ditto', 'fed_adam', 'fed_pipe', 'flora', 'lp_fl', 'scaffold']
)
def test_a_round_is_its_two_halves(name):
  test_methods.check_halves(name)


def test_the_halves_take_turns_with_a_phase_after_and_an_adversary():
  """What `round` gives to the server's phase, `aggregate` gives as well."""

  def after(state, base, data, key):
    noise = tiny.draw(key, state.params)
    return state._replace(
      params=tree.add(state.params, tree.scale(noise, data))
    )

  def adversary(uploads, key):
    noise = tiny.draw(key, uploads.update)
    return uploads._replace(update=tree.add(uploads.update, noise))

  algorithm = recipes.fed_avg(
    cheap, tiny.sgd(), after=after, adversary=adversary, history=3
  )
  params, cohort = tiny.lora(), tiny.cohort()
  state, received, _ = tiny.received(algorithm, params, cohort)
  data = jnp.float32(0.1)
  assert algorithm.aggregate is not None
  new, _ = jax.jit(algorithm.aggregate)(state, received, tiny.base(), data)
  whole, _, _ = tiny.run(algorithm, params, cohort, data=data)
  plain = lambda x: x._replace(key=None)
  tiny.close(plain(new), plain(whole), 1e-6)
  tiny.close(tree.take(new.history, 0), new.params)
  tiny.close(tree.take(new.history, 2), params)


# ------------------------------------------------------------------ memory --


def bytes_of(half, num, width=4096):
  """Bytes that a compiled program needs beside its arguments, K = num."""

  def loss(base, params, batch, key):
    return LossSum(jnp.sum(params['w'] * batch), *jnp.float32([1, 0]))

  algorithm = recipes.fed_avg(loss, tiny.sgd(), block_size=2)
  state = algorithm.init(tiny.KEY, {'w': jnp.ones(width)})
  ids = jnp.arange(num)
  ones = jnp.ones((num, 1, 1))
  cohort = Cohort(ids, ones, ones[:, 0, 0], ids >= 0)
  program = jax.jit(getattr(algorithm, half)).lower(state, cohort).compile()
  memory: Any = program.memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_a_streaming_round_in_blocks_never_holds_the_stack():
  stack = 4 * 4096  # bytes of one client's update
  grown = {
    half: (bytes_of(half, 32) - bytes_of(half, 8)) / 24
    for half in ('round', 'train')
  }
  assert grown['round'] < 0.1 * stack
  assert grown['train'] >= stack
