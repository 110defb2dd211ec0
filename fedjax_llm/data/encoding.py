"""Encoders of a task: functions from records to examples."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm.data import text
from fedjax_llm.data.sources import Record
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Example


class Encoding(NamedTuple):
  """The settings of an encoder.

  All but `tokenizer` and `labels` are fields of the section `population` of a
  config; `labels` is the result of `Task.labels`.

  >>> Encoding(tokenizer=None).max_length
  256
  """

  tokenizer: Tokenizer
  template: str | text.Template = 'chat'
  max_length: int = 256
  long_replies: str = 'drop'
  labels: Sequence[str] | None = None


# (record, settings) -> examples, with counts of truncated and omitted parts
Encode = Callable[[Record, Encoding], text.Encoded]


def texts(record: Record, how: Encoding) -> text.Encoded:
  """Encodes a record for language modelling: `text.encode_counted`.

  >>> from fedjax_llm.data import tokenizers
  >>> how = Encoding(tokenizers.bytes())
  >>> texts(Record(text='hi'), how).examples[0].tokens.tolist()
  [257, 104, 105, 258]
  """
  return text.encode_counted(
    record, how.tokenizer, how.template, how.max_length, how.long_replies
  )


def labelled(record: Record, how: Encoding) -> text.Encoded:
  """Encodes a record for classification: `text.classified`.

  >>> from fedjax_llm.data import tokenizers
  >>> how = Encoding(tokenizers.bytes(), labels=('sad', 'glad'))
  >>> labelled(Record(text='hi', label='glad'), how).examples[0].label
  1
  """
  labels = how.labels or ()
  return text.classified(record, how.tokenizer, labels, how.max_length)


def content(example: Any) -> bytes:
  """Returns bytes that identify an example's content without its label.

  >>> one = Example(np.arange(2, dtype=np.int32), np.ones(2, bool), label=1)
  >>> content(one) == content(one._replace(label=2))
  True
  """
  if isinstance(example, Example):
    return example.tokens.tobytes() + example.loss_mask.tobytes()
  is_text = lambda x: isinstance(x, Example)
  if getattr(example, 'label', None) is not None:
    example = example._replace(label=None)
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(example, is_leaf=is_text):
    if is_text(leaf):
      part = repr(len(leaf.tokens)).encode() + content(leaf)
    else:
      x = np.asarray(leaf)
      part = repr((x.shape, x.dtype.str)).encode() + x.tobytes()
    digest.update(repr(len(part)).encode() + part)
  return digest.digest()
