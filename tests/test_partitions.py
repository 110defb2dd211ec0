"""Partitions by label, size, meaning and time: the counts that define them."""

from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_llm.data import drift, skew
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error


def made(sizes):
  """Makes records with `sizes[l]` of label l, each with a date."""
  labels = [f'l{i}' for i, size in enumerate(sizes) for _ in range(size)]
  return [
    Record(client='c', text=f't{i} {label}', label=label, date=str(2000 + i))
    for i, label in enumerate(labels)
  ]


RULES = {
  'by_keys': lambda n: skew.by_keys(),
  'inner_dirichlet': lambda n: skew.inner_dirichlet(n, alpha=0.3),
  'inner_dirichlet_skewed': lambda n: skew.inner_dirichlet(n, sigma=1.0),
  'shards': lambda n: skew.shards(n, 2),
  'pathological': lambda n: skew.pathological(n, 2),
  'linear': drift.linear,
  'square': drift.square,
  'exponential': drift.exponential,
  'time_drift': lambda n: drift.time_drift(n, drift=0.5),
  'clusters': drift.clusters,
  'clusters_dirichlet': lambda n: drift.clusters(n, 3, alpha=0.5),
}


@pytest.mark.parametrize('rule', sorted(RULES))
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.data())
def test_every_record_once_pure_in_the_seed_and_whatever_the_order(rule, data):
  sizes = data.draw(st.lists(st.integers(6, 12), min_size=2, max_size=5))
  num_clients = data.draw(st.integers(3, 6))
  seed = data.draw(st.integers(0, 9))
  records = made(sizes)
  partition = RULES[rule](num_clients)
  names = partition(records, seed)
  assert len(names) == len(records) and all(names)
  if rule != 'by_keys':
    assert len(set(names)) == num_clients
  assert names == RULES[rule](num_clients)(records, seed)
  order = np.random.default_rng(seed).permutation(len(records))
  again = partition([records[i] for i in order], seed)
  assert again == [names[i] for i in order]


def test_records_of_several_keys():
  records = made([2, 1])
  assert skew.by_keys(('client', 'label', 'date'))(records, 0) == [
    'c/l0/2000', 'c/l0/2001', 'c/l1/2002'
  ]  # fmt: skip
  with pytest.raises(Error, match=r"partition.keys is \['text'\], but must be"):
    skew.by_keys(('text',))
  with pytest.raises(Error, match='needs the label of each record; give the s'):
    skew.by_keys()([Record(client='a', text='b')], 0)


def counts(names, records):
  """Returns the number of records of each client and label."""
  table: dict[str, Counter] = {}
  for name, record in zip(names, records, strict=True):
    table.setdefault(name, Counter())[record.label] += 1
  return table


def test_inner_dirichlet_keeps_sizes_and_skews_labels():
  records = made([100, 100, 100, 100])
  names = skew.inner_dirichlet(8, alpha=0.05)(records, 0)
  assert set(Counter(names).values()) == {50}
  # Few labels each: while labels last, a client's largest share is near one.
  largest = [max(c.values()) / 50 for c in counts(names, records).values()]
  assert np.median(largest) > 0.7
  names = skew.inner_dirichlet(8, alpha=1e4)(records, 0)
  largest = [max(c.values()) / 50 for c in counts(names, records).values()]
  assert np.median(largest) < 0.45  # near the quarter of four equal labels
  skewed = skew.inner_dirichlet(8, sigma=1.5)(records, 0)
  assert len(set(Counter(skewed).values())) > 4
  with pytest.raises(Error, match='alpha is 0, but must be positive'):
    skew.inner_dirichlet(2, alpha=0)(records, 0)
  with pytest.raises(Error, match='num_clients is 401, but must be between'):
    skew.inner_dirichlet(401)(records, 0)


def test_shards_are_equal_and_hold_few_labels():
  records = made([40] * 10)
  for each in (1, 2, 4):
    names = skew.shards(20, each)(records, 3)
    assert set(Counter(names).values()) == {20}
    # A shard is no longer than a label, so it touches two at most; here shards
    # divide the labels evenly and touch one.
    assert all(len(c) <= each for c in counts(names, records).values())
  uneven = skew.shards(3, 2)(made([7, 6]), 0)
  assert sorted(Counter(uneven).values()) in ([4, 4, 5], [4, 5, 4])
  with pytest.raises(Error, match='that 13 records in shards allow'):
    skew.shards(7, 2)(made([7, 6]), 0)
  with pytest.raises(Error, match='shards_per_client is 0, but must be at'):
    skew.shards(2, 0)(made([7, 6]), 0)


