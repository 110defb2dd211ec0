"""Tasks of one's own through `train`, and batches of every kind."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import (
  batching,
  config,
  data,
  experiment,
  local,
  models,
  tasks,
  train,
)
from fedjax_llm.adapters import peft
from fedjax_llm.clients import cohorts
from fedjax_llm.data import collate, encoding
from fedjax_llm.data.sources import Record
from fedjax_llm.models import families
from fedjax_llm.plan import work
from fedjax_llm.sections import SPEC
from fedjax_llm.server.widths import narrowed
from fedjax_llm.types import (
  Batch,
  Draw,
  Error,
  Example,
  Image,
  Images,
  ImagesWithTexts,
  ImageWithText,
  LossSum,
  Pair,
  Pairs,
)

HERE = __name__
BETA = 0.5

CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    num_rounds={rounds},
    task={task!r},
    data={data!r},
    partition=dict(name='natural'),
    population={population!r},
    clients=dict(name='full'),
    cohort={cohort!r},
    model={model!r},
    adapter={adapter!r},
    algorithm=dict(name='fed_avg'),
    local={local!r},
    evals=dict(every=100, batch_size=4, buckets=(), samples=1),
  ))
"""


def arguments(folder, **parts):
  file = folder / 'config.py'
  file.write_text(CONFIG.format(**parts))
  return ['--config', str(file), '--workdir', str(folder / 'run')]


def records_of(folder):
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


# ------------------------------------------------------ preferences by pairs --


def preferences(num: int) -> list[Record]:
  """A source by import path: everybody likes a better than b and c."""
  return [
    Record(
      client=f'c{i % 3}',
      prompt=f'{i:02}',
      chosen='a' * (2 + i % 2),
      rejected='bc'[i % 2] * 3,
      where=f'preferences:{i}',
    )
    for i in range(num)
  ]


def dpo() -> tasks.Task:
  """Direct preference optimisation (Rafailov et al. 2023, equation 7).

  -log sigmoid(beta ((log p(y_w) - log ref(y_w)) - (log p(y_l) - log ref(y_l))))
  """

  def encode(record, how):
    def side(reply):
      whole = record._replace(response=reply, chosen=None, rejected=None)
      return encoding.texts(whole, how).examples[0]

    return data.Encoded([Pair(side(record.chosen), side(record.rejected))])

  def loss(loaded, *, per_row=False):
    nats = local.causal_lm(loaded.model, per_row=True)

    def run(base, params, batch, key):
      gain = lambda side, before: -nats(base, params, side, key).total - before
      margin = gain(batch.chosen, batch.reference_chosen)
      margin -= gain(batch.rejected, batch.reference_rejected)
      real = (batch.chosen.segments > 0).any(-1)
      terms = jnp.where(real, jax.nn.softplus(-BETA * margin), 0.0)
      count = real.astype(jnp.float32)
      sums = LossSum(terms, count, count * (margin > 0))
      return sums if per_row else jax.tree.map(jnp.sum, sums)

    return run

  return tasks.Task(
    loss,
    encode=encode,
    prepare=tasks.with_references,
    metrics=tasks.Measures('pair', accuracies=True),
  )


