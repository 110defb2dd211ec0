"""Losses on pairs and GRPO against NumPy float64, and their identities."""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_alignment as ref
import tiny

from fedjax_llm import data, local, models, recipes
from fedjax_llm.data import collate, encoding
from fedjax_llm.local import rewards
from fedjax_llm.local.grpo import Rollouts, advantages, clipped, rolled, texts
from fedjax_llm.local.preference import Scores
from fedjax_llm.run import preferences, rewarded, tasks
from fedjax_llm.types import (
  Batch,
  Context,
  Error,
  Example,
  Masks,
  Pair,
  Pairs,
  Population,
)

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'trl_losses.json'

# ------------------------------------------------------------------- terms --


def rows(num=5, seed=0):
  """Log-probabilities of replies of several lengths, as dicts of floats."""
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(num):
    nc, nr = rng.integers(2, 9, 2)
    draw = lambda n: -float(rng.uniform(0.2, 2.0, n).sum())
    one = {'c': draw(nc), 'rc': draw(nc), 'r': draw(nr), 'rr': draw(nr)}
    one |= {'m': draw(nc), 'rm': draw(nc) - 2}
    out.append({**one, 'nc': int(nc), 'nr': int(nr)})
  return out


def scores(rows):
  of = lambda name: jnp.asarray([r[name] for r in rows], jnp.float32)
  first = map(of, ('c', 'r', 'rc', 'rr', 'nc', 'nr'))
  last: Any = (jnp.ones(len(rows)), *map(of, ('m', 'rm')))
  return Scores(*first, *last)


TERMS = {
  'dpo': {'beta': 0.3},
  'ipo': {'beta': 0.4},
  'kto': {'beta': 0.3},
  'orpo': {'beta': 0.5},
  'simpo': {'beta': 2.0, 'gamma': 0.7, 'nll': 0.2},
}


@pytest.mark.parametrize('name', TERMS)
def test_a_term_is_that_of_its_paper(name):
  value = getattr(local, name)(**TERMS[name]).value(scores(rows()))
  want = getattr(ref, name)(rows(), **TERMS[name])
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for other in set(TERMS) - {name}:
    near = getattr(local, other)(beta=TERMS[name]['beta'])
    assert not np.allclose(near.value(scores(rows())), want, rtol=1e-2)


def test_ktos_weights_and_its_bound():
  value = local.kto(0.3, 2.0, 0.5).value(scores(rows()))
  np.testing.assert_allclose(value, ref.kto(rows(), 0.3, 2.0, 0.5), rtol=1e-5)
  below = [{**r, 'm': r['rm'] - 9} for r in rows()]  # z is not below 0
  value = local.kto(0.3).value(scores(below))
  np.testing.assert_allclose(value, ref.kto(below, 0.3), rtol=1e-5)
  assert not np.allclose(value, local.kto(0.3).value(scores(rows())), rtol=1e-3)


@pytest.mark.parametrize('name', ['orpo', 'simpo'])
def test_a_term_is_that_of_trl(name):
  golden = json.loads(GOLDEN.read_text())
  term = getattr(local, name)(**golden[name]['settings'])
  value = term.value(scores(golden['rows']))
  np.testing.assert_allclose(value, golden[name]['losses'], rtol=2e-5)
  of = lambda c: jnp.sum(term.value(scores(golden['rows'])._replace(chosen=c)))
  slope = jax.grad(of)(scores(golden['rows']).chosen)
  np.testing.assert_allclose(slope, golden[name]['slopes'], rtol=2e-5)


@functools.cache
def trl():
  with np.load(GOLDEN.with_name('trl_trainers.npz')) as file:
    return dict(file)


