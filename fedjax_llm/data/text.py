"""Encodes records as token arrays: templates, loss masks, truncation.

The loss counts the tokens of the client's replies and the end token after each.
The tokens before a reply in training are exactly the tokens from which that
reply is generated later (`prompt`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.data import chat as chat_lib
from fedjax_llm.data import tokenizers, windows
from fedjax_llm.data.chat import Piece as Piece
from fedjax_llm.data.chat import Template as Template
from fedjax_llm.data.chat import chat as chat
from fedjax_llm.data.messages import Message
from fedjax_llm.data.sources import Record
from fedjax_llm.data.templates import alpaca as alpaca
from fedjax_llm.data.templates import plain as plain
from fedjax_llm.data.templates import vicuna as vicuna
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Error, Example


class Encoded(NamedTuple):
  """The examples of one record, with counts of truncated and omitted parts.

  >>> Encoded([], replies_left_out=1).texts_cut
  0
  """

  examples: list[Any]  # of the task's kind, `Example` of texts
  prompts_truncated: int = 0
  replies_left_out: int = 0
  replies_cut: int = 0
  texts_cut: int = 0
  replies_rewritten: int = 0


TEMPLATES: dict[str, Callable[[], Template]] = {
  'chat': chat,
  'alpaca': alpaca,
  'vicuna': vicuna,
  'plain': plain,
}


def encode(
  record: Record,
  tokenizer: Tokenizer,
  template: str | Template = 'chat',
  max_length: int = 256,
  long_replies: str = 'drop',
) -> list[Example]:
  """Encodes a record: one example, several if it is long, none if none fits.

  `template` is 'chat' (the tokenizer's own), 'alpaca', 'vicuna', 'plain' or a
  function; plain texts use none. The tokens are

      [bos] prompt reply eos        loss on `reply eos`
      [bos] text eos                loss on everything but the first token

  with bos if the tokenizer has one and the template does not write it. At most
  `max_length` tokens: prompts lose tokens on their left (never the bos). A long
  chat becomes several examples, in which each reply is learned exactly once
  after as many earlier turns as fit. A reply that does not fit (with one token
  before it) is left out with `long_replies='drop'`; with 'cut' it loses its
  end, and its prompt is cut to half of `max_length`. A long text is split into
  consecutive rows, each with bos, that overlap by one token, so that each token
  is learned once.

  Raises `Error` for an unknown template or option.

  >>> from fedjax_llm.data import tokenizers
  >>> record = Record(client='ann', prompt='2+2', response='4')
  >>> (example,) = encode(record, tokenizers.bytes(), template='plain')
  >>> example.tokens.tolist()
  [257, 50, 43, 50, 10, 52, 258]
  >>> example.loss_mask.astype(int).tolist()
  [0, 0, 0, 0, 0, 1, 1]
  """
  return encode_counted(
    record, tokenizer, template, max_length, long_replies
  ).examples


def encode_counted(
  record: Record,
  tokenizer: Tokenizer,
  template: str | Template = 'chat',
  max_length: int = 256,
  long_replies: str = 'drop',
) -> Encoded:
  """Encodes a record as `encode` does, with counts of what was left out.

  >>> from fedjax_llm.data import tokenizers
  >>> record = Record(prompt='2+2', response='far too long')
  >>> encode_counted(
  ...   record, tokenizers.bytes(), 'plain', max_length=8).replies_left_out
  1
  """
  if max_length < 2:
    raise Error(f'max_length is {max_length}, but must be 2 or more.')
  if long_replies not in ('drop', 'cut'):
    raise Error(
      f"long_replies is {long_replies!r}, but must be 'drop' or 'cut'."
    )
  _template(template)  # raises for a misspelt name, also for plain texts
  if record.text is not None:
    return Encoded(_chunks(record.text, tokenizer, max_length))
  parts, rewritten = [], 0
  messages, cut = _messages(record), long_replies == 'cut'
  for dialogue in _dialogues(record, messages, tokenizer, template):
    rewritten += sum(piece.rewritten for piece in dialogue)
    ids, spans, turns = windows.lay(dialogue, tokenizer)
    keep = windows.kept_start(ids, tokenizer)
    own = []
    if len(ids) > max_length:
      own = windows.contents(dialogue, messages, tokenizer)
    borders = windows.Borders(turns, own)
    part = windows.windows(ids, spans, borders, keep, max_length, cut)
    parts.append(Encoded(*part))
  return Encoded(
    [example for part in parts for example in part.examples],
    *(sum(counts) for counts in zip(*(part[1:5] for part in parts))),
    replies_rewritten=rewritten,
  )


def classified(
  record: Record,
  tokenizer: Tokenizer,
  labels: Sequence[str],
  max_length: int = 256,
) -> Encoded:
  """Encodes the text of a record for classification; no example if empty.

  The tokens are those of the tokenizer for one whole text, or for two:

      [CLS] text [SEP]    or    [CLS] text [SEP] second text [SEP]

  Texts longer than `max_length` are cut at the end, the longer of two texts
  first. A prompt with its response is read as two texts. No token has a loss;
  the label is the index of the record's label in `labels`.

  Raises `Error` for a chat, a record without a label and an unknown label.

  >>> from fedjax_llm.data import tokenizers
  >>> record = Record(text='fine', label='glad')
  >>> (example,) = classified(
  ...   record, tokenizers.bytes(), ['sad', 'glad']
  ... ).examples
  >>> example.tokens.tolist(), example.label
  ([257, 102, 105, 110, 101, 258], 1)
  """
  where = record.where or 'record'
  if max_length < 4:
    raise Error(f'max_length is {max_length}, but must be 4 or more.')
  if record.label is None:
    raise Error(
      f'{where}: this text has no label, so it cannot be classified; give the '
      'source a label_key.'
    )
  if record.label not in labels:
    raise Error(
      f'{where}: the label {record.label!r} is not one of '
      f'{", ".join(map(repr, labels))}.'
    )
  text, pair = record.text, record.pair
  if text is None:
    text, pair = record.prompt, record.response
  if text is None or tokenizer.whole is None:
    what = 'a chat' if text is None else f'for the tokenizer {tokenizer.name}'
    raise Error(f'{where}: classification is of texts or of pairs, not {what}.')
  if not text.strip() and not (pair or '').strip():
    return Encoded([])
  tokens, types, is_cut = tokenizer.whole(text, pair, max_length)
  example = Example(
    np.asarray(tokens, np.int32),
    np.zeros(len(tokens), bool),
    label=list(labels).index(record.label),
    types=np.asarray(types, np.int32) if any(types) else None,
  )
  return Encoded([example], texts_cut=int(is_cut))


def prompt(
  record: Record,
  tokenizer: Tokenizer,
  template: str | Template = 'chat',
  max_length: int | None = None,
) -> list[int]:
  """Returns the token ids from which the record's last reply is generated.

  They are exactly the tokens before that reply in training. A chat without a
  final reply is prompted for the next reply; of a plain text the first half is
  used, at most 32 tokens. More than `max_length` tokens are cut on the left, as
  in training.

  >>> from fedjax_llm.data import tokenizers
  >>> record = Record(client='ann', prompt='2+2', response='4')
  >>> prompt(record, tokenizers.bytes(), template='plain')
  [257, 50, 43, 50, 10]
  """
  if record.text is not None:
    ids, turns, own = tokenizer.encode(record.text), [], []
    ids = windows.with_start(ids[: min(32, max(1, len(ids) // 2))], tokenizer)
  else:
    messages = list(_messages(record))
    if messages[-1]['role'] != 'assistant':
      messages.append({'role': 'assistant', 'content': 'x'})  # a placeholder
    dialogue = _dialogues(record, messages, tokenizer, template)[-1]
    ids, _, turns = windows.lay(dialogue[:-1], tokenizer)
    own = windows.contents(dialogue[:-1], messages, tokenizer)
  if max_length is not None and len(ids) > max_length:
    keep = windows.kept_start(ids, tokenizer)[: max_length - 1]
    start = len(ids) - max_length + len(keep)
    ids = (
      keep + ids[windows.border(windows.Borders(turns, own), start, len(ids)) :]
    )
  return ids


# ---------------------------------------------------------------- to tokens --


def _messages(record: Record) -> Sequence[Message]:
  if record.messages is not None:
    return record.messages
  if record.prompt is None or record.response is None:
    raise Error(
      f'{record.where or "record"}: a record holds a prompt with a response, '
      'a text, or messages.'
    )
  return (
    {'role': 'user', 'content': record.prompt},
    {'role': 'assistant', 'content': record.response},
  )


def _dialogues(record, messages, tokenizer, template) -> list[list[Piece]]:
  try:
    if record.tools and template in TEMPLATES and template != 'chat':
      raise Error(f"the template {template} does not write the record's tools.")
    tokenizer = chat_lib.with_tools(tokenizer, record.tools, messages)
    return _template(template)(messages, tokenizer)
  except Error as error:
    raise Error(f'{record.where}: {error}' if record.where else error) from None


def _template(template: str | Template) -> Template:
  if callable(template):
    return template
  if not isinstance(template, str) or template not in TEMPLATES:
    raise Error(
      f'template: there is no {template!r}; choose from {", ".join(TEMPLATES)}.'
    )
  return TEMPLATES[template]()


def _chunks(text: str, tokenizer: Tokenizer, max_length: int) -> list[Example]:
  """Splits a plain text into rows, each with the tokenizer's start tokens."""
  if not text.strip():
    return []
  start = tokenizers.start(tokenizer)
  ids = [
    *windows.with_start(tokenizer.encode(text), tokenizer),
    tokenizer.eos_id,
  ]
  rows = [windows.example(ids[:max_length], [(0, max_length)])]
  lead = start[: max_length - 1]
  # A later row repeats the last token of the row before it, if there is room.
  repeats = 1 if len(lead) + 2 <= max_length else 0
  room = max_length - len(lead) - repeats
  for first in range(max_length, len(ids), room):
    row = [*lead, *ids[first - repeats : first + room]]
    rows.append(windows.example(row, [(len(lead) + repeats, len(row))]))
  return rows
