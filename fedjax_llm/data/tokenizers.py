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


class Tokenizer(NamedTuple):
  """What the data room needs of a tokenizer.

  `encode(text) -> ids` adds no special token, but reads those written out in
  the text (chat templates write them). `decode(ids) -> text` leaves special
  tokens out. `chat(messages, add_generation_prompt) -> text` is the tokenizer's
  own template, None if it has none. `bos_id` is the token that the tokenizer
  puts in front of a text by itself, None if it does not.
  """

  name: str
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int
  chat: Callable[[Sequence[Mapping[str, str]], bool], str | None]


def bytes() -> Tokenizer:
  """UTF-8 bytes and three special tokens: pad 256, bos 257, eos 258.

  Needs no file. Its chat template writes `role: content`, one message a line.

  >>> tokenizer = bytes()
  >>> tokenizer.encode('hé'), tokenizer.decode([104, 195, 169, 258])
  ([104, 195, 169], 'hé')
  >>> tokenizer.chat([{'role': 'user', 'content': 'hi'}], True)
  'user: hi\\nassistant: '
  """

  def encode(text):
    return list(text.encode('utf-8'))

  def decode(ids):
    plain = builtins.bytes(int(i) for i in ids if int(i) < 256)
    return plain.decode('utf-8', errors='replace')

  def chat(messages, add_generation_prompt):
    lines = [f'{m["role"]}: {m["content"]}\n' for m in messages]
    return ''.join(lines) + ('assistant: ' if add_generation_prompt else '')

  return Tokenizer(
    name='bytes',
    encode=encode,
    decode=decode,
    vocab_size=259,
    bos_id=257,
    eos_id=258,
    pad_id=256,
    chat=chat,
  )


def pretrained(path: str) -> Tokenizer:
  """The tokenizer of a Hugging Face directory or hub name.

  Padding uses the tokenizer's pad token, or its end token where it has none.
  A chat template that asks for today's date gets a fixed one, so that a run
  that is resumed tomorrow sees the same tokens.

  Raises `Error` if it cannot be had or has no end token.
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
  if tokenizer.eos_token_id is None:
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

  bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
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
