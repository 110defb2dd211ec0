"""Computes recorded rounds again: without a client, or with client values.

    python -m fedjax_llm.replay --workdir DIR --round N
    python -m fedjax_llm.replay --workdir DIR --round N --without CLIENT
    python -m fedjax_llm.replay --workdir DIR --round N --values shapley
    python -m fedjax_llm.replay --workdir DIR --round N --forget CLIENT

The round is computed from the nearest checkpoint before it, with the same keys,
texts and client states, and compared with its record in metrics.jsonl. A run
keeps its last `keep_checkpoints` checkpoints; a round before these is reached
by computing all rounds from the start of the run. Nothing in the folder
changes. In notebooks, use `before` and `play`.
"""

from fedjax_llm.replay.moments import Moment as Moment
from fedjax_llm.replay.moments import before as before
from fedjax_llm.replay.moments import differences as differences
from fedjax_llm.replay.moments import heldout_score as heldout_score
from fedjax_llm.replay.moments import play as play
from fedjax_llm.replay.moments import without as without
from fedjax_llm.replay.program import main as main

__all__ = [
  'Moment',
  'before',
  'differences',
  'heldout_score',
  'main',
  'play',
  'without',
]
