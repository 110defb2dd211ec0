"""Evaluators: choices, replies, classes and programs, against other counts."""

import itertools
import json
import math
import os
import pathlib
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, data, local, models, recipes
from fedjax_llm.data import collate, encoding
from fedjax_llm.evals import (
  agreement,
  answers,
  choosing,
  intervals,
  overlap,
  programs,
  sandbox,
)
from fedjax_llm.run import benchmarks, evaluators, tasks
from fedjax_llm.run.benchmarks import multiple_choice, replies
from fedjax_llm.types import Batch, Error, Population

GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / 'golden' / 'scores.json').read_text()
)


def whole(scores):
  return {
    name: float(x)
    for name, x in scores.combine(scores.statistics.sum(0)).items()
  }


# ------------------------------------------------------------------ counts --


def test_classes_are_those_of_scikit_learn():
  true, said = np.array(GOLDEN['true']), np.array(GOLDEN['predicted'])
  values = whole(agreement.classes(said, true, 4))
  for name in ('macro_f1', 'micro_f1', 'mcc'):
    assert values[name] == pytest.approx(GOLDEN[name], abs=1e-9)
  assert values['accuracy'] == np.mean(true == said)
  # A class that is neither true nor predicted changes nothing.
  assert whole(agreement.classes(said, true, 7)) == pytest.approx(values)
  one = whole(agreement.classes(np.zeros(3, int), np.zeros(3, int), 2))
  assert one['mcc'] == 0 and one['macro_f1'] == 1


def test_calibration_is_the_papers_sum_over_bins():
  rng = np.random.default_rng(0)
  confidence, correct = rng.uniform(0.2, 1, 50), rng.integers(0, 2, 50)
  confidence[0] = 0.4  # the upper edge of a bin belongs to it
  total = 0.0
  for b in range(5):
    low, high = b / 5, (b + 1) / 5
    inside = (confidence > low) & (confidence <= high + 1e-12)
    if inside.any():
      gap = correct[inside].mean() - confidence[inside].mean()
      total += inside.sum() / 50 * abs(gap)
  value = whole(agreement.calibration(confidence, correct, 5))['ece']
  assert value == pytest.approx(total, abs=1e-9)


def test_chrf_is_that_of_sacrebleu():
  scores = overlap.chrf()(GOLDEN['replies'], GOLDEN['references'])
  assert whole(scores)['chrf'] == pytest.approx(GOLDEN['chrf'], abs=1e-6)


@pytest.mark.parametrize(
  ('name', 'package'), [('bleu', 'sacrebleu'), ('rouge_l', 'rouge_score')]
)
def test_overlaps_of_packages_add_up_to_their_corpus_scores(name, package):
  pytest.importorskip(package)
  scores = getattr(overlap, name)()(GOLDEN['replies'], GOLDEN['references'])
  assert whole(scores)[name] == pytest.approx(GOLDEN[name], abs=1e-6)


def test_a_missing_package_is_one_sentence(monkeypatch):
  def missing(name):
    raise ImportError(name)

  monkeypatch.setattr(overlap.importlib, 'import_module', missing)
  with pytest.raises(Error, match=r'^this score is computed by sacrebleu: pip'):
    overlap.bleu()(['a'], ['b'])


@pytest.mark.parametrize('k', [1, 2, 4])
def test_pass_at_k_is_the_share_of_drawings_with_a_right_sample(k):
  for right in range(6):
    samples = [i < right for i in range(5)] if right < 6 else []
    drawings = list(itertools.combinations(samples, k))
    want = np.mean([any(drawing) for drawing in drawings])
    value = answers.pass_at_k(np.array([5]), np.array([min(right, 5)]), k)
    assert value[0] == pytest.approx(want)
    closed = 1 - math.comb(5 - min(right, 5), k) / math.comb(5, k)
    assert value[0] == pytest.approx(closed)


@pytest.mark.parametrize(
  ('reply', 'pattern', 'answer'),
  [
    ('6 * 7 = 42.\n#### 42', '#### *(.+)', '42'),
    ('costs $1,234.50 today', 'number', '1234.5'),
    ('first 3, then -4.', 'number', '-4'),
    ('no number', 'number', ''),
    ('Answer: (B) because', r'\(([A-D])\)', 'b'),
  ],
)
def test_answers_are_extracted_from_replies(reply, pattern, answer):
  pattern = answers.NUMBER if pattern == 'number' else pattern
  assert answers.extracted(reply, pattern) == answer


