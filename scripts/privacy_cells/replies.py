"""The replies of people that the cells train on, read once a process."""

import functools
import os
import pathlib
from collections import Counter
from collections.abc import Sequence

from fedjax_llm import data

MOST = 40  # replies of one person


@functools.cache
def chitchat() -> Sequence[data.Record]:
  """Returns the first `MOST` replies of each person, a source of a config."""
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  path = pathlib.Path(cache).expanduser() / 'chitchat/chitchat.jsonl.gz'
  records = data.sources.jsonl(
    str(path),
    client_key='client',
    prompt_key='instruction',
    response_key='response',
  )
  seen: Counter[str] = Counter()
  kept = []
  for record in records:
    seen[str(record.client)] += 1
    if seen[str(record.client)] <= MOST:
      kept.append(record)
  return kept
