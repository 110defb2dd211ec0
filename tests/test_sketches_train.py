"""Sketches of later families through the whole program, by import paths."""

import json
import pathlib

import numpy as np
import pytest
import test_sketches
import test_sketches_server
import test_sketches_uploads

from fedjax_llm import train

ROOT = pathlib.Path(__file__).parents[1]
NUM, VERSIONS = 5, 2

path_of = lambda part: f'{part.__module__}:{part.__name__}'
RUNS = {
  'plain': {},
  'scalars': {  # of a gradient along one direction, in a seeded basis
    'algorithm.name': path_of(test_sketches.fed_spsa),
    'upload.name': path_of(test_sketches_uploads.seeded),
    'upload.num': NUM,
  },
  'secure': {'upload.name': path_of(test_sketches_uploads.pairwise)},
  'asynchronous': {
    'algorithm.name': path_of(test_sketches_server.buffered),
    'algorithm.versions': VERSIONS,
    'clients.name': path_of(test_sketches_server.arrivals),
  },
}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """The records of three rounds, of every sketch."""
  folder = tmp_path_factory.mktemp('sketches')
  texts = folder / 'texts.jsonl'
  words = 'one two three four five six seven'.split()  # noqa: SIM905
  with texts.open('w') as file:
    for i in range(40):
      line = {'client': f'c{i % 5}', 'text': f'{words[i % 7]} {words[i % 3]}'}
      file.write(json.dumps(line) + '\n')
  records = {}
  for name, parts in RUNS.items():
    settings = {
      'num_rounds': 3,
      'data.name': 'jsonl',
      'data.path': texts,
      'data.client_key': 'client',
      'data.text_key': 'text',
      'population.max_clients': 'none',
      'clients.cohort_size': 3,
      'model.hidden_size': 16,
      'model.intermediate_size': 16,
      'model.num_heads': 2,
      'model.num_layers': 1,
      'adapter.targets': "('q_proj',)",
      'local.name': 'sgd',
      'local.learning_rate': 0.05,
      'evals.samples': 0,
      **({'clients.dropout': 0.3} if name in ('plain', 'secure') else {}),
      **parts,
    }
    fields = [f'--config.{k}={v}' for k, v in settings.items()]
    config = f'{ROOT}/configs/tiny.py:smoke'
    workdir = str(folder / name)
    assert train.main(['--config', config, '--workdir', workdir, *fields]) == 0
    lines = (folder / name / 'metrics.jsonl').read_text().splitlines()
    records[name] = [json.loads(line) for line in lines]
  return records


def values(records, name):
  return [record[name] for record in records[1:]]


def test_every_sketch_trains_by_its_import_path(ran):
  for name, records in ran.items():
    assert [record['round'] for record in records] == [0, 1, 2, 3], name
    assert np.isfinite(values(records, 'local/loss')).all(), name
    assert records[-1]['evals/heldout/loss'] != records[0]['evals/heldout/loss']


def test_a_secure_sum_ends_where_plain_averaging_does(ran):
  for name in ('local/loss', 'clients/reporting', 'uploads/bytes'):
    secure, plain = (values(ran[run], name) for run in ('secure', 'plain'))
    np.testing.assert_allclose(secure, plain, rtol=1e-4)
  assert sum(values(ran['secure'], 'clients/dropped_out')) > 0


def test_coefficients_are_all_that_is_sent(ran):
  assert values(ran['scalars'], 'uploads/bytes') == [3 * 4 * NUM] * 3


def test_clients_that_started_too_long_ago_are_left_out(ran):
  runs = ran['asynchronous']
  assert values(runs, 'clients/reporting') == [3, 3, 2]
  assert values(runs, 'clients/too_late') == [0, 0, 1]
