"""Tokenizers: builders return functions between texts and token ids.

`bytes` uses UTF-8 bytes, `pairs` joins some of them, `pretrained` reads the
files of a Hugging Face tokenizer.
"""

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fedjax_llm.data import pieces as token_pieces
from fedjax_llm.data import tokenizer_files


class Whole(NamedTuple):
  """An encoder's input; `types` is 0 for the first text, 1 for the second.

  >>> Whole(tokens=[1, 5, 2], types=[0, 0, 0], is_cut=False).tokens
  [1, 5, 2]
  """

  tokens: list[int]
  types: list[int]
  is_cut: bool


class Tokenizer(NamedTuple):
  """Functions between texts and token ids, and the special tokens.

  `encode(text) -> ids` adds no special token, but reads those written out in
  the text (chat templates write them). `decode(ids) -> text` leaves special
  tokens out. `chat(messages, add_generation_prompt) -> text` is the tokenizer's
  own template and returns None if it has none; the tools of a record are its
  third argument. `bos_id` is the token that the tokenizer puts before a text by
  itself, None if there is none. `special` are the ids of special and added
  tokens by their texts.

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
  chat: Callable[..., str | None]
  # (text, second text or None, max_length) -> tokens and types, with special
  # tokens; cut at the end, the longer of two texts first
  whole: Callable[[str, str | None, int], Whole] | None = None
  # all ids put before a text, if there are more than `bos_id`
  begin: tuple[int, ...] = ()
  special: Mapping[str, int] = {}
  # ids -> the bytes that each token stands for; a space in front belongs to it
  pieces: Callable[[Sequence[int]], list[builtins.bytes]] | None = None


def start(tokenizer: Tokenizer) -> list[int]:
  """Returns the ids that the tokenizer puts before a text by itself.

  >>> start(bytes()), start(bytes()._replace(bos_id=None))
  ([257], [])
  """
  if tokenizer.begin or tokenizer.bos_id is None:
    return list(tokenizer.begin)
  return [tokenizer.bos_id]


def bytes() -> Tokenizer:
  """Returns a tokenizer of UTF-8 bytes with pad 256, bos 257 and eos 258.

  Needs no file. Its chat template writes `role: content`, one message per line.

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

  def chat(messages, add_generation_prompt, tools=None):
    del tools  # not written
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
    pieces=lambda ids: [builtins.bytes([i] if i < 256 else []) for i in ids],
  )


def pairs() -> Tokenizer:
  """Returns the tokenizer of bytes with 32 frequent pairs of letters as well.

  Needs no file. A text is read from left to right, a pair where there is one.
  Runs with several models use it to have two tokenizers (`client_models`).

  >>> tokenizer = pairs()
  >>> tokenizer.encode('then'), tokenizer.decode([259, 261])
  ([259, 267], 'thin')
  >>> len(tokenizer.encode('then')), tokenizer.vocab_size
  (2, 291)
  """
  inner = bytes()
  both = [_PAIRS[i : i + 2].encode() for i in range(0, len(_PAIRS), 2)]
  ids = {pair: 259 + i for i, pair in enumerate(both)}

  def joined(letters: Sequence[int]) -> list[int]:
    result, at = [], 0
    while at < len(letters):
      two = letters[at : at + 2]
      pair = ids.get(builtins.bytes(two)) if max(two) < 256 else None
      result.append(letters[at] if pair is None else pair)
      at += 1 if pair is None else 2
    return result

  def decode(tokens):
    letters: list[int] = []
    for token in tokens:
      letters += both[token - 259] if token >= 259 else [int(token)]
    return inner.decode(letters)

  def pieces(tokens):
    assert inner.pieces is not None
    return [both[i - 259] if i >= 259 else inner.pieces([i])[0] for i in tokens]

  return inner._replace(
    name='pairs',
    encode=lambda text: joined(inner.encode(text)),
    decode=decode,
    vocab_size=259 + len(both),
    whole=None,
    pieces=pieces,
  )


_PAIRS = 'thheinerreanonatenndtiesorteofedisitalarsttontngsehaasouioleveco'


def pretrained(path: str) -> Tokenizer:
  """Returns the tokenizer of a Hugging Face directory or hub name.

  Texts are split as `tokenizer.json` defines, also if transformers would
  rebuild the tokenizer from its class. Padding uses the tokenizer's pad token,
  or its end token if it has none; the end token of an encoder is its separator.
  A chat template that reads today's date gets a fixed one, so that a run
  resumed on another day has the same tokens; it runs with limits of time and
  memory (`rendering`). Python code of a tokenizer is never run.

  Raises `Error` if the tokenizer cannot be loaded or has no end token, or if
  one of its files has invalid values.

  >>> pretrained('./nowhere')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ./nowhere: there is no such directory.
  """
  where = os.path.expanduser(path)
  loaded = tokenizer_files.load(where)
  tokenizer, guarded = loaded.tokenizer, loaded.guarded

  @guarded
  def encode(text):
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

  @guarded
  def decode(ids):
    ids = [int(i) for i in ids]
    return str(tokenizer.decode(ids, skip_special_tokens=True))

  def chat(messages, add_generation_prompt, tools=None):
    if loaded.render is None:
      return None
    return loaded.render(messages, add_generation_prompt, tools)

  @guarded
  def whole(text, other, max_length):
    result = tokenizer(
      text,
      other,
      truncation=True,
      max_length=max_length,
      return_token_type_ids=True,
      return_overflowing_tokens=True,
      verbose=False,
    )
    ids, types = result['input_ids'], result['token_type_ids']
    if not tokenizer.is_fast:
      return Whole(list(ids), list(types), bool(result['num_truncated_tokens']))
    return Whole(list(ids[0]), list(types[0]), len(ids) > 1)

  begin = loaded.begin
  return Tokenizer(
    name=path,
    encode=encode,
    decode=decode,
    vocab_size=len(tokenizer),
    bos_id=begin[0] if begin else None,
    eos_id=loaded.eos_id,
    pad_id=loaded.pad_id,
    chat=chat,
    whole=whole,
    begin=begin if len(begin) > 1 else (),
    special=loaded.special,
    pieces=lambda ids: token_pieces.of(tokenizer, ids),
  )
