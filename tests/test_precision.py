"""Precision: which arithmetic runs in which dtype, read from the programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import models
from fedjax_llm.models.files import load
from fedjax_llm.types import Batch, Error

# What must not be rounded: powers, roots, angles, and sums of them.
CAREFUL = ('exp', 'rsqrt', 'sqrt', 'cos', 'sin', 'log', 'log1p')
BATCH = Batch(*(np.ones((2, 6), np.int32),) * 4)._replace(
  loss_mask=np.ones((2, 6), bool)
)


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def programs(**settings):
  """(forward, with gradients) of a loss over LoRA, and the outputs' dtypes."""
  loaded = models.random(vocab_size=31, **settings)
  loss = fl.local.causal_lm(loaded.model)
  params = fl.adapters.lora(rank=2).init(jax.random.key(0), loaded.base)

  def forward(params):
    return loss(loaded.base, params, BATCH, jax.random.key(0)).total

  return [
    jax.make_jaxpr(f, return_shape=True)(params)
    for f in (forward, jax.value_and_grad(forward))
  ]


def dtypes(program, *names):
  """Of the operands of these operations."""
  return {
    tuple(x.aval.dtype.name for x in equation.invars)
    for equation in equations(program.jaxpr)
    if equation.primitive.name in names and not _elementwise(equation)
  }


def _elementwise(equation):
  """True for sums over a row, and their gradients, written as contractions."""
  if equation.primitive.name != 'dot_general':
    return False
  contracted, batch = equation.params['dimension_numbers']
  used = [len(c) + len(b) for c, b in zip(contracted, batch, strict=True)]
  free = [x.aval.ndim - n for x, n in zip(equation.invars, used, strict=True)]
  return 0 in free


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_products_run_in_the_compute_dtype_and_the_rest_in_float32(dtype):
  (forward, _), (both, shapes) = programs(compute_dtype='bfloat16', dtype=dtype)
  assert dtypes(forward, 'dot_general') == {('bfloat16', 'bfloat16')}
  for program in (forward, both):
    assert dtypes(program, *CAREFUL) == {('float32',)}
  # What starts in float32 (scores, logits) comes back in it; nothing else.
  assert ('float32', 'float32') not in dtypes(both, 'dot_general')
  # The adapter's gradients, and so its moments and updates, stay whole.
  assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {'float32'}


def test_attention_and_logits_are_summed_in_float32_unless_asked_otherwise():
  def wide(**settings):
    (forward, _), _ = programs(compute_dtype='bfloat16', **settings)
    return sum(
      equation.outvars[0].aval.dtype == jnp.float32
      for equation in equations(forward.jaxpr)
      if equation.primitive.name == 'dot_general'
    )

  # Scores, the sums of values that they weigh, logits.
  assert wide() == 3
  assert wide(logits_dtype='bfloat16') == 2


def test_a_cpu_computes_in_float32_and_an_accelerator_in_bfloat16(monkeypatch):
  hidden = lambda: jax.eval_shape(
    (loaded := models.random()).model.hidden, loaded.base, {}, BATCH
  )
  assert hidden().dtype == jnp.float32
  monkeypatch.setattr(load, '_on_cpu', lambda: False)
  assert hidden().dtype == jnp.bfloat16
  loaded = models.random(compute_dtype='float32')  # asked for
  assert (
    jax.eval_shape(loaded.model.hidden, loaded.base, {}, BATCH).dtype
    == jnp.float32
  )


def test_parameters_are_kept_in_the_dtype_asked_for():
  loaded = models.random(dtype='bfloat16')
  assert {x.dtype.name for x in jax.tree.leaves(loaded.base)} == {'bfloat16'}
  params = fl.adapters.lora(rank=2).init(jax.random.key(0), loaded.base)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}


@pytest.mark.parametrize('field', ['dtype', 'compute_dtype', 'logits_dtype'])
def test_other_dtypes_are_refused_by_name(field):
  with pytest.raises(Error, match=rf"^{field}='float8'.*bfloat16, float16"):
    models.random(**{field: 'float8'})  # type: ignore