def test_a_task_of_pairs_trains_by_its_import_path(tmp_path, capsys):
  command = arguments(
    tmp_path,
    rounds=2,
    task={'name': f'{HERE}:dpo'},
    data={'name': f'{HERE}:preferences', 'num': 21},
    population={
      'template': 'plain',
      'max_length': 16,
      'heldout_fraction': 0.3,
    },
    cohort={'num_steps': 1, 'batch_size': 3, 'weight_by': 'tokens'},
    model={
      'name': 'random',
      'hidden_size': 16,
      'intermediate_size': 16,
      'num_layers': 1,
      'num_heads': 2,
    },
    adapter={'name': 'lora', 'rank': 2, 'targets': ('q_proj', 'up_proj')},
    local={'name': 'sgd', 'learning_rate': 0.2},
  )
  assert train.main(command) == 0
  message = capsys.readouterr().out
  start, first, last = records_of(tmp_path)
  # Where the policy is the reference every margin is 0: -log sigmoid(0).
  for value in (start['evals/heldout/loss'], first['local/loss']):
    assert value == pytest.approx(math.log(2), abs=1e-5)
  assert first['local/tokens'] == 3 * 3  # pairs
  assert last['evals/heldout/loss'] < start['evals/heldout/loss']
  assert set(last['evals/heldout/accuracies']) == {'c0', 'c1', 'c2'}
  assert 'nats/pair' in message and '18 pairs learned' in message
  assert 'prompt' not in message  # nobody said that it writes

  # What was written gives the loss of the end, pair by pair, in float64.
  conf = config.parse(command, SPEC).config
  built = experiment.build(conf, lambda _: None)
  loaded = models.pretrained(tmp_path / 'run' / 'base')
  params = peft.load(
    tmp_path / 'run' / 'adapter',
    path_of=lambda name: families.our_paths(name, loaded.config),
    from_tensors=lambda w: families.from_checkpoint(w, loaded.config),
  )
  pairs = [pair for own in built.population.heldout for pair in own]
  batch = collate.pairs(pairs, 16)([[pair] for pair in pairs])
  nats = jax.jit(local.causal_lm(loaded.model, per_row=True))
  margin = np.zeros(len(pairs))
  for sign, side in ((1, batch.chosen), (-1, batch.rejected)):
    new, old = (
      np.asarray(nats(loaded.base, x, side, None).total, np.float64)
      for x in (params, {})
    )
    margin += sign * (old - new)
  want = np.mean(np.log1p(np.exp(-BETA * margin)))
  assert last['evals/heldout/loss'] == pytest.approx(want, abs=1e-5)
  references = [pair.reference_chosen for pair in pairs]
  np.testing.assert_allclose(
    references,
    -nats(loaded.base, {}, batch.chosen, None).total,
    rtol=1e-5,
  )
  # The references are no part of the data that a run goes on with.
  assert built.digest != data.population.digest(built.population)
  assert train.main(command) == 0
  assert 'this run is finished' in capsys.readouterr().out


# ------------------------------------------------------------------ pictures --


def pictures(path: str) -> list[Record]:
  """A source by import path: a .npz file of pictures, classes and owners."""
  with np.load(path) as file:
    rows = zip(file['pixels'], file['label'], file['client'], strict=True)
    return [
      Record(client=f'c{k}', image=x, label=str(y), where=f'{path}[{i}]')
      for i, (x, y, k) in enumerate(rows)
    ]


def seeing() -> tasks.Task:
  def encode(record, how):
    label = list(how.labels).index(record.label)
    return data.Encoded([Image(record.image, label)])

  return tasks.Task(
    lambda loaded, per_row=False: local.classification(
      loaded.model, per_row=per_row
    ),
    encode=encode,
    labels=tasks.label_names,
    metrics=tasks.Measures('image', accuracies=True),
  )


def regression(labels, num_features: int):
  """A network of one's own: the softmax of one matrix and a bias."""
  weights = {
    'spare': {'kernel': jnp.zeros((1, 1))},  # a file wants a low-rank part
    'head': {
      'kernel': jnp.zeros((num_features, len(labels))),
      'bias': jnp.zeros(len(labels)),
    },
  }

  def net(weights, pixels):
    flat = pixels.reshape(len(pixels), -1)
    return flat @ weights['head']['kernel'] + weights['head']['bias']

  mine = models.own(net, weights)
  model = mine.model(lambda net, batch: net(batch.pixels))
  return mine.loaded(model, vocab_size=1, max_positions=1)


