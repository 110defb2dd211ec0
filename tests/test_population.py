"""Partitions of records over clients, and populations."""

import json
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_llm import data
from fedjax_llm.data import population, tokenizers
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

BYTES = tokenizers.bytes()


# -------------------------------------------------------------- partition --


def make(n, num_labels=3, num_clients=4):
  return [
    Record(
      f'c{i % num_clients}',
      text=f'text {i}',
      label=f'l{i % num_labels}',
      where=f'f:{i}',
    )
    for i in range(n)
  ]


BUILDERS = {
  'natural': lambda n: data.natural(),
  'iid': lambda n: data.iid(n),
  'dirichlet': lambda n: data.dirichlet(n, alpha=0.1),
  'quantity': lambda n: data.quantity(n),
  'one_label': lambda n: data.one_label(n),
}


@pytest.mark.parametrize('name', BUILDERS)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(8, 60), st.integers(3, 8), st.integers(0, 99))
def test_a_partition_depends_on_the_seed_and_not_on_the_order_of_the_file(
  name, num_records, num_clients, seed
):
  records = make(num_records)
  split = BUILDERS[name](num_clients)
  names = split(records, seed)
  assert names == split(records, seed)
  order = np.random.default_rng(seed).permutation(num_records)
  moved = [records[i]._replace(where='elsewhere') for i in order]
  assert split(moved, seed) == [names[i] for i in order]
  if name != 'natural':  # every client holds something, as asked
    assert len(set(names)) == num_clients


@pytest.mark.parametrize('name', ['iid', 'dirichlet', 'quantity', 'one_label'])
def test_another_seed_is_another_partition(name):
  records, split = make(60), BUILDERS[name](6)
  assert split(records, 0) != split(records, 1)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(1, 50), st.integers(1, 50))
def test_iid_sizes_differ_by_at_most_one(num_records, num_clients):
  hypothesis.assume(num_clients <= num_records)
  sizes = Counter(data.iid(num_clients)(make(num_records), 0)).values()
  assert max(sizes) - min(sizes) <= 1


def mixes(names, records):
  """Share of each label in each client, [N, labels]."""
  table = Counter(zip(names, (r.label for r in records)))
  clients, labels = sorted(set(names)), sorted({r.label for r in records})
  counts = np.array([[table[c, label] for label in labels] for c in clients])
  return counts / counts.sum(1, keepdims=True)


def test_dirichlet_goes_from_one_label_a_client_to_iid():
  records = make(1200, num_labels=3)
  skew = [
    np.abs(mixes(data.dirichlet(10, alpha)(records, 0), records) - 1 / 3).mean()
    for alpha in (0.01, 1.0, 1e6)
  ]
  assert skew[0] > 0.4 > skew[1] > 0.05 > 0.01 > skew[2]  # one label: 4 / 9
  sizes = Counter(data.dirichlet(10, 1e6)(records, 0)).values()
  assert max(sizes) - min(sizes) <= 3  # one of each label


def test_dirichlet_shares_have_the_variance_of_their_distribution():
  """Var p = (1/N)(1 - 1/N) / (N alpha + 1); here over 200 labels."""
  records = make(200 * 100, num_labels=200)
  for alpha in (0.2, 2.0):
    names = data.dirichlet(4, alpha, min_size=0)(records, 3)
    table = Counter(zip(names, (r.label for r in records)))
    shares = [
      table[f'client000{c}', f'l{k}'] / 100
      for k in range(200)
      for c in range(4)
    ]
    expected = 0.25 * 0.75 / (4 * alpha + 1)
    np.testing.assert_allclose(np.var(shares), expected, rtol=0.15)


def test_dirichlet_lifts_small_clients_to_the_least_size():
  records = make(100, num_labels=2)
  for seed in range(5):
    small = data.dirichlet(20, 0.01, min_size=0)(records, seed)
    assert len(set(small)) < 20  # some would hold nothing
    sizes = Counter(data.dirichlet(20, 0.01, min_size=5)(records, seed))
    assert set(sizes.values()) == {5}
    sizes = Counter(data.dirichlet(20, 0.01, min_size=3)(records, seed))
    assert len(sizes) == 20 and min(sizes.values()) == 3


def test_quantity_is_log_normal_with_a_heavy_tail():
  records = make(20000)
  logs = {}
  for sigma in (0.0, 0.5, 1.0, 1.5):
    sizes = Counter(data.quantity(100, sigma)(records, 1)).values()
    assert sum(sizes) == 20000 and len(sizes) == 100
    logs[sigma] = np.std(np.log(list(sizes)))
    if sigma >= 1:
      assert np.mean(list(sizes)) > 1.25 * np.median(list(sizes))
  assert logs[0.0] == 0
  # The same draw, scaled: sigma is a slope (rounding aside).
  np.testing.assert_allclose(logs[0.5] / logs[1.0], 0.5, rtol=0.05)
  np.testing.assert_allclose(logs[1.0], 1.0, rtol=0.25)


