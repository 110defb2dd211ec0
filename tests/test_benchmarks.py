"""Evaluators: choices, replies, classes and programs, against other counts."""

import http.server
import itertools
import json
import math
import os
import pathlib
import re
import sys
import threading
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
  formulas,
  haystack,
  intervals,
  judging,
  overlap,
  programs,
  sandbox,
)
from fedjax_llm.run import benchmarks, evaluators, tasks
from fedjax_llm.run.benchmarks import (
  comparison,
  consistency,
  multiple_choice,
  replies,
  retrieval,
)
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


# ---------------------------------------- votes, retrieval, judges, formulas --


def saying(monkeypatch, module, replies):
  """The network says these texts, in turn; returns the prompts it got."""
  seen, left = [], list(replies)

  def writer(built, **settings):
    def write(base, params, prompts, **more):
      seen.extend(built.tokenizer.decode(prompt) for prompt in prompts)
      return [built.tokenizer.encode(left.pop(0)) for _ in prompts]

    return write

  monkeypatch.setattr(module, 'writer', writer)
  return seen


def test_all_wordings_of_a_question_get_the_most_frequent_answer(
  tmp_path, monkeypatch
):
  rows = [
    {'group': 1, 'prompt': 'a', 'response': '4', 'who': 'ann'},
    {'group': 1, 'prompt': 'b', 'response': '#4', 'who': 'bob'},
    {'group': 2, 'prompt': 'c', 'response': '7', 'who': 'ann'},
  ]
  said = ['It is 4.', 'five', '4', '5', '6', '7']
  seen = saying(monkeypatch, consistency, said)
  result = evaluated(
    'consistent',
    path=lines(tmp_path / 'quiz.jsonl', *rows),
    client_key='who',
    hint='Think.',
    num_samples=2,
    temperature=1.0,
    max_new_tokens=8,
    num_resamples=20,
  )
  assert len(seen) == 6 and 'Think.' in seen[0]
  at = lambda name: result[f'evals/consistent/{name}']
  # 4 has two of the four votes of the first question, 6 came before 7.
  assert at('voted') == pytest.approx(2 / 3)
  assert at('alone') == pytest.approx((0.5 + 0.5 + 0.5) / 3)
  assert at('agreement') == pytest.approx((0.5 + 0.5 + 0.5) / 3)
  assert at('clients') == {'ann': 0.5, 'bob': 1.0}
  rows[1]['response'] = '5'
  message = r":2: 'response' is '5', but another wording of group '1' has '4'"
  with pytest.raises(Error, match=message):
    evaluated('consistent', path=lines(tmp_path / 'quiz.jsonl', *rows))
  rows[0]['response'] = 'four'
  message = r":1: 'response' is 'four', in which pattern='number' finds no"
  with pytest.raises(Error, match=message):
    evaluated('consistent', path=lines(tmp_path / 'quiz.jsonl', *rows))


def test_a_fact_is_asked_at_every_depth_of_texts_of_a_length(monkeypatch):
  config = RUN.loaded.config._replace(max_positions=600)
  monkeypatch.setattr(RUN, 'loaded', RUN.loaded._replace(config=config))
  texts = [haystack.needle(n, d, 0) for n in (0, 1, 2, 3) for d in (0.0, 1.0)]
  assert all(one.prompt.count(one.answer) == 1 for one in texts)
  first, last = texts[-2].prompt, texts[-1].prompt
  assert first.startswith('The number of the house is')
  assert last.split('\n')[0].endswith(f'{texts[-1].answer}.')

  answers_of = {}

  def writer(built, **settings):
    def write(base, params, prompts, **more):
      spoken = []
      for prompt in prompts:
        text = built.tokenizer.decode(prompt)
        answers_of[text] = len(prompt)
        right = re.findall(r'is (\d+)\.', text)[0]
        spoken.append(f' {right}.' if text.startswith('The number') else ' no')
      return [built.tokenizer.encode(reply) for reply in spoken]

    return write

  monkeypatch.setattr(retrieval, 'writer', writer)
  settings: Any = dict(depths=(0.0, 1.0), per_cell=2, num_resamples=20)
  result = evaluated('needle', lengths=(300, 500), **settings)
  at = lambda name: result[f'evals/needle/{name}']
  assert at('accuracy') == at('length_300/accuracy') == 0.5
  assert (at('depth_0/accuracy'), at('depth_1/accuracy')) == (1.0, 0.0)
  sizes = sorted(answers_of.values())
  # A sentence more would not fit.
  assert all(300 - 80 < n <= 300 for n in sizes[:4])
  assert all(500 - 80 < n <= 500 for n in sizes[4:])
  message = r'needle: lengths has 20, too short for the question, of \d+ token'
  with pytest.raises(Error, match=message):
    evaluated('needle', lengths=(20,), **settings)
  with pytest.raises(Error, match=r'lengths has 9999; with .* at most 592[.]$'):
    evaluated('needle', lengths=(9999,), **settings)


