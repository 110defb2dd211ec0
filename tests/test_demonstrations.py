"""Prompts with examples in them: of others (Fed-DP-CoT), of one's own."""

import numpy as np
import pytest
from test_benchmarks import RUN, evaluated, lines, saying

from fedjax_llm import evals
from fedjax_llm.run.benchmarks import demonstrations, recollection, replies
from fedjax_llm.types import Error

HINT = 'Think.'
WARNING = 'May be wrong.'


def vectors(records):
  """Texts are near where they have more letters 'x'."""
  return [
    [1.0, (record.prompt or record.text).count('x')] for record in records
  ]


def too_few(records):
  return np.ones((1, 2))


def rows():
  return [
    {'group': 1, 'prompt': 'a', 'response': '4', 'who': 'ann'},
    {'group': 1, 'prompt': 'ax', 'response': '4', 'who': 'bob'},
    {'group': 2, 'prompt': 'bx', 'response': '7', 'who': 'bob'},
    {'group': 2, 'prompt': 'bxx', 'response': '7', 'who': 'zoe'},
    {'group': 3, 'prompt': 'cxxx', 'response': '9', 'who': 'ann'},
    {'group': 3, 'prompt': 'c', 'response': '9', 'who': 'zoe'},
  ]


def test_examples_are_voted_answers_to_other_questions_of_others(
  tmp_path, monkeypatch
):
  # The vote of 1 is 5, a wrong one; that of 2 is 7; 3 does not agree.
  first = ['so 5', 'thus 5', 'hm 7', 'ok 7', 'no 1', 'or 2']
  later = ['4', '5', '7', '7', '9', '']
  seen = saying(monkeypatch, demonstrations, first + later)
  result = evaluated(
    'demonstrated',
    path=lines(tmp_path / 'quiz.jsonl', *rows()),
    client_key='who',
    hint=HINT,
    disclaimer=WARNING,
    least_agreement=0.6,
    embed='test_demonstrations:vectors',
    max_new_tokens=4,
    num_resamples=20,
  )
  plain = [f'{row["prompt"]}\n\n{HINT}' for row in rows()]
  strip = lambda text: text.replace('<bos>', '').strip()
  assert [strip(x) for x in seen[:6]] == plain
  whole = lambda shots, row: '\n\n'.join([*shots, WARNING, plain[row]])
  one, other, seven, eight = (
    *('a\nso 5', 'ax\nthus 5'),
    *('bx\nhm 7', 'bxx\nok 7'),
  )
  # Of the two wordings of a group the nearest of another client, the nearest
  # group last; ann's own words never stand before ann's question.
  assert [strip(x) for x in seen[6:]] == [
    whole([seven], 0),
    whole([eight], 1),
    whole([one], 2),
    whole([other], 3),
    whole([other, eight], 4),
    whole([eight_or_seven(), one], 5),
  ]
  at = lambda name: result[f'evals/demonstrated/{name}']
  assert at('accuracy') == pytest.approx(4 / 6)
  assert at('alone') == pytest.approx(2 / 6)
  assert at('demonstrations') == pytest.approx(8 / 6)
  assert at('clients') == {'ann': 1.0, 'bob': 0.5, 'zoe': 0.5}


def eight_or_seven():
  return 'bx\nhm 7'  # zoe asked 'bxx' herself


def test_examples_that_do_not_fit_are_left_out_the_farthest_first(
  tmp_path, monkeypatch
):
  long = [{**row, 'prompt': row['prompt'] * 300} for row in rows()]
  seen = saying(monkeypatch, demonstrations, ['4'] * 6 + ['4'] * 6)
  result = evaluated(
    'demonstrated',
    path=lines(tmp_path / 'quiz.jsonl', *long),
    hint='',
    max_new_tokens=RUN.loaded.config.max_positions - 700,
    num_resamples=20,
  )
  assert all(len(text) <= 700 for text in seen)
  assert result['evals/demonstrated/demonstrations'] < 2


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'num_shots': 0}, r'num_shots is 0; it must be above 0[.]$'),
    ({'least_agreement': 2.0}, r'least_agreement=2.0; it must be from 0 to 1'),
    ({'num_samples': 2}, r'num_samples=2 at temperature 0 are all the same'),
    ({'embed': 'hashed'}, r"embed is|there is no 'hashed'"),
    (
      {'embed': 'test_demonstrations:too_few'},
      r"embed='test_demonstrations:too_few' returned values of shape \[1, 2\]",
    ),
  ],
)
def test_a_wrong_setting_of_demonstrations_is_named(
  tmp_path, settings, message
):
  path = lines(tmp_path / 'quiz.jsonl', *rows())
  with pytest.raises(Error, match=message):
    evaluated('demonstrated', path=path, max_new_tokens=4, **settings)


