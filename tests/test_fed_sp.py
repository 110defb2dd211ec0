"""FedSP against a float64 loop, on a toy network of two layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest

from fedjax_llm import local, recipes, tree
from fedjax_llm.nodes import Prompt
from fedjax_llm.types import Error, Model

L, P, RATE, STEPS = 2, 2, 0.5, 2


def base():
  draw = np.random.default_rng(1).normal
  array = lambda *s: jnp.asarray(draw(size=s), jnp.float32)
  return {
    'embed': array(toy.V, toy.D),
    'layers': array(L, toy.D, toy.D),
    'head': array(toy.D, toy.C),
  }


def start():
  rng = np.random.default_rng(2)
  draw = lambda *s: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32)
  return {
    'inputs': Prompt(draw(P, toy.D)),
    'layers': {'w': draw(L, toy.D, toy.D)},
  }


def states(base, rows, w, tokens, numbers, tanh=jnp.tanh):
  h = base['embed'][tokens] + rows.mean(0)
  for i in numbers:
    h = h + tanh(h @ (base['layers'][i] + w[i]))
  return h


def layers(base, params, batch, numbers, hidden=None, *, ends=True):
  del hidden, ends
  rows, w = params['inputs'].rows, params['layers']['w']
  return states(base, rows, w, batch.tokens, numbers)


def hidden(base, params, batch):
  return layers(base, params, batch, range(L))


MODEL = Model(
  hidden,
  lambda base, params, h: h @ base['head'],
  lambda *args: (hidden(*args), {}),
  layers,
)
LOSS = local.classification(MODEL)


@functools.cache
def public():
  return toy.batches(3, seed=7)


def method(**settings):
  settings = {'public': public(), 'server_steps': STEPS, **settings}
  return recipes.fed_sp(LOSS, toy.sgd(RATE), model=MODEL, **settings)


@functools.cache
def trained():
  algorithm = method()
  state = algorithm.init(toy.KEY, start())
  clients = tree.broadcast(algorithm.init_client(state.params), toy.K)
  step = jax.jit(algorithm.round)
  cohort = toy.cohort()._replace(states=clients)
  return algorithm, step(state, cohort, base())


# --------------------------------------------------------- float64, by hand --


def value(rows, w, batch, numbers):
  of = {name: toy.f64(x) for name, x in base().items()}
  logits = states(of, rows, w, batch.tokens, numbers, np.tanh)[:, 0]
  logits = logits @ of['head']
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.mean([log_p[i, c] for i, c in enumerate(batch.label) if c >= 0])


def descended(x, of, step=1e-6):
  grads = np.zeros_like(x)
  for at in np.ndindex(x.shape):
    ends = []
    for sign in (1, -1):
      moved = x.copy()
      moved[at] += sign * step
      ends.append(of(moved))
    grads[at] = (ends[0] - ends[1]) / (2 * step)
  return x - RATE * grads


def reference(numbers=(0, 0), steps=STEPS, order=('network', 'prompt')):
  first = start()
  rows = toy.f64(first['inputs'].rows)
  ends, own = [], []
  for k in range(toy.K):
    p, w = rows, toy.f64(first['layers']['w'])
    for phase in order:
      for s in range(toy.S):
        batch = jax.tree.map(lambda x, k=k, s=s: x[k, s], toy.cohort().batches)
        fixed = (p, w)
        if phase != 'prompt':
          w = descended(
            fixed[1], lambda w, p=fixed[0], b=batch: value(p, w, b, numbers)
          )
        if phase != 'network':
          p = descended(
            fixed[0], lambda p, w=fixed[1], b=batch: value(p, w, b, numbers)
          )
    ends.append(p)
    own.append(w)
  p = np.average(ends, axis=0, weights=toy.WEIGHT)
  w = toy.f64(first['layers']['w'])
  for i in range(steps):
    batch = jax.tree.map(lambda x, i=i: x[i % 3], public())
    p = descended(p, lambda p, b=batch: value(p, w, b, range(L)))
  return p, own


def test_a_round_equals_a_float64_loop():
  _, (state, clients, info) = trained()
  rows = np.asarray(state.params['inputs'].rows)
  want, own = reference()
  np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-5)
  for k in range(toy.K):
    got = clients.private['layers']['w'][k]
    np.testing.assert_allclose(got, own[k], rtol=1e-4, atol=1e-5)
    # The upper layers are none of the client's network.
    np.testing.assert_array_equal(got[1:], start()['layers']['w'][1:])
  both = ('both',)
  for other in (
    reference(numbers=(0, 1)),  # the client has the whole network
    reference(steps=0),  # no steps of the server
    reference(order=both),  # network and prompt at once
    reference(order=('prompt', 'network')),
  ):
    assert np.abs(rows - other[0]).max() > 1e-3
  size = 4 * P * toy.D
  assert info.bytes_up.sum(1).tolist() == [size] * toy.K
  assert info.bytes_down.sum(1).tolist() == [size] * toy.K


def test_the_whole_network_is_served_with_the_prompt_alone():
  algorithm, (state, clients, _) = trained()
  served = algorithm.personal(state.params, tree.take(clients, 0))
  np.testing.assert_array_equal(served['layers']['w'], start()['layers']['w'])
  assert served['inputs'].rows is state.params['inputs'].rows


@pytest.mark.parametrize(
  'settings, reason',
  [
    ({'server_steps': -1}, 'algorithm.server_steps is -1; it must be 0'),
    ({'public': None}, 'fed_sp trains its prompt on public texts: add'),
    ({'scope': None}, 'fed_sp brings its own scope'),
  ],
)
def test_a_wrong_setting_is_named(settings, reason):
  with pytest.raises(Error, match=reason):
    method(**settings)


def test_an_adapter_without_a_small_network_is_refused():
  with pytest.raises(Error, match='fed_sp trains a prompt beside the layers'):
    method().init(toy.KEY, {'inputs': start()['inputs']})
  algorithm = method(cell=2)
  short = jax.tree.map(lambda x: x, start())
  short['layers']['w'] = jnp.zeros((3, toy.D, toy.D))
  state = algorithm.init(toy.KEY, short)
  clients = tree.broadcast(algorithm.init_client(short), toy.K)
  with pytest.raises(Error, match='cell is 2; it must divide the 3 layers'):
    jax.eval_shape(
      algorithm.round, state, toy.cohort()._replace(states=clients), base()
    )