def test_pathological_clients_have_exactly_their_labels():
  records = made([30] * 5)
  for assign in ('random', 'in_order', 'first_in_order'):
    names = skew.pathological(10, 2, assign)(records, 1)
    table = counts(names, records)
    assert {len(c) for c in table.values()} == {2}
    for label in {r.label for r in records}:
      shares = [c[label] for c in table.values() if c[label]]
      assert max(shares) - min(shares) <= 1 and sum(shares) == 30
      if assign != 'first_in_order':
        assert len(shares) == 4  # 10 clients x 2 labels / 5 labels
  names = skew.pathological(5, 2, 'in_order')(records, 0)
  assert set(counts(names, records)['client0004']) == {'l4', 'l0'}
  with pytest.raises(Error, match='2 clients with 2 labels each cannot hold 5'):
    skew.pathological(2, 2)(records, 0)
  with pytest.raises(Error, match='labels_per_client is 6, but must be betwe'):
    skew.pathological(9, 6)(records, 0)
  with pytest.raises(Error, match="assign is 'order', but must be random"):
    skew.pathological(9, 2, 'order')(records, 0)  # pyright: ignore
  with pytest.raises(Error, match=r"the label 'l\d' has 1 records for"):
    skew.pathological(4, 2)(made([1, 1, 9, 9]), 0)


def test_sizes_grow_as_they_should():
  records = made([550])

  def sizes(rule):
    tally = Counter(rule(records, 0))
    return [tally[name] for name in sorted(tally)]

  assert sizes(drift.linear(10)) == [10 * (n + 1) for n in range(10)]
  records = made([770])
  assert sizes(drift.square(10)) == [2 * (n + 1) ** 2 for n in range(10)]
  records = made([2**10 - 1])
  grown = drift.exponential(10, rate=float(np.log(2.0)))
  assert sizes(grown) == [2**n for n in range(10)]
  records = made([40])  # one each where a share is below one
  assert min(sizes(drift.exponential(8))) == 1
  with pytest.raises(Error, match='rate is -1, but must not be negative'):
    drift.exponential(3, rate=-1)
  with pytest.raises(Error, match='num_clients is 41, but must be between 1'):
    drift.linear(41)(records, 0)


def test_time_drift_gives_periods_and_mixes_them():
  records = made([60])
  names = drift.time_drift(6)(records, 0)
  assert names == [f'client{i // 10:04}' for i in range(60)]
  # Numbers sort as numbers.
  numbers = [Record(text=d, date=d) for d in ('9', '10', '100', '11')]
  assert drift.time_drift(4)(numbers, 0) == [
    'client0000', 'client0001', 'client0003', 'client0002'
  ]  # fmt: skip
  for share in (0.0, 0.5):
    mixed = drift.time_drift(6, drift=share)(records, 0)
    assert set(Counter(mixed).values()) == {10}
    stayed = np.mean([a == b for a, b in zip(names, mixed, strict=True)])
    # Those that stay, and a sixth of those that change places by chance.
    assert abs(stayed - (share + (1 - share) / 6)) < 0.15
  with pytest.raises(Error, match='needs the date of each record'):
    drift.time_drift(1)([Record(text='a')], 0)
  with pytest.raises(Error, match='drift is 2, but must be from 0 to 1'):
    drift.time_drift(1, drift=2)(records, 0)


def test_clusters_find_what_lies_together():
  records = made([12, 12, 12])
  centres = {'l0': (0.0, 0.0), 'l1': (9.0, 0.0), 'l2': (0.0, 9.0)}

  def embed(given):
    rng = np.random.default_rng(0)
    points = [centres[r.label] for r in given]
    return np.array(points) + rng.normal(scale=0.1, size=(len(given), 2))

  for seed in range(5):
    names = drift.clusters(3, embed=embed)(records, seed)
    table = counts(names, records)
    assert [len(c) for c in table.values()] == [1, 1, 1]
    assert set(Counter(names).values()) == {12}
  names = drift.clusters(4, num_clusters=3, alpha=100.0, embed=embed)(
    records, 0
  )
  assert set(Counter(names).values()) <= {8, 9, 10}  # near iid within clusters
  with pytest.raises(Error, match='without alpha each cluster is a client'):
    drift.clusters(4, num_clusters=3)(records, 0)
  with pytest.raises(Error, match=r'returned an array \(36,\), but must retur'):
    drift.clusters(4, embed=lambda given: np.ones(len(given)))(records, 0)
  with pytest.raises(Error, match='a value that is not finite'):
    drift.clusters(4, embed=lambda given: np.full((len(given), 2), np.nan))(
      records, 0
    )
  # Equal vectors still fill every cluster.
  same = drift.clusters(4, embed=lambda given: np.ones((len(given), 2)))
  assert len(set(same(records, 0))) == 4


def test_configs_name_these_partitions():
  from fedjax_llm.run import builders, sections

  namespace = sections.SPEC.sections['partition']
  records = made([6, 6])
  for section in (
    {'name': 'shards', 'num_clients': 3},
    {'name': 'clusters', 'num_clients': 3, 'embed': 'hashed_words'},
    {'name': 'clusters', 'num_clients': 3},
    {'name': 'pooled', 'of': {'name': 'linear', 'num_clients': 3}},
  ):
    names = builders.build(section, namespace)(records, 0)
    assert len(set(names)) == 3, section
  with pytest.raises(Error, match=r"partition.embed: there is no 'hashed'"):
    builders.build(
      {'name': 'clusters', 'num_clients': 3, 'embed': 'hashed'}, namespace
    )