@pytest.mark.parametrize('name', ['dpo', 'ipo', 'kto'])
def test_a_loss_and_its_gradient_are_those_of_trls_trainer(name):
  golden = {
    field.split('/')[1]: value
    for field, value in trl().items()
    if field.startswith(f'{name}/')
  }
  settings = {k: float(golden[k]) for k in ('beta',)}
  if name == 'kto':
    settings['undesirable_weight'] = float(golden['undesirable_weight'])
  term = getattr(local, name)(**settings)
  half = len(golden['mask']) // 2
  sizes = jnp.asarray(golden['mask'].sum(1), jnp.float32)
  first = jnp.asarray(golden['reference'].sum(1))
  other = {
    side: jnp.asarray(golden[side].sum(1))
    for side in ('mismatched', 'reference_mismatched')
    if side in golden
  }

  def loss(log_p):
    total = jnp.sum(log_p * golden['mask'], 1)
    sums = Scores(
      *(total[:half], total[half:], first[:half], first[half:]),
      *(sizes[:half], sizes[half:], jnp.ones(half)),
      **other,
    )
    return jnp.mean(term.value(sums))

  value, slope = jax.value_and_grad(loss)(jnp.asarray(golden['log_p']))
  np.testing.assert_allclose(value, golden['loss'], rtol=1e-5)
  np.testing.assert_allclose(slope, golden['slope'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('reduction', ['grpo', 'bnpo', 'dr_grpo'])
def test_grpos_loss_and_its_gradient_are_those_of_trl(reduction):
  golden = {
    field.split('/')[1]: jnp.asarray(value)
    for field, value in trl().items()
    if field.startswith(f'{reduction}/')
  }
  empty: Any = None
  rollouts = Rollouts(
    empty,
    starts=empty,
    reply=jnp.where(golden['mask'], 5, -1),
    old=golden['old'],
    reference=golden['reference'],
    advantage=golden['advantage'],
    reward=jnp.zeros(len(golden['mask'])),
  )

  def loss(log_p):
    settings: Any = dict(clip=0.2, clip_high=0.28, reduction=reduction)
    sums = clipped(log_p, rollouts, kl=0.04, **settings)
    return sums.total / sums.count

  value, slope = jax.value_and_grad(loss)(golden['log_p'])
  np.testing.assert_allclose(value, golden['loss'], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(slope, golden['slope'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
def test_advantages_are_those_of_trl(scale):
  value = advantages(jnp.asarray(trl()['reward']), 4, scale)
  want = trl()[f'advantages/{scale}']
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'settings', 'message'),
  [
    ('dpo', {'beta': 0.0}, r'^dpo: beta is 0.0; it must be above 0[.]$'),
    ('kto', {'desirable_weight': -1.0}, r'^kto: desirable_weight is -1.0; it'),
    ('simpo', {'gamma': -0.5}, r'^simpo: gamma is -0.5; it must be 0 or more'),
  ],
)
def test_a_setting_out_of_range_is_named(name, settings, message):
  with pytest.raises(Error, match=message):
    getattr(local, name)(**settings)


# ------------------------------------------------------------------- pairs --


@functools.cache
def nats():
  return jax.jit(local.causal_lm(tiny.loaded().model, per_row=True))


def text(tokens, learned):
  tokens = np.asarray(tokens, np.int32)
  return Example(tokens, np.arange(len(tokens)) >= learned)


def people():
  pairs = [
    Pair(text([5, 6, 7, 8], 2), text([5, 6, 9], 2)),
    Pair(text([4, 8, 8], 1), text([4, 3, 2, 9, 9], 1)),
    Pair(text([2, 7, 6, 5, 4, 3], 3), text([2, 7, 6, 1], 3)),
    Pair(text([3, 7, 2], 1), text([3, 1, 1], 1)),
  ]
  return Population(
    ('ann', 'bob'), (tuple(pairs[:2]), tuple(pairs[2:])), ((), ())
  )


def test_references_are_those_of_the_start_and_not_of_the_base():
  """With a warm start, and where its change is written into the base later."""
  start = tiny.lora()
  loaded = tiny.loaded()
  out = preferences.with_mismatched(loaded, people(), start=start)
  for own in out.train:
    for i, pair in enumerate(own):
      other = own[(i + 1) % len(own)]
      for side in ('chosen', 'rejected', 'mismatched'):
        example = getattr(pair, side)
        batch = collate.texts([example], 8)([[example]])
        want = -nats()(loaded.base, start, batch, tiny.KEY).total[0]
        plain = -nats()(loaded.base, {}, batch, tiny.KEY).total[0]
        value = getattr(pair, f'reference_{side}')
        assert value == pytest.approx(float(want), rel=1e-5)
        assert abs(value - float(plain)) > 1e-3
      reply = lambda x: x.tokens[x.loss_mask]
      mine: Any = pair.mismatched
      cut = np.argmax(pair.chosen.loss_mask)
      np.testing.assert_array_equal(mine.tokens[:cut], pair.chosen.tokens[:cut])
      np.testing.assert_array_equal(
        reply(mine), reply(other.chosen)[: len(reply(mine))]
      )


@pytest.mark.parametrize('name', TERMS)
def test_a_loss_of_pairs_is_its_term_of_the_networks_log_probabilities(name):
  loaded, params = tiny.loaded(), tiny.lora(seed=4)
  ready = preferences.with_mismatched(loaded, people())
  pairs = [pair for own in ready.train for pair in own]
  batch = collate.pairs(pairs, 8)([*([pair] for pair in pairs), []])
  loss = local.preference(
    loaded.model, getattr(local, name)(**TERMS[name]), per_row=True
  )
  sums = loss(loaded.base, params, batch, tiny.KEY)
  table = []
  for i, pair in enumerate(pairs):
    one = {'nc': int(pair.chosen.loss_mask.sum())}
    one['nr'] = int(pair.rejected.loss_mask.sum())
    sides = {'c': 'chosen', 'r': 'rejected', 'm': 'mismatched'}
    for short, side in sides.items():
      of = lambda p, side=side, i=i: (
        -float(nats()(loaded.base, p, getattr(batch, side), None).total[i])
      )
      one |= {short: of(params), f'r{short}': of({})}
    table.append(one)
  want = getattr(ref, name)(table, **TERMS[name])
  np.testing.assert_allclose(sums.total, [*want, 0], rtol=1e-4, atol=1e-6)
  assert sums.count.tolist() == [1, 1, 1, 1, 0]
  better = {
    True: [r['c'] - r['rc'] > r['r'] - r['rr'] for r in table],
    False: [r['c'] / r['nc'] > r['r'] / r['nr'] for r in table],
  }[getattr(local, name)().referenced]
  assert sums.correct.tolist() == [*map(float, better), 0]


def test_at_the_start_dpo_is_log_2_and_falls():
  loaded, start = tiny.loaded(), tiny.lora()
  ready = tasks.with_references(loaded, people(), start=start)
  pairs = [pair for own in ready.train for pair in own]
  batch = collate.pairs(pairs, 8)([[pair] for pair in pairs])
  loss = local.preference(loaded.model, local.dpo(0.5))
  value = jax.jit(
    jax.value_and_grad(lambda p: loss(loaded.base, p, batch, tiny.KEY).total)
  )
  first, slope = value(start)
  assert float(first) / len(pairs) == pytest.approx(math.log(2), abs=1e-5)
  later = jax.tree.map(lambda p, g: p - 0.05 * g, start, slope)
  assert value(later)[0] < first


def test_a_loss_of_pairs_refuses_other_batches():
  loss = local.preference(tiny.loaded().model, local.dpo())
  with pytest.raises(Error, match=r'^a preference loss reads Pairs, not B'):
    loss(tiny.base(), {}, tiny.texts(2), tiny.KEY)
  pairs = [pair for own in people().train for pair in own]
  batch = collate.pairs(pairs, 8)([[pair] for pair in pairs])
  loss = local.preference(tiny.loaded().model, local.kto())
  with pytest.raises(Error, match='needs replies to other prompts'):
    loss(tiny.base(), {}, batch, tiny.KEY)


def test_a_single_held_out_pair_has_a_reply_to_train_on_beside_it():
  everybody = people()
  first, other = everybody.train[0]
  alone = everybody._replace(
    names=('ann',), train=((first,),), heldout=((other,),)
  )
  (ready,) = preferences.with_mismatched(tiny.loaded(), alone).train[0]
  mine: Any = ready.mismatched
  assert mine.tokens.tolist() == [5, 6, 8, 8]  # of `other`, not its own


def test_a_client_of_a_single_pair_is_refused_by_kto():
  alone = people()._replace(
    names=('ann',), train=(people().train[0][:1],), heldout=((),)
  )
  message = '^task.name=kto compares .* set population.min_examples=2[.]$'
  with pytest.raises(Error, match=message):
    preferences.with_mismatched(tiny.loaded(), alone)


def test_pairs_with_mismatched_replies_count_their_places():
  ready: Any = preferences.mismatched(people().train[0], 8)
  batch = collate.pairs(ready, 8)([[pair] for pair in ready])
  assert isinstance(batch, Pairs) and batch.places() == 3 * 2 * 8
  assert batch.used() == sum(
    len(x.tokens) for p in ready for x in (p.chosen, p.rejected, p.mismatched)
  )


# ----------------------------------------------------------------- records --


def source(folder, *lines, **keys):
  file = folder / 'pairs.jsonl'
  file.write_text('\n'.join(map(json.dumps, lines)))
  return data.preferences.preferences(str(file), client_key=None, **keys)


def test_pairs_in_the_two_forms_of_the_hub_are_the_same_examples(tmp_path):
  turn = lambda role, content: {'role': role, 'content': content}
  plain = {'prompt': 'Hi', 'chosen': 'Ho', 'rejected': 'Hm'}
  whole = {
    side: [turn('user', 'Hi'), turn('assistant', plain[side])]
    for side in ('chosen', 'rejected')
  }
  how = encoding.Encoding(data.tokenizers.bytes(), 'alpaca', 512)
  (one,), (two,) = (
    preferences.encode(record, how).examples
    for record in source(tmp_path, plain, whole)
  )
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(x, y)
  assert how.tokenizer.decode(one.rejected.tokens[one.rejected.loss_mask]) == (
    'Hm'
  )


def test_only_the_last_turn_of_a_chat_is_learned(tmp_path):
  turn = lambda role, content: {'role': role, 'content': content}
  chat = [turn('user', 'a'), turn('assistant', 'b'), turn('user', 'c')]
  (record,) = source(
    tmp_path, {'prompt': chat, 'chosen': 'Yes', 'rejected': 'No'}
  )
  how = encoding.Encoding(data.tokenizers.bytes(), 'alpaca', 512)
  (pair,) = preferences.encode(record, how).examples
  for side, reply in ((pair.chosen, 'Yes'), (pair.rejected, 'No')):
    assert how.tokenizer.decode(side.tokens[side.loss_mask]) == reply


GOOD = {'prompt': 'Hi', 'chosen': 'Ho', 'rejected': 'Hm'}


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (
      {'prompt': 'Hi', 'chosen': 'Ho', 'worse': 'Hm'},
      r"pairs.jsonl:2: there is no 'rejected'; there is 'prompt', 'chosen', "
      "'worse'[.]$",
    ),
    ({**GOOD, 'chosen': 3}, r"jsonl:2: 'chosen' is 3, but must be a string[.]"),
    (
      {**GOOD, 'rejected': 'Ho'},
      r"jsonl:2: 'chosen' and 'rejected' are the ",
    ),
    (
      {
        'chosen': [{'role': 'user', 'content': 'Hi'}],
        'rejected': [{'role': 'user', 'content': 'Ha'}],
      },
      r"jsonl:2: 'chosen' ends with a turn of 'user', not of 'assistant'[.]$",
    ),
  ],
)
def test_a_wrong_pair_is_one_sentence_with_its_line(tmp_path, line, message):
  with pytest.raises(Error, match=message):
    source(tmp_path, GOOD, line)


def test_a_record_without_two_replies_is_refused():
  record = data.sources.Record(prompt='Hi', response='Ho', where='a.jsonl:7')
  with pytest.raises(Error, match=r'^a.jsonl:7: chosen is missing: tasks of '):
    preferences.encode(record, encoding.Encoding(data.tokenizers.bytes()))


def test_contrasted_replies_are_of_other_clients_in_any_order():
  records = data.preferences.contrasted()
  own = {(r.client, r.prompt): r.response for r in data.sources.packaged()}
  said = {}
  for record in data.sources.packaged():
    said.setdefault(record.response, set()).add(record.client)
  assert len(records) == len(data.sources.packaged())
  for record in records[:200]:
    assert record.chosen != record.rejected
    assert said[record.rejected] - {record.client}
  assert records[0].chosen == own[records[0].client, records[0].prompt]


# -------------------------------------------------------------------- GRPO --

REWARD = [1.0, 0.0, 0.0, 1.1, 0.0, 0.0, 0.1, 0.1]


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
def test_advantages_are_those_of_the_paper(scale):
  value = advantages(jnp.array(REWARD), 4, scale)
  want = ref.advantages(REWARD, 4, scale)
  np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5)
  assert abs(float(value[:4].sum())) < 1e-4
  # Prompts of padding change nothing.
  real = jnp.arange(12) < 8
  padded = advantages(jnp.array([*REWARD, *[0.0] * 4]), 4, scale, real=real)
  np.testing.assert_allclose(padded, [*want, *[0.0] * 4], rtol=1e-4, atol=1e-5)


