"""The program `evaluate`, lm-eval's tasks, and the origin of results."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import runs

from fedjax_llm import adapters, data, evaluate, models, train
from fedjax_llm.evals import choosing
from fedjax_llm.run import harness, provenance, rebuild
from fedjax_llm.run.benchmarks import multiple_choice
from fedjax_llm.types import Error

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3.0
"""
ITEMS = [
  {'question': 'Capital of France:', 'choices': ['Rome', 'Paris'], 'answer': 1},
  {'question': 'Capital of Italy:', 'choices': ['Rome', 'Paris'], 'answer': 0},
  {'question': 'Two and two:', 'choices': ['4', 'four', 'x'], 'answer': 0},
]


def trained(folder):
  """A run whose evaluators are those of generated replies, too."""
  texts = runs.texts(folder / 'texts.jsonl')
  words = runs.arguments(
    *(texts, folder / 'run'),
    algorithm__name='fed_avg',
    num_rounds=1,
    evals__evaluators=[
      {'name': 'likelihood'},
      {'name': 'generated', 'max_new_tokens': 2, 'num_resamples': 20},
    ],
  )
  runs.done(train, words)
  return folder / 'run'


def test_a_start_with_other_versions_is_noted_behind_the_first(monkeypatch):
  one = provenance.started(None, 0, {'seed': 1}, data='x')
  monkeypatch.setattr(provenance, 'versions', lambda: {'jax': '99'})
  two = provenance.started(json.dumps(one), 4, {'seed': 1}, data='x')
  assert [start['round'] for start in two['starts']] == [0, 4]
  assert two['starts'][1]['versions'] == {'jax': '99'}
  again = provenance.started('{"starts": [3', 4, {'seed': 1}, data='x')
  assert [start['round'] for start in again['starts']] == [4]


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--tasks', ','], '--tasks is empty: name a task of lm-eval or a file'),
    (['--tasks', 'x', '--limit', '0'], '--limit is 0; it must be at least 1.'),
    (['--tasks', 'x', '--round', 'y'], "argument --round: 'y' is no round; it"),
  ],
)
def test_a_wrong_command_is_one_sentence(words, message):
  status, _, error = runs.run(evaluate, ['--workdir', 'none', *words])
  assert status == 1 and message in error


def test_a_missing_package_is_one_sentence(monkeypatch):
  def missing(name):
    raise ImportError(name)

  monkeypatch.setattr(harness.importlib, 'import_module', missing)
  with pytest.raises(Error, match=r'^tasks of lm-eval need the package: pip'):
    harness.evaluate(None, ['x'])


def test_a_local_task_of_lm_eval_has_the_choices_of_the_evaluator(
  tmp_path,
):
  pytest.importorskip('lm_eval')
  run = trained(tmp_path)
  last = runs.records(run)[-1]
  assert 0 <= last['evals/generated/exact_match_high'] <= 1
  file = tmp_path / 'items.jsonl'
  file.write_text('\n'.join(map(json.dumps, ITEMS)))
  task = tmp_path / 'capitals.yaml'
  task.write_text(TASK.format(file=file))
  out = tmp_path / 'out.json'
  folder = ['--workdir', run, '--trust-code']
  words = [*folder, '--tasks', task, '--out', out]
  status, text, error = runs.run(evaluate, words)
  assert status == 0, error
  result = json.loads(out.read_text())
  made = result['provenance']
  assert made['task_versions'] == {'capitals': 3.0}
  assert made['num_examples'] == {'capitals': 3} and made['versions']['lm_eval']
  assert 'capitals' in text and '(3 examples)' in text

  made = rebuild.open(str(run), trusted=True)
  base, params = adapters.fold(made.loaded.base, made.params)
  spell = data.tokenizers.bytes()
  items = choosing.read(str(file))
  rows = [
    choosing.texts(item, spell.encode, start=[257], max_length=64)
    for item in items
  ]
  flat = [row for some in rows for row in some]
  built = SimpleNamespace(loaded=made.loaded, tokenizer=spell)
  values = iter(multiple_choice.likelihoods(built, flat, 4)(flat, base, params))
  scores = choosing.chosen(items, [[next(values) for _ in x] for x in rows])
  metrics = scores.combine(scores.statistics.sum(0))
  ours = [float(metrics[name]) for name in ('accuracy', 'accuracy_norm')]
  theirs = result['results']['capitals']
  assert ours == [theirs['acc,none'], theirs['acc_norm,none']]

  status, _, error = runs.run(evaluate, [*folder, '--tasks', 'arc_esy'])
  assert status == 1 and "lm-eval has no task 'arc_esy'; the nearest" in error


def test_lm_eval_gets_log_likelihoods_and_greedy_replies():
  pytest.importorskip('lm_eval')
  spell = data.tokenizers.bytes()
  loaded = models.random(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
  )
  network = harness.model(
    *(loaded, spell, loaded.base, {}), stops=[258], batch_size=2
  )
  ask = lambda *args: SimpleNamespace(args=args)
  pairs = [('a b', ' c'), ('x', 'yzyzyzyzyz'), ('', 'q')]
  results = network.loglikelihood([ask(*p) for p in pairs], disable_tqdm=True)
  for (context, reply), (value, _) in zip(pairs, results, strict=True):
    total, tokens = 0.0, [257, *context.encode()]
    for token in reply.encode():
      text = np.array([tokens], np.int32)
      batch = models.generate.__globals__['_texts'](
        text, np.array([len(tokens)])
      )
      hidden = loaded.model.hidden(loaded.base, {}, batch)[0, -1]
      logits = np.asarray(
        loaded.model.logits(loaded.base, {}, hidden), np.float64
      )
      total += logits[token] - np.log(np.exp(logits).sum())
      tokens.append(token)
    assert value == pytest.approx(total, abs=1e-3)
  whole = network.loglikelihood_rolling([ask('xyz')])[0]
  assert whole == pytest.approx(
    network.loglikelihood([ask('', 'xyz')], disable_tqdm=True)[0][0], abs=1e-3
  )
  replies = network.generate_until(
    [ask('abc', {'max_gen_toks': 3}), ask('d', {'max_gen_toks': 3})]
  )
  alone = models.generate(
    *(loaded, loaded.base, {}, [[257, *b'abc'], [257, *b'd']]),
    max_new_tokens=3,
    eos_id=258,
  )
  assert replies == [spell.decode(reply) for reply in alone]
