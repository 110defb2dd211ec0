"""A federation small enough to check by hand: linear regression, LoRA form.

The prediction is x (W + scale A B) w_out; the frozen W is the base. "Tokens"
are rows of the batch whose mask is one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import aggregators, local, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import ClientState, Cohort, LossSum, Masks, Uploads

D, F, R = 4, 3, 2


class Rows(NamedTuple):
  x: np.ndarray  # [..., B, D]
  y: np.ndarray  # [..., B, F]
  mask: np.ndarray  # [..., B]


def base():
  return jax.random.normal(jax.random.key(7), (D, F))


def params():
  a, b = jax.random.split(jax.random.key(3))
  return {
    'q': LowRank(
      a=jax.random.normal(a, (D, R)),
      b=jax.random.normal(b, (R, F)) * 0.3,
      scale=jnp.float32(0.5),
    )
  }


def loss(base, params, batch, key):
  del key
  q = params['q']
  error = batch.x @ (base + q.scale * q.a @ q.b) - batch.y
  each = 0.5 * jnp.sum(error**2, -1)
  return LossSum(
    total=jnp.sum(jnp.where(batch.mask, each, 0.0)),
    count=jnp.sum(batch.mask.astype(jnp.float32)),
    correct=jnp.float32(0.0),
  )


def fold(base, params):
  """Residuals into the base, as an adapter's `fold` does."""
  q = params['q']
  if q.residual is None:
    return base, params
  return base + q.residual, {**params, 'q': q._replace(residual=None)}


def sgd(learning_rate=0.1, **settings):
  return local.optimizer('sgd', learning_rate, **settings)


def cohort(num_clients=5, steps=3, batch=4, seed=0, states=None, ragged=True):
  rng = np.random.default_rng(seed)
  shape = (num_clients, steps, batch)
  mask = np.ones(shape, bool)
  if ragged:
    mask &= rng.random(shape) < 0.7
    mask[:, 0, 0] = True
    mask[0, -1] = False  # client 0 has one step less
  rows = Rows(
    x=rng.normal(size=(*shape, D)).astype(np.float32),
    y=rng.normal(size=(*shape, F)).astype(np.float32),
    mask=mask,
  )
  return Cohort(
    ids=np.arange(num_clients, dtype=np.int32),
    batches=rows,
    weight=mask.sum((1, 2)).astype(np.float32),
    valid=np.ones(num_clients, bool),
    states=states if states is not None else ClientState(),
  )


def uploads(num_clients=5, seed=0):
  """What clients of all ranks might send, and what the server has."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mine = params()
  node = LowRank(draw(num_clients, D, R), draw(num_clients, R, F), None)
  some = jnp.ones((num_clients, 1), bool)  # [K, R]
  held = LowRank(some, some[..., None], None)
  return Uploads(
    update={'q': node},
    start=tree.broadcast(mine, num_clients),
    masks=Masks({'q': held}, {'q': held}),
    weight=jnp.arange(1.0, num_clients + 1),
    valid=jnp.ones(num_clients, bool),
    ids=jnp.arange(num_clients),
  ), mine


def rules(**settings):
  """Every public aggregator by its name, built."""
  parts = ('as_stack', 'control_variates', 'from_rule')
  return {
    name: aggregators.as_stack(
      getattr(aggregators, name)(**settings.get(name, {}))
    )
    for name in aggregators.__all__
    if name not in parts
  }


def close(x, y, rtol=1e-5, atol=1e-6):
  """Equal structure, equal leaves; None leaves must agree."""
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