def test_a_missing_answer_matches_nothing():
  score = answers.exact_match('#### *(.+)')
  assert whole(score(['none', '#### 5'], ['none', 'x #### 5.0'])) == {
    'exact_match': 0.5
  }
  with pytest.raises(Error, match=r"^pattern is '\[', which is no regular"):
    answers.exact_match('[')


# --------------------------------------------------------------- intervals --


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution():
  values = np.arange(400) % 2
  (low, high) = intervals.intervals(intervals.means('x', values))['x']
  assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01)
  assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)


def test_intervals_resample_examples_and_not_their_sums():
  """BLEU, F1 and ECE are no means: each resample is combined afresh."""
  true, said = np.array(GOLDEN['true']), np.array(GOLDEN['predicted'])
  scores = agreement.classes(said, true, 4)
  rng, values = np.random.default_rng(5), []
  for _ in range(1000):
    some = rng.integers(0, 60, 60)
    values.append(whole(agreement.classes(said[some], true[some], 4))['mcc'])
  want = np.quantile(values, [0.025, 0.975])
  np.testing.assert_allclose(
    intervals.intervals(scores, num_resamples=4000)['mcc'], want, atol=0.02
  )


def test_clients_and_the_worst_tenth_have_their_own_values():
  values = [1, 1, 0, 1, 0, 0, 1]
  owners = np.array([0, 0, 2, 2, 1, 1, -1])
  told = intervals.summarised(
    'quiz', intervals.means('hits', values), owners, ['a', 'b', 'c']
  )
  assert told['evals/quiz/hits'] == pytest.approx(4 / 7)
  assert told['evals/quiz/clients'] == {'a': 1.0, 'b': 0.0, 'c': 0.5}
  assert told['evals/quiz/client_worst_10'] == 0.0
  assert told['evals/quiz/client_mean'] == 0.5
  assert told['evals/quiz/num_examples'] == 7
  assert told['evals/quiz/hits_low'] < 4 / 7 < told['evals/quiz/hits_high']


# ----------------------------------------------------------------- sandbox --


@pytest.mark.parametrize(
  ('program', 'status', 'detail'),
  [
    ('x = 1', 'passed', ''),
    ('raise ValueError("no")', 'failed', 'ValueError: no'),
    ('raise SystemExit(0)', 'failed', ''),
    *(
      (f'import os, sys; {end}({status})', 'failed', '')
      for end, status in (('os._exit', 0), ('os._exit', 17), ('sys.exit', 17))
    ),
    ('x = bytearray(10**9)', 'out of memory', 'more than 256 MB'),
    ('open("f", "w").write("x" * 2**21)', 'failed', 'OSError'),
    ('import os; assert not os.environ.get("HOME")', 'passed', ''),
  ],
)
def test_a_program_ends_within_its_limits(program, status, detail):
  outcome = sandbox.run(program, timeout=60, memory_mb=256)
  assert outcome.status == status and outcome.detail.startswith(detail)


def test_a_program_that_never_ends_is_stopped():
  outcome = sandbox.run('while True: pass', timeout=0.5)
  assert outcome == ('timed out', 'after 0.5 seconds')


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')
def test_the_children_of_a_program_end_with_it(tmp_path):
  file = tmp_path / 'child'
  program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
