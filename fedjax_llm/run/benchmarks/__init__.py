"""Evaluators of tasks: choices, replies, classes, programs, votes, examples.

Each is named in `evals.evaluators` of a config and reports 'evals/{title}/...'
with bootstrap intervals over examples and values of clients
(`evals.intervals`). Examples are the run's held-out ones, of clients that train
('seen') and of new clients ('unseen'), or those of a file.
"""

from fedjax_llm.run.benchmarks.comparison import judged as judged
from fedjax_llm.run.benchmarks.consistency import consistent as consistent
from fedjax_llm.run.benchmarks.demonstrations import (
  demonstrated as demonstrated,
)
from fedjax_llm.run.benchmarks.labels import classes as classes
from fedjax_llm.run.benchmarks.multiple_choice import choices as choices
from fedjax_llm.run.benchmarks.programming import code as code
from fedjax_llm.run.benchmarks.recollection import retrieved as retrieved
from fedjax_llm.run.benchmarks.replies import generated as generated
from fedjax_llm.run.benchmarks.replies import writer as writer
from fedjax_llm.run.benchmarks.retrieval import needle as needle

__all__ = [
  'choices',
  'classes',
  'code',
  'consistent',
  'demonstrated',
  'generated',
  'judged',
  'needle',
  'retrieved',
]
