"""Held-out numbers against float64 loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import evals
from fedjax_llm.types import Batch, Error, LossSum

KEY = jax.random.key(0)
CLIENTS = 7
LENGTHS = (4, 6)


def fake_loss(base, params, batch, key):
  """A model of two numbers: nats depend on token, base and parameters."""
  del key
  nats = base['w'][batch.tokens] * params['a'] + params['b'] ** 2  # [B, T]
  nats = jnp.where(batch.loss_mask, nats, 0.0)
  hit = batch.loss_mask & (batch.tokens % 3 == 0)
  return LossSum(
    jnp.sum(nats, -1),
    jnp.sum(batch.loss_mask, -1, dtype=jnp.float32),
    jnp.sum(hit, -1, dtype=jnp.float32),
  )


BASE = {'w': np.linspace(0.5, 2.5, 11).astype(np.float32)}
PARAMS = {'a': np.float32(0.75), 'b': np.float32(1.5)}


def make_groups(seed=0, num=3, width=4, clients=CLIENTS):
  """Groups of [M, B, T]; the last rows are padding full of loss tokens."""
  rng = np.random.default_rng(seed)
  groups = []
  for length in LENGTHS:
    shape = (num, width, length)
    tokens = rng.integers(0, 11, shape).astype(np.int32)
    mask = rng.random(shape) < 0.6
    owner = rng.integers(0, clients, shape[:2]).astype(np.int32)
    owner[-1, -2:] = -1
    mask[-1, -2:] = True
    ones = np.ones(shape, np.int32)
    groups.append((Batch(tokens, mask, ones, ones), owner))
  return groups


def reference(groups, params_of):
  """{client: [nats, tokens, hits]} in float64, one token at a time."""
  sums = {}
  for batch, owner in groups:
    for m, b in np.ndindex(owner.shape):
      client = int(owner[m, b])
      if client < 0:
        continue
      a, shift = params_of(client)
      for token, counts in zip(batch.tokens[m, b], batch.loss_mask[m, b]):
        if counts:
          row = sums.setdefault(client, np.zeros(3))
          row += [BASE['w'][token] * a + shift**2, 1, token % 3 == 0]
  return sums


def expected(sums):
  total, count, correct = np.array([sums[c] for c in sorted(sums)]).T
  each = np.sort(total / count)
  num = -(-len(each) // 10)
  loss = total.sum() / count.sum()
  return {
    'loss': loss,
    'perplexity': np.exp(loss),
    'accuracy': correct.sum() / count.sum(),
    'client_mean': each.mean(),
    'client_worst_10': each[-num:].mean(),
    'client_std': np.sqrt(np.mean((each - each.mean()) ** 2)),
  }


def close(metrics, name, numbers):
  found = {
    k.removeprefix(f'evals/{name}/'): v
    for k, v in metrics.items()
    if k.startswith(f'evals/{name}/')
  }
  assert found.keys() == numbers.keys()
  for field, number in numbers.items():
    np.testing.assert_allclose(found[field], number, rtol=2e-6, err_msg=field)


def test_likelihood_is_the_float64_sum_over_tokens_and_padding_says_nothing():
  groups = make_groups()
  report = evals.likelihood(fake_loss)(BASE, PARAMS, groups, KEY)
  sums = reference(groups, lambda client: (0.75, 1.5))
  close(report.metrics, 'heldout', expected(sums))
  clients = report.clients['heldout']
  assert clients.ids.tolist() == sorted(sums)
  table = np.stack([clients.total, clients.count, clients.correct], 1)
  np.testing.assert_allclose(table, [sums[c] for c in sorted(sums)], rtol=1e-6)


def test_the_order_of_the_rows_changes_nothing_but_rounding():
  groups = make_groups()
  rng = np.random.default_rng(1)
  shuffled = []
  for batch, owner in groups:
    order = rng.permutation(owner.size)
    mix = lambda x, order=order, owner=owner: x.reshape(
      owner.size, *x.shape[2:]
    )[order].reshape(x.shape)
    shuffled.append((jax.tree.map(mix, batch), mix(owner)))
  evaluate = evals.likelihood(fake_loss)
  one = evaluate(BASE, PARAMS, groups, KEY).metrics
  other = evaluate(BASE, PARAMS, shuffled[::-1], KEY).metrics
  for field in one:
    np.testing.assert_allclose(one[field], other[field], rtol=1e-6)


def test_the_worst_tenth_is_rounded_up_and_never_past_a_whole_number():
  def worst(num):
    loss = np.arange(1.0, num + 1)
    sums = evals.ClientSums(np.arange(num), loss, np.ones(num), np.ones(num))
    return evals.summary(sums)['client_worst_10']

  assert worst(1) == 1
  assert worst(10) == 10
  assert worst(11) == (11 + 10) / 2
  assert worst(30) == (30 + 29 + 28) / 3  # 0.1 * 30 > 3 in floating point


def test_a_client_without_tokens_is_not_a_client_of_loss_zero():
  groups = make_groups()
  for batch, owner in groups:
    batch.loss_mask[owner == 2] = False
  report = evals.likelihood(fake_loss)(BASE, PARAMS, groups, KEY, 'new')
  assert 2 not in report.clients['new'].ids
  sums = reference(groups, lambda client: (0.75, 1.5))
  close(report.metrics, 'new', expected(sums))


def test_no_text_is_an_error():
  evaluate = evals.likelihood(fake_loss)
  with pytest.raises(Error, match='evals/heldout: there is no text'):
    evaluate(BASE, PARAMS, [], KEY)
  groups = make_groups()
  nobody = [(batch, np.full_like(owner, -1)) for batch, owner in groups]
  with pytest.raises(Error, match='evals/new: there is no text'):
    evaluate(BASE, PARAMS, nobody, KEY, 'new')


def test_a_loss_that_is_not_a_number_is_told():
  bad = {'a': np.float32(np.nan), 'b': np.float32(0)}
  report = evals.likelihood(fake_loss)(BASE, bad, make_groups(), KEY)
  assert np.isnan(report.metrics['evals/heldout/loss'])


def test_a_loss_summed_over_the_batch_is_refused():
  def summed(*args):
    return jax.tree.map(jnp.sum, fake_loss(*args))

  with pytest.raises(ValueError, match='per_row=True'):
    evals.likelihood(summed)(BASE, PARAMS, make_groups(), KEY)


# ----------------------------------------------------------------- personal --

IDS = np.array([5, 0, 3, 2, 6])
STACK = {
  'a': np.linspace(0.5, 1.5, 5).astype(np.float32),
  'b': np.linspace(1.0, 0.2, 5).astype(np.float32),
}


def own_params(client):
  k = IDS.tolist().index(client)
  return float(STACK['a'][k]), float(STACK['b'][k])


@pytest.mark.parametrize('chunk_size', [2, 5])
def test_every_client_is_served_its_own_parameters(chunk_size):
  own, common = make_groups(), make_groups(seed=3, num=1)
  own[0][1][0] = [0, 0, 0, 0]  # one client with more rows than the others
  evaluate = evals.personal(fake_loss, chunk_size=chunk_size)
  report = evaluate(BASE, STACK, IDS, own, common, KEY)

  mine = [
    (batch, np.where(np.isin(owner, IDS), owner, -1)) for batch, owner in own
  ]
  close(report.metrics, 'personal/own', expected(reference(mine, own_params)))
  on_all = {}
  for client in IDS.tolist():
    relabelled = [
      (batch, np.where(owner < 0, -1, client)) for batch, owner in common
    ]
    on_all |= reference(relabelled, own_params)
  close(report.metrics, 'personal/common', expected(on_all))
  assert report.clients['personal/common'].ids.tolist() == sorted(IDS)


def test_parameters_may_come_by_chunks_and_equal_ones_are_the_global_model():
  groups = make_groups(clients=5)
  ids = np.arange(5)
  asked = []

  def params(places):
    asked.append(places.tolist())
    return jax.tree.map(lambda x: np.full(len(places), x), PARAMS)

  evaluate = evals.personal(fake_loss, chunk_size=2)
  report = evaluate(BASE, params, ids, groups, [], KEY, 'local')
  assert asked == [[0, 1], [2, 3], [4, 0]]
  everybody = evals.likelihood(fake_loss)(BASE, PARAMS, groups, KEY)
  assert {k.split('/')[2] for k in report.metrics} == {'own'}
  for field, number in everybody.metrics.items():
    found = report.metrics[field.replace('heldout', 'local/own')]
    np.testing.assert_allclose(found, number, rtol=1e-6)


def test_personal_without_any_text_is_an_error():
  with pytest.raises(Error, match='evals/personal: there is no text'):
    evals.personal(fake_loss)(BASE, STACK, IDS, [], [], KEY)
