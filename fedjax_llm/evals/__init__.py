"""Evals: what a model is worth on text that no round trained on."""

from fedjax_llm.evals.likelihood import ClientSums as ClientSums
from fedjax_llm.evals.likelihood import Report as Report
from fedjax_llm.evals.likelihood import likelihood as likelihood
from fedjax_llm.evals.likelihood import personal as personal
from fedjax_llm.evals.likelihood import summary as summary
from fedjax_llm.evals.loop import Question as Question
from fedjax_llm.evals.loop import in_turn as in_turn
from fedjax_llm.evals.loop import loop as loop
from fedjax_llm.evals.loop import questions as questions
from fedjax_llm.evals.loop import replies as replies

__all__ = [
  'ClientSums',
  'Question',
  'Report',
  'in_turn',
  'likelihood',
  'loop',
  'personal',
  'questions',
  'replies',
  'summary',
]
