"""The section `public` of a config: texts on which the server itself trains.

`batches` returns them in the form of a client's steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import clients, data
from fedjax_llm.run import tasks
from fedjax_llm.types import Error

MOST = 64  # batches: they are constants of the compiled round


def batches(
  records: Sequence[data.Record],
  settings: Mapping[str, Any],
  *,
  task: tasks.Task,
  tokenizer: Any,
  labels: Sequence[str] | None,
  batch_size: int,
  width: int,
  seed: int,
) -> Any:
  """Returns NumPy batches [M, B, ...] of public texts, at most 64.

  Args:
    records: of the source that the section names.
    settings: the resolved section `population`: template and long replies.
    task, tokenizer, labels: of the run.
    batch_size: B, that of the clients.
    width: T, that of the clients' rows; longer texts are cut to it.
    seed: decides which texts are taken where there are more.

  Raises:
    Error: no record gives an example.

  >>> from fedjax_llm.data import tokenizers
  >>> one = batches(
  ...   [data.Record(text='to be')] * 3, {'template': 'plain'}, width=8,
  ...   task=tasks.causal_lm(), tokenizer=tokenizers.bytes(), labels=None,
  ...   batch_size=2, seed=0)
  >>> one.tokens.shape
  (2, 2, 8)
  """
  how = data.Encoding(
    tokenizer,
    settings.get('template', 'chat'),
    width,
    settings.get('long_replies', 'drop'),
    labels,
  )
  order = np.random.default_rng(seed).permutation(len(records))
  examples: list[Any] = []
  for i in order:
    if len(examples) >= MOST * batch_size:
      break
    examples += task.encode(records[i], how).examples
  if not examples:
    raise Error(
      f'public: none of the {len(records)} records gives a text of at most '
      f'{width} tokens.'
    )
  (group,) = clients.cohorts.rows(
    [examples[: MOST * batch_size]],
    batch_size=batch_size,
    max_length=width,
    pad_id=tokenizer.pad_id,
    collate=task.collate,
    length=task.length,
  )
  return jax.tree.map(np.asarray, group.batches)