def rollouts(seed=0, sizes=(3, 1, 4, 2)):
  rng = np.random.default_rng(seed)
  num = max(sizes)
  shape = (len(sizes), num)
  inside = np.arange(num) < np.array(sizes)[:, None]
  old, new, first = (-rng.uniform(0.1, 2.0, shape) for _ in range(3))
  new = old + rng.normal(size=shape) * 0.4
  return new, Rollouts(
    text=tiny.texts(len(sizes)),
    starts=np.ones(len(sizes), np.int32),
    reply=np.where(inside, 3, -1).astype(np.int32),
    old=old.astype(np.float32),
    reference=first.astype(np.float32),
    advantage=np.array([1.0, -0.5, 0.3, -1.2], np.float32),
    reward=np.array([1.0, 0, 0, 1], np.float32),
  )


@pytest.mark.parametrize('reduction', ['grpo', 'bnpo', 'dr_grpo'])
def test_the_clipped_loss_is_that_of_the_paper(reduction):
  new, sample = rollouts()
  how = {'low': 0.2, 'high': 0.3, 'kl': 0.05, 'reduction': reduction}
  parts = (new, sample.old, sample.reference, sample.advantage)
  of = lambda **more: ref.grpo(*parts, (3, 1, 4, 2), **{**how, **more})
  sums = clipped(
    jnp.asarray(new, jnp.float32),
    sample,
    clip=0.2,
    clip_high=0.3,
    kl=0.05,
    reduction=reduction,
  )
  value = float(sums.total / sums.count)
  assert value == pytest.approx(of(), rel=1e-5)
  neighbours = [
    of(kl=0.0),
    of(high=0.2),
    of(low=9.0, high=9.0),
    *(of(reduction=x) for x in ('grpo', 'bnpo', 'dr_grpo') if x != reduction),
  ]
  assert min(abs(value - x) for x in neighbours) > 1e-4


