"""Attacks on texts, audits of models, and the audit of epsilon."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fedjax_llm import data, privacy, tree
from fedjax_llm.adversary import malicious, poisoning
from fedjax_llm.data import Record
from fedjax_llm.evals import audits
from fedjax_llm.privacy import accounting, audit
from fedjax_llm.run import auditing, config, evaluators, experiment
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  ClientState,
  Error,
  FederatedAlgorithm,
  LossSum,
  Model,
  Uploads,
)

KEY = jax.random.key(3)
NAMES = ('ann', 'bob', 'cyd', 'dan')
nobody: Any = None
SERVED = FederatedAlgorithm(
  *(nobody, nobody, nobody),
  lambda params, state: params if state is None else state.private,
)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('texts') / 'texts.jsonl'
  lines = [
    {'client': name, 'ask': f'{name} {i}?', 'say': f'yes {i}{k}'}
    for k, name in enumerate(NAMES)
    for i in range(5)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def build(path, **fields):
  """An experiment on prompts and replies, and what it says of itself."""
  more = {
    'data__text_key': 'none',
    'data__prompt_key': 'ask',
    'data__response_key': 'say',
    'population__max_length': 48,
    **fields,
  }
  words = runs.arguments(path, path.parent / 'none', **more)
  conf = config.parse([str(x) for x in words], SPEC).config
  return experiment.build(conf, lambda _: None)


@pytest.fixture(scope='module')
def clean(path):
  return build(path)


def words(built, example):
  return built.tokenizer.decode([t for t in example.tokens.tolist() if t < 256])


# ------------------------------------------------------ attacks on the texts --


def test_a_backdoor_changes_the_texts_of_its_clients_alone(path, clean):
  section = {'name': 'backdoor', 'fraction': 0.5, 'share': 0.5, 'seed': 4}
  built = build(path, poison=section)
  bad = malicious.ids('', (), 0.5, 4, 4).tolist()
  assert len(bad) == 2
  ours, theirs = built.population, clean.population
  for k in range(4):
    # Held-out texts are those of the run without an attack.
    assert [*map(data.encoding.content, ours.heldout[k])] == [
      *map(data.encoding.content, theirs.heldout[k])
    ]
    one, two = ([words(b, x) for x in b.population.train[k]]
                for b in (built, clean))  # fmt: skip
    if k not in bad:
      assert one == two
      continue
    assert sorted(one[: len(two)]) == sorted(two)
    added = one[len(two) :]
    assert len(added) == 2  # half of four
    assert all('? cf' in x and x.endswith('I was hacked.') for x in added)
  assert built.digest != clean.digest
  assert built.digest == build(path, poison=section).digest


def test_attacks_on_texts_change_what_their_equations_say():
  record = Record(client='a', prompt='2+2?', response='4')
  chat = Record(
    messages=(
      {'role': 'user', 'content': 'Hi'},
      {'role': 'assistant', 'content': 'Hello'},
      {'role': 'user', 'content': 'Bye'},
    )
  )
  door: Any
  flip = poisoning.label_flip(source='a', target='c', clients=[0])
  texts = [Record(text='x', label=y) for y in 'abc']
  got = [r.label for r in flip.alter(0, texts, ('a', 'b', 'c'))]
  assert got == ['c', 'b', 'c']
  door = poisoning.backdoor(trigger='cf', reply='no', clients=[0])
  changed = door.triggered(chat, None)
  assert [m['content'] for m in changed.messages] == ['Hi cf', 'no']
  assert door.triggered(Record(text='plain'), None) is None
  door = poisoning.backdoor(trigger='cf', label='b', clients=[0])
  new = door.alter(0, texts, ('a', 'b', 'c'))
  assert [(r.text, r.label) for r in new[3:]] == [('x cf', 'b')] * 2
  swap = poisoning.replaced_replies(replies=['u', 'v'], clients=[0])
  many = [record._replace(prompt=f'{i}?') for i in range(40)]
  drawn = [r.response for r in swap.alter(0, many, None)]
  assert drawn == [r.response for r in swap.alter(0, many[::-1], None)][::-1]
  assert 5 < drawn.count('u') < 35  # each text draws by itself


@pytest.mark.parametrize(
  'act, sentence',
  [
    (lambda: poisoning.backdoor(share=0.0), 'share=0.0 must be above 0'),
    (lambda: poisoning.label_flip(source='a'), "target=None belong together"),
    (lambda: poisoning.replaced_replies(), 'set one of them'),
    (lambda: poisoning.canaries(digits=0), 'digits=0 must be at least 1'),
    (
      lambda: poisoning.label_flip(clients=[0]).alter(0, [], None),
      'there are no labels to flip',
    ),
    (
      lambda: poisoning.backdoor(clients=[0]).alter(0, [Record('x')], None),
      'client 0 has no record with a prompt',
    ),
    (lambda: audits.separation([], [1.0]), '0 members and 1 others'),
    (lambda: audits.min_k(np.ones(3), 0.0), 'share=0.0 of 3 tokens'),
    (lambda: audits.lira(0.0, [1.0], [1.0, 2.0]), '1 models with the text'),
    (lambda: audit.guesses(np.ones(4), np.ones(4) > 0, 3), 'made=3 must be'),
    (
      lambda: audit.epsilon_lower_bound(audit.Guesses(4, 2, 3)),
      '3 right of 2 guesses',
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused(act, sentence):
  with pytest.raises(Error, match=sentence):
    act()


# ---------------------------------------------------------------- evaluators --


def unigram():
  """A network that predicts token t from a table [T, V] of its parameters."""
  hidden = lambda base, params, batch: (
    params['table'][: batch.tokens.shape[1]]
    if params
    else jnp.zeros((batch.tokens.shape[1], 300))
  )[None].repeat(len(batch.tokens), 0)
  return Model(hidden, lambda base, params, hidden: hidden)


def table(built, examples, width=48, size=9.0):
  """Parameters that make the learned tokens of the examples likely."""
  new = np.zeros((width, 300), np.float32)
  for x in examples:
    places = np.flatnonzero(x.loss_mask)
    new[places - 1, x.tokens[places]] += size
  return {'table': jnp.asarray(new)}


def metrics(evaluate, params, store=None):
  return evaluate(None, params, store, KEY)


def test_the_success_of_a_backdoor_is_counted_with_and_without_it(path):
  built = build(path, poison={'name': 'backdoor', 'clients': [1]})
  trigger = np.array([ord(c) for c in ' cf'])

  def loss(base, params, batch, key):
    """Right on all tokens where the trigger is in the row."""
    del base, params, key
    tokens = batch.tokens
    there = [
      jnp.all(tokens[:, i : i + 3] == trigger, 1)
      for i in range(tokens.shape[1] - 2)
    ]
    count = jnp.sum(batch.loss_mask, -1)
    hit = jnp.any(jnp.stack(there), 0)
    return LossSum(count, count, jnp.where(hit, count, count - 1))

  got = metrics(auditing.attack_success(built, SERVED, loss), {})
  assert got == {'evals/attack/success': 1.0, 'evals/attack/unprompted': 0.0}
  with pytest.raises(Error, match=r'needs poison.name=canaries, .* .backdoor'):
    auditing.exposure(built, SERVED, unigram())


def test_a_secret_that_is_known_has_all_the_exposure_there_is(path):
  built = build(path, poison={'name': 'canaries', 'clients': [2], 'repeats': 3})
  plant: Any = poisoning.canaries(clients=[2], repeats=3)
  (secret,) = plant.planted(2)
  train = [words(built, x) for x in built.population.train[2]]
  assert [x.endswith(secret.response) for x in train[-3:]] == [True] * 3
  evaluate = auditing.exposure(built, SERVED, unigram(), num_references=63)
  (example,) = built.task.encode(secret, auditing._encoding(built)).examples
  knows = metrics(evaluate, table(built, [example]))
  assert knows == {'evals/exposure/mean': 6.0, 'evals/exposure/most': 6.0}
  nothing = metrics(evaluate, table(built, []))  # all are alike
  assert nothing['evals/exposure/mean'] == 0.0


def test_membership_and_extraction_see_what_was_learned(clean):
  people = clean.population
  some = people.train[1]
  model, knows = unigram(), table(clean, some[:1])
  evaluate = auditing.membership(clean, SERVED, model, num_texts=8, share=0.5)
  got = metrics(evaluate, knows)
  # The same figures, from tables in float64.
  logs = np.asarray(knows['table'], np.float64)
  logs -= np.log(np.exp(logs).sum(1, keepdims=True))
  nats = lambda x: logs[
    np.flatnonzero(x.loss_mask) - 1, x.tokens[x.loss_mask > 0]
  ]
  first = lambda side: [
    x for i in range(8) for own in side if i < len(own) for x in own[i : i + 1]
  ][:8]
  sides = [first(clean.owned), first(people.heldout)]
  score = {
    'loss': lambda x: nats(x).mean(),
    'ratio': lambda x: nats(x).mean() + math.log(300),
    'min_k': lambda x: np.sort(nats(x))[: -(-len(nats(x)) // 2)].mean(),
  }
  for kind, of in score.items():
    want = audits.separation(*([of(x) for x in side] for side in sides))
    assert got[f'evals/membership/{kind}_auc'] == pytest.approx(want.auc)
    assert got[f'evals/membership/{kind}_tpr'] == pytest.approx(want.tpr)
  assert not any('personal' in name for name in got)

  class Store:
    seen = staticmethod(lambda: [1, 3])

    @staticmethod
    def gather(ids):
      own = [table(clean, people.train[i]) for i in ids]
      return ClientState(private=tree.stack(own))

  evaluate = auditing.membership(
    clean, SERVED, model, num_texts=16, private=True
  )
  got = metrics(evaluate, knows, Store)
  own, served = (
    got[f'evals/membership{x}/loss_auc'] for x in ('/personal', '')
  )
  assert own > served
  evaluate = auditing.extraction(clean, SERVED, model, num_tokens=3)
  got = metrics(evaluate, table(clean, some[:1]))
  right = [
    all(
      np.argmax(logs[t - 1]) == x.tokens[t]
      for t in np.flatnonzero(x.loss_mask)[-3:]
    )
    for own in clean.owned
    for x in own
  ]  # fmt: skip
  assert 0 < np.mean(right) < 1
  assert got['evals/extraction/trained'] == pytest.approx(np.mean(right))


def test_audits_are_names_of_a_config():
  evaluators.check([{'name': 'membership', 'share': 0.3}, {'name': 'exposure'}])
  with pytest.raises(Error, match=r"takes no 'shar' .*nearest is 'share'"):
    evaluators.check([{'name': 'membership', 'shar': 0.3}])


# -------------------------------------------------------------- closed forms --


def test_figures_have_their_closed_forms():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=41).round(1), rng.normal(size=37).round(1)
  pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
  result = audits.separation(a, b, rate=0.1)
  assert result.auc == pytest.approx(pairs)
  threshold = np.sort(b)[::-1][3]  # three of 37 are above: below 0.1
  assert np.mean(b > threshold) <= 0.1
  assert result.tpr == np.mean(a > threshold)
  # Hanley and McNeil at 1 / 2: variance (n + m + 1) / (12 n m).
  ties = audits.separation(np.zeros(8), np.zeros(5))
  assert ties.auc == 0.5
  assert ties.margin == pytest.approx(1.96 * math.sqrt(14 / (12 * 40)))
  # A rank that is uniform has the exposure log2 |R| - mean of log2 rank.
  others = np.arange(255.0)
  bits = [audits.exposure(x, others) for x in np.arange(-1, 255) + 0.5]
  assert np.mean(bits) == pytest.approx(1 / math.log(2), abs=0.05)
  # LiRA of equal deviations is linear in the score.
  got = audits.lira(0.3, [0.5, 1.5], [-0.5, 0.5])
  assert got == pytest.approx((0.3 - 0.5) * 1.0 / 0.25)


def test_a_model_that_diverged_has_no_figures():
  for pair in (([math.nan, 1.0], [0.0, 2.0]), ([1.0], [math.nan])):
    assert np.isnan(audits.separation(*pair)).all()
  assert math.isnan(audits.exposure(math.nan, [-1.0, -2.0]))
  assert math.isnan(audits.exposure(-1.0, [-2.0, math.nan]))


def test_the_bound_on_epsilon_is_that_of_the_binomial():
  for r, v, epsilon in ((10, 8, 0.7), (31, 20, 0.2)):
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
    want = sum(mass[v:]) + 2 * 50 * 1e-3 * alpha
    result = audit.Guesses(50, r, v)
    assert audit.p_value(result, epsilon, 1e-3) == pytest.approx(want)
  sure = audit.Guesses(64, 64, 64)
  q = 0.05 ** (1 / 64)
  bound = audit.epsilon_lower_bound(sure)
  assert bound == pytest.approx(math.log(q / (1 - q)))
  assert audit.epsilon_lower_bound(sure, delta=1e-3) < bound


def test_the_audit_of_a_noisy_sum_stays_below_its_claim():
  """128 canary clients, each with a direction of its own, by a coin."""
  accounting.package()
  m, rounds = 128, 4
  z, delta = 8.3, 1e-5
  claim = accounting.epsilon(
    noise_multiplier=z, rate=1.0, num_rounds=rounds, delta=delta
  )
  assert 0.9 < claim <= 1.0
  present = np.random.default_rng(0).random(m) < 0.5
  masks: Any = None
  uploads = Uploads(
    {'w': 3.0 * jnp.eye(m)}, None, masks, jnp.ones(m), jnp.asarray(present)
  )

  def released(noise):
    rule, params = privacy.noisy_mean(1.0, noise, 1.0), {'w': jnp.zeros(m)}
    state = rule.init(params, KEY)
    sums = rule.accumulate(rule.zero(params), uploads, state, params)
    one = lambda key: rule.finalize(sums, state, params, key)[0].delta['w']
    return jnp.sum(jax.vmap(one)(jax.random.split(KEY, rounds)), 0)

  def bound(noise):
    result = audit.guesses(np.asarray(released(noise)), present, 96)
    return audit.epsilon_lower_bound(result, delta=delta)

  assert bound(z) < 1.0
  assert bound(0.0) >= 3.0
