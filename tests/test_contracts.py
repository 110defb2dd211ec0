"""The contracts carry what is to come: one sketch of every later family.

Each sketch is a part or two in the shape of `types`, taken through a whole
round by `jax.eval_shape`: nothing is trained, but every structure must fit.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import (
  adapters,
  aggregators,
  clients,
  local,
  recipes,
  server,
  tree,
  uploads,
)
from fedjax_llm.types import (
  Adapter,
  Aggregate,
  Aggregator,
  ClientOutput,
  ClientState,
  Codec,
  FederatedAlgorithm,
  LocalUpdate,
  LossSum,
  Masks,
  Private,
  ServerState,
  StreamingAggregator,
  Traits,
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
  adapters: dict(lora={}, rslora={}),
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


RANKS = np.array([1, 2, 2, 1], np.int32)  # what clients can hold
# On other parameters than two factors: test_variants, test_structured, ...
OTHERS = (
  *('fed_amole', 'fed_pipe', 'fed_ra', 'fed_sb', 'fed_tt_plus'),
  *('lp_fl', 'ravan'),
)


def test_every_recipe_carries_a_round():
  for name in sorted(set(recipes.__all__) - set(OTHERS)):
    extra: dict = {'num_clients': 9} if name == 'scaffold' else {}
    algorithm = getattr(recipes, name)(
      toy.loss, toy.sgd(), fold=toy.fold, **extra
    )
    assert isinstance(algorithm, FederatedAlgorithm)
    cohort = toy.cohort(num_clients=4)
    carry(algorithm, toy.params(), cohort._replace(profiles=RANKS))


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


# ----------------------------------------------------------- what may come --


def test_sketch_soft_prompt():
  """Prompt tuning: a few learned rows that the input is read beside."""

  def forward(base, params, x):
    prompt = params['prompt']  # [P, D]
    gate = jax.nn.softmax(x @ prompt.T)
    return (x + gate @ prompt) @ base

  params = {'prompt': jax.ShapeDtypeStruct((5, toy.D), jnp.float32)}
  algorithm = recipes.fed_avg(quadratic(forward), toy.sgd())
  state, _, told = carry(algorithm, params)
  assert state.params['prompt'].shape == (5, toy.D)
  assert told['uploads/bytes'].shape == (4, 1)


def test_sketch_bottleneck_adapter():
  """Houlsby-style: down, nonlinearity, up, added to the stream."""

  def forward(base, params, x):
    return (x + jax.nn.relu(x @ params['down']) @ params['up']) @ base

  params = {
    'down': jax.ShapeDtypeStruct((toy.D, 2), jnp.float32),
    'up': jax.ShapeDtypeStruct((2, toy.D), jnp.float32),
  }
  carry(recipes.fed_adam(quadratic(forward), toy.sgd()), params)


def test_sketch_seeds_and_scalars():
  """The message is J coefficients in a basis that the key draws again."""
  num = 6

  def basis(like, key):
    leaves, treedef = jax.tree.flatten(like)
    draws = [
      jax.random.normal(jax.random.fold_in(key, i), (num, *x.shape))
      for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)

  def encode(update, masks, state, key):
    del masks
    parts = jax.tree.map(
      lambda z, u: jnp.tensordot(z, u, u.ndim), basis(update, key), update
    )
    return sum(jax.tree.leaves(parts)), state

  def decode(message, start, key):
    update = start['q']._replace(scale=None)
    return {
      'q': jax.tree.map(
        lambda z: jnp.tensordot(message, z, 1), basis(update, key)
      )
    }

  codec = Codec(
    init=lambda update: (),
    encode=encode,
    decode=decode,
    num_bytes=lambda message, masks: jnp.int32(4 * message.size),
  )
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(), upload=codec)
  _, _, told = carry(algorithm, toy.params())
  assert told['uploads/bytes'].shape == (4, 1)


def test_sketch_split_learning():
  """scan(step) of vmap(client): the server's half moves inside every step."""

  def forward(client_half, server_half, base, x):
    return (x @ client_half['cut']) @ server_half['head'] @ base

  def init(key, params):
    return ServerState(jnp.int32(0), params, (), (), key)

  def round_fn(state, cohort, base=None):
    def step(params, batch):  # batch [K, B, ...]
      def one(rows):
        def total(p):
          error = forward(p, p, base, rows.x) - rows.y
          return jnp.sum(jnp.where(rows.mask[:, None], error**2, 0.0))

        return jax.grad(total)(params)

      grads = jax.vmap(one)(batch)
      mean = tree.weighted_mean(grads, cohort.weight)
      return tree.add(params, tree.scale(mean, -0.1)), ()

    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), cohort.batches)
    params, _ = jax.lax.scan(step, state.params, by_step)
    state = state._replace(round=state.round + 1, params=params)
    return state, cohort.states, {}

  algorithm = FederatedAlgorithm(
    init, lambda params: ClientState(), round_fn, lambda params, state: params
  )
  params = {
    'cut': jax.ShapeDtypeStruct((toy.D, 5), jnp.float32),
    'head': jax.ShapeDtypeStruct((5, toy.D), jnp.float32),
  }
  carry(algorithm, params)


