"""Evaluators of a model on text that no round trained on.

Its builders return functions that compute held-out loss, perplexity and
accuracy, of all texts and of each client, and prompts for sampled replies.
"""

from fedjax_llm.evals import agreement as agreement
from fedjax_llm.evals import answers as answers
from fedjax_llm.evals import audits as audits
from fedjax_llm.evals import choosing as choosing
from fedjax_llm.evals import continual as continual
from fedjax_llm.evals import intervals as intervals
from fedjax_llm.evals import inversion as inversion
from fedjax_llm.evals import lamp as lamp
from fedjax_llm.evals import matching as matching
from fedjax_llm.evals import neighbours as neighbours
from fedjax_llm.evals import overlap as overlap
from fedjax_llm.evals import programs as programs
from fedjax_llm.evals import sandbox as sandbox
from fedjax_llm.evals import views as views
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
from fedjax_llm.evals.loop import samples as samples
from fedjax_llm.evals.loop import told_of as told_of
from fedjax_llm.evals.memory import Memory as Memory
from fedjax_llm.evals.memory import recalling as recalling
from fedjax_llm.evals.memory import remember as remember
from fedjax_llm.evals.mixing import Instances as Instances
from fedjax_llm.evals.mixing import fuse as fuse
from fedjax_llm.evals.mixing import instance_mixed as instance_mixed
from fedjax_llm.evals.mixing import instance_weights as instance_weights
from fedjax_llm.evals.mixing import text_states as text_states

__all__ = [
  'ClientSums',
  'Instances',
  'Memory',
  'Question',
  'Report',
  'agreement',
  'answers',
  'choosing',
  'continual',
  'audits',
  'fuse',
  'in_turn',
  'instance_mixed',
  'instance_weights',
  'intervals',
  'inversion',
  'lamp',
  'matching',
  'neighbours',
  'likelihood',
  'loop',
  'overlap',
  'personal',
  'programs',
  'questions',
  'recalling',
  'remember',
  'replies',
  'samples',
  'sandbox',
  'summary',
  'text_states',
  'told_of',
  'views',
]
