"""A base of few bits: what it loses, what it weighs, how it is multiplied."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import models
from fedjax_llm.adapters.changes import Amended
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import quantised
from fedjax_llm.types import Batch, Cohort, Error, LowRank

pytest.importorskip('qwix')

# Dettmers et al. 2023, arXiv 2305.14314, appendix E.
NF4 = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ]
)
# No two sides of a weight, nor the tokens of a batch, are alike.
SIZES: dict[str, Any] = dict(
  vocab_size=61,
  hidden_size=32,
  intermediate_size=96,
  num_heads=4,
  num_kv_heads=2,
)


def kernel(inputs=96):
  w = np.random.default_rng(0).normal(size=(2, inputs, 24)).astype(np.float32)
  w[0, :, 3] = 0  # a feature that is nothing
  w[1, 5, 7] = 40  # an outlier
  return w


def each(scale, inputs):
  """A scale for every weight: of its block of inputs and its feature."""
  return np.repeat(np.asarray(scale), inputs // scale.shape[1], axis=1)


# ------------------------------------------------------------------ weights --


@pytest.mark.parametrize('kind, blocks', [('int8', 1), ('int4', 3)])
def test_integers_are_at_most_half_a_scale_away(kind, blocks):
  w = kernel()
  q = quantised.quantise(jnp.asarray(w), kind)
  assert q.shape == w.shape and q.scale.shape == (2, blocks, 24)
  scale, levels = each(q.scale, 96), {'int8': 127.5, 'int4': 7.5}[kind]
  error = np.abs(np.asarray(quantised.dense(q, jnp.float32)) - w)
  assert (error <= scale / 2 * (1 + 1e-5)).all()
  assert error.max() > 0.1 * scale.max()
  # The scale is the least that holds the largest weight of its block.
  most = np.abs(w).reshape(2, blocks, -1, 24).max(2)
  np.testing.assert_allclose(q.scale[most > 0], most[most > 0] / levels, 1e-6)
  assert (error[0, :, 3] == 0).all()


def test_nf4_takes_the_nearest_of_its_sixteen_levels():
  w = kernel()
  q = quantised.quantise(jnp.asarray(w), 'nf4')
  scale = each(q.scale, 96)
  ratio = np.asarray(quantised.dense(q, jnp.float32)) / scale
  distance = np.abs(ratio[..., None] - NF4)
  assert distance.min(-1).max() < 1e-6
  nearest = np.abs((w / scale)[..., None] - NF4).min(-1)
  np.testing.assert_allclose(np.abs(ratio - w / scale), nearest, atol=1e-6)
  assert np.abs(ratio - w / scale).max() <= 0.1521


@pytest.mark.parametrize('kind', quantised.KINDS)
def test_fewer_bits_lose_more(kind):
  w = np.random.default_rng(1).normal(size=(1, 256, 64)).astype(np.float32)
  error = (
    quantised.dense(quantised.quantise(jnp.asarray(w), kind), jnp.float32) - w
  )
  relative = np.linalg.norm(error) / np.linalg.norm(w)
  low, high = {'int8': (0.004, 0.01), 'int4': (0.08, 0.12), 'nf4': (0.07, 0.1)}[
    kind
  ]
  assert low < relative < high


def test_only_the_matrices_of_the_layers_are_quantised():
  plain = models.random(**SIZES)
  found = models.random(**SIZES, quantisation='int8').base
  is_kernel = lambda x: hasattr(x, 'qvalue')
  kinds = {
    jax.tree_util.keystr(path, simple=True, separator='/'): is_kernel(x)
    for path, x in jax.tree.leaves_with_path(found, is_leaf=is_kernel)
  }
  assert sum(kinds.values()) == 7
  assert all(
    few == (name.startswith('layers') and name.endswith('kernel'))
    for name, few in kinds.items()
  )
  for name in ('embed_tokens', 'lm_head', 'norm'):
    jax.tree.map(np.testing.assert_array_equal, found[name], plain.base[name])


def test_the_bytes_are_those_of_values_and_scales():
  config = models.random(**SIZES).config
  shapes = config_lib.shapes(config)['layers']
  kernels = [
    x['kernel'] for g in ('self_attn', 'mlp') for x in shapes[g].values()
  ]
  values = sum(int(np.prod(s)) for s in kernels)
  scales = sum(s[0] * s[2] for s in kernels)
  plain = models.num_bytes(models.random(**SIZES).base)
  assert plain == 4 * config_lib.num_params(config)
  few = models.num_bytes(models.random(**SIZES, quantisation='int8').base)
  assert few == plain - 4 * values + values + 4 * scales


# -------------------------------------------------------------------- model --


def factors(base, num=None, residual=False):
  """LoRA on one matrix of each kind, neither factor zero."""
  rng = np.random.default_rng(3)
  lead = () if num is None else (num,)

  def leaf(group, name):
    layers, d, f = base['layers'][group][name]['kernel'].shape
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 6, jnp.float32)
    return LowRank(
      draw(*lead, layers, d, 2),
      draw(*lead, layers, 2, f),
      jnp.ones((*lead, layers)),
      draw(layers, d, f) if residual else None,
    )

  return {
    'layers': {
      'self_attn': {'q_proj': leaf('self_attn', 'q_proj')},
      'mlp': {'down_proj': leaf('mlp', 'down_proj')},
    }
  }


def batch(*lead):
  tokens = np.random.default_rng(2).integers(1, 61, (*lead, 2, 10))
  ones = np.ones_like(tokens)
  places = np.broadcast_to(np.arange(10), tokens.shape)
  return Batch(tokens, ones > 0, ones, places)


def total(loaded, base, params, batch):
  hidden = loaded.model.hidden(base, params, batch)
  return jnp.sum(loaded.model.logits(base, params, hidden) ** 2)


def written_out(base):
  is_kernel = lambda x: hasattr(x, 'qvalue') or isinstance(x, Amended)
  return jax.tree.map(
    lambda x: quantised.dense(x, jnp.float32), base, is_leaf=is_kernel
  )


@pytest.fixture(scope='module')
def few():
  return {
    kind: models.random(**SIZES, quantisation=kind) for kind in ('int8', 'nf4')
  }


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_the_model_computes_with_the_weights_written_out(few, kind):
  loaded = few[kind]
  params = factors(loaded.base)
  step = jax.jit(
    jax.value_and_grad(lambda p, base: total(loaded, base, p, batch()))
  )
  found, wanted = (
    step(params, loaded.base),
    step(params, written_out(loaded.base)),
  )
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {'float32'}


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


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_clients_share_one_product_with_one_dequantised_weight(few, kind):
  """Forwards and backwards, no copy of the base a client, no batched dot."""
  loaded, clients = few[kind], 5
  base, folded = loaded.base, kind == 'int8'
  if folded:  # q and down: a dense change beside the quantised weight
    base, _ = fl.adapters.fold(base, factors(base, residual=True))
  run = jax.vmap(
    jax.grad(lambda p, base, b: total(loaded, base, p, b)), (0, None, 0)
  )
  program = jax.make_jaxpr(run)(
    factors(loaded.base, clients), base, batch(clients)
  )
  sides = {
    tuple(sorted(x['kernel'].shape[1:]))
    for group in ('self_attn', 'mlp')
    for name, x in loaded.base['layers'][group].items()
  }
  merged = 0
  for equation in equations(program.jaxpr):
    for x in equation.outvars:
      shape = getattr(x.aval, 'shape', ())
      assert not (
        clients in shape[:-2] and tuple(sorted(shape[-2:])) in sides
      ), equation
    if equation.primitive.name != 'dot_general':
      continue
    shapes = [x.aval.shape for x in equation.invars]
    if any(tuple(sorted(s)) in sides for s in shapes):
      _, batched = equation.params['dimension_numbers']
      assert batched == ((), ()), equation
      assert any(clients in s for s in shapes)
      merged += 1
  # Seven matrices in the scan's body forwards, and as many backwards.
  assert merged == 14 + 4 * folded


def test_a_residual_becomes_a_product_beside_the_quantised_one(few):
  loaded = few['int8']
  params = factors(loaded.base, residual=True)
  base, bare = fl.adapters.fold(loaded.base, params)
  assert (
    jax.tree.leaves(bare, is_leaf=lambda x: isinstance(x, LowRank))[0].residual
    is None
  )
  down = base['layers']['mlp']['down_proj']['kernel']
  assert isinstance(down, Amended) and down.weight.qvalue.dtype == jnp.int8
  run = jax.jit(lambda base, params: total(loaded, base, params, batch()))
  wanted = run(loaded.base, params)
  np.testing.assert_allclose(run(base, bare), wanted, rtol=1e-3)
  assert abs(run(loaded.base, bare) / wanted - 1) > 0.05
  # Once more, and merged as a whole: changes add up.
  twice, _ = fl.adapters.fold(base, params)
  change = lambda base: base['layers']['mlp']['down_proj']['kernel'].change
  np.testing.assert_allclose(change(twice), 2 * change(base), rtol=1e-6)
  merged = fl.adapters.merge(loaded.base, params)
  np.testing.assert_allclose(run(merged, {}), wanted, rtol=1e-3)


def test_a_saved_model_holds_the_weights_written_out(few, tmp_path):
  loaded = few['int8']
  merged = fl.adapters.merge(loaded.base, factors(loaded.base))
  models.save(tmp_path, loaded.config, merged)
  again = models.pretrained(tmp_path).base
  jax.tree.map(np.testing.assert_array_equal, again, written_out(merged))


def test_loading_quantises_as_quantising_what_was_loaded(tmp_path):
  plain = models.random(**SIZES)
  models.save(tmp_path, plain.config, plain.base)
  found = models.pretrained(tmp_path, quantisation='int4').base
  wanted = models.random(**SIZES, quantisation='int4').base
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_round_on_an_int8_base_learns(few):
  """Two rounds of a rule that writes residuals, which the second folds."""
  loaded = few['int8']
  own = batch(3, 2)._replace(tokens=np.tile(np.arange(1, 11), (3, 2, 2, 1)))
  cohort = Cohort(
    np.arange(3, dtype=np.int32), own, np.ones(3, np.float32), np.ones(3, bool)
  )
  adapter = fl.adapters.lora(rank=2)
  params = adapter.init(jax.random.key(0), loaded.base)
  algorithm = fl.recipes.fedex_lora(
    fl.local.causal_lm(loaded.model),
    fl.local.optimizer('adamw', 3e-2),
    fold=adapter.fold,
  )
  state = algorithm.init(jax.random.key(1), params)
  step, losses = jax.jit(algorithm.round), []
  for _ in range(3):
    state, _, told = step(state, cohort, loaded.base)
    losses.append(float(told.metrics['local/loss']))
  assert np.isfinite(losses).all()
  assert losses[2] < losses[1] < losses[0]
  q = state.params['layers']['self_attn']['q_proj']
  assert q.a.dtype == jnp.float32
  assert float(jnp.abs(q.residual).max()) > 0


# ----------------------------------------------------------------- mistakes --


def test_what_cannot_be_quantised_is_told(monkeypatch, few):
  with pytest.raises(Error, match=r"quantisation='int3'.*int8, int4, nf4"):
    models.random(quantisation='int3')
  with pytest.raises(Error, match=r'down_proj.*multiple of 16.*100'):
    models.random(intermediate_size=100, quantisation='nf4')
  with pytest.raises(Error, match=r'federa.*quantisation'):
    fl.adapters.federa(rank=2).init(jax.random.key(0), few['int8'].base)
  monkeypatch.setitem(sys.modules, 'qwix', None)
  with pytest.raises(Error, match=r'fedjax_llm\[quant\]'):
    models.random(quantisation='int8')