def test_a_judge_is_asked_in_both_orders_and_may_fall_silent(
  tmp_path, monkeypatch
):
  rows = [{'prompt': f'q{i}', 'response': f'r{i}'} for i in range(3)]
  path, out = lines(tmp_path / 'p.jsonl', *rows), tmp_path / 'pairs.jsonl'
  saying(monkeypatch, comparison, ['good', 'bad', 'good'] * 2)
  settings: Any = dict(
    path=path, out=str(out), against='reference', max_new_tokens=4
  )
  result = evaluated('judged', **settings)
  assert result == {'evals/judged/pairs': 3, 'evals/judged/judged': 0}
  pairs = [json.loads(line) for line in out.read_text().splitlines()]
  assert [pair['reply'] for pair in pairs] == ['good', 'bad', 'good']
  assert [pair['other'] for pair in pairs] == ['r0', 'r1', 'r2']

  asked = []

  def endpoint(url, model, *, key, timeout):
    def ask(message):
      asked.append(message)
      if len(asked) > 4:
        raise Error('the judge is down.')
      mine = 'A' if message.index('[reply A]\n') else ''
      first = message.split('[reply A]\n')[1].startswith('good')
      if 'bad' in message:  # always the first place
        return 'Better: A'
      return f'Better: {mine if first else "B"}'

    return ask

  monkeypatch.setattr(comparison.judging, 'endpoint', endpoint)
  judge: Any = dict(url='http://x/v1', judge='m')
  result = evaluated('judged', **settings, **judge, num_resamples=20)
  assert (result['evals/judged/pairs'], result['evals/judged/judged']) == (3, 2)
  assert result['evals/judged/win_rate'] == 0.75  # a win, and a tie
  pairs = [json.loads(line) for line in out.read_text().splitlines()]
  assert [pair.get('score') for pair in pairs] == [1.0, 0.5, None]
  assert pairs[2]['error'] == 'the judge is down.'
  with pytest.raises(Error, match=r"url is 'http://x', but judge is empty;"):
    evaluated('judged', **settings, url='http://x')


def test_an_endpoint_gets_the_message_and_its_failures_are_one_sentence():
  bodies = []

  class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      size = int(self.headers['Content-Length'])
      bodies.append(
        (self.path, self.headers, json.loads(self.rfile.read(size)))
      )
      if len(bodies) > 3:  # the key must not follow to another place
        self.send_response(302)
        self.send_header('Location', f'{url}elsewhere')
        self.send_header('Content-Length', '0')
        self.end_headers()
        return
      choices = [{'message': {'content': 'Better: A'}}]
      body = json.dumps({'choices': choices[: len(bodies) % 2]}).encode()
      self.send_response(200)
      # The third reply breaks off.
      size = len(body) + (len(bodies) > 2)
      self.send_header('Content-Length', str(size))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, format, *args):
      del format, args

  server = http.server.HTTPServer(('127.0.0.1', 0), Answers)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    url = f'http://127.0.0.1:{server.server_port}/v1/'
    ask = judging.endpoint(url, 'm', key='k', timeout=600)
    assert ask('Hi') == 'Better: A'
    with pytest.raises(
      Error, match=r'^http.*/completions gave no reply: Index'
    ):
      ask('Hi')
    with pytest.raises(Error, match=r'gave no reply: IncompleteRead'):
      ask('Hi')
    with pytest.raises(Error, match=r'gave no reply: <HTTPError 302'):
      ask('Hi')
  finally:
    server.shutdown()
    server.server_close()
  assert len(bodies) == 4
  place, headers, body = bodies[0]
  assert place == '/v1/chat/completions'
  assert headers['Authorization'] == 'Bearer k'
  assert body['model'] == 'm' and body['messages'][0]['content'] == 'Hi'


def test_formulas_are_compared_by_value():
  pytest.importorskip('math_verify')
  score = formulas.mathematics()
  replies = ['So it is 0.5.', '18 dollars', '3', '']
  references = [r'$\frac{1}{2}$', '#### 18', '4', '4']
  hits = score(replies, references).statistics[:, 0].tolist()
  assert hits == [1.0, 1.0, 0.0, 0.0]


def test_without_math_verify_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  with pytest.raises(Error, match=r"pip install 'fedjax_llm\[math\]'[.]$"):
    formulas.mathematics()(['1'], ['1'])


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