def test_one_label_clients_are_pure_and_even():
  records = make(90, num_labels=2)[:60] + make(30, num_labels=1)
  for num_clients in (None, 2, 7):
    names = data.one_label(num_clients)(records, 0)
    assert (mixes(names, records).max(1) == 1).all()
  sizes = Counter(names)  # 60 of label l0, 30 of l1, over 7 clients
  assert sorted(sizes.values()) == [12, 12, 12, 12, 12, 15, 15]


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    (data.natural(), 'f:1: the partition natural needs the client'),
    (data.one_label(), 'f:2: the partition one_label needs the label'),
    (data.dirichlet(2), 'f:2: the partition dirichlet needs the label'),
    (data.iid(4), 'num_clients is 4, but must be between 1 and the 3 records'),
    (data.iid(0), 'num_clients is 0'),
    (data.quantity(4), 'num_clients is 4'),
    (data.quantity(2, sigma=-1.0), 'sigma is -1.0'),
  ],
)
def test_partitions_say_what_they_miss(split, message):
  records = [
    Record('a', text='x', label='u', where='f:0'),
    Record(None, text='y', label='v', where='f:1'),
    Record('b', text='z', where='f:2'),
  ]
  with pytest.raises(Error, match=message):
    split(records, 0)


def test_label_partitions_check_their_numbers():
  records = make(9)
  for split, message in [
    (data.dirichlet(2, alpha=0.0), 'alpha is 0.0'),
    (data.dirichlet(4, min_size=3), 'num_clients is 4, .* min_size=3'),
    (data.dirichlet(4, min_size=-1), 'min_size is -1'),
    (data.one_label(2), 'num_clients is 2, .* 3 labels and the 9 records'),
    (data.one_label(10), 'num_clients is 10'),
  ]:
    with pytest.raises(Error, match=message):
      split(records, 0)


def test_the_histogram_counts_every_client_once():
  names = ['a'] * 1 + ['b'] * 2 + ['c'] * 3 + ['d'] * 1024
  head, *bars = data.histogram(names).split('\n')
  assert head == (
    '4 clients, 1,030 records: min 1, median 2.5, max 1,024 a client'
  )
  assert len(bars) == 11  # 1, 2-3, 4-7, ..., 1,024-2,047
  assert [int(bar.split()[-1]) for bar in bars] == [1, 2, *[0] * 8, 1]
  assert data.histogram([]) == '0 clients, 0 records'


# ------------------------------------------------------------- population --


def build(records, **kwargs):
  settings = {'template': 'plain', 'max_length': 64} | kwargs
  return population.build(records, BYTES, **settings)


def texts(examples):
  return [BYTES.decode(e.tokens.tolist()) for e in examples]


def test_every_text_is_trained_on_or_held_out_once():
  records = make(40)
  made = build(records, heldout_fraction=0.25, new_clients=1)
  assert len(made.names) == 3 and len(made.new_names) == 1
  assert list(made.names) == sorted(made.names)
  assert sorted(made.names + made.new_names) == ['c0', 'c1', 'c2', 'c3']
  for names, groups in (
    (made.names, [a + b for a, b in zip(made.train, made.heldout)]),
    (made.new_names, made.new),
  ):
    for name, group in zip(names, groups):
      expected = [r.text or '' for r in records if r.client == name]
      assert sorted(texts(group)) == sorted(expected)
  assert {len(one) for one in made.heldout} == {2}
  assert made.report['num_records'] == 40 and made.report['num_clients'] == 3
  assert made.report['histogram'] == data.histogram(['a', 'b', 'c'] * 8)
  assert (
    made.report['tokens'] - made.report['train_examples']
    == (made.report['loss_tokens'])
  )
  json.dumps(made.report)


def same(one, two):
  assert one.names == two.names and one.new_names == two.new_names
  assert one.report == two.report
  for field in ('train', 'heldout', 'new'):
    a, b = getattr(one, field), getattr(two, field)
    assert list(map(texts, a)) == list(map(texts, b))


@pytest.mark.parametrize('name', BUILDERS)
def test_a_population_does_not_depend_on_the_order_of_the_records(name):
  records = make(50) + make(5)  # some of them twice
  split = BUILDERS[name](5)
  first = build(records, partition=split, new_clients=0.3, max_clients=4)
  order = np.random.default_rng(0).permutation(len(records))
  same(
    first,
    build(
      [records[i] for i in order],
      partition=split,
      new_clients=0.3,
      max_clients=4,
    ),
  )


def test_a_clients_split_does_not_depend_on_the_other_clients():
  records = make(40)
  whole = build(records)
  alone = build([r for r in records if r.client == 'c2'])
  at = whole.names.index('c2')
  assert texts(whole.train[at]) == texts(alone.train[0])
  assert texts(whole.heldout[at]) == texts(alone.heldout[0])
  other = build(records, seed=1)
  assert texts(other.heldout[at]) != texts(whole.heldout[at])


