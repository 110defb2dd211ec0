"""Clients that join after training: their start, their steps, their records."""

import pathlib

import jax
import numpy as np
import pytest
import runs

from fedjax_llm import data, local, recipes
from fedjax_llm.report import newcomers as shown
from fedjax_llm.report import runs as reports
from fedjax_llm.run import config, evaluators, experiment, newcomers, sections
from fedjax_llm.types import Error

FIELDS = {
  'algorithm__name': 'fed_sa',
  'population__new_clients': "('bob','eve')",
  'population__heldout_fraction': 0.0,
  'cohort__batch_size': 2,
  'local__learning_rate': 0.5,
}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  texts = runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')
  words = runs.arguments(texts, 'none', **FIELDS)
  conf = config.parse(words, sections.SPEC).config
  return experiment.build(conf, say=lambda text: None)


def away(algorithm, built):
  """The server's parameters, as after some rounds."""
  params = algorithm.init(jax.random.key(0), built.initial).params
  return jax.tree.map(lambda x: x + 0.1 if x.ndim > 1 else x, params)


def examine(built, algorithm, params, **settings):
  examiner = evaluators.build(
    [{'name': 'newcomers', **settings}],
    built=built,
    algorithm=algorithm,
    tests=None,
    private=True,
    loss=built.task.loss(built.loaded, per_row=True),
    model=built.loaded.model,
    together=None,
  )
  return examiner(built.base, params, None, jax.random.key(1))


def by_hand(built, start, num_steps, rate=0.5):
  """Plain SGD on the first batches of each new client, then its loss."""
  loss = built.task.loss(built.loaded)
  by_row = jax.jit(built.task.loss(built.loaded, per_row=True))
  mean = jax.jit(
    jax.grad(
      lambda p, batch: (lambda x: x.total / x.count)(
        loss(built.base, p, batch, jax.random.key(0))
      ),
      allow_int=True,
    )
  )
  totals, counts = [], []
  for k, own in enumerate(built.population.new):
    adapt, test = newcomers.split(own, 0.5)
    collate = built.task.collate(adapt + test, built.width, 0)
    order = np.random.default_rng((0, 201, 0, k))  # that of a cohort's client
    stream = np.concatenate([order.permutation(len(adapt)) for _ in range(2)])
    params = start
    for step in range(num_steps):
      rows = [[adapt[i]] for i in stream[2 * step : 2 * step + 2]]
      grads = mean(params, collate(rows))
      node = params['layers']['self_attn']['q_proj']
      slope = grads['layers']['self_attn']['q_proj']
      new = node._replace(a=node.a - rate * slope.a, b=node.b - rate * slope.b)
      params = {'layers': {'self_attn': {'q_proj': new}}}
    sums = by_row(built.base, params, collate([[x] for x in test]), None)
    totals.append(float(sums.total.sum()))
    counts.append(float(sums.count.sum()))
  return totals, counts


def test_newcomers_take_the_local_steps_of_the_config(built):
  """From the model of a client that the method has never seen, or alone."""
  algorithm = built.method()
  params = away(algorithm, built)
  metrics = examine(built, algorithm, params, steps=(1, 3))
  assert built.population.new_names == ('bob', 'eve')
  begun = algorithm.init(built.round_key, built.initial).params
  new = lambda params: algorithm.personal(params, algorithm.init_client(params))
  for name, start, k in (
    ('steps_0', new(params), 0),
    ('steps_1', new(params), 1),
    ('steps_3', new(params), 3),
    ('alone_3', new(begun), 3),
  ):
    totals, counts = by_hand(built, start, k)
    loss = metrics[f'evals/newcomers/{name}/loss']
    assert loss == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    each = metrics[f'evals/newcomers/{name}/clients']
    assert list(each) == ['bob', 'eve']
    assert list(each.values()) == pytest.approx(
      [t / c for t, c in zip(totals, counts)], rel=1e-5
    )
  assert 'evals/newcomers/alone_0/loss' not in metrics


def test_a_shared_model_is_the_start_of_all_methods_without_private_parts(
  built,
):
  plain = recipes.fed_avg(None, local.optimizer('sgd'))
  params = away(plain, built)
  metrics = examine(built, plain, params, steps=(3,), alone=False)
  totals, counts = by_hand(built, params, 3)
  assert metrics['evals/newcomers/steps_3/loss'] == pytest.approx(
    sum(totals) / sum(counts), rel=1e-5
  )
  assert set(metrics) == {
    f'evals/newcomers/steps_{k}/{x}'
    for k in (0, 3)
    for x in ('loss', 'accuracy', 'clients')
  }


def test_alone_begins_where_a_method_that_draws_its_start_begins(built):
  plain = recipes.fed_avg(None, local.optimizer('sgd'))

  def init(key, params):
    shift = jax.random.uniform(key)
    drawn = jax.tree.map(lambda x: x + shift if x.ndim > 1 else x, params)
    return plain.init(key, drawn)

  drawing = plain._replace(init=init)
  begun = init(built.round_key, built.initial).params  # that of the run
  metrics = examine(built, drawing, begun, steps=(3,))
  for field in ('loss', 'clients'):
    assert metrics[f'evals/newcomers/alone_3/{field}'] == pytest.approx(
      metrics[f'evals/newcomers/steps_3/{field}'], rel=1e-6
    )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'steps': ()}, r'newcomers.steps is \(\): numbers of local steps'),
    ({'share': 1.0}, 'newcomers.share is 1.0: it is above 0 and below 1'),
  ],
)
def test_wrong_numbers_are_refused(built, settings, message):
  with pytest.raises(Error, match=message):
    examine(built, built.method(), None, **settings)


def test_new_clients_by_name():
  records = [data.Record(client=x, text=x * 3) for x in 'abcabc']
  build = lambda new: data.build(
    records, data.bytes(), template='plain', new_clients=new
  )
  assert build(('c', 'a')).new_names == ('a', 'c')
  assert build('b').names == ('a', 'c')
  with pytest.raises(Error, match="new_clients names 'z', which is none of"):
    build(['z'])
  with pytest.raises(Error, match='new_clients names all clients'):
    build(['a', 'b', 'c'])


def test_the_report_has_a_row_of_the_last_evaluation():
  loss = lambda **values: {
    f'evals/newcomers/{name}/loss': value for name, value in values.items()
  }
  run = lambda label, *records: reports.Run(
    label, pathlib.Path(), {}, records, None, None, False
  )
  first = run('a', loss(steps_0=9.0), loss(steps_10=1.0, steps_5=2.0), {})
  second = run('b', loss(alone_5=3.0, steps_0=4.0))
  (table,) = shown.table([first, second])
  assert table.header == ['run', 'as served', '5 steps', '10 steps',
                          'alone, 5 steps']  # fmt: skip
  assert table.rows == [
    ['a', None, 2.0, 1.0, None],
    ['b', 4.0, None, None, 3.0],
  ]
  assert not shown.table([run('c', {})])


def test_without_new_clients_there_is_nothing_to_test(built):
  nobody = built.population._replace(new_names=(), new=())
  with pytest.raises(Error, match=r'set population.new_clients'):
    examine(built._replace(population=nobody), built.method(), None)
