"""Methods on a tiny CLIP: what a round of many clients compiles to."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompted import apart, close

import fedjax_llm as fl
from fedjax_llm import adapters, local, models, recipes
from fedjax_llm.local import class_names
from fedjax_llm.nodes import scores
from fedjax_llm.types import Cohort, Images

K, S, B, C, T, SIDE = 32, 1, 2, 3, 6, 8
SIZES: Any = dict(
  hidden_size=24, intermediate_size=40, num_layers=2, projection=20
)
BEGIN, END = 7, 9


def names():
  """Class names of one to three tokens between a begin and an end."""
  tokens = np.zeros((C, T), np.int32)
  for c in range(C):
    tokens[c, : c + 3] = [BEGIN, *range(20 + c, 21 + 2 * c), END]
  return tokens, np.arange(C) + 2


@pytest.fixture(scope='module')
def clip():
  return models.random_clip(vocab_size=61, eos_ids=(END,), **SIZES)


def loss_of(loaded):
  return class_names.by_names(class_names.towers(loaded.dual, *names()))


def cohort():
  rng = np.random.default_rng(0)
  pixels = rng.random((K, S, B, SIDE, SIDE, 3), np.float32)
  label = rng.integers(0, C, (K, S, B)).astype(np.int32)
  return Cohort(
    ids=np.arange(K, dtype=np.int32),
    batches=Images(pixels, label, label >= 0),
    weight=np.ones(K, np.float32),
    valid=np.ones(K, bool),
  )


def test_32_clients_meet_both_towers_in_one_matmul_each(clip):
  algorithm = recipes.fed_otp(loss_of(clip), local.optimizer('sgd', 0.1))
  params = adapters.context(2).init(jax.random.key(0), clip.base)
  state = algorithm.init(jax.random.key(1), params)
  one = algorithm.init_client(state.params)
  whole = cohort()._replace(states=fl.tree.broadcast(one, K))
  lowered = jax.jit(algorithm.round).lower(state, whole, clip.base)
  text: Any = lowered.compile().as_text()
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(clip.base)
    if path[-1].key == 'kernel'
  }
  shapes = {
    name: tuple(n for n in map(int, dims.split(',')) if n > 1)
    for name, dims in re.findall(r'(%[\w.-]+) = f32\[([\d,]+)\]', text)
  }
  count = 0
  for line in text.splitlines():
    if ' dot(' in line:
      operands = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
      if any(tuple(sorted(shapes.get(n, ()))) in kernels for n in operands):
        count += 1
        assert not re.search(r'lhs_batch_dims=\{\d', line), line
  # Six matrices of a layer and a projection, in each tower.
  assert count >= 2 * 7
  # No client has a copy of a kernel.
  copies = [s for s in shapes.values() if s[:1] == (K,) and s[1:] in kernels]
  assert not copies


def test_rows_stand_between_the_begin_and_the_name(clip):
  """A context of the embeddings of words is a text with these words."""
  see = class_names.towers(clip.dual, *names())
  batch = Images(np.zeros((1, SIDE, SIDE, 3), np.float32), None, None)
  tokens, ends = names()
  words = np.full((C, 2), 33, np.int32)
  longer = np.concatenate([tokens[:, :1], words, tokens[:, 1:]], axis=1)

  @jax.jit
  def both(base):
    rows = clip.dual.embed(base, {}, words[:1])[0]
    towers = see(base, {}, batch)
    plain = clip.dual.text(base, {}, longer, ends=ends + 2)
    return towers.texts(rows), scores.unit(plain), towers.texts(None)

  context, plain, none = both(clip.base)
  close(context, plain)
  apart(context, none, by=1e-2)
  assert context.shape == (C, SIZES['projection'])


@pytest.mark.parametrize(
  'adapter',
  [
    adapters.context(2),
    adapters.visual_prompt(2),
    adapters.feature_attention(),
    adapters.generated_context(2, 2, 1),
    adapters.domain_context(2, C),
  ],
  ids=['context', 'visual', 'attention', 'generated', 'domains'],
)
def test_adapters_fit_the_towers_and_cannot_be_merged(clip, adapter):
  params = jax.eval_shape(lambda: adapter.init(jax.random.key(0), clip.base))
  batch = jax.tree.map(lambda x: x[0, 0], cohort().batches)
  if params['scores'].__class__.__name__ == 'Domains':
    node = params['scores']
    size = lambda x, axis, n: jax.ShapeDtypeStruct(
      (*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype
    )
    node = node._replace(query=size(node.query, 1, 2),
                         keys=size(node.keys, 0, 2))  # fmt: skip
    params = {'scores': node}
  sums = jax.eval_shape(
    lambda p: loss_of(clip)(clip.base, p, batch, jax.random.key(0)), params
  )
  assert sums.total.shape == ()
  assert jnp.issubdtype(sums.total.dtype, jnp.floating)
  reason = adapters.unmerged(clip.base, params)
  assert 'cannot be written into a weight' in (reason or '')