def test_where_nothing_has_changed_the_loss_is_zero_and_its_gradient_is_not():
  _, sample = rollouts()
  gain = ref.advantages([1.0, 0, 0, 1], 2)
  sample = sample._replace(advantage=gain.astype(np.float32))
  of = lambda new: clipped(new, sample).total
  value, slope = jax.value_and_grad(of)(jnp.asarray(sample.old))
  assert abs(float(value)) < 1e-5
  inside = sample.reply >= 0
  want = -gain[:, None] / inside.sum(1, keepdims=True) * inside
  np.testing.assert_allclose(slope, want, rtol=1e-5)


def _right(token):
  return (token >= 0) & (token < 10) & (token != 2)


@functools.cache
def sampled():
  loaded = tiny.loaded()
  # A reply is right if it begins with one of the tokens 0 to 9.
  first = lambda replies: _right(replies.tokens[:, 0]).astype(jnp.float32)
  sample = models.sampler(loaded, max_new_tokens=3, stops=(2,))
  return loaded, local.Sampled(loaded.model, sample, first, (2,))


def asked(steps=2, num=2):
  tokens = np.zeros((steps, num, 5), np.int32)
  tokens[..., :4] = [[7, 8, 3, 2], [9, 3, 2, 0]]
  mask = np.zeros((steps, num, 5), bool)
  mask[:, 0, 2:4] = mask[:, 1, 1:3] = True
  here = (tokens > 0).astype(np.int32)
  return Batch(tokens, mask, here, np.arange(5) * here)


