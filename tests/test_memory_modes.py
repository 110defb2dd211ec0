"""Micro-batches and frozen lower layers: equal gradients, less memory."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import adapters, local, models, scopes, tree
from fedjax_llm.local.gradients import backprop, mean_loss
from fedjax_llm.plan import modes, steps, work
from fedjax_llm.run import config, experiment, memory
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Batch, Error, LossSum, Shared

ROOT = pathlib.Path(__file__).parents[1]
SHAPE = {
  'population.max_length': 64,
  'clients.cohort_size': 1,
  'cohort.batch_size': 4,
  'model.hidden_size': 64,
  'model.num_layers': 4,
}


def conf_of(**fields):
  words = [f'--config.{name}={value}' for name, value in fields.items()]
  argv = ['--config', str(ROOT / 'configs' / 'tiny.py'), '--workdir', '.']
  return config.parse([*argv, *words], SPEC).config


# ----------------------------------------------------------- micro-batches --


def squares(base, params, batch, key):
  """Squared errors of rows x [B, T] where the mask m is set."""
  x, y, m = batch
  total = jnp.sum(m * (params['w'] * x - y) ** 2)
  return LossSum(total, jnp.sum(m), jnp.float32(0))


def rows_of_squares():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 4, 3))
  m = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], float)
  return x, y, m


def test_micro_batches_give_the_token_mean_of_the_large_batch():
  """Against NumPy float64; a mean of the parts' means is another number."""
  x, y, m = rows_of_squares()
  w = 0.7
  slope = 2 * m * (w * x - y) * x  # [B, T]
  expected = slope.sum() / m.sum()
  parts = [(slope[i : i + 2].sum(), m[i : i + 2].sum()) for i in (0, 2)]
  neighbour = np.mean([total / count for total, count in parts])
  assert abs(neighbour - expected) > 0.01

  batch = tuple(np.float32(z) for z in (x, y, m))
  start = {'w': jnp.float32(w)}
  for rows in (1, 2, 4, 8):
    loss = local.micro_batches(squares, rows)
    grads, sums = backprop(loss, None, start, start, batch, tiny.KEY)
    np.testing.assert_allclose(grads['w'], expected, rtol=1e-5)
    assert float(sums.count) == m.sum()
    of = lambda p, loss=loss: mean_loss(loss, None, p, start, batch, tiny.KEY)[
      0
    ]
    _, forward = jax.jvp(of, (start,), ({'w': jnp.float32(1)},))
    np.testing.assert_allclose(forward, expected, rtol=1e-5)


def test_micro_batches_of_the_network_equal_the_large_batch():
  batch = tiny.texts(4, seed=3)
  counts = batch.loss_mask[:, 1:].sum(1)
  assert len(set(counts.tolist())) > 1  # micro-batches differ in tokens
  params = tiny.lora()

  @jax.jit
  def both(params, batch):
    trained = tiny.floats(params)
    return [
      backprop(loss, tiny.base(), trained, params, batch, tiny.KEY)
      for loss in (tiny.loss, local.micro_batches(tiny.loss, 1))
    ]

  (large, sums), (small, more) = both(params, batch)
  tiny.close(small, large, rtol=1e-5)
  tiny.close(more, sums, rtol=1e-6)


def test_rows_of_a_loss_by_rows_keep_their_order():
  by_row = lambda base, p, batch, key: LossSum(
    *(jnp.sum(z, 1) for z in (batch, batch > 0, batch))
  )
  batch = jnp.arange(8.0).reshape(4, 2)
  sums = local.micro_batches(by_row, 2)(None, {}, batch, tiny.KEY)
  assert sums.total.tolist() == [1.0, 5.0, 9.0, 13.0]


def test_wrong_micro_batches_are_refused():
  with pytest.raises(Error) as error:
    local.micro_batches(squares, 0)
  assert str(error.value) == 'memory.micro_batch is 0; it must be at least 1.'
  batch = tuple(np.float32(z) for z in rows_of_squares())
  with pytest.raises(Error) as error:
    local.micro_batches(squares, 3)(None, {'w': 1.0}, batch, tiny.KEY)
  assert str(error.value) == (
    'memory.micro_batch is 3; it must divide the 4 rows of a batch '
    '(cohort.batch_size).'
  )
  with pytest.raises(Error) as error:
    experiment.checked(conf_of(**{'memory.micro_batch': 3}))
  assert str(error.value) == (
    'memory.micro_batch is 3; it must divide cohort.batch_size, which is 2.'
  )


