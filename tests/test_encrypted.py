"""Sums of partly encrypted messages: the chosen entries, bytes, the mean."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from fedjax_llm import tree
from fedjax_llm.deploy import halves, sealed
from fedjax_llm.types import Error
from fedjax_llm.uploads import encrypted


def clear(slots=7):
  """A scheme that encrypts nothing, with the interface of `ckks`."""
  pack = lambda xs: struct.pack(f'{len(xs)}d', *xs)
  read = lambda part: np.frombuffer(part)
  return encrypted.Scheme(
    keys=lambda: (b'secret', b'public'),
    encrypt=lambda public, xs: pack(xs),
    add=lambda public, parts: pack(np.sum([read(x) for x in parts], 0)),
    decrypt=lambda secret, part, num: read(part)[:num],
    num_bytes=lambda num: 8 * num,
    slots=slots,
    largest=100.0,
  )


def test_sensitivity_is_its_formula_and_chooses_the_largest():
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(3, 4)), rng.normal(size=(5, 3))
  y = np.eye(4)[rng.integers(0, 4, 5)]
  loss = lambda p, x, y: -jnp.sum(y * jax.nn.log_softmax(x @ p['w']))
  scores = encrypted.sensitivity(
    loss, {'w': jnp.float32(w)}, jnp.float32(x), jnp.float32(y)
  )['w']
  want = np.zeros((3, 4))
  for one in x:  # d/dy_j of x_d (p_c sum(y) - y_c): x_d (p_c - [c = j])
    p = np.exp(one @ w) / np.exp(one @ w).sum()
    for d in range(3):
      for c in range(4):
        slopes = [one[d] * (p[c] - (c == j)) for j in range(4)]
        want[d, c] += np.sqrt(np.sum(np.square(slopes))) / len(x)
  np.testing.assert_allclose(scores, want, rtol=1e-5)
  mask = encrypted.most_sensitive({'w': scores}, 0.25)
  assert sorted(np.flatnonzero(mask)) == sorted(np.argsort(want.ravel())[-3:])
  for share, num in ((0.0, 0), (1.0, 12)):
    assert encrypted.most_sensitive(scores, share).sum() == num
  with pytest.raises(Error, match=r'share=1.5 must be from 0 to 1'):
    encrypted.most_sensitive(scores, 1.5)


def test_the_mean_and_the_bytes_of_messages():
  rng, scheme = np.random.default_rng(1), clear()
  mask = rng.random(40) < 0.5
  secret, public = scheme.keys()
  updates, weights = rng.normal(size=(3, 40)) / 9, (1.0, 2.0, 0.5)
  sent = [
    encrypted.seal(u, mask, scheme, public, weight=w, largest=2.0)
    for u, w in zip(updates, weights)
  ]
  for message in sent:
    assert message.num_bytes == 8 * mask.sum() + 4 * (~mask).sum() + 4
    assert message.num_bytes == encrypted.most_bytes(mask, scheme)
    np.testing.assert_allclose(
      message.clear, message.weight * updates[sent.index(message)][~mask], 1e-6
    )
  total = encrypted.add(sent, scheme, public)
  mean = encrypted.unseal(total, mask, scheme, secret)
  np.testing.assert_allclose(mean, np.average(updates, 0, weights), atol=1e-7)
  full = encrypted.most_bytes(np.ones(4096, bool), encrypted.ckks())
  half = encrypted.most_bytes(np.arange(4096) < 2048, encrypted.ckks())
  assert (full, half) == (2 * 66048 + 4, 66048 + 4 * 2048 + 4)


def test_what_cannot_be_summed_is_one_sentence():
  scheme, mask = clear(), np.arange(4) < 2
  seal = lambda x, m=mask, **more: encrypted.seal(x, m, scheme, b'', **more)
  ones = np.ones(4)
  with pytest.raises(Error, match=r'is 3 times its weight, above largest=2'):
    seal(3 * ones, largest=2.0)
  with pytest.raises(Error, match='not finite'):
    seal(ones * np.nan)
  with pytest.raises(Error, match=r'the sum may reach 120, and the scheme'):
    encrypted.add([seal(ones, largest=60.0)] * 2, scheme, b'')
  with pytest.raises(Error, match='must encrypt the same entries'):
    encrypted.add([seal(ones), seal(ones, ~mask[:1].repeat(4))], scheme, b'')
  with pytest.raises(Error, match='another mask than that of the messages'):
    encrypted.unseal(seal(ones), np.ones(4, bool), scheme, b'')


def test_ckks_sums_what_is_encrypted_without_the_secret_key():
  pytest.importorskip('tenseal')
  scheme, rng = encrypted.ckks(), np.random.default_rng(2)
  secret, public = scheme.keys()
  mask = np.arange(5000) % 2 == 0  # two ciphertexts
  updates = rng.normal(size=(4, 5000)) / 10
  sent = [encrypted.seal(u, mask, scheme, public) for u in updates]
  most = encrypted.most_bytes(mask, scheme)
  assert all(0.8 * most < x.num_bytes <= most for x in sent)
  total = encrypted.add(sent, scheme, public)
  mean = encrypted.unseal(total, mask, scheme, secret)
  np.testing.assert_allclose(mean, updates.mean(0), atol=1e-6)
  with pytest.raises(ValueError, match='secret_key'):
    encrypted.unseal(total, mask, scheme, public)
  with pytest.raises(Error, match='degree=4096'):
    encrypted.ckks(bits=(60, 60)).keys()


def test_sealed_rounds_are_those_of_the_halves(tmp_path):
  """The mean of a round, by messages in the clear and by sealed ones."""
  data = runs.texts(tmp_path / 'texts.jsonl')
  words = runs.arguments(
    data, tmp_path / 'run', algorithm__name='fed_avg', num_rounds=1,
    clients__cohort_size=3, compilation_cache='none',
  )  # fmt: skip
  fields = [w.removeprefix('--config.') for w in words if '--config.' in w]
  opened = lambda *more: halves.open(
    f'{runs.ROOT}/configs/tiny.py:smoke', *fields, *more, say=lambda _: None
  )
  site = opened()
  ids = [int(i) for i in site.built.sampler(0).ids[:2]]
  message = halves.instruct(site, site.start)
  replies = {i: halves.train(site, message, i)[0] for i in ids}
  scores = tree.map_present(
    lambda x: np.abs(np.arange(x.size).reshape(x.shape[1:]) - 5.0),
    site.row.update,
  )
  plan = sealed.plan(site, scores, 0.3, clear(slots=64), largest=50.0)
  assert plan.mask.sum() == round(0.3 * len(plan.mask))
  secret, public = plan.scheme.keys()
  sent = [sealed.seal(plan, reply, public) for reply in replies.values()]
  assert sent[0].num_bytes == plan.most_bytes
  total = encrypted.add(sent, plan.scheme, public)
  new = sealed.collect(site, site.start, plan, total, secret)
  old = halves.collect(site, site.start, replies)
  tiny.close(new.params, old.params, 1e-5, 1e-6)
  assert tiny.differs(new.params, site.start.params, by=1e-5)
  with pytest.raises(Error, match='with the shapes of an update'):
    sealed.plan(site, {'w': np.ones(3)}, 0.3)
  with pytest.raises(Error, match='use one that is linear in the updates'):
    sealed.plan(opened('aggregator.name=median'), scores, 0.3)
