"""Votes over answers: the most frequent one of a group of questions."""

import collections
from collections.abc import Sequence


def majority(answers: Sequence[str]) -> tuple[str, float]:
  """Returns the most frequent answer and its share of all answers.

  Empty answers do not count as candidates; of equally frequent answers the
  first one wins. Without a candidate the answer is ''.

  Self-consistency, Wang et al. 2022, arXiv 2203.11171.

  >>> majority(['4', '', '5', '4'])
  ('4', 0.5)
  >>> majority([''])
  ('', 0.0)
  """
  counts = collections.Counter(answer for answer in answers if answer)
  if not counts:
    return '', 0.0
  (answer, number), *_ = counts.most_common(1)
  return answer, number / len(answers)