def test_the_section_reaches_the_loss_of_every_method():
  seen = []

  def loss(base, params, batch, key):
    seen.append(batch.tokens.shape)
    total = tree.norm(tiny.floats(params))
    return LossSum(total, jnp.float32(1), jnp.float32(0))

  for name in ('fed_avg', 'fed_mezo'):
    conf = conf_of(**{
      'memory.micro_batch': 1, 'algorithm.name': name, 'local.name': 'sgd',
    })  # fmt: skip
    method = experiment.algorithm(
      conf, loss=loss, model=None, adapter=adapters.lora(), num_clients=3
    )
    state = method.init(tiny.KEY, tiny.lora())
    cohort = tiny.cohort()._replace(states=tiny.fresh(method, state))
    seen.clear()
    jax.eval_shape(method.round, state, cohort, tiny.base())
    assert set(seen) == {(1, tiny.T)}, name


# ----------------------------------------------------------- frozen layers --


@functools.cache
def compiled(num_layers, layers, marked):
  """A backward pass: (gradients, temporary bytes)."""
  model = models.random(
    vocab_size=32, hidden_size=32, num_layers=num_layers, num_heads=2,
    num_kv_heads=1,
  )  # fmt: skip
  params = adapters.lora(rank=2, layers=layers).init(tiny.KEY, model.base)
  params = jax.tree.map(lambda x: x + 0.1 if x.ndim == 3 else x, params)
  loss = local.causal_lm(model.model)
  if marked:
    loss = local.frozen_below(loss, min(layers), memory.only_chosen)
  one = np.random.default_rng(0).integers(1, 30, (2, 32)).astype(np.int32)
  batch = Batch(one, one > 0, np.ones_like(one), np.tile(np.arange(32), (2, 1)))
  trained = tree.select(params, scopes.everything().labels(params), Shared)

  @jax.jit
  def grads(trained, base):
    return backprop(loss, base, trained, params, batch, tiny.KEY)[0]

  program = grads.lower(trained, model.base).compile()
  sizes: Any = program.memory_analysis()
  return program(trained, model.base), sizes.temp_size_in_bytes


def test_frozen_layers_change_no_gradient_and_keep_no_activation():
  plain, much = compiled(4, (3,), False)
  grads, little = compiled(4, (3,), True)
  tiny.close(grads, plain, rtol=1e-5)
  assert little < 0.5 * much
  deeper = compiled(8, (7,), True)[1]  # four more frozen layers keep nothing
  assert deeper == pytest.approx(little, rel=0.02)


def test_frozen_layers_are_those_below_the_adapter():
  section = {'name': 'lora', 'layers': '[23]'}
  assert memory.lowest(section, 4) == 2
  chosen = {'name': 'layers', 'which': [-1, 2]}
  assert memory.lowest(chosen, 4) == 2
  base = tiny.loaded(3).base
  of = lambda adapter: memory.only_chosen(adapter.init(tiny.KEY, base))
  assert of(adapters.lora(layers=[2]))
  assert of(adapters.layers([2]))
  assert not of(adapters.lora())
  mixed = adapters.lora(layers=[2]).init(tiny.KEY, base)
  dense = adapters.norms().init(tiny.KEY, base)
  mixed['layers']['input_layernorm'] = dense['layers']['input_layernorm']
  assert not memory.only_chosen(mixed)  # it trains in all layers


def test_a_method_that_trains_upper_layers_marks_the_others():
  marks = []

  def loss(base, params, batch, key):
    marks.append(params.get('frozen_below'))
    total = jnp.sum(params['layers']['self_attn']['q_proj'].b)
    return LossSum(total, jnp.float32(1), jnp.float32(0))

  conf = conf_of(**{'adapter.layers': '[2]'})
  method = experiment.algorithm(
    conf, loss=loss, model=None, adapter=adapters.lora(), num_clients=3,
    num_layers=3,
  )  # fmt: skip
  params = adapters.lora(layers=[2]).init(tiny.KEY, tiny.loaded(3).base)
  state = method.init(tiny.KEY, params)
  cohort = tiny.cohort()._replace(states=tiny.fresh(method, state))
  jax.eval_shape(method.round, state, cohort, tiny.base())
  assert set(marks) == {2}
  assert 'frozen_below' not in state.params


# -------------------------------------------------------------------- plan --


def test_the_plan_of_each_mode_is_that_of_the_compiled_program():
  """Within a fifth, at a small shape: as it is, full, 1 row, upper layers."""
  conf = conf_of(**SHAPE)
  result = modes.modes(conf, lambda conf: work.read(conf, num_clients=1))
  assert [mode.field for mode in result] == [
    '',
    '--config.model.remat=dots',
    '--config.model.remat=full',
    '--config.memory.micro_batch=2',
    '--config.memory.micro_batch=1',
    '--config.model.quantisation=int8',
    '--config.adapter.layers=[2,3]',
  ]
  for mode in result[::2]:
    real = steps.peak(mode.field, mode.planned, backprop)
    assert mode.temporary == pytest.approx(real.temporary, rel=0.2), mode.field
    assert mode.total == pytest.approx(real.total, rel=0.2), mode.field
  lines = dict(modes.rows(result))
  assert 'saves' in lines['  --config.memory.micro_batch=1']