def test_replies_are_laid_behind_their_prompts_and_scored():
  loaded, loss = sampled()
  batch = jax.tree.map(lambda x: x[0], asked())
  out = jax.jit(
    lambda key: rolled(loss, loaded.base, {}, batch, key, group_size=4)
  )(tiny.KEY)
  assert out.starts.tolist() == [2] * 4 + [1] * 4
  for i in range(8):
    start, reply = int(out.starts[i]), np.asarray(out.reply[i])
    reply = reply[reply >= 0]
    text = np.asarray(out.text.tokens[i])
    prompt = batch.tokens[i // 4][:start]
    np.testing.assert_array_equal(text[: start + len(reply)], [*prompt, *reply])
    assert 2 not in reply[:-1] and (len(reply) == 3 or reply[-1] == 2)
    assert float(out.reward[i]) == _right(reply[0])
    # The old log-probabilities are those of the text, token by token.
    whole = Example(text[: start + len(reply)], np.arange(len(text)) >= start)
    whole = whole._replace(loss_mask=whole.loss_mask[: len(whole.tokens)])
    sums = nats()(loaded.base, {}, collate.texts([whole], 8)([[whole]]), None)
    old = np.asarray(out.old[i])
    assert -old.sum() == pytest.approx(float(sums.total[0]), rel=1e-4)
  np.testing.assert_array_equal(out.old, out.reference)


def test_grpo_makes_rewarded_replies_likelier():
  loaded, loss = sampled()
  update = local.grpo(
    loss, local.optimizer('sgd', 2.0), group_size=16, num_iterations=2, kl=0.01
  )
  params = {
    'lm_head': tiny.lora('lm_head')['lm_head'],
  }
  masks = Masks(*[jax.tree.map(lambda x: jnp.bool_(True), params)] * 2)
  out = jax.jit(
    lambda params: update.run(
      *(loaded.base, params, (), asked(), masks),
      Context(key=tiny.KEY),
    )
  )(params)
  new = jax.tree.map(lambda p, u: p + u, params, out.update)
  right = np.flatnonzero(_right(np.arange(tiny.V)))[:, None]  # [M, 1]
  prompt = np.broadcast_to([7, 8], (len(right), 2))
  batch = texts(prompt, np.full(len(right), 2), right)
  before, after = (
    float(jnp.exp(-nats()(loaded.base, p, batch, tiny.KEY).total).sum())
    for p in (params, new)
  )
  assert after > before + 0.01
  # Of the prompts' texts: 4 and 3 tokens in each of two steps.
  assert float(out.work.used) == 14 and int(out.work.turns) == 2
  assert int(out.work.steps) == 4 and 0 < float(out.metrics['reward']) < 1
  assert 0 < float(out.metrics['split_groups']) <= 1


def test_held_out_replies_are_greedy_and_scored():
  loaded, loss = sampled()
  batch = jax.tree.map(lambda x: x[0], asked())
  greedy = models.generate(
    *(loaded, loaded.base, {}, [[7, 8], [9]]), max_new_tokens=3, eos_id=2
  )
  right = [float(_right(reply[0])) for reply in greedy]
  sums = loss(loaded.base, {}, batch, tiny.KEY)
  assert tuple(map(float, sums)) == (-sum(right), 2.0, sum(right))


def test_rules_read_the_answer_after_the_last_marker():
  replies = rewards.Replies(
    tokens=jnp.array([[9, 4, 9, 7], [9, 7, -1, -1], [7, -1, -1, -1]]),
    answer=jnp.array([[5, 9, 7]] * 3),
    ended=jnp.array([True, True, False]),
  )
  both: Any = rewards.weighted(
    [(8.0, rewards.exact([9])), (1.0, rewards.ended([9]))]
  )
  assert both(replies).tolist() == [8.0, 9.0, 0.0]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'group_size': 1}, '^group_size is 1; a group needs 2 replies or more[.]'),
    ({'scale': 'std'}, "^scale is 'std'; it must be group, batch, none[.]$"),
    ({'num_iterations': 0}, '^num_iterations is 0; it must be at least 1[.]$'),
    ({'clip': 1.0}, '^clip is 1.0; it must be above 0 and below 1[.]$'),
    ({'clip_high': 0.0}, '^clip_high is 0.0; it must be above 0[.]$'),
    ({'kl': -0.1}, '^kl is -0.1; it must be 0 or more, and finite[.]$'),
  ],
)
def test_a_wrong_setting_of_grpo_is_named(settings, message):
  with pytest.raises(Error, match=message):
    recipes.fed_avg_grpo(sampled()[1], tiny.sgd(), **settings)


def test_the_task_of_rewards_compares_answers_as_text():
  loaded = models.random(vocab_size=259)
  task = rewarded.grpo(marker='#', form=0.5, max_new_tokens=4)
  records = [data.sources.Record(prompt='1+1', response='so #2')]
  how = encoding.Encoding(data.tokenizers.bytes(), 'plain')
  (example,) = task.encode(records[0], how).examples
  batch = task.collate([example], 16, 0)([[example]])
  loss: Any = task.loss(loaded)
  spell = lambda x: [*map(ord, x), 258, -1, -1][:5]
  reply = jnp.array([spell('#2'), spell('#3'), [*map(ord, 'a#2b'), -1]])
  three = jax.tree.map(lambda x: np.repeat(x, 3, 0), batch)
  assert loss.score(three, reply).tolist() == [1.5, 0.5, 0.0]
  with pytest.raises(Error, match=r'^replies are sampled to one prompt'):
    task.collate([example], 64, 0)([[example, example]])
