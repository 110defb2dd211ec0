"""Emulators: a network without some layers, and what is tuned beside it.

The gates of `adapters.gates` leave layers out in another way, so that a round
of federated averaging on gated parameters says what a method has to compute.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_two_models as reference
import tiny

from fedjax_llm import adapters, local, recipes, tree
from fedjax_llm.adapters import halves
from fedjax_llm.recipes.split.cutting import layers_of
from fedjax_llm.recipes.two_models import emulators, fed_biot
from fedjax_llm.types import Error

RATE, LAYERS, KL = 0.2, 5, 0.9
OFFSITE = emulators.Layout(bottom=1, top=1, drop=0.5)  # layers 0, 1, 3, 4
BIOT = emulators.Layout(bottom=0, top=2, drop=0.3)  # layers 0, 2, 3, 4


@functools.cache
def network():
  return tiny.loaded(LAYERS)


loss = local.causal_lm(network().model)


@functools.cache
def factors():
  params = adapters.lora(2, targets=('q_proj', 'up_proj')).init(
    tiny.KEY, network().base
  )
  return jax.tree.map(lambda x: x + 0.1, params)


@functools.cache
def public():
  return tiny.texts(3, tiny.B, seed=8)


@functools.cache
def cohort():
  return tiny.cohort(steps=1)


def program(algorithm, params):
  """A method's state, compiled round and states of clients."""
  state = algorithm.init(tiny.KEY, params)
  return state, jax.jit(algorithm.round), tiny.fresh(algorithm, state)


def after(state, step, states):
  """One round: (state, info)."""
  new, _, info = step(state, cohort()._replace(states=states), network().base)
  return new, info


@functools.cache
def gated():
  """The program of federated averaging on parameters with gates."""
  average = recipes.fed_avg(loss, tiny.sgd(RATE), measure=None)
  return program(average, adapters.gates.added(factors()))


def updates(params, numbers):
  """What one round adds to the factors of the network of some layers."""
  state, step, states = gated()
  gate = np.isin(np.arange(LAYERS), numbers).astype(np.float32)
  whole = {'layers': {**params['layers'], 'gate': jnp.asarray(gate)}}
  new, info = after(state._replace(params=whole), step, states)
  moved = tiny.moved(adapters.gates.without(new.params), params)
  return moved, float(info.metrics['local/loss'])


def method(name, **settings):
  if name == 'fed_biot':
    settings = {'top': 2, 'drop': 0.3, 'public': public(), **settings}
  return getattr(recipes, name)(
    loss, tiny.sgd(RATE), model=network().model, measure=None, **settings
  )


@functools.cache
def built(name):
  return program(method(name), factors())


@functools.cache
def learned(name):
  """The state before and after a round, and its outcome."""
  return built(name)[0], *after(*built(name))


# ---------------------------------------------------------------- the layers --


def test_a_uniform_drop_keeps_the_layers_of_the_paper():
  others = 0
  for num in range(1, 40):
    for drop in (0.0, 0.2, 0.25, 0.5, 0.9):
      kept = emulators.uniform(num, drop)
      assert kept == reference.kept(num, drop)
      assert kept == sorted(set(kept)) and kept[-1] <= num - 1
      if len(kept) > 1:  # the neighbour rounds to the nearest layer
        stride = (num - 1) / (len(kept) - 1)
        others += kept != [round(i * stride) for i in range(len(kept))]
  assert others > 20
  assert OFFSITE.numbers(LAYERS) == [0, 1, 3, 4]
  assert BIOT.numbers(LAYERS) == [0, 2, 3, 4]


@pytest.mark.parametrize('layout', [OFFSITE, BIOT])
def test_parts_of_an_adapter_are_joined_again(layout):
  parts = emulators.cut(factors(), layout, 'it')
  tiny.close(emulators.joined(parts, layout), factors(), rtol=0, atol=0)
  served = emulators.plugged(parts, layout)['layers']
  for i in range(LAYERS):
    outer = i < layout.bottom or i >= LAYERS - layout.top
    row = halves.rows(factors()['layers'], i)
    want = row if outer else tree.zeros_like(row)
    tiny.close(halves.rows(served, i), want, rtol=0, atol=0)


# --------------------------------------------------------------- the methods --


@pytest.mark.parametrize('name', ['offsite_tuning', 'fed_biot'])
def test_clients_tune_their_layers_in_the_network_without_the_others(name):
  layout = {'offsite_tuning': OFFSITE, 'fed_biot': BIOT}[name]
  start, state, info = learned(name)
  whole = emulators.joined(start.params, layout)
  if name == 'offsite_tuning':  # its emulator has no adapter
    whole = emulators.plugged(start.params, layout)
  want, nats = updates(whole, layout.numbers(LAYERS))
  got = tiny.moved(state.params.client, start.params.client)
  tiny.close(got, emulators.cut(want, layout, 'it').client)
  np.testing.assert_allclose(info.metrics['local/loss'], nats, rtol=1e-5)
  # The neighbour computes all layers.
  other, _ = updates(whole, range(LAYERS))
  assert tiny.differs(emulators.cut(other, layout, 'it').client, got)


def test_an_emulator_of_every_layer_is_lora_on_the_outer_layers():
  layout = BIOT._replace(drop=0.0)
  algorithm = method('fed_biot', drop=0.0)
  params = emulators.plugged(emulators.cut(factors(), layout, ''), layout)
  start, *rest = program(algorithm, params)
  state, info = after(start, *rest)
  want, nats = updates(params, range(LAYERS))
  served = algorithm.personal(state.params, None)
  got = emulators.cut(tiny.moved(served, params), layout, 'it')
  tiny.close(got.client, emulators.cut(want, layout, 'it').client)
  np.testing.assert_allclose(info.metrics['local/loss'], nats, rtol=1e-5)
  # Nothing is left to distil.
  tiny.close(state.params.server, start.params.server, atol=1e-6)


