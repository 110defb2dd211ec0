"""RaFFM: permuted neurons, cut perceptrons, means over the holders."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, local, models, recipes, tree
from fedjax_llm.clients import profiles
from fedjax_llm.nodes import Dense
from fedjax_llm.recipes.selective import raffm
from fedjax_llm.types import (
  Batch,
  ClientState,
  Cohort,
  Context,
  Error,
  LossSum,
)

L, D, F, C = 2, 3, 8, 2
K, S, B, RATE = 3, 2, 5, 0.1
WEIGHT = np.array([3.0, 1.0, 2.0], np.float32)
WIDTHS = np.array([0.25, 0.5, 0.6], np.float32)  # 2, 4 and 5 of 8 neurons

# ------------------------------------------- the function of a real network --


def llama():
  return models.random(
    vocab_size=19, hidden_size=8, intermediate_size=12, num_layers=L,
    num_heads=2,
  )  # fmt: skip


def bert():  # with biases
  return models.random_encoder(
    vocab_size=19, hidden_size=8, intermediate_size=12, num_heads=2
  )


def permuted(params, order, number):
  """The first neurons of perceptrons whose neurons are put in an order [L, F].

  NumPy, from the definition: columns of the matrices into the neurons, and
  rows of the matrix out of them.
  """
  rows = [chosen[:number] for chosen in order]

  def take(node, axis):  # of one layer after another
    value = np.asarray(node.value)
    each = [np.take(x, at, axis) for x, at in zip(value, rows)]
    return Dense(np.stack(each))

  mlp = {}
  for name, module in params['layers']['mlp'].items():
    outward = name == 'down_proj'
    mlp[name] = {'kernel': take(module['kernel'], 0 if outward else 1)}
    if 'bias' in module:
      mlp[name]['bias'] = module['bias'] if outward else take(module['bias'], 0)
  return {'layers': {'mlp': mlp}}


@pytest.mark.parametrize('build', [llama, bert])
def test_a_client_computes_the_prefix_of_the_permuted_network(build):
  loaded = build()
  params = adapters.dense('layers/mlp/.*').init(jax.random.key(0), loaded.base)
  place = np.asarray(raffm.places(params['layers']['mlp']))
  into = [
    np.abs(np.asarray(loaded.base['layers']['mlp'][n]['kernel'])).sum(1)
    for n in ('gate_proj', 'up_proj')
    if n in loaded.base['layers']['mlp']
  ]
  order = np.argsort(-np.mean(into, 0), axis=1)  # [L, F]
  np.testing.assert_array_equal(np.argsort(place, axis=1), order)
  tokens = np.arange(12).reshape(2, 6) % 19
  batch = Batch(
    tokens, tokens > 0, np.ones_like(tokens), np.tile(np.arange(6), (2, 1))
  )
  program = jax.jit(loaded.model.hidden)

  def hidden(params):  # written into the base, which may be narrower
    values = jax.tree.map(jnp.asarray, params['layers']['mlp'])
    mlp = jax.tree.map(
      lambda x: x.value, values, is_leaf=lambda x: isinstance(x, Dense)
    )
    layers = {**loaded.base['layers'], 'mlp': mlp}
    return program({**loaded.base, 'layers': layers}, {}, batch)

  context = Context(profile={'width': jnp.float32(0.4)})  # 5 of 12 neurons
  masks = raffm.neurons().mask(params, ClientState(), context)
  cut = program(loaded.base, tree.apply_mask(params, masks.held), batch)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
  plain = program(loaded.base, {}, batch)
  close(hidden(permuted(params, order, 12)), plain)
  close(cut, hidden(permuted(params, order, 5)))
  assert np.abs(cut - plain).max() > 1e-3
  assert np.abs(cut - hidden(permuted(params, order[:, ::-1], 5))).max() > 1e-3


# ------------------------------------------------------------- whole rounds --


def start():
  rng = np.random.default_rng(0)
  draw = lambda *s: Dense(jnp.asarray(rng.normal(size=s), jnp.float32))
  mlp = {
    'up_proj': {'kernel': draw(1, D, F), 'bias': draw(1, F)},
    'down_proj': {'kernel': draw(1, F, C)},
  }
  return {'layers': {'mlp': mlp}}


def loss(base, params, batch, key):
  del base, key
  mlp = params['layers']['mlp']
  up, down = mlp['up_proj'], mlp['down_proj']
  h = jax.nn.relu(batch[0] @ up['kernel'].value[0] + up['bias'].value[0])
  error = h @ down['kernel'].value[0] - batch[1]
  return LossSum(0.5 * jnp.sum(error**2), jnp.float32(B), jnp.float32(0))


def data():
  rng = np.random.default_rng(1)
  draw = lambda *s: rng.normal(size=s).astype(np.float32)
  return draw(K, S, B, D), draw(K, S, B, C)


def history(name, rounds=2, widths: Any = WIDTHS, **settings) -> Any:
  algorithm = getattr(recipes, name)(
    loss, local.optimizer('sgd', RATE), measure=None, **settings
  )
  state = algorithm.init(jax.random.key(0), start())
  cohort = Cohort(
    np.arange(K), data(), WEIGHT, np.ones(K, bool), profiles={'width': widths}
  )
  step, info = jax.jit(algorithm.round), None
  for _ in range(rounds):
    state, _, info = step(state, cohort)
  return state.params['layers']['mlp'], info


def reference(rounds=2, salient=True, divide=True):
  """Two rounds in float64: every client has its own smaller matrices."""
  mlp = start()['layers']['mlp']
  f64 = lambda x: np.asarray(x.value, np.float64)[0]
  up, bias = f64(mlp['up_proj']['kernel']), f64(mlp['up_proj']['bias'])
  down = f64(mlp['down_proj']['kernel'])
  xs, ys = (np.asarray(x, np.float64) for x in data())
  for _ in range(rounds):
    order = np.argsort(-np.abs(up).sum(0)) if salient else np.arange(F)
    moved = [np.zeros_like(x) for x in (up, bias, down)]
    holders = np.zeros(F)
    for k in range(K):
      mine = order[: int(np.ceil(WIDTHS[k] * F))]
      u, b, v = up[:, mine], bias[mine], down[mine]
      for s in range(S):
        z = xs[k, s] @ u + b
        error = (np.maximum(z, 0) @ v - ys[k, s]) / B
        back = error @ v.T * (z > 0)
        v = v - RATE * np.maximum(z, 0).T @ error
        u, b = u - RATE * xs[k, s].T @ back, b - RATE * back.sum(0)
      holders[mine] += WEIGHT[k]
      moved[0][:, mine] += WEIGHT[k] * (u - up[:, mine])
      moved[1][mine] += WEIGHT[k] * (b - bias[mine])
      moved[2][mine] += WEIGHT[k] * (v - down[mine])
    share = np.where(holders > 0, holders, 1) if divide else WEIGHT.sum()
    up, bias = up + moved[0] / share, bias + moved[1] / share
    down = down + moved[2] / np.reshape(share, (-1, 1))
  return up, bias, down


def arrays(mlp):
  up = mlp['up_proj']
  return [
    np.asarray(x.value)[0]
    for x in (up['kernel'], up['bias'], mlp['down_proj']['kernel'])
  ]


def test_rounds_equal_a_float64_loop_over_smaller_networks():
  mlp, info = history('raffm')
  for got, want in zip(arrays(mlp), reference()):
    np.testing.assert_allclose(got, want, atol=2e-5)
  # A prefix without the order, and a mean over all clients, are others.
  for other in (reference(salient=False), reference(divide=False)):
    assert np.abs(arrays(mlp)[0] - other[0]).max() > 1e-3
  sent = np.array([2, 4, 5]) * (D + 1 + C) * 4
  np.testing.assert_array_equal(info.bytes_up.sum(1), sent)
  np.testing.assert_array_equal(info.bytes_down.sum(1), sent)
  # Three of eight neurons were held by nobody.
  before = arrays(start()['layers']['mlp'])[0]
  assert (arrays(history('raffm', rounds=1)[0])[0] == before).all(0).sum() == 3


def test_whole_clients_are_fed_avg():
  whole = np.ones(K, np.float32)
  mine, _ = history('raffm', widths=whole)
  plain, _ = history('fed_avg', widths=whole)
  for x, y in zip(arrays(mine), arrays(plain)):
    np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_whole_number_of_neurons_is_not_rounded_up():
  mlp = {
    'up_proj': {'kernel': Dense(jnp.ones((1, 2, 50)))},
    'down_proj': {'kernel': Dense(jnp.ones((1, 50, 2)))},
  }
  for width, number in ((0.3, 15), (0.31, 16), (1e-9, 1)):
    context = Context(profile={'width': jnp.float32(width)})
    masks = raffm.neurons().mask(
      {'layers': {'mlp': mlp}}, ClientState(), context
    )
    held: Any = masks.held
    up = held['layers']['mlp']['up_proj']['kernel'].value
    assert int(up[0, 0].sum()) == number


def test_what_it_needs():
  method = recipes.raffm(loss, local.optimizer('sgd'))
  with pytest.raises(Error) as error:
    method.init(jax.random.key(0), {'layers': {'q': jnp.ones((L, D, F))}})
  assert str(error.value) == (
    "raffm trains perceptrons: adapter.name=dense with 'layers/mlp/.*' among "
    'adapter.modules.'
  )
  with pytest.raises(Error, match='needs the width of every client'):
    history('raffm', widths=None)
  with pytest.raises(Error) as error:
    profiles.widths((0.5, 1.5), num_clients=4)
  assert str(error.value) == (
    'profiles.choices is [0.5, 1.5]: widths are above 0 and at most 1.'
  )
  with pytest.raises(Error, match='raffm brings its own scope'):
    recipes.raffm(loss, local.optimizer('sgd'), scope=None)
