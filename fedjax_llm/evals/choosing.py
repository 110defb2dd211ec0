"""Multiple choice by log-likelihood: texts, scores and their metrics."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.data import files
from fedjax_llm.evals.agreement import calibration
from fedjax_llm.evals.intervals import Scores, joined, means
from fedjax_llm.reading import short
from fedjax_llm.types import Error, Example


class Item(NamedTuple):
  """A question with its choices, of which one is right.

  >>> Item('2 + 2 =', ('3', '4'), answer=1).client is None
  True
  """

  question: str
  choices: tuple[str, ...]
  answer: int
  client: str | None = None


def read(
  path: str,
  *,
  question_key: str = 'question',
  choices_key: str = 'choices',
  answer_key: str = 'answer',
  client_key: str | None = None,
) -> list[Item]:
  """Reads items from a file with one JSON object per line.

  Choices are a list of texts, the answer their number from 0, a letter from A,
  or the text of a choice.

  Raises:
    Error: a field is missing or of another kind; the message names the line.

  >>> import json, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'quiz.jsonl')
  >>> row = {'question': 'Sky?', 'choices': ['red', 'blue'], 'answer': 'B'}
  >>> with open(path, 'w') as f:
  ...   _ = f.write(json.dumps(row))
  >>> read(path)[0].answer
  1
  """
  return [
    _item(row, where, question_key, choices_key, answer_key, client_key)
    for file in files.matching(path)
    for where, row in files.rows(file, 'jsonl')
  ]


def _item(
  row, where, question_key, choices_key, answer_key, client_key
) -> Item:
  if not isinstance(row, dict):
    raise Error(f'{where}: this line is no JSON object: {short(row)}.')
  keys = [question_key, choices_key, answer_key, client_key]
  for key in filter(None, keys):
    if key not in row:
      names = ', '.join(map(repr, row)) or 'no field'
      raise Error(f'{where}: there is no {key!r}; there is {names}.')
  question, choices = row[question_key], row[choices_key]
  if not isinstance(question, str):
    raise Error(
      f'{where}: {question_key!r} is {short(question)}, but must be a string.'
    )
  texts = isinstance(choices, list) and all(
    isinstance(x, str) and x for x in choices
  )
  if not texts or len(choices) < 2:
    raise Error(
      f'{where}: {choices_key!r} is {short(choices)}, but must be a list of '
      'two texts or more.'
    )
  answer = row[answer_key]
  letters = [chr(ord('A') + i) for i in range(len(choices))]
  if isinstance(answer, str) and answer in choices:
    answer = choices.index(answer)
  elif isinstance(answer, str) and answer.strip().upper() in letters:
    answer = letters.index(answer.strip().upper())
  elif isinstance(answer, str) and answer.strip().isdecimal():
    answer = int(answer)
  if type(answer) is not int or not 0 <= answer < len(choices):
    raise Error(
      f'{where}: {answer_key!r} is {short(row[answer_key])}, but must be the '
      f'number of a choice, from 0 to {len(choices) - 1}, its letter or its '
      'text.'
    )
  client = None if client_key is None else str(row[client_key])
  return Item(question, tuple(choices), answer, client)


def texts(
  item: Item,
  encode: Callable[[str], Sequence[int]],
  *,
  start: Sequence[int] = (),
  joint: str = ' ',
  max_length: int,
) -> list[Example]:
  """Returns the question with each choice, with a loss on the choice.

  The text `question + joint + choice` is tokenized as a whole, and its tokens
  after those of the question are the choice's, as in lm-eval. Questions lose
  tokens on their left above `max_length`.

  Raises:
    Error: a choice that is longer than `max_length`.

  >>> encode = lambda text: [ord(c) for c in text]
  >>> one, two = texts(
  ...   Item('a', ('b', 'cd'), 0), encode, start=[0], max_length=4)
  >>> two.tokens.tolist(), two.loss_mask.astype(int).tolist()
  ([97, 32, 99, 100], [0, 1, 1, 1])
  """
  question = item.question.rstrip()
  joint = item.question[len(question) :] + joint
  head, rows = len(encode(question)), []
  for choice in item.choices:
    whole = list(encode(f'{question}{joint}{choice}'))
    reply = whole[head:]
    if not reply or len(reply) >= max_length:
      raise Error(
        f'the choice {short(choice)} has {len(reply)} tokens; it must have '
        f'from 1 to {max_length - 1}.'
      )
    tokens = [*start, *whole[:head]][-(max_length - len(reply)) :] + reply
    learned = np.arange(len(tokens)) >= max(1, len(tokens) - len(reply))
    rows.append(Example(np.array(tokens, np.int32), learned))
  return rows


def chosen(
  items: Sequence[Item], log_likelihoods: Sequence[Sequence[float]]
) -> Scores:
  """Returns accuracy by log-likelihood, plain and normalised, and calibration.

  `accuracy` takes the choice with the largest log-likelihood, `accuracy_norm`
  that with the largest one divided by the number of its characters, as lm-eval
  does. `ece` is that of softmax(log-likelihoods).

  >>> scores = chosen([Item('?', ('aa', 'b'), 0)], [[-1.5, -1.0]])
  >>> metrics = scores.combine(scores.statistics.sum(0))
  >>> float(metrics['accuracy']), float(metrics['accuracy_norm'])
  (0.0, 1.0)
  """
  plain, normal, confidence = [], [], []
  for item, values in zip(items, log_likelihoods, strict=True):
    x = np.asarray(values, np.float64)
    sizes = np.array([len(choice) for choice in item.choices])
    plain.append(int(np.argmax(x)) == item.answer)
    normal.append(int(np.argmax(x / sizes)) == item.answer)
    shares = np.exp(x - x.max())
    confidence.append(shares.max() / shares.sum())
  return joined(
    [
      means('accuracy', plain),
      means('accuracy_norm', normal),
      calibration(np.array(confidence), np.array(plain)),
    ]
  )


def owners(
  clients: Sequence[Any], names: Sequence[str], new_names: Sequence[str]
) -> tuple[list[str], np.ndarray]:
  """Returns all clients' names and the place of each client there, -1 for None.

  Clients of a file that are none of the run's come last.

  >>> owners(['bob', None, 'eve'], ['ann', 'bob'], [])
  (['ann', 'bob', 'eve'], array([ 1, -1,  2]))
  """
  known = [*names, *new_names]
  known += sorted({c for c in clients if c is not None} - set(known))
  place = {name: i for i, name in enumerate(known)}
  ids = [-1 if client is None else place[client] for client in clients]
  return known, np.array(ids, int)