# --------------------------------------------------------------- own texts --


def test_a_clients_nearest_texts_stand_before_its_prompts(monkeypatch):
  asked = replies.heldout(RUN, None, 64)
  assert [one.client for one in asked] == ['ann', 'ann', 'bob', 'eve']
  prompts, counts = recollection.remembered(RUN, asked, 64, 1, 'hashed_words')
  ann, bob = RUN.population.train
  own = [ann[0], ann[1], bob[0]]  # each is its own nearest text
  for i, text in enumerate(own):
    want = [*text.tokens, *asked[i].prompt[1:]]  # one token starts the whole
    assert prompts[i] == [int(t) for t in want]
  assert prompts[3] == asked[3].prompt and counts == [1, 1, 1, 0]
  both, counts = recollection.remembered(RUN, asked, 64, 2, 'hashed_words')
  want = [*ann[1].tokens, *ann[0].tokens[1:], *asked[0].prompt[1:]]
  assert both[0] == [int(t) for t in want] and counts == [2, 2, 1, 0]
  short, counts = recollection.remembered(
    RUN, asked, len(prompts[0]), 2, 'hashed_words'
  )
  assert short[0] == prompts[0] and counts[0] == 1
  seen = saying(monkeypatch, replies, ['2', '4', '0', 'Ho', '2', '0', '0', '0'])
  result = evaluated(
    'retrieved', num_texts=1, score='exact_match', max_new_tokens=4,
    num_resamples=20,
  )  # fmt: skip
  assert [len(text) for text in seen[:3]] > [len(text) for text in seen[4:7]]
  at = lambda name: result[f'evals/retrieved/{name}']
  assert at('seen/exact_match') == pytest.approx(2 / 3)
  assert at('alone/seen/exact_match') == pytest.approx(1 / 3)
  assert at('unseen/exact_match') == 1 and at('alone/unseen/exact_match') == 0
  assert at('texts') == 0.75


def test_a_prompt_that_fills_the_room_stays_as_it_is():
  # It was cut from the left, so it does not begin with the start.
  joined = evals.neighbours.joined
  assert joined([[1, 5]], [6, 7, 8], start=[1], room=3) == ([6, 7, 8], 0)
  assert joined([], [1, 7], start=[1], room=3) == ([1, 7], 0)
  assert joined([[1, 5]], [1, 7], start=[1], room=3) == ([1, 5, 7], 1)


def test_the_nearest_are_those_of_the_cosine():
  rng = np.random.default_rng(0)
  queries, pool = rng.normal(size=(5, 3)), rng.normal(size=(9, 3))
  allowed = rng.random((5, 9)) < 0.7
  result = evals.neighbours.nearest(queries, pool, 4, allowed)
  for i, q in enumerate(queries):
    size = lambda x: np.sqrt(x @ x)
    cosine = [q @ p / (size(q) * size(p)) for p in pool]
    order = sorted(np.flatnonzero(allowed[i]), key=lambda j: -cosine[j])
    assert result[i] == order[:4]
  by_length = np.argsort(-(queries @ pool.T), 1)[:, :4].tolist()
  assert result != by_length
  with pytest.raises(Error, match=r'must be \[texts, E\]'):
    evals.neighbours.nearest(queries, pool[:, :2], 1)
  with pytest.raises(Error, match='not finite'):
    evals.neighbours.nearest(queries * np.nan, pool, 1)