@pytest.mark.parametrize('fraction', [0.01, 0.5, 0.99])
def test_two_texts_suffice_for_one_on_each_side(fraction):
  records = [
    Record('a', text='x'),
    Record('a', text='y'),
    Record('b', text='z'),
  ]
  made = build(records, heldout_fraction=fraction)
  assert [len(one) for one in made.train] == [1, 1]
  assert [len(one) for one in made.heldout] == [1, 0]
  assert made.report['clients_without_heldout'] == 1
  none = build(records, heldout_fraction=0)
  assert [len(one) for one in none.train] == [2, 1]


def test_no_text_is_both_trained_on_and_held_out():
  # 'hi' belongs to everybody, 'a0' is there three times for one client.
  records = [Record(c, text='hi') for c in 'abcdef'] + [
    Record(c, text=f'{c}{i}') for c in 'abcdef' for i in range(3)
  ]
  records += [records[6], records[6]]
  for seed in range(8):
    made = build(records, heldout_fraction=0.5, new_clients=2, seed=seed)
    trained = {t for one in made.train for t in texts(one)}
    held = [t for one in made.heldout + made.new for t in texts(one)]
    assert not trained & set(held)
    lost = made.report['heldout_duplicates']
    assert sum(map(len, made.train)) + len(held) + lost == len(records)
    assert lost > 0 and 'hi' in trained


def test_chunks_of_a_text_stay_on_one_side_unless_there_is_but_one_text():
  long = [Record('a', text=f'{c}' * 100) for c in 'xyz']
  made = build(long, heldout_fraction=0.3, max_length=21)
  letters = [
    {t[0] for t in texts(side[0])} for side in (made.train, made.heldout)
  ]
  assert len(letters[0]) == 2 and len(letters[1]) == 1
  one = build(
    [Record('a', text='abcdefghij' * 3)], heldout_fraction=0.3, max_length=8
  )
  assert len(one.train[0]) > len(one.heldout[0]) > 0


def test_clients_without_a_usable_example_are_left_out_and_counted():
  records = [
    Record('long', prompt='q', response='x' * 99),
    Record('mute', prompt='q', response=' '),
    Record('fine', prompt='q' * 99, response='ok'),
  ]
  made = build(records)
  assert made.names == ('fine',)
  expected = {
    'clients_left_out': 2,
    'clients_left_out_names': ['long', 'mute'],
    'replies_left_out': 1,
    'empty_records': 1,
    'prompts_truncated': 1,
    'replies_cut': 0,
  }
  assert expected.items() <= made.report.items()
  kept = build(records, long_replies='cut')
  assert kept.names == ('fine', 'long') and kept.report['replies_cut'] == 1
  with pytest.raises(
    Error, match=r'no client is left: none of the 2 .*1 empty'
  ):
    build(records[:2])
  many = [Record(f'{i}', text=' ') for i in range(9)] + [Record('a', text='b')]
  report = build(many).report
  assert report['clients_left_out'] == 9
  assert report['clients_left_out_names'] == ['0', '1', '2', '3', '4']


def test_min_examples_and_max_clients_choose_by_key():
  records = [*make(40), Record('poor', text='one')]
  made = build(records, min_examples=2)
  assert 'poor' not in made.names and made.report['clients_left_out'] == 1
  few = build(records, min_examples=2, max_clients=3, new_clients=1)
  assert len(few.names) == 2 and len(few.new_names) == 1
  assert few.report['clients_not_drawn'] >= 1
  chosen = {
    build(records, min_examples=2, max_clients=2, seed=s).names
    for s in range(9)
  }
  assert len(chosen) > 2


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'heldout_fraction': 1.0}, 'heldout_fraction is 1.0'),
    ({'new_clients': 4}, r'new_clients is 4, .* 4 clients and one must be'),
    ({'new_clients': -1}, 'new_clients is -1'),
    ({'new_clients': 1.5}, 'new_clients is 1.5'),
    ({'max_clients': 0}, 'max_clients is 0'),
    ({'min_examples': -1}, 'min_examples is -1'),
  ],
)
def test_numbers_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(Error, match=message):
    build(make(8), **settings)


def test_the_packaged_text_makes_32_clients_that_hold_out_a_tenth():
  made = population.build(data.packaged(), BYTES, max_length=512)
  assert len(made.names) == 32 and made.names[0].startswith('all-s-well')
  assert {len(one) for one in made.heldout} == {7}
  assert made.report['replies_left_out'] == 0
  assert made.report['train_examples'] == 2013


def test_random_deals_are_those_of_earlier_versions():
  """Keys are made of a record's fields: new ones must not change old deals."""
  records = [Record(text=f'text {i}', label=str(i % 3)) for i in range(9)]
  names = data.iid(num_clients=3)(records, 5)
  assert [int(name[-1]) for name in names] == [0, 2, 0, 1, 1, 2, 2, 1, 0]
