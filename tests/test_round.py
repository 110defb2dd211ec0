"""A round of a real network: one program, and what is not in it."""

import re

import jax
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import batching, tree
from fedjax_llm.types import Batch, Error

K, S, B, T, V = 3, 2, 2, 16, 83


@pytest.fixture(scope='module')
def round_program():
  loaded = fl.models.random(vocab_size=V, hidden_size=40, intermediate_size=56)
  rng = np.random.default_rng(0)
  shape = (K, S, B, T)
  segments = np.ones(shape, np.int32)
  segments[1, :, :, 9:] = 0
  mask = (rng.random(shape) < 0.3) & (segments > 0)
  mask[..., 0] = False
  mask[..., 5] = True
  cohort = fl.types.Cohort(
    ids=np.arange(K, dtype=np.int32),
    batches=batching.bounded(
      Batch(
        tokens=rng.integers(0, V, shape).astype(np.int32),
        loss_mask=mask,
        segments=segments,
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), shape),
      )
    ),
    weight=mask.sum((1, 2, 3)).astype(np.float32),
    valid=np.ones(K, bool),
  )
  algorithm = fl.recipes.fed_avg(
    fl.local.causal_lm(loaded.model),
    fl.local.optimizer('sgd', 0.5),
  )
  params = fl.adapters.lora(rank=4).init(jax.random.key(0), loaded.base)
  state = algorithm.init(jax.random.key(1), params)
  compiled = (
    jax.jit(algorithm.round).lower(state, cohort, loaded.base).compile()
  )
  return loaded, cohort, state, compiled


def test_the_base_meets_all_clients_in_one_matmul(round_program):
  loaded, _, _, compiled = round_program
  text = compiled.as_text()
  dims = lambda s: tuple(int(n) for n in s.split(',') if n)
  shapes = {
    name: dims(found)
    for name, found in re.findall(r'(%[\w.-]+) = \w+\[([\d,]*)\]', text)
  }
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(loaded.base)
    if path[-1].key in ('kernel', 'embedding')
  }
  with_base = 0
  for line in text.splitlines():
    if ' dot(' not in line:
      continue
    names = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
    operands = [tuple(d for d in shapes[n] if d > 1) for n in names]
    assert not any(
      K in o and tuple(sorted(d for d in o if d != K)) in kernels
      for o in operands
    ), f'the base was repeated for every client: {line}'
    if any(tuple(sorted(o)) in kernels for o in operands):
      with_base += 1
      assert not re.search(r'lhs_batch_dims=\{\d', line), line
  assert with_base >= 14  # seven matrices, forwards and backwards


def test_logits_of_all_positions_never_exist(round_program):
  _, cohort, _, compiled = round_program
  most = int(cohort.batches.loss_mask.sum((2, 3)).max())
  rows = [
    int(np.prod([int(n) for n in found.split(',')])) // V
    for found in re.findall(r'f32\[([\d,]*)\]', compiled.as_text())
    if found and str(V) in found.split(',')
  ]
  assert max(rows) == max(K * most, 40)  # 40: the embedding table itself
  assert K * most < K * B * T


def test_clients_one_after_another_give_the_same_round(round_program):
  """The slow twin: a Python loop over clients, each in its own program."""
  loaded, cohort, state, compiled = round_program
  together, _, told = compiled(state, cohort, loaded.base)
  algorithm = fl.recipes.fed_avg(
    fl.local.causal_lm(loaded.model), fl.local.optimizer('sgd', 0.5)
  )
  one = jax.jit(algorithm.round)
  # It computes every logit, the other one those that a bound allows.
  cohort = cohort._replace(batches=cohort.batches._replace(bound=None))
  total, losses = None, []
  for k in range(K):
    row = jax.tree.map(lambda x, k=k: x[k : k + 1], cohort)
    alone, _, heard = one(state, row, loaded.base)
    update = tree.scale(tree.sub(alone.params, state.params), cohort.weight[k])
    total = update if total is None else tree.add(total, update)
    seen = heard.metrics
    losses.append((float(seen['local/loss']), float(seen['local/tokens'])))
  mean = tree.scale(total, 1 / cohort.weight.sum())
  for x, y in zip(
    jax.tree.leaves(together.params),
    jax.tree.leaves(tree.add(state.params, mean)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
  loss = sum(a * b for a, b in losses) / sum(b for _, b in losses)
  np.testing.assert_allclose(told.metrics['local/loss'], loss, rtol=1e-5)


def test_a_bound_changes_nothing_and_too_small_a_one_is_refused(round_program):
  loaded, cohort, state, _ = round_program
  batch = jax.tree.map(lambda x: x[0, 0], cohort.batches)
  count = int(batch.loss_mask.sum())
  call = lambda loss, batch: loss(loaded.base, state.params, batch, None)
  whole = fl.local.causal_lm(loaded.model)
  want = call(whole, batch._replace(bound=None))
  small = fl.local.causal_lm(loaded.model, chunk_size=3)
  rows = fl.local.causal_lm(loaded.model, per_row=True)
  for got in (
    call(small, batching.bounded(batch)),
    jax.tree.map(np.sum, call(rows, batching.bounded(batch, [count + 1]))),
  ):
    np.testing.assert_allclose(got.total, want.total, rtol=1e-5)
    assert got.count == want.count == count
    assert got.correct == want.correct
  message = f'a step holds {count} tokens with a loss, more than the bound of '
  with pytest.raises(Error, match=f'^{message}its batch, {count - 1}[.]$'):
    batching.bounded(batch, [count - 1])
