"""Problems of programming in the form of HumanEval, and pass@k."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.data import files
from fedjax_llm.evals import sandbox
from fedjax_llm.evals.answers import pass_at_k
from fedjax_llm.evals.intervals import Scores, joined, means
from fedjax_llm.reading import is_unicode, short
from fedjax_llm.types import Error

# Where a completion goes on with something else, as in HumanEval's evaluation.
_STOPS = ('\nclass', '\ndef', '\n#', '\nif', '\nprint', '\nassert')


class Problem(NamedTuple):
  """The start of a function, and a program that tests it.

  >>> Problem('def f():', 'def check(f): pass', 'f').client is None
  True
  """

  prompt: str
  test: str
  entry_point: str
  client: str | None = None


def read(path: str, client_key: str | None = None) -> list[Problem]:
  """Reads problems from a file with one JSON object per line, plain or .gz.

  Raises:
    Error: a field is missing or no text; the message names the line.

  >>> import json, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'code.jsonl')
  >>> row = {'prompt': 'def f():', 'test': 'x = 1', 'entry_point': 'f'}
  >>> with open(path, 'w') as f:
  ...   _ = f.write(json.dumps(row))
  >>> read(path)[0].entry_point
  'f'
  """
  problems = []
  for file in files.matching(path):
    for where, row in files.rows(file, 'jsonl'):
      keys = ['prompt', 'test', 'entry_point']
      for key in keys if client_key is None else [*keys, client_key]:
        if not isinstance(row, dict) or key not in row:
          names = ', '.join(map(repr, row)) if isinstance(row, dict) else ''
          raise Error(
            f'{where}: there is no {key!r}; there is {names or "no field"}.'
          )
        if not isinstance(row[key], str):
          raise Error(
            f'{where}: {key!r} is {short(row[key])}, but must be a string.'
          )
        if not is_unicode(row[key]):
          raise Error(
            f'{where}: {key!r} holds half a character (a lone surrogate): '
            f'{short(row[key])}.'
          )
      client = None if client_key is None else row[client_key]
      fields = {key: row[key] for key in keys}
      problems.append(Problem(**fields, client=client))
  return problems


def program(problem: Problem, reply: str) -> str:
  """Returns the program that tests a reply.

  A fenced block of code in a reply is the whole answer; else the reply goes on
  from the prompt, and ends before the next statement at its left margin.

  >>> problem = Problem('def f():\\n', 'def check(g): assert g() == 1', 'f')
  >>> program(problem, '  return 1\\nprint(f())').splitlines()
  ['def f():', '  return 1', 'def check(g): assert g() == 1', 'check(f)']
  """
  fence = re.search(r'```(?:python|py)?\n(.*?)(?:```|\Z)', reply, re.DOTALL)
  if fence is not None:
    body = fence[1]
    if not re.search(rf'def +{re.escape(problem.entry_point)}\b', body):
      body = problem.prompt + body
    else:  # its imports and helpers
      body = problem.prompt.partition('def ')[0] + body
  else:
    ends = [place for stop in _STOPS if (place := reply.find(stop)) >= 0]
    body = problem.prompt + reply[: min(ends, default=len(reply))]
  return f'{body}\n{problem.test}\ncheck({problem.entry_point})\n'


def scores(
  problems: Sequence[Problem],
  replies: Sequence[str],
  *,
  k: Sequence[int] = (1,),
  timeout: float = 5.0,
  memory_mb: int = 512,
) -> Scores:
  """Returns pass@k of problems, and the share of programs that were stopped.

  `replies` has the same number of replies for each problem, one problem after
  the other.

  >>> problem = Problem('def f():\\n', 'def check(g): assert g() == 1', 'f')
  >>> result = scores([problem], ['  return 1', '  return 2'], timeout=60)
  >>> result.statistics[0].tolist()  # pass@1 of one problem, none timed out
  [0.5, 1.0, 0.0, 1.0]
  """
  num = len(replies) // max(len(problems), 1)
  if num * len(problems) != len(replies):
    raise Error(f'{len(replies)} replies to {len(problems)} problems.')
  whole = [
    program(problem, replies[i * num + j])
    for i, problem in enumerate(problems)
    for j in range(num)
  ]
  outcomes = sandbox.run_all(whole, timeout=timeout, memory_mb=memory_mb)
  share = lambda status: np.array(
    [one.status == status for one in outcomes], float
  ).reshape(-1, num)
  passed = share('passed').sum(1)
  tries = np.full(len(problems), num)
  return joined(
    [
      *(means(f'pass_at_{x}', pass_at_k(tries, passed, x)) for x in k),
      means('timed_out', share('timed out').mean(1)),
    ]
  )
