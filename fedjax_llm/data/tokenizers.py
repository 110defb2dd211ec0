"""Text to token ids and back: bytes, or a pretrained tokenizer."""

import builtins
import datetime
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.types import Error

# Templates that print the date would make two runs of one config differ.
_TODAY = datetime.datetime(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')


class Whole(NamedTuple):
  """A text as an encoder reads it; `types` say which of two a token is of.

  >>> Whole(tokens=[1, 5, 2], types=[0, 0, 0], is_cut=False).tokens
  [1, 5, 2]
  """

  tokens: list[int]
  types: list[int]
  is_cut: bool


class Tokenizer(NamedTuple):
  """What the data room needs of a tokenizer.

  `encode(text) -> ids` adds no special token, but reads those written out in
  the text (chat templates write them). `decode(ids) -> text` leaves special
  tokens out. `chat(messages, add_generation_prompt) -> text` is the tokenizer's
  own template, None if it has none. `bos_id` is the token that the tokenizer
  puts in front of a text by itself, None if it does not.

  >>> letters = bytes()
  >>> letters.encode('hi'), letters.decode([104, 105]), letters.vocab_size
  ([104, 105], 'hi', 259)
  """

  name: str
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int
  chat: Callable[[Sequence[Mapping[str, str]], bool], str | None]
  # (text, second text or None, max_length) -> tokens and types, with the
  # special tokens of a whole text; cut at the end, of two the longer one first
  whole: Callable[[str, str | None, int], Whole] | None = None


def bytes() -> Tokenizer:
  """UTF-8 bytes and three special tokens: pad 256, bos 257, eos 258.

  Needs no file. Its chat template writes `role: content`, one message a line.

  >>> tokenizer = bytes()
  >>> tokenizer.encode('hé'), tokenizer.decode([104, 195, 169, 258])
  ([104, 195, 169], 'hé')
  >>> tokenizer.chat([{'role': 'user', 'content': 'hi'}], True)
  'user: hi\\nassistant: '
  >>> tokenizer.whole('hi', 'ho', 6).tokens
  [257, 104, 258, 104, 111, 258]
  """

  def encode(text):
    return list(text.encode('utf-8'))

  def decode(ids):
    plain = builtins.bytes(int(i) for i in ids if int(i) < 256)
    return plain.decode('utf-8', errors='replace')

  def chat(messages, add_generation_prompt):
    lines = [f'{m["role"]}: {m["content"]}\n' for m in messages]
    return ''.join(lines) + ('assistant: ' if add_generation_prompt else '')

  def whole(text, other, max_length):
    first, second = encode(text), encode(other or '')
    room = max_length - (2 if other is None else 3)
    over = max(0, len(first) + len(second) - room)
    for _ in range(over):
      (first if len(first) >= len(second) else second).pop()
    one = [257, *first, 258]
    two = [] if other is None else [*second, 258]
    return Whole(one + two, [0] * len(one) + [1] * len(two), over > 0)

  return Tokenizer(
    name='bytes',
    encode=encode,
    decode=decode,
    vocab_size=259,
    bos_id=257,
    eos_id=258,
    pad_id=256,
    chat=chat,
    whole=whole,
  )


def pretrained(path: str) -> Tokenizer:
  """The tokenizer of a Hugging Face directory or hub name.

  Padding uses the tokenizer's pad token, or its end token where it has none;
  the end token of an encoder is the one that separates texts.
  A chat template that asks for today's date gets a fixed one, so that a run
  that is resumed tomorrow sees the same tokens.

  Raises `Error` if it cannot be had or has no end token.

  >>> pretrained('./nowhere')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ./nowhere: there is no such directory.
  """
  where = os.path.expanduser(path)
  if os.path.isdir(where):
    if not any(os.path.exists(os.path.join(where, f)) for f in _FILES):
      raise Error(
        f'{where}: no tokenizer in this directory; it needs one of '
        f'{", ".join(_FILES)}.'
      )
  elif os.path.isabs(where) or where.startswith('.'):
    raise Error(f'{where}: there is no such directory.')
  tokenizer = _load(where)
  eos = tokenizer.eos_token_id
  eos = tokenizer.sep_token_id if eos is None else eos
  if eos is None:
    raise Error(f'{where}: the tokenizer has no end-of-text token (eos_token).')
  template = None
  if tokenizer.chat_template is not None:
    template = _NOW.sub(
      lambda match: repr(_TODAY.strftime(match[2])),
      tokenizer.get_chat_template(),
    )

  def encode(text):
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

  def decode(ids):
    ids = [int(i) for i in ids]
    return str(tokenizer.decode(ids, skip_special_tokens=True))

  def chat(messages, add_generation_prompt):
    if template is None:
      return None
    return tokenizer.apply_chat_template(
      [dict(m) for m in messages],
      chat_template=template,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
    )

  def whole(text, other, max_length):
    found = tokenizer(
      text,
      other,
      truncation=True,
      max_length=max_length,
      return_token_type_ids=True,
      return_overflowing_tokens=True,
      verbose=False,
    )
    ids, types = found['input_ids'], found['token_type_ids']
    if not tokenizer.is_fast:
      return Whole(list(ids), list(types), bool(found['num_truncated_tokens']))
    return Whole(list(ids[0]), list(types[0]), len(ids) > 1)

  bos = tokenizer.bos_token_id
  adds_bos = bos is not None and tokenizer.encode('a')[:1] == [bos]
  pad = tokenizer.pad_token_id
  return Tokenizer(
    name=path,
    encode=encode,
    decode=decode,
    vocab_size=len(tokenizer),
    bos_id=bos if adds_bos else None,
    eos_id=eos,
    pad_id=eos if pad is None else pad,
    chat=chat,
    whole=whole,
  )


def _load(path: str) -> Any:
  # On import the library advises to install a framework that is not needed.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    from transformers import AutoTokenizer
  except ImportError:
    raise Error(
      'the package `transformers` is not installed; `pip install '
      'transformers`, or use the tokenizer bytes.'
    ) from None
  try:
    return AutoTokenizer.from_pretrained(path)
  except Exception as error:  # whatever the library or the network raises
    reason = ' '.join(str(error).split())
    raise Error(
      f'the tokenizer {path!r} cannot be loaded: {type(error).__name__}: '
      f'{reason[:300]}'
    ) from error
