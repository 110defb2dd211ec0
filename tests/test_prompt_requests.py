"""Requests with prompts of their own in one call of `generate`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, models, nodes
from fedjax_llm.models import tenants
from fedjax_llm.types import Error

PROMPTS = [[1, 2, 3, 4], [7], [3, 3], [5, 6, 7]]


@functools.cache
def loaded():
  return models.random(
    vocab_size=32, hidden_size=16, intermediate_size=24, max_positions=64
  )


def moved(adapter, seed):
  """An adapter away from its start."""
  params = adapter.init(jax.random.key(seed), loaded().base)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree, [x + jnp.float32(rng.normal(size=x.shape)) / 2 for x in leaves]
  )


def replies(model=None, **arguments):
  return models.generate(
    model or loaded(),
    loaded().base,
    **{'prompts': PROMPTS, 'params': {}, 'max_new_tokens': 5, **arguments},
  )


def alone(params):
  return replies(params=params)


def test_clients_with_prompts_of_their_own_share_a_batch():
  """Also without a cache; requests without an adapter are of another batch."""
  own = [moved(adapters.soft_prompt(3), 0), moved(adapters.p_tuning(3), 1)]
  which = [0, 1, -1, 1]
  want = [alone(x) for x in (*own, {})]
  want = [want[index][i] for i, index in enumerate(which)]
  assert replies(adapters=own, which=which) == want
  plain = loaded().model
  assert replies(plain, adapters=own, which=which) == want
  assert replies(adapters=own, which=[1, 0, 0, 0])[1:] == alone(own[0])[1:]


def test_a_prefix_and_adapters_of_other_kinds_in_one_call():
  first = moved(adapters.prefix(2, reparametrised=True, hidden_size=3), 1)
  second = moved(adapters.ia3(), 2)
  third = moved(adapters.bottleneck(2, 'houlsby', activation='gelu'), 3)
  own, which = [first, second, third], [2, 1, 0, 2]
  want = [alone(own[index])[i] for i, index in enumerate(which)]
  assert replies(adapters=own, which=which) == want


def test_adapters_that_share_no_batch_say_so():
  prompt = {'inputs': nodes.Prompt(jnp.ones((3, 16)))}
  bare = adapters.lora(2).init(jax.random.key(0), loaded().base)
  with pytest.raises(Error, match='Only some of the adapters have a Prompt at'):
    tenants.stack(loaded().base, [prompt, bare])
  longer = {'inputs': nodes.Prompt(jnp.ones((4, 16)))}
  with pytest.raises(Error, match=r'they are \[3, 16\] and \[4, 16\]'):
    tenants.stack(loaded().base, [prompt, longer])
  with pytest.raises(Error, match='are 63 tokens behind 3 prompt rows'):
    replies(adapters=[bare, prompt], which=[1, 0, 0, 0], max_new_tokens=59)