def test_sketch_client_level_dp_with_a_fixed_denominator():
  """Clip every client, sum, add noise once, divide by what was planned."""
  clip, noise, planned = 1.0, 0.5, 4

  def accumulate(sums, uploads, state, params):
    del state, params
    norms = jax.vmap(tree.norm)(uploads.update)
    factor = jnp.minimum(1.0, clip / jnp.maximum(norms, 1e-12))
    part = tree.weighted_sum(
      uploads.update, jnp.where(uploads.valid, factor, 0.0)
    )
    return tree.add(sums, part)

  def finalize(sums, state, params, key):
    del params
    leaves, treedef = jax.tree.flatten(sums)
    keys = jax.random.split(key, len(leaves))
    noisy = [
      (x + noise * clip * jax.random.normal(k, x.shape)) / planned
      for x, k in zip(leaves, keys, strict=True)
    ]
    return Aggregate(jax.tree.unflatten(treedef, noisy)), state

  zero = lambda params: {'q': tree.zeros_like(params['q']._replace(scale=None))}
  rule = StreamingAggregator(
    lambda params, key: (), zero, accumulate, finalize, Traits(True, False)
  )
  for size in (None, 2):
    carry(
      recipes.fed_avg(toy.loss, toy.sgd(), aggregator=rule, block_size=size),
      toy.params(),
    )


def test_sketch_error_feedback():
  """Top-k keeps what it did not send and adds it to the next update."""

  def encode(update, masks, state, key):
    del masks, key
    total = tree.add(update, state)

    def top(x):
      bound = jax.lax.top_k(jnp.abs(x).reshape(-1), 2)[0][-1]
      return jnp.where(jnp.abs(x) >= bound, x, 0.0)

    message = jax.tree.map(top, total)
    return message, tree.sub(total, message)

  codec = Codec(
    init=tree.zeros_like,
    encode=encode,
    decode=lambda message, start, key: message,
    num_bytes=lambda message, masks: jax.tree.map(
      lambda x: jnp.count_nonzero(x).astype(jnp.int32) * 8, message
    ),
  )
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(), upload=codec)
  _, states, _ = carry(algorithm, toy.params())
  assert states.upload['q'].a.shape == (4, toy.D, toy.R)


class Versioned(NamedTuple):
  params: Any
  version: Any


def test_sketch_buffered_asynchronous_clients():
  """Each client trains from the version it holds; staleness discounts it."""
  inner = local.sgd(toy.loss, toy.sgd())

  def run(base, start, state, batches, masks, round, key):
    inner_masks = Masks(masks.held.params, masks.trained.params)
    held = tree.merge(state.params, start.params)
    out = inner.run(base, held, (), batches, inner_masks, round, key)
    return ClientOutput(
      update=Versioned(out.update, state.version - start.version),
      masks=masks,
      state=Versioned(tree.like(start.params, out.update), start.version),
      metrics=out.metrics,
    )

  rule = aggregators.mean()

  def aggregate(uploads, state, params, key):
    stale = -uploads.update.version
    stack = uploads._replace(
      update=uploads.update.params,
      weight=uploads.weight / jnp.sqrt(1.0 + stale),
    )
    got, state = aggregators.as_stack(rule).aggregate(
      stack, state, params.params, key
    )
    nothing = jax.tree.map(lambda x: None, params.params)
    return (
      Aggregate(
        delta=Versioned(got.delta, None),
        assign=Versioned(nothing, params.version + 1.0),
      ),
      state,
    )

  algorithm = recipes.compose(
    LocalUpdate(lambda trainable: trainable, run),
    aggregator=Aggregator(lambda params, key: (), aggregate),
  )
  carry(algorithm, Versioned(toy.params(), jnp.float32(0)))


def test_sketch_private_state_of_100_000_clients():
  """Only the cohort's rows enter a round, whatever the population."""
  scope = clients.scopes.labelled({'q/b': Private})
  algorithm = recipes.fed_avg(toy.loss, toy.sgd(), scope=scope)
  cohort = toy.cohort(num_clients=4)._replace(
    ids=jnp.asarray([5, 99_999, 31_337, 7], jnp.int32)
  )
  _, states, told = carry(algorithm, toy.params(), cohort)
  assert states.private['q'].b.shape == (4, toy.R, toy.F)
  assert states.private['q'].a is None
  assert told['uploads/bytes'].shape == (4, 1)  # only A travels
