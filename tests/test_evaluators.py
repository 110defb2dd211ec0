"""The evaluators that a config lists: names, import paths, and refusals."""

import json

import numpy as np
import pytest
import runs

from fedjax_llm import train, tree
from fedjax_llm.run import evaluators, provenance
from fedjax_llm.types import Error


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('texts') / 'texts.jsonl')


def length(algorithm, tests, *, scale: float = 1.0):
  """An evaluator of one's own: the norm of what is served."""

  def evaluate(base, params, store, key):
    del base, store, key
    served = algorithm.personal(params, None)
    assert tests.heldout
    return {'evals/length': scale * float(tree.norm(served))}

  return evaluate


def trained(data, folder, *more, **fields):
  fields = {
    **{'num_rounds': 2, 'evals__every': 1, 'evals__common': 0},
    **fields,
  }
  runs.done(train, runs.arguments(data, folder, *more, **fields))
  return runs.records(folder)


def test_a_list_of_evaluators_is_that_of_a_run(data, tmp_path):
  mine = {'name': f'{__name__}:length'}
  both = [{'name': 'likelihood'}, mine, {**mine, 'scale': -1.0}]
  plain = trained(data, tmp_path / 'plain', algorithm__name='fed_avg')
  listed = trained(
    *(data, tmp_path / 'listed'),
    algorithm__name='fed_avg',
    evals__evaluators=both,
    evals__best_by='length',
    evals__keep_best=True,
    keep_checkpoints=1,
  )
  file = tmp_path / 'plain' / 'provenance.json'
  (start,) = json.loads(file.read_text())['starts']
  conf = json.loads((tmp_path / 'plain' / 'config.json').read_text())
  assert start['config'] == provenance.digest(conf)
  assert start['versions']['jax'] and start['hardware']['platform'] == 'cpu'
  assert len(start['data']) == 32 and start['num_examples']['train'] > 0
  for ours, theirs in zip(listed, plain, strict=True):
    told = {k for k in theirs if k.startswith('evals/')}
    assert {k for k in ours if k.startswith('evals/')} == {
      *told,
      'evals/length',
    }
    for name in told:
      if isinstance(theirs[name], float):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
  # The last of the list has the last word, and the best round is kept by it.
  lengths = [record['evals/length'] for record in listed]
  assert max(lengths) < 0
  best = int(np.argmin(lengths))
  kept = {x.name for x in (tmp_path / 'listed' / 'checkpoints').glob('round_*')}
  assert {f'round_{number:08}' for number in (best, 2)} <= kept


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    ('likelihood', r'evals.evaluators\[0\] must be dict\(name=...\)'),
    ({'name': 'likelihod'}, r"evaluators\[0\].name: .* 'likelihood'"),
    ({'name': length, 'scal': 1.0}, r"takes no 'scal' .*nearest is 'scale'"),
    ({'name': length, 'scale': 'a'}, r'\[0\].scale must be float'),
    ({'name': length, 'tests': 1}, r'\[0\].tests is filled in by the program'),
    ({'name': 'fused', 'num_texts': 'a'}, r'num_texts must be int'),
  ],
)
def test_a_wrong_entry_is_one_sentence(section, message):
  with pytest.raises(Error, match=message):
    evaluators.check([section])


def test_metrics_have_names_that_a_report_finds():
  nameless = lambda: lambda *_: {'loss': 1.0}
  examine = evaluators.build([{'name': nameless}])
  with pytest.raises(Error, match=r"\[0\] returns the metric 'loss'"):
    examine(None, None, None, None)
