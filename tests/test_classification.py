"""Texts with labels: read, batched, learned, tested, and a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, data, evals, local, models, scopes, train, tree
from fedjax_llm.adapters import Dense, peft
from fedjax_llm.clients import cohorts
from fedjax_llm.data import population, sources, text, tokenizers
from fedjax_llm.data.sources import Record
from fedjax_llm.models import families
from fedjax_llm.run import tasks
from fedjax_llm.types import (
  Batch,
  Context,
  Draw,
  Error,
  Example,
  LossSum,
  Model,
)

KEY = jax.random.key(0)
BYTES = tokenizers.bytes()
LABELS = ('sad', 'glad')


@pytest.fixture(scope='module')
def encoder():
  return models.random_encoder(labels=LABELS, vocab_size=259)


def example(label, length=3, types=None):
  tokens = np.arange(1, length + 1, dtype=np.int32)
  return Example(tokens, np.zeros(length, bool), label, types)


# -------------------------------------------------------------------- loss --

CLASSES = 3


def table_model():
  """A model whose logits are the base's row of a text's first token."""
  return Model(
    lambda base, params, batch: jnp.asarray(base)[batch.tokens] + params,
    lambda base, params, hidden: hidden,
  )


def batch_of(labels, segments=None):
  rows = len(labels)
  tokens = np.arange(rows * 4).reshape(rows, 4) % 11
  one = np.ones_like(tokens) if segments is None else segments
  return Batch(tokens, tokens < 0, one, tokens * 0, label=np.array(labels))


def test_the_loss_is_the_float64_cross_entropy_of_the_first_token():
  base = np.random.default_rng(0).normal(size=(11, CLASSES)).astype(np.float32)
  labels = [2, 0, -1, 1]
  batch = batch_of(labels)
  logits = base[batch.tokens[:, 0]].astype(np.float64)
  nats = np.log(np.exp(logits).sum(-1)) - logits[range(4), labels]
  hit = logits.argmax(-1) == labels
  real = np.array([1, 1, 0, 1])
  rows = jax.jit(local.classification(table_model(), per_row=True))
  each = rows(base, 0.0, batch, KEY)
  np.testing.assert_allclose(each.total, nats * real, rtol=1e-5)
  np.testing.assert_array_equal(each.count, real)
  np.testing.assert_array_equal(each.correct, hit * real)
  one = jax.jit(local.classification(table_model()))(base, 0.0, batch, KEY)
  np.testing.assert_allclose(
    one, [(nats * real).sum(), 3, (hit * real).sum()], rtol=1e-5
  )


def test_rows_of_padding_leak_nothing_not_even_nan():
  base = np.ones((11, CLASSES), np.float32)
  batch = batch_of([1, 0])
  segments = np.array([[1] * 4, [0] * 4])
  base[batch.tokens[1, 0]] = np.nan
  loss = local.classification(table_model())
  slopes = jax.jit(jax.value_and_grad(lambda p, b: loss(base, p, b, KEY).total))
  for padded in (
    batch._replace(label=np.array([1, -1])),
    batch._replace(segments=segments),
  ):
    value, slope = slopes(jnp.zeros(CLASSES), padded)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(slope, [1 / 3, -2 / 3, 1 / 3], rtol=1e-5)


def test_a_step_without_a_label_changes_nothing():
  params = {'bias': Dense(jnp.zeros(CLASSES))}
  model = Model(
    lambda base, params, batch: jnp.asarray(base)[batch.tokens],
    lambda base, params, h: h + params['bias'].value,
  )
  update = local.sgd(local.classification(model), local.optimizer('adam', 0.1))
  masks = tree.full_masks(params, scopes.everything().labels(params))
  base = np.ones((11, CLASSES), np.float32)

  @jax.jit
  def run(batches):
    out = update.run(base, params, (), batches, masks, Context(key=KEY))
    return out.update['bias'].value, out.work

  steps = lambda *rows: jax.tree.map(
    lambda *x: np.stack(x), *(batch_of(r) for r in rows)
  )
  one, told = run(steps([1, 0], [-1, -1]))
  other, _ = run(steps([1, 0], [1, 0]))
  empty, _ = run(steps([-1, -1], [-1, -1]))
  assert told.steps == 1 and told.tokens == 2
  assert (empty == 0).all()
  assert (np.asarray(one)[:2] > 0).all() and (np.abs(other) > np.abs(one)).all()


def test_texts_without_labels_are_refused():
  loss = local.classification(table_model())
  with pytest.raises(Error, match='have no labels'):
    loss(np.ones((11, 3)), 0.0, batch_of([0])._replace(label=None), KEY)


# -------------------------------------------------------------------- text --


@pytest.fixture(scope='module')
def wordpiece(tmp_path_factory):
  """A tiny BERT tokenizer, as transformers saves it."""
  from transformers import BertTokenizerFast  # type: ignore

  folder = tmp_path_factory.mktemp('wordpiece')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefgh']
  vocab = folder / 'words.txt'
  vocab.write_text('\n'.join(words))
  tokenizer = BertTokenizerFast(vocab=str(vocab))
  if len(tokenizer) != len(words):  # transformers before 5 names it otherwise
    tokenizer = BertTokenizerFast(vocab_file=str(vocab))
  tokenizer.save_pretrained(folder)
  return tokenizers.pretrained(str(folder))


def test_an_encoders_tokenizer_writes_its_own_special_tokens(wordpiece):
  assert wordpiece.eos_id == 3 and wordpiece.pad_id == 0
  (one,) = text.classified(
    Record(text='A b', label='glad'), wordpiece, LABELS
  ).examples
  assert one.tokens.tolist() == [2, 5, 6, 3]
  assert one.label == 1 and one.types is None and not one.loss_mask.any()
  record = Record(text='a b', pair='c d e f g h', label='sad')
  (two,) = text.classified(record, wordpiece, LABELS).examples
  assert two.tokens.tolist() == [2, 5, 6, 3, 7, 8, 9, 10, 11, 12, 3]
  assert two.types is not None
  assert two.types.tolist() == [0] * 4 + [1] * 7
  cut = text.classified(record, wordpiece, LABELS, max_length=8)
  assert cut.texts_cut == 1
  assert cut.examples[0].tokens.tolist() == [2, 5, 6, 3, 7, 8, 9, 3]


def test_bytes_cut_the_longer_text_first():
  record = Record(text='ab', pair='cdefgh', label='sad')
  (cut,) = text.classified(record, BYTES, LABELS, max_length=8).examples
  assert cut.tokens.tolist() == [257, *b'ab', 258, *b'cde', 258]
  assert cut.types is not None
  assert cut.types.tolist() == [0] * 4 + [1] * 4


def test_the_types_of_tokens_reach_the_model(encoder):
  """All of type 1: as if the two rows of the table changed places."""
  tokens = np.arange(8).reshape(2, 4)
  one = np.ones_like(tokens)
  batch = Batch(tokens, one > 0, one, tokens % 4)
  run = jax.jit(encoder.model.hidden)
  base = encoder.base
  swapped = base['embed_types']['embedding'][::-1]
  other = {**base, 'embed_types': {'embedding': swapped}}
  plain = run(base, {}, batch)
  typed = run(base, {}, batch._replace(types=one))
  np.testing.assert_allclose(typed, run(other, {}, batch), rtol=1e-5)
  assert np.abs(typed - plain).max() > 0.1
  np.testing.assert_allclose(
    run(base, {}, batch._replace(types=one * 0)), plain
  )


@pytest.mark.parametrize(
  'record, message',
  [
    (Record(text='x'), 'no label'),
    (Record(text='x', label='mad'), "'mad' is not one of 'sad', 'glad'"),
    (Record(messages=({},), label='sad'), 'not a chat'),
  ],
)
def test_records_that_cannot_be_classified_are_named(record, message):
  with pytest.raises(Error, match=message):
    text.classified(record._replace(where='f:3'), BYTES, LABELS)
  with pytest.raises(Error, match='f:3'):
    text.classified(record._replace(where='f:3'), BYTES, LABELS)


# -------------------------------------------------------------------- data --


def test_sources_read_labels_and_pairs(tmp_path):
  file = tmp_path / 'x.jsonl'
  rows = [{'a': 'one', 'b': 'two', 'y': 1}, {'a': 'x', 'b': 'y', 'y': 'no'}]
  file.write_text('\n'.join(map(json.dumps, rows)))
  keys = dict(client_key=None, text_key='a', label_key='y')
  found = sources.jsonl(str(file), text_pair_key='b', **keys)
  assert [(r.text, r.pair, r.label) for r in found] == [
    ('one', 'two', '1'),
    ('x', 'y', 'no'),
  ]
  with pytest.raises(Error, match='needs text_key'):
    sources.jsonl(str(file), client_key=None, text_pair_key='b')
  with pytest.raises(Error, match="there is no 'c'"):
    sources.jsonl(str(file), text_pair_key='c', **keys)


def test_hf_gives_class_names_and_hides_the_labels_of_test_sets(tmp_path):
  import datasets

  features = datasets.Features(
    s=datasets.Value('string'), y=datasets.ClassLabel(names=['no', 'yes'])
  )
  table = datasets.Dataset.from_dict({'s': ['a', 'b'], 'y': [1, -1]}, features)
  table.save_to_disk(str(tmp_path / 'd'))
  found = sources.hf(str(tmp_path / 'd'), text_key='s', label_key='y')
  assert [r.label for r in found] == ['yes', None]
  with pytest.raises(Error, match='row 1: this record has no label'):
    tasks.label_names(found)


def records(num=40, labels='ab'):
  return [
    Record(text=f'text {i}', label=labels[i % len(labels)]) for i in range(num)
  ]


def test_a_population_of_labelled_texts_tells_what_nobody_can_learn():
  given = [*records(), Record(text='odd', label='c')]
  # The odd one lies alone with a client that never trains.
  partition = lambda rows, seed: [
    'new' if r.label == 'c' else f'{i % 4}' for i, r in enumerate(rows)
  ]
  build = lambda seed: data.build(
    given,
    BYTES,
    partition=partition,
    labels=('a', 'b', 'c'),
    new_clients=1,
    seed=seed,
  )
  seed = next(s for s in range(50) if build(s).new_names == ('new',))
  found = build(seed)
  assert found.report['labels_untrained'] == {'c': 1}
  assert sum(found.report['labels'].values()) == found.report['train_examples']
  labels = {e.label for own in found.train for e in own}
  assert labels == {0, 1}
  other = data.build(
    [r._replace(label='b') for r in given],
    BYTES,
    partition=partition,
    labels=('a', 'b', 'c'),
    new_clients=1,
    seed=seed,
  )
  assert population.digest(other) != population.digest(found)


def test_dirichlet_of_labels_makes_clients_of_few_labels():
  found = data.build(
    records(400, 'abcd'),
    BYTES,
    partition=data.dirichlet(num_clients=10, alpha=0.05),
    labels=tuple('abcd'),
  )
  largest = [
    max(np.bincount([e.label or 0 for e in own])) / len(own)
    for own in found.train
  ]
  assert np.mean(largest) > 0.7


def test_label_names_are_sorted_and_checked():
  assert tasks.label_names(records(3, 'ba')) == ('a', 'b')
  with pytest.raises(Error, match='only one label, a'):
    tasks.label_names(records(3, 'a'))
  with pytest.raises(Error, match='this record has no label'):
    tasks.label_names([Record(text='x')])


# ------------------------------------------------------------------ batches --


def test_cohorts_carry_labels_and_minus_one_on_padding():
  two = [example(1), example(0, types=np.array([0, 1, 1], np.int32))]
  build = cohorts.cohorts(
    [two, [example(1)]],
    num_steps=2,
    batch_size=2,
    max_length=4,
    epochs=1,
    weight_by='tokens',
  )
  cohort = build(Draw(np.array([0, 1, -1]), np.array([1, 1, 0], bool)), 0)
  label = cohort.batches.label
  assert label.shape == (3, 2, 2)
  assert sorted(label[0, 0]) == [0, 1] and (label[0, 1] == -1).all()
  assert label[1].ravel().tolist() == [1, -1, -1, -1] and (label[2] < 0).all()
  assert cohort.weight.tolist() == [2, 1, 0]
  types = cohort.batches.types
  row = int(np.argmin(label[0, 0]))
  assert types[0, 0, row].tolist() == [0, 1, 1, 0] and types.sum() == 2
  plain = Example(np.arange(3, dtype=np.int32), np.ones(3, bool))
  for given, packing, message in (
    ([two], True, 'a row has one label'),
    ([[plain, example(1)]], False, 'some have none'),
  ):
    with pytest.raises(Error, match=message):
      cohorts.cohorts(
        given, num_steps=1, batch_size=1, max_length=4, packing=packing
      )
  unlabelled = cohorts.cohorts(
    [[plain]], num_steps=1, batch_size=1, max_length=4
  )(Draw(np.array([0]), np.array([True])), 0)
  assert unlabelled.batches.label is None and unlabelled.batches.types is None


# -------------------------------------------------------------------- evals --


def vote(base, params, batch, key):
  """Says `params`, whatever the text is."""
  del base, key
  real = (batch.label >= 0) & (batch.segments[:, 0] > 0)
  hit = real & (batch.label == params)
  wide = lambda x: x.astype(jnp.float32)
  return LossSum(wide(real) * 2, wide(real), wide(hit))


class _Algorithm:
  @staticmethod
  def personal(params, state):
    return params if state is None else state


class _Store:
  def seen(self):
    return np.array([0, 2])

  def gather(self, ids):
    return np.asarray(ids) // 2  # client 0 says 0, client 2 says 1


def test_accuracy_is_told_client_by_client_and_of_the_worst_tenth():
  texts = [
    [example(0), example(0), example(1)],
    [example(1)],
    [example(1), example(1, length=2)],
  ]
  groups = [
    (g.batches, g.owners)
    for g in cohorts.rows(texts, batch_size=4, max_length=4, buckets=(2,))
  ]
  examine = evals.loop(
    vote,
    _Algorithm,  # type: ignore
    heldout=groups,
    common=groups,
    names=['ann', 'bob', 'eve'],
    has_private=True,
    labelled=True,
  )
  told = examine(None, jnp.int32(0), _Store(), KEY)
  assert told['evals/heldout/accuracy'] == pytest.approx(2 / 6)
  accuracies = told['evals/heldout/accuracies']
  assert accuracies == pytest.approx({'ann': 2 / 3, 'bob': 0, 'eve': 0})
  assert told['evals/heldout/client_accuracy_mean'] == pytest.approx(2 / 9)
  assert told['evals/heldout/client_accuracy_worst_10'] == 0
  own = told['evals/personal/own/accuracies']
  assert own == pytest.approx({'ann': 2 / 3, 'eve': 1})
  common = told['evals/personal/common/accuracies']
  assert common == pytest.approx({'ann': 2 / 6, 'eve': 4 / 6})


# --------------------------------------------------------------------- runs --


def test_a_task_refuses_a_model_of_another_task(encoder):
  decoder = models.random()
  with pytest.raises(Error, match='is an encoder'):
    tasks.causal_lm().check(encoder)
  with pytest.raises(Error, match='has no classifier'):
    tasks.classification().check(decoder)


@pytest.fixture(scope='module')
def reviews(tmp_path_factory):
  """Three clients whose texts say in one letter what they are."""
  file = tmp_path_factory.mktemp('data') / 'reviews.jsonl'
  rng = np.random.default_rng(0)
  with open(file, 'w') as out:
    for i in range(60):
      label = int(rng.integers(2))
      row = {
        'who': f'c{i % 3}',
        'first': f'{"xz"[label]}{i:02}',
        'second': 'so',
        'label': LABELS[label],
      }
      out.write(json.dumps(row) + '\n')
  return file


def arguments(reviews, folder, **more):
  fields = {
    'task': {'name': 'classification'},
    'data.name': 'jsonl',
    'data.path': str(reviews),
    'data.client_key': 'who',
    'data.text_key': 'first',
    'data.text_pair_key': 'second',
    'data.label_key': 'label',
    'partition.name': 'natural',
    'population': {'max_length': 12},
    'clients': {'name': 'full'},
    'cohort': {'num_steps': 12, 'batch_size': 8},
    'model': {'name': 'random_encoder', 'num_layers': 1, 'max_positions': 16},
    'adapter.rank': 2,
    'adapter.targets': 'all-linear',
    'local.learning_rate': 0.02,
    'evals': {'every': 2, 'common': 6, 'buckets': ()},
    **more,
  }
  return [
    *('--config', 'configs/minilm_classification.py:smoke'),
    *('--workdir', str(folder)),
    *(
      f'--config.{k}={"none" if v is None else json.dumps(v)}'
      for k, v in fields.items()
    ),
  ]


def test_clients_learn_to_classify_pairs_and_write_an_adapter_with_a_head(
  reviews, tmp_path, capsys
):
  folder = tmp_path / 'run'
  assert train.main(arguments(reviews, folder)) == 0
  told = capsys.readouterr().out
  assert '2 labels' in told and 'held-out accuracy' in told
  assert 'labels learned' in told and 'prompt' not in told
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  first, *_, last = (json.loads(line) for line in lines)
  assert last['evals/heldout/accuracy'] > 0.9 > first['evals/heldout/accuracy']
  assert last['local/tokens'] == 3 * 12 * 8
  assert last['local/accuracy'] > 0.8
  assert set(last['evals/heldout/accuracies']) == {'c0', 'c1', 'c2'}
  labels = json.loads((folder / 'adapter' / 'labels.json').read_text())
  assert labels == ['glad', 'sad']
  # The adapter and its base, read again, classify as the run did.
  loaded = models.pretrained(folder / 'base')
  assert loaded.config.labels == ('glad', 'sad')
  params = peft.load(
    folder / 'adapter',
    path_of=lambda name: families.our_paths(name, loaded.config),
    from_tensors=lambda w: families.from_checkpoint(w, loaded.config),
  )
  assert isinstance(params['classifier']['kernel'], Dense)
  rows = [json.loads(line) for line in reviews.read_text().splitlines()]
  encoded = [
    text.classified(
      Record(text=r['first'], pair='so', label=r['label']), BYTES, labels, 12
    ).examples[0]
    for r in rows
  ]
  (group,) = cohorts.rows([encoded], batch_size=60, max_length=12)
  one = jax.tree.map(lambda x: x[0], group.batches)
  loss = jax.jit(local.classification(loaded.model))
  sums = loss(loaded.base, params, one, KEY)
  assert sums.correct / sums.count > 0.9
  merged = adapters.merge(loaded.base, params)
  again = loss(merged, {}, one, KEY)
  np.testing.assert_allclose(again.total, sums.total, rtol=1e-3)


def test_what_cannot_be_classified_is_one_sentence(reviews, tmp_path, capsys):
  for fields, message in (
    ({'data.label_key': None}, 'no label'),
    ({'model': {'name': 'random'}}, "'pooler' matches no module"),
    ({'task': {'name': 'causal_lm'}}, 'is an encoder'),
    ({'task': {'name': 'classification', 'labels': ['sad']}}, "'glad' is not"),
    ({'adapter.modules_to_save': ['head']}, 'matches no module'),
    ({'cohort.packing': True}, 'a row has one label'),
    ({'model': {'name': 'random_encoder', 'labels': []}}, 'filled in by the'),
  ):
    assert train.main(arguments(reviews, tmp_path / 'x', **fields)) == 1
    assert message in capsys.readouterr().err, fields