def softmax_regression(train, heldout, rounds, rate):
  """FedAvg of one full-batch step a round, in NumPy float64."""

  def look(own):
    x = np.stack([np.ravel(e.pixels) for e in own]).astype(np.float64)
    y = np.array([e.label for e in own])
    return np.concatenate([x, np.ones((len(x), 1))], 1), y

  def loss(w, x, y):
    z = x @ w
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    return -log_p[np.arange(len(y)), y], np.exp(log_p)

  clients = [look(own) for own in train]
  num_classes = 1 + max(y.max() for _, y in clients)
  w = np.zeros((clients[0][0].shape[1], num_classes))
  total = sum(len(y) for _, y in clients)
  curve = []
  for _ in range(rounds):
    step, nats = np.zeros_like(w), 0.0
    for x, y in clients:
      each, p = loss(w, x, y)
      gradient = x.T @ (p - np.eye(num_classes)[y]) / len(y)
      step += len(y) / total * gradient
      nats += each.sum()
    w -= rate * step
    curve.append(nats / total)
  x, y = look([e for own in heldout for e in own])
  return curve, loss(w, x, y)[0].mean(), np.mean((x @ w).argmax(1) == y)


def test_a_task_of_pictures_is_softmax_regression(tmp_path, capsys):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, 33)
  pixels = rng.normal(size=(33, 2, 3, 1)).astype(np.float32)
  pixels[np.arange(33), 0, label] += 2  # so that there is something to see
  client = rng.choice(3, 33, p=[0.5, 0.3, 0.2])
  np.savez(tmp_path / 'pictures.npz', pixels=pixels, label=label, client=client)
  command = arguments(
    tmp_path,
    rounds=4,
    task={'name': f'{HERE}:seeing'},
    data={
      'name': f'{HERE}:pictures',
      'path': str(tmp_path / 'pictures.npz'),
    },
    population={'heldout_fraction': 0.25},
    # Whole passes of clients of different sizes: rows of padding.
    cohort={'num_steps': 2, 'batch_size': 20, 'epochs': 1},
    model={'name': f'{HERE}:regression', 'num_features': 6},
    adapter={
      'name': 'lora',
      'rank': 1,
      'targets': ('spare',),
      'modules_to_save': ('head',),
    },
    local={'name': 'sgd', 'learning_rate': 0.5},
  )
  assert train.main(command) == 0
  message = capsys.readouterr().out
  built = experiment.build(config.parse(command, SPEC).config, lambda _: None)
  people = built.population
  curve, heldout, accuracy = softmax_regression(
    people.train, people.heldout, rounds=4, rate=0.5
  )
  records = records_of(tmp_path)
  np.testing.assert_allclose(
    [record['local/loss'] for record in records[1:]], curve, rtol=1e-5
  )
  assert records[-1]['evals/heldout/loss'] == pytest.approx(heldout, rel=1e-5)
  assert records[-1]['evals/heldout/accuracy'] == pytest.approx(accuracy)
  assert records[-1]['local/steps'] == len(people.names)  # one a client
  assert 'nats/image' in message and '3 labels); ' in message
  assert 'tokens' not in message


# ------------------------------------------------------------ kinds of batch --


def text(length, first=1, learned=None):
  tokens = np.arange(first, first + length, dtype=np.int32)
  return Example(tokens, np.arange(length) >= (learned or 1))


def picture(value, label=None):
  return Image(np.full((2, 2, 1), value, np.float32), label)


def batches_of_every_kind():
  """Three rows of each kind, the last one padding; what each should tell."""
  long, short = text(5), text(3)
  pairs = [Pair(long, short), Pair(short, short)]
  seen = [picture(1, 0), picture(2)]
  both = [ImageWithText(picture(3).pixels, long) for _ in range(2)]
  rows = lambda kind: collate.by_kind(kind, 8)([[kind[0]], [kind[1]], []])
  return {
    'texts': (rows([long, short]), Batch, 24, 8, 6),
    'pairs': (rows(pairs), Pairs, 48, 14, 2),
    'images': (rows(seen), Images, 3, 2, 1),
    'images with texts': (rows(both), ImagesWithTexts, 24, 10, 8),
  }


