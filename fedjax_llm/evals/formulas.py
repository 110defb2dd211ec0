"""Equality of mathematical answers, by math-verify (extra `math`)."""

import importlib
from collections.abc import Sequence

from fedjax_llm.evals.answers import Scorer
from fedjax_llm.evals.intervals import Scores, means
from fedjax_llm.types import Error


def mathematics() -> Scorer:
  """Returns the scorer of answers that are equal as numbers or formulas.

  The last answer of a reply and of its reference are read as LaTeX or plain
  expressions and compared by value: 0.5 equals \\frac{1}{2}. A text without
  an answer equals none.

  Raises:
    Error: from the scorer, math-verify is not installed.

  >>> scorer = mathematics()  # then scorer(replies, references)
  """

  def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
    try:
      package = importlib.import_module('math_verify')
    except ImportError as error:
      raise Error(
        "score=math is computed by math-verify: pip install 'fedjax_llm[math]'."
      ) from error
    hits = [
      bool(package.verify(package.parse(reference), package.parse(reply)))
      for reply, reference in zip(replies, references, strict=True)
    ]
    return means('math', hits)

  return score
