"""Files of questions that several clients ask in words of their own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.data import drift, files
from fedjax_llm.data.sources import Record, text_of
from fedjax_llm.evals import answers, voting
from fedjax_llm.run import builders
from fedjax_llm.types import Error


class Wording(NamedTuple):
  """One client's words for a question, and the right answer.

  >>> Wording('1', 'What is 2 + 2?', '4', 'ann').answer
  '4'
  """

  group: str  # of all wordings of the question
  text: str
  answer: str  # as `answers.extracted` returns it
  client: str | None


def read(
  path: str,
  keys: tuple[str, str, str, str | None],
  pattern: str,
) -> list[Wording]:
  """Reads wordings, one JSON object a line.

  Args:
    path: of the file, or a pattern of several.
    keys: the fields of the group, the prompt, the response and the client.
    pattern: of answers in responses, as `answers.compiled` returns it.

  Raises:
    Error: a file or field that does not fit; a right answer that the pattern
      does not find, or right answers that differ within a group.
  """
  group_key, prompt_key, response_key, client_key = keys
  result: list[Wording] = []
  wanted: dict[str, str] = {}
  for file in files.matching(path):
    for where, row in files.rows(file, 'jsonl'):
      if not isinstance(row, dict):
        raise Error(f'{where}: this line is no JSON object.')
      field = lambda key, row=row, where=where: text_of(row, key, where)
      group = text_of(row, group_key, where, numbers=True)
      answer = answers.extracted(
        field(response_key), answers.compiled('pattern', pattern)
      )
      if not answer:
        raise Error(
          f'{where}: {response_key!r} is {field(response_key)!r}, in which '
          f'pattern={pattern!r} finds no answer.'
        )
      if wanted.setdefault(group, answer) != answer:
        raise Error(
          f'{where}: {response_key!r} is {answer!r}, but another wording of '
          f'{group_key} {group!r} has {wanted[group]!r}.'
        )
      client = field(client_key) if client_key else None
      result.append(Wording(group, field(prompt_key), answer, client))
  return result


def votes(
  wordings: Sequence[Wording], own: Sequence[Sequence[str]]
) -> dict[str, tuple[str, float]]:
  """Returns the vote of each group over its wordings' answers: `voting`.

  Args:
    wordings: of all groups.
    own: the answers to each of them.

  >>> ask = lambda group: Wording(group, '', '', None)
  >>> votes([ask('a'), ask('b'), ask('a')], [['4'], ['7'], ['4']])
  {'a': ('4', 1.0), 'b': ('7', 1.0)}
  """
  each: dict[str, list[str]] = {}
  for one, some in zip(wordings, own, strict=True):
    each.setdefault(one.group, []).extend(some)
  return {group: voting.majority(some) for group, some in each.items()}


def hits(said: Sequence[str], answer: str) -> float:
  """Returns the share of answers that are the right one.

  >>> hits(['4', '', '5', '4'], '4')
  0.5
  """
  return float(np.mean([bool(answer) and x == answer for x in said]))


def embedding(name: str) -> Callable[[Sequence[Record]], Any]:
  """Returns the function of vectors [texts, E] that a config names.

  It is 'hashed_words' (`data.drift.hashed_words`) or the import path of a
  function of records.

  Raises:
    Error: no such function; from the call, another number of vectors.

  >>> embedding('hashed_words')([Record(text='to be')]).shape
  (1, 256)
  """
  known = {'hashed_words': drift.hashed_words}
  vectors_of = builders.resolve_builder(
    'evals.evaluators', name, known, 'evals.evaluators: embed'
  )

  def checked(records: Sequence[Record]) -> np.ndarray:
    vectors = np.asarray(vectors_of(records))
    if vectors.ndim != 2 or len(vectors) != len(records):
      raise Error(
        f'evals.evaluators: embed={name!r} returned values of shape '
        f'{list(vectors.shape)} for {len(records)} texts: they must be '
        '[texts, E].'
      )
    return vectors

  return checked