@pytest.mark.parametrize('name', batches_of_every_kind())
def test_every_kind_of_batch_tells_what_it_holds(name):
  batch, kind, places, used, learned = batches_of_every_kind()[name]
  assert type(batch) is kind
  assert batching.places(batch) == places
  assert (batching.used(batch), batching.learned(batch)) == (used, learned)
  # Two steps, of which the second is all padding; the same when traced.
  steps = jax.tree.map(lambda x: np.stack([x[None], 0 * x[None]]), batch)
  for ask in (batching.real, jax.jit(batching.real)):
    assert np.asarray(ask(steps)).tolist() == [[True], [False]]


def test_a_batch_of_an_unknown_kind_is_full():
  batch = {
    'x': np.zeros((2, 3, 4)),
    'text': batches_of_every_kind()['texts'][0],
  }
  assert batching.kinds(batch) == []
  assert batching.real(batch) is None and batching.learned(batch) is None
  _, places = narrowed(lambda batch: batch, batch, (4,))
  assert int(places) == 0
  assert batching.axes(np.zeros((5, 2, 3, 7))) == (5, 2, 3)


def test_a_kind_of_ones_own_needs_four_methods():
  class Rows(Images):
    """Half of the places."""

    def places(self):
      return 2

  batch = Rows(*batches_of_every_kind()['images'][0])
  assert batching.kinds({'a': batch, 'b': batch}) == [batch, batch]
  assert batching.places({'a': batch, 'b': batch}) == 4


def test_both_texts_of_pairs_are_cut_to_the_width_of_the_longer():
  batch = batches_of_every_kind()['pairs'][0]
  step = jax.tree.map(lambda x: x[None], batch)
  run = lambda b: b.chosen.tokens.sum() + 1000 * b.rejected.tokens.shape[-1]
  outcome, places = narrowed(run, step, (3, 6))
  assert int(outcome) == 6000 + batch.chosen.tokens.sum()
  assert int(places) == 2 * 3 * 6
  wide = batching.widened(batch, 11)
  assert wide.rejected.segments.shape == (3, 11)
  assert wide.reference_chosen.shape == (3,)


def test_cohorts_and_rows_of_pairs_have_bounds_for_both_texts():
  short, long = text(3), text(7, learned=2)
  people = [[Pair(short, long), Pair(short, short)], [Pair(long, short)]]
  build = cohorts.cohorts(
    people,
    num_steps=2,
    batch_size=2,
    max_length=8,
    epochs=1,
    weight_by='tokens',
  )
  cohort = build(Draw(np.array([1, 0, -1]), np.array([1, 1, 0], bool)), 0)
  assert batching.bounds(cohort.batches) == (max(2 + 2, 5), max(5 + 2, 2))
  assert cohort.batches.chosen.tokens.shape == (3, 2, 2, 8)
  assert cohort.weight.tolist() == [1, 2, 0]  # pairs
  assert batching.real(cohort.batches).tolist() == [[1, 0], [1, 0], [0, 0]]
  (narrow, _), (wide, owners) = cohorts.rows(
    people, batch_size=2, max_length=8, buckets=(4,), limits=(9, None)
  )
  assert narrow.chosen.tokens.shape == (1, 2, 4)
  assert (wide.chosen.bound, wide.rejected.bound) == (9, None)
  assert owners.tolist() == [[0, 1]]
  with pytest.raises(Error, match=r'^packing puts several texts in a row; '):
    cohorts.cohorts(
      people, num_steps=1, batch_size=1, max_length=8, packing=True
    )