def test_what_is_served_is_the_whole_network_with_the_clients_layers():
  for name, layout in (('offsite_tuning', OFFSITE), ('fed_biot', BIOT)):
    _, state, _ = learned(name)
    served = method(name).personal(state.params, None)
    tiny.close(served, emulators.plugged(state.params, layout), rtol=0, atol=0)


def test_the_emulators_layers_stay_where_nobody_trains_them():
  start, state, _ = learned('offsite_tuning')
  tiny.close(state.params.server, start.params.server, rtol=0, atol=0)
  start, state, _ = learned('fed_biot')
  for i in range(LAYERS - BIOT.top):
    change = tiny.differs(
      halves.rows(state.params.server['layers'], i),
      halves.rows(start.params.server['layers'], i),
      by=0,
    )
    assert change == (i in BIOT.kept(LAYERS))


@functools.cache
def gap():
  return jax.jit(
    lambda base, parts, batch: fed_biot.gap(
      network().model, BIOT, base, parts, batch, KL
    )
  )


def test_the_emulators_loss_equals_the_reference():
  model, layers = network().model, layers_of(network().model)
  parts = emulators.cut(factors(), BIOT, 'it')
  batch = tree.take(public(), 1)
  below, above = range(LAYERS - BIOT.top), range(LAYERS - BIOT.top, LAYERS)
  gates = jnp.isin(jnp.arange(LAYERS), jnp.array(BIOT.numbers(LAYERS)))
  small = adapters.gates.added(emulators.joined(parts, BIOT))
  small['layers']['gate'] = gates.astype(jnp.float32)
  full = adapters.gates.added(emulators.plugged(parts, BIOT))

  @jax.jit
  def seen(base, params, batch):
    states = layers(base, params, batch, below, ends=False)
    hidden = layers(base, params, batch, above, states)
    return states, model.logits(base, params, hidden)

  (h, teacher), (got, student) = (
    map(np.asarray, seen(network().base, params, batch))
    for params in (full, small)
  )
  places = np.zeros_like(batch.loss_mask)
  places[:, :-1] = batch.loss_mask[:, 1:]
  want = reference.gap(h, got, teacher, student, batch.segments > 0, places, KL)
  value = gap()(network().base, parts, batch)
  np.testing.assert_allclose(value, want, rtol=1e-4)
  assert want > 0.01
  # The neighbour is offsite tuning's distance of states alone.
  alone = reference.gap(h, got, teacher, student, batch.segments > 0, places, 0)
  assert abs(alone - want) > 1e-3


def test_rounds_descend_the_emulators_loss_on_the_next_public_texts():
  """Two steps of SGD a round, on texts 0 and 1, then on 2 and 0."""
  start, first, _ = learned('fed_biot')
  second, _ = after(first, *built('fed_biot')[1:])

  @jax.jit
  def slope(base, trained, parts, batch):
    def of(trained):
      emulator = tree.merge(trained, parts.server)
      return fed_biot.gap(
        network().model, BIOT, base, parts._replace(server=emulator), batch, KL
      )

    return jax.grad(of)(trained)

  for old, new, texts in ((start, first, (0, 1)), (first, second, (2, 0))):
    emulator = tiny.floats(old.params.server)
    for i in texts:
      batch = tree.take(public(), i)
      grads = slope(network().base, emulator, new.params, batch)
      emulator = tree.sub(emulator, tree.scale(grads, RATE))
    tiny.close(tiny.floats(new.params.server), emulator)
    assert tiny.differs(emulator, tiny.floats(old.params.server))


def test_bytes_are_those_of_the_adapter_and_down_of_the_emulators_too():
  size = lambda part: sum(x.nbytes for x in jax.tree.leaves(tiny.floats(part)))
  for name in ('offsite_tuning', 'fed_biot'):
    start, _, info = learned(name)
    own = size(start.params.client)
    emulated = 0
    if name == 'fed_biot':
      rows = np.array(BIOT.kept(LAYERS))
      emulated = size(halves.rows(start.params.server, rows))
    up, down = (
      np.asarray(x).sum(1).tolist() for x in (info.bytes_up, info.bytes_down)
    )
    assert up == [own] * tiny.K
    assert down == [own + emulated] * tiny.K


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(drop=1.0), r'drop is 1\.0; it must be from 0 to below 1'),
    (dict(top=-1), 'top is -1; it must be 0 or more'),
    (dict(server_steps=-1), 'server_steps is -1; it must be 0 or more'),
    (dict(kl=-1.0), r'kl is -1\.0; it must be 0 or more'),
    (dict(public=None), 'add the section public'),
    (dict(after=lambda *_: None), 'fed_biot brings its own after'),
  ],
)
def test_settings_without_sense_are_refused(settings, words):
  with pytest.raises(Error, match=words):
    method('fed_biot', **settings)


def test_adapters_that_no_emulator_can_lack_are_refused():
  for params, words in (
    ({'layers': {'norm': jnp.ones((LAYERS, 2))}}, 'needs low-rank factors'),
    (halves.at_layer(factors(), 2).client, 'leave none of the 2 layers'),
  ):
    with pytest.raises(Error, match=words):
      method('offsite_tuning').init(tiny.KEY, params)
  plain: Any = network().model.hidden
  with pytest.raises(Error, match='cannot be computed on another network'):
    local.on_model(plain, network().model)
