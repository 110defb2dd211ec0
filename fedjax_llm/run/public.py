"""The section `public` of a config: texts on which the server itself trains.

`batches` returns them in the form of a client's steps, `in_common` in the
tokens of several tokenizers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import clients, data
from fedjax_llm.run import tasks
from fedjax_llm.types import Batch, Error

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


def in_common(
  records: Sequence[data.Record],
  settings: Mapping[str, Any],
  tokenizers: Sequence[data.tokenizers.Tokenizer],
  *,
  task: tasks.Task,
  batch_size: int,
  seed: int,
) -> list[Batch]:
  """Returns the same public texts in the tokens of each tokenizer.

  [M, B, T] for each, with T that of its longest text; at most `MOST`
  batches. A text counts where every tokenizer makes one example of the
  whole of it.

  Raises:
    Error: there are no records, or no text that all tokenizers can hold.
  """
  if not records:
    raise Error('public: the source has no text.')
  limit = settings.get('max_length', 256)
  template = settings.get('template', 'chat')
  long = settings.get('long_replies', 'drop')
  hows = [data.Encoding(x, template, limit, long) for x in tokenizers]
  rows: list[list[Any]] = []
  for i in np.random.default_rng(seed).permutation(len(records)):
    if len(rows) >= MOST * batch_size:
      break
    each = [task.encode(records[i], how) for how in hows]
    if all(len(one.examples) == 1 and not _is_cut(one) for one in each):
      rows.append([one.examples[0] for one in each])
  if not rows:
    raise Error(
      f'public: none of the {len(records)} texts has at most {limit} tokens in '
      f'all {len(tokenizers)} tokenizers: raise population.max_length.'
    )
  rows = rows[: max(len(rows) // batch_size, 1) * batch_size]
  result = []
  for i, one in enumerate(tokenizers):
    examples = [row[i] for row in rows]
    width = -(-max(map(task.length, examples)) // 8) * 8
    filled = [[x] for x in examples] + [[]] * (-len(examples) % batch_size)
    batch = task.collate(examples, width, one.pad_id)(filled)
    shape = lambda x: np.asarray(x).reshape(-1, batch_size, *x.shape[1:])
    result.append(jax.tree.map(shape, batch)._replace(bound=None))
  return result


def _is_cut(encoded: data.Encoded) -> bool:
  """Returns True if a part of a record is in none of its examples."""
  return bool(
    encoded.texts_cut or encoded.replies_cut or encoded.prompts_truncated
  )
