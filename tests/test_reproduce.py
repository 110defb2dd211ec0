"""Published trends: the arithmetic of verdicts, and that every trend runs."""

import importlib
import importlib.machinery
import importlib.util
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts'
NAMES = ('fedex', 'ranks', 'flora', 'fedsa', 'ffa', 'flasc', 'collapse')
RESULTS = SCRIPTS / 'reproductions' / 'results.json'


@pytest.fixture(scope='module', autouse=True)
def found():
  sys.path.insert(0, str(SCRIPTS))
  yield
  sys.path.remove(str(SCRIPTS))


def room(name) -> Any:
  return importlib.import_module(f'reproductions.{name}')


@pytest.fixture(scope='module')
def lab(found):
  return room('bench').bench(smoke=True, say=lambda sentence: None)


# ---------------------------------------------------------------- verdicts --


def test_the_interval_is_students():
  found = room('verdicts').interval([1.0, 2.0, 3.0, 4.0, 5.0])
  half = 2.776445 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom, s^2 = 2.5
  assert np.allclose(found, [3.0, 3.0 - half, 3.0 + half], atol=1e-5)


@pytest.mark.parametrize(
  'values, bound, word',
  [
    ([1.0, 1.1, 0.9], 0.0, 'agrees'),
    ([1.0, 1.1, 0.9], 2.0, 'contradicts'),
    ([1.0, 1.1, 0.9], 1.05, 'cannot tell'),
    ([5.0], 0.0, 'cannot tell'),
    ([1.0, math.nan, 0.9], 0.0, 'cannot tell'),
  ],
)
def test_a_claim_is_judged_by_its_interval(values, bound, word):
  verdicts = room('verdicts')
  assert verdicts.judge(verdicts.Claim('a > b', values, bound)) == word


def test_one_contradiction_contradicts_and_all_must_agree():
  overall = room('verdicts').overall
  assert overall(['agrees', 'agrees']) == 'agrees'
  assert overall(['agrees', 'cannot tell']) == 'cannot tell'
  assert overall(['agrees', 'cannot tell', 'contradicts']) == 'contradicts'
  assert overall([]) == 'cannot tell'


def test_checks_of_our_own_do_not_decide():
  verdicts = room('verdicts')
  yes = verdicts.Claim('published', [1.0, 1.1, 0.9])
  no = verdicts.Claim('ours', [-1.0, -1.1, -0.9], published=False)
  told = verdicts.told(verdicts.Outcome([yes, no], {}, {}))
  assert told['verdict'] == 'agrees'
  assert [c['verdict'] for c in told['claims']] == ['agrees', 'contradicts']
  assert 'contradicts: ours (a check of ours)' in verdicts.sentences(told)


def test_a_slope_is_the_exponent():
  x = np.array([1.0, 2.0, 5.0])
  assert math.isclose(room('verdicts').slope(x, 3 * x**-0.7), -0.7)


def test_results_follow_from_their_numbers():
  verdicts = room('verdicts')
  for name, found in json.loads(RESULTS.read_text()).items():
    assert name in NAMES and len(found['seeds']) >= 3
    claims = [
      verdicts.Claim(c['claim'], c['values'], c['bound'], c['published'])
      for c in found['claims']
    ]
    again = verdicts.told(verdicts.Outcome(claims, {}, {}))
    assert again['verdict'] == found['verdict']
    for new, old in zip(again['claims'], found['claims']):
      assert new['verdict'] == old['verdict']
      assert len(old['values']) == len(found['seeds'])
      assert np.allclose(new['mean'], old['mean'], rtol=1e-3, atol=1e-9)
    figure = RESULTS.parent / 'figures' / f'{name}.png'
    assert figure.stat().st_size < 60_000


# ------------------------------------------------------------------- parts --


def test_a_shortened_cohort_is_one_of_fewer_steps():
  bench = room('bench')
  people = bench.people(0, 3)
  many = bench.assembler(people, 0, steps=4)(1)
  few = bench.assembler(people, 0, steps=2)(1)
  short = bench.shortened(many, 2)
  for x, y in zip(jax.tree.leaves(short.batches), jax.tree.leaves(few.batches)):
    assert (x[:, :2] == y).all() and not x[:, 2:].any()


def test_no_text_is_both_in_the_pre_training_and_in_the_trends():
  manual = room('base').manual()
  texts = [r.response or '' for r in fl.data.sources.packaged()]
  long = [text for text in texts if len(text) > 40]
  assert len(long) > 1000
  assert len(manual) > 100_000
  assert not any(text in manual for text in long)


def test_noise_is_on_what_travels_after_clipping():
  codec = room('ffa').noisy(clip=2.0, noise=0.5)
  update = {'a': None, 'b': jnp.full((200, 50), 3.0)}
  masks = fl.types.Masks(None, {'a': None, 'b': jnp.bool_(True)})
  message, _ = codec.encode(
    update, masks, (), fl.types.Context(key=jax.random.key(0))
  )
  assert message['a'] is None
  clipped = 2.0 / math.sqrt(200 * 50)  # each entry of an update of norm 2
  b = np.asarray(message['b'])
  assert abs(b.std() - 0.5) < 0.02
  assert abs(b.mean() - clipped) < 5 * 0.5 / math.sqrt(b.size)


def test_the_error_of_the_product_is_linear_where_a_is_frozen():
  ffa = room('ffa')
  ones = fl.nodes.LowRank(jnp.ones((1, 6, 2)), jnp.ones((1, 2, 5)), jnp.ones(1))
  params = {'q': ones}
  assert abs(ffa.exponent(params, 3.0, 0, 'ffa') - 1) < 1e-5
  assert 1.3 < ffa.exponent(params, 3.0, 0, 'lora') < 2


def test_alike_is_the_mean_cosine_over_pairs():
  x = np.random.default_rng(0).normal(size=(3, 2, 4, 5))
  flat = x.reshape(3, 2, -1)
  flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
  pairs = [(0, 1), (0, 2), (1, 2)]
  wanted = np.mean([np.sum(flat[i] * flat[j], -1) for i, j in pairs], 0)
  assert np.allclose(room('fedsa').pairwise(jnp.asarray(x)), wanted, atol=1e-5)


# ------------------------------------------------------------------ trends --


@pytest.mark.parametrize('name', NAMES)
def test_every_trend_runs_on_a_random_model(name, lab, tmp_path):
  pytest.importorskip('matplotlib')
  trend, verdicts = room(name), room('verdicts')
  found = verdicts.told(trend.run(lab, range(2)))
  found = json.loads(json.dumps(found))  # it goes into a file
  assert found['verdict'] in ('agrees', 'contradicts', 'cannot tell')
  values = [v for claim in found['claims'] for v in claim['values']]
  assert np.isfinite(values).all()
  path = tmp_path / f'{name}.png'
  room('figures').save(path, trend, found)
  assert path.read_bytes()[:4] == b'\x89PNG'
