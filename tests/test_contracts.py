"""The contracts carry what is to come: one sketch of every later family.

Each sketch is a part or two in the shape of `types`, taken through a whole
round by `jax.eval_shape`: nothing is trained, but every structure must fit.
"""

import inspect

import jax
import jax.numpy as jnp
import pytest
import toy

from fedjax_llm import (
  adapters,
  aggregators,
  recipes,
  server,
  tree,
  uploads,
)
from fedjax_llm.types import (
  Adapter,
  Aggregator,
  Codec,
  LossSum,
  StreamingAggregator,
)

KEY = jax.random.key(0)


def carry(algorithm, params, cohort=None):
  """Shapes of one round; the state must come back in the shape it went in."""
  cohort = cohort or toy.cohort(num_clients=4)
  num = len(cohort.ids)

  def whole(params):
    state = algorithm.init(KEY, params)
    one = algorithm.init_client(state.params)
    states = tree.broadcast(one, num)
    out = algorithm.round(state, cohort._replace(states=states), toy.base())
    return (state, states), out

  (state, states), (new_state, new_states, told) = jax.eval_shape(whole, params)
  for old, new in ((state, new_state), (states, new_states)):
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
  return new_state, new_states, told


def quadratic(forward):
  def loss(base, params, batch, key):
    del key
    error = jnp.sum((forward(base, params, batch.x) - batch.y) ** 2, -1)
    return LossSum(
      jnp.sum(jnp.where(batch.mask, error, 0.0)),
      jnp.sum(batch.mask.astype(jnp.float32)),
      jnp.float32(0),
    )

  return loss


# ------------------------------------------------------- what is there now --

BUILT = {
  adapters: dict(dense=dict(modules='q_proj'), lora={}, rslora={}),
  aggregators: dict(
    krum=dict(num_byzantine=1),
    control_variates=dict(inner=aggregators.mean(), num_clients=9),
    from_rule=dict(fn=tree.weighted_mean),
    as_stack=dict(aggregator=aggregators.mean()),
  ),
  uploads: {},
}
CONTRACT = {
  adapters: Adapter,
  aggregators: (Aggregator, StreamingAggregator),
  uploads: Codec,
}


@pytest.mark.parametrize('room', BUILT, ids=lambda r: r.__name__.split('.')[-1])
def test_every_public_builder_keeps_its_rooms_contract(room):
  seen = 0
  for name in room.__all__:
    builder = getattr(room, name)
    if name == 'from_optax':
      continue  # takes an optax transformation: below
    made = builder(**BUILT[room].get(name, {}))
    assert isinstance(made, CONTRACT[room]), name
    assert inspect.getdoc(builder), f'{name} has no docstring'
    seen += 1
  assert seen >= 1


def test_every_aggregator_works_under_every_server_optimizer():
  for rule in ('mean', 'uniform_mean', 'masked_mean', 'median', 'trimmed_mean'):
    for optimizer in server.__all__:
      algorithm = recipes.fed_avg(
        toy.loss,
        toy.sgd(),
        aggregator=getattr(aggregators, rule)(),
        server=getattr(server, optimizer)(),
      )
      carry(algorithm, toy.params())