@pytest.mark.parametrize(
  'examples, message',
  [
    ([text(2), picture(1)], 'examples are of different kinds, Example and'),
    ([('a', 'b')], 'examples of the kind tuple need a collate of their task'),
    (
      [picture(1), Image(np.zeros((3, 2, 1)))],
      r'pictures need one shape \[H, W, C\] for all of a run; there are '
      r'\(2, 2, 1\), \(3, 2, 1\)[.]',
    ),
  ],
)
def test_examples_that_make_no_batch_are_refused(examples, message):
  with pytest.raises(Error, match=f'^{message}'):
    collate.by_kind(examples, 4)


def test_pictures_are_packed_by_nobody():
  build = collate.images([picture(1)])
  with pytest.raises(Error, match=r'^only texts without labels can be packed'):
    build([[picture(1), picture(2)]])


# -------------------------------------------------------------------- bounds --


def test_a_bound_is_structure_and_no_array():
  batch = batching.bounded(batches_of_every_kind()['texts'][0])
  assert batch.bound == 4 + 2
  assert len(jax.tree.leaves(batch)) == 4
  traced = []

  @jax.jit
  def program(batch):
    traced.append(batch.bound)
    return jax.vmap(lambda row: row.tokens.sum())(batch)

  for bounds in ([6], [6], [9]):
    program(batching.bounded(batch, bounds))
  assert traced == [6, 9]
  with pytest.raises(
    Error, match=r'^there are 2 bounds for 1 texts of a batch'
  ):
    batching.bounded(batch, [6, 6])


def test_runs_that_train_together_share_the_larger_bound():
  batch = batches_of_every_kind()['pairs'][0]
  some = [batching.bounded(batch, x) for x in ((9, 4), (6, 8), (7, 5))]
  assert batching.most(some) == (9, 8)
  assert batching.most([*some, batch]) == (None, None)


# ------------------------------------------------------- what stays the same --


def test_populations_of_texts_keep_their_checksums():
  """Workdirs of earlier versions go on: these values are theirs."""
  records = data.sources.packaged()[:300]
  spell = data.tokenizers.bytes()
  build = lambda **more: data.population.build(
    records, spell, max_length=96, new_clients=1, seed=3, **more
  )
  labels = ('comedies', 'histories', 'tragedies')
  assert [
    data.population.digest(build(template='plain')),
    data.population.digest(build(labels=labels, labelled=0.5)),
  ] == ['813c0f7a37204a1c01d3a954d31d3dd1', '28ba7cd1067886eb9ca5ecc394919149']


def test_a_checksum_sees_everything_of_pairs_and_pictures():
  people = lambda example: data.population.digest(
    data.population.Population(('ann',), train=((example,),), heldout=((),))
  )
  pair, seen = Pair(text(3), text(4)), picture(1, 2)
  different = [
    pair,
    pair._replace(rejected=text(4, first=2)),
    pair._replace(reference_chosen=-1.0),
    Pair(pair.rejected, pair.chosen),
    seen,
    picture(2, 2),
    seen._replace(label=1),
    Image(seen.pixels.reshape(4, 1, 1), 2),
  ]
  assert len(set(map(people, different))) == len(different)
  # Copies with other labels stay together, as texts do.
  assert encoding.content(seen) == encoding.content(picture(1, 0))


@pytest.mark.parametrize('task', [tasks.causal_lm, tasks.classification])
def test_a_plan_has_the_shapes_of_a_round(task):
  planned = work.batches_of(task(), (3, 2, 2, 8), vocab_size=50)
  one = task().example(8, 50)
  build = cohorts.cohorts(
    [[one]], num_steps=2, batch_size=2, max_length=8, collate=task().collate
  )
  cohort = build(Draw(np.array([0, -1, -1]), np.array([1, 0, 0], bool)), 0)
  alike = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
  free = lambda batch: batch._replace(bound=None)
  assert jax.tree.all(jax.tree.map(alike, free(planned), free(cohort.batches)))
  assert batching.real(planned).all()
  with pytest.raises(Error, match='this task has no `example'):
    work.batches_of(seeing(), (1, 1, 1, 8), vocab_size=50)