open({str(file)!r}, 'w').write(str(child.pid))
"""
  assert sandbox.run(program, timeout=600).status == 'passed'
  stat = pathlib.Path('/proc', file.read_text(), 'stat')
  for _ in range(600):  # at once, but for the load of the machine
    try:
      state = stat.read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
      return
    if state in 'ZX':
      return
    time.sleep(0.1)
  raise AssertionError(f'the child is still in the state {state}')


def test_programs_that_are_stopped_lose_no_result():
  problem = programs.Problem(
    'def f(x):\n', 'def check(f): assert f(2) == 4', 'f'
  )
  # As the limit of processor time stops it, without waiting for that.
  stopped = '  import os, signal\n  os.kill(os.getpid(), signal.SIGXCPU)'
  replies = ['  return x * x\nprint(f(3))', stopped]
  replies += ['```python\ndef f(x): return 2 * x\n```', '  return 5']
  scores = programs.scores([problem, problem], replies, k=(1, 2), timeout=600)
  assert whole(scores) == {
    'pass_at_1': 0.5,
    'pass_at_2': 1.0,
    'timed_out': 0.25,
  }


# --------------------------------------------------------------- evaluators --


class Run:
  """The parts of an experiment that the evaluators read."""

  def __init__(self):
    spell = data.tokenizers.bytes()
    loaded = models.random(
      vocab_size=spell.vocab_size,
      hidden_size=16,
      intermediate_size=16,
      num_layers=1,
      num_heads=2,
    )
    how = encoding.Encoding(spell, 'plain', 32)
    record = lambda prompt, reply: data.Record(prompt=prompt, response=reply)
    encoded = lambda *pair: encoding.texts(record(*pair), how).examples[0]
    ann = (encoded('1+1', '2'), encoded('2+2', '4'))
    bob, eve = (encoded('3+3', '6'),), (encoded('Hi', 'Ho'),)
    self.population = Population(
      *(('ann', 'bob'), (ann, bob), (ann, bob), ('eve',), (eve,))
    )
    self.loaded, self.tokenizer, self.labels = loaded, spell, None
    self.task = tasks.causal_lm()
    self.conf = {'population': {'template': 'plain'}}
    self.settings = SimpleNamespace(seed=0)
    self.test = SimpleNamespace(batch_size=4)
    self.adapter = adapters.lora(rank=2, targets=('q_proj',))
    self.width = 16


RUN: Any = Run()
FED_AVG = recipes.fed_avg(None, local.optimizer('sgd'))  # pyright: ignore


def params():
  start = RUN.adapter.init(jax.random.key(1), RUN.loaded.base)
  return jax.tree.map(lambda x: x + 0.1, start)


def evaluated(
  name, algorithm: Any = FED_AVG, store: Any = None, **settings: Any
):
  section = {'name': name, **settings}
  evaluators.check([section])
  examine = evaluators.build(
    *([section],), built=RUN, algorithm=algorithm, private=store is not None
  )
  return examine(RUN.loaded.base, params(), store, jax.random.key(0))


def lines(path, *rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return str(path)


@jax.jit
def logits_of(base, params, tokens):
  ones = jnp.ones_like(tokens)
  batch = Batch(tokens, ones > 0, ones, jnp.arange(tokens.shape[1])[None])
  model = RUN.loaded.model
  return model.logits(base, params, model.hidden(base, params, batch))[0]


def direct(question, choice):
  """log p(choice | question), byte by byte in float64."""
  tokens = [257, *f'{question} {choice}'.encode()]
  padded = np.zeros((1, 24), np.int32)  # what follows changes nothing before it
  padded[0, : len(tokens)] = tokens
  logits = np.asarray(logits_of(RUN.loaded.base, params(), padded), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  start = 1 + len(question.encode())
  return sum(log_p[t - 1, tokens[t]] for t in range(start, len(tokens)))


def test_half_a_character_in_a_problem_is_named(tmp_path):
  row = {'prompt': 'x\ud800', 'test': 'y', 'entry_point': 'z'}
  path = tmp_path / 'code.jsonl'
  path.write_text(json.dumps(row))
  message = r":1: 'prompt' holds half a character [(]a lone surrogate[)]: "
  with pytest.raises(Error, match=message):
    programs.read(str(path))


def test_choices_are_taken_by_log_likelihood(tmp_path):
  items = [
    {'q': 'What is 2+2?', 'c': ['4', 'four!', 'x'], 'a': 0, 'who': 'ann'},
    {'q': 'Sky?', 'c': ['red', 'blue'], 'a': 'B', 'who': 'eve'},
    {'q': 'Sea?', 'c': ['wet', 'dry'], 'a': 'dry', 'who': 'ann'},
  ]
  told = evaluated(
    'choices',
    path=lines(tmp_path / 'quiz.jsonl', *items),
    **{'question_key': 'q', 'choices_key': 'c', 'answer_key': 'a'},
    client_key='who',
    title='quiz',
    batch_size=4,
    num_resamples=50,
  )
  plain, normal = [], []
  for item, answer in zip(items, (0, 1, 1), strict=True):
    values = np.array([direct(item['q'], choice) for choice in item['c']])
    plain.append(np.argmax(values) == answer)
    sizes = np.array([len(choice) for choice in item['c']])
    normal.append(np.argmax(values / sizes) == answer)
  seen, unseen = 'evals/quiz/seen', 'evals/quiz/unseen'
  assert told[f'{seen}/accuracy'] == (plain[0] + plain[2]) / 2
  assert told[f'{seen}/accuracy_norm'] == (normal[0] + normal[2]) / 2
  assert told[f'{unseen}/clients'] == {'eve': float(plain[1])}
  # The values behind them, in batches of several widths.
  read = [choosing.Item(item['q'], tuple(item['c']), 0) for item in items]
  rows = [
    choosing.texts(x, RUN.tokenizer.encode, start=[257], max_length=64)
    for x in read
  ]
  flat = [row for some in rows for row in some]
  score = multiple_choice.likelihoods(RUN, flat, 4)
  want = [direct(x.question, choice) for x in read for choice in x.choices]
  np.testing.assert_allclose(
    score(flat, RUN.loaded.base, params()), want, rtol=1e-5
  )


@pytest.mark.parametrize('joint', ['', ' '])
def test_a_choice_keeps_the_spaces_at_the_end_of_its_question(joint):
  item = choosing.Item('Sky:\n', ('red', 'blue'), 0)
  one, _ = choosing.texts(item, str.encode, joint=joint, max_length=64)
  assert bytes(one.tokens.tolist()) == f'Sky:\n{joint}red'.encode()


def test_replies_of_a_batch_are_those_of_one_by_one():
  told = evaluated(
    'generated', score='chrf', title='arith', max_new_tokens=3, num_resamples=50
  )
  asked = replies.heldout(RUN, None, 64)
  assert [(one.reference, one.client) for one in asked] == [
    *(('2', 'ann'), ('4', 'ann'), ('6', 'bob'), ('Ho', 'eve')),
  ]
  alone = [
    models.generate(
      *(RUN.loaded, RUN.loaded.base, params(), [one.prompt]),
      max_new_tokens=3,
      eos_id=RUN.tokenizer.eos_id,
    )[0]
    for one in asked
  ]
  texts = [RUN.tokenizer.decode(reply) for reply in alone]
  some = overlap.chrf()(texts[:3], [one.reference for one in asked[:3]])
  assert told['evals/arith/seen/chrf'] == pytest.approx(whole(some)['chrf'])
  assert told['evals/arith/seen/num_examples'] == 3
  assert told['evals/arith/unseen/num_examples'] == 1
  assert told['evals/arith/tokens_per_second'] > 0
  assert told['evals/arith/reply_tokens'] == sum(map(len, alone)) / 4


def test_clients_with_models_of_their_own_answer_with_them(tmp_path):
  """A store in which bob keeps another adapter than what all are served."""
  ditto = recipes.ditto(None, local.optimizer('sgd'))  # pyright: ignore
  kept = ditto.init_client(ditto.init(jax.random.key(0), params()).params)
  other = jax.tree.map(lambda x: x - 0.4, kept)
  store = SimpleNamespace(
    seen=lambda: np.array([1]),
    gather=lambda ids: jax.tree.map(lambda x: jnp.asarray(x)[None], other),
  )
  start = ditto.init(jax.random.key(0), params()).params
  asked = replies.heldout(RUN, None, 64)[2]
  base, own = RUN.adapter.fold(RUN.loaded.base, ditto.personal(start, other))
  (reply,) = models.generate(
    *(RUN.loaded, base, own, [asked.prompt]),
    max_new_tokens=2,
    eos_id=RUN.tokenizer.eos_id,
  )
  examine = benchmarks.generated(
    *(RUN, ditto),
    score='word_f1',
    max_new_tokens=2,
    num_resamples=20,
    private=True,
  )
  told = examine(RUN.loaded.base, start, store, jax.random.key(0))
  want = whole(answers.word_f1()([RUN.tokenizer.decode(reply)], ['6']))
  assert told['evals/generated/personal/clients'] == {'bob': want['word_f1']}
  assert told['evals/generated/personal/num_examples'] == 1


def test_programs_of_the_network_are_run(tmp_path):
  path = lines(
    tmp_path / 'code.jsonl',
    *[
      {'prompt': 'x = 1\n', 'test': test, 'entry_point': 'x'}
      for test in ('def check(x): pass', 'def check(x): assert x == 2')
    ],
  )
  told = evaluated(
    *('code',),
    path=path,
    execute=True,
    max_new_tokens=2,
    num_samples=2,
    temperature=1.0,
    k=(1, 2),
    timeout=60,
    num_resamples=20,
  )
  assert told['evals/code/pass_at_2'] <= 0.5
  assert told['evals/code/pass_at_1'] <= told['evals/code/pass_at_2']
  assert told['evals/code/timed_out'] == 0


def test_classes_are_those_of_the_logits():
  labels = ('a', 'b', 'c')
  spell = data.tokenizers.bytes()
  loaded = models.random_encoder(
    labels=labels,
    vocab_size=spell.vocab_size,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
  )
  how = encoding.Encoding(spell, labels=labels, max_length=16)
  own = tuple(
    encoding.labelled(data.Record(text=text, label=label), how).examples[0]
    for text, label in (('one', 'a'), ('two', 'b'), ('three', 'c'), ('4', 'a'))
  )
  built = SimpleNamespace(
    **{
      **vars(RUN),
      'population': Population(('ann', 'bob'), ((), ()), (own[:3], own[3:])),
      'loaded': loaded,
      'labels': labels,
      'task': tasks.classification(),
    }
  )
  still = FED_AVG._replace(personal=lambda params, state: {})
  examine = benchmarks.classes(built, still, num_resamples=20)
  told = examine(loaded.base, {}, None, None)
  batch = collate.texts(own, 16)([[example] for example in own])
  logits = local.class_logits(loaded.model)(loaded.base, {}, batch)
  hits = np.argmax(logits, -1) == batch.label
  assert told['evals/classes/accuracy'] == hits.mean()
  assert told['evals/classes/clients'] == {
    'ann': hits[:3].mean(),
    'bob': float(hits[3]),
  }
  assert set(told) >= {
    f'evals/classes/{x}' for x in ('macro_f1', 'mcc', 'ece', 'mcc_low')
  }


ITEM = {'question': 'Sky?', 'choices': ['red', 'blue'], 'answer': 1}


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    (
      {'question': 'Sky?', 'options': ['a'], 'answer': 1},
      r"quiz.jsonl:2: there is no 'choices'; there is 'question', "
      r"'options', 'answer'[.]$",
    ),
    (
      {**ITEM, 'choices': ['red']},
      r":2: 'choices' is \['red'\], but must be a",
    ),
    ({**ITEM, 'answer': 2}, r":2: 'answer' is 2, but must be the number of a "),
    (
      {**ITEM, 'answer': 'C'},
      r":2: 'answer' is 'C', but must be the number of",
    ),
    ({**ITEM, 'question': 1}, r":2: 'question' is 1, but must be a string[.]$"),
  ],
)
def test_an_item_that_does_not_fit_is_one_sentence(tmp_path, row, message):
  with pytest.raises(Error, match=message):
    evaluated('choices', path=lines(tmp_path / 'quiz.jsonl', ITEM, row))


@pytest.mark.parametrize(
  ('name', 'settings', 'message'),
  [
    ('code', {'path': 'x'}, r'runs programs that a model has written, with'),
    (
      'code',
      {'path': 'x', 'execute': True, 'k': (2,)},
      r'k is \(2,\); each',
    ),
    ('classes', {}, r'classes needs task.name=classification; the task of'),
    (
      'generated',
      {'score': 'bleu', 'pattern': 'x'},
      r'pattern is of score=exa',
    ),
    ('generated', {'title': 'a/b'}, r"title is 'a/b'; it must be a word[.]$"),
    ('generated', {'limit': 0}, r'limit is 0; it must be above 0[.]$'),
    (
      'generated',
      {'max_new_tokens': 10**6},
      r'generated: max_new_tokens is 1000000; it must be below the \d+ posi',
    ),
  ],
)
def test_a_wrong_setting_of_an_evaluator_is_one_sentence(
  name, settings, message
):
  with pytest.raises(Error, match=message):
    evaluated(name, **settings)


def test_a_misspelt_evaluator_or_score_is_named():
  with pytest.raises(Error, match=r"no 'choises' \(the nearest is 'choices'"):
    evaluators.check([{'name': 'choises', 'path': 'x'}])
  with pytest.raises(Error, match=r'\[0\].score must be one of|score must be'):
    evaluators.check([{'name': 'generated', 'score': 'rouge'}])
