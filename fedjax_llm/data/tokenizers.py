"""Text to token ids and back: bytes, or a pretrained tokenizer."""

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fedjax_llm.data import tokenizer_files


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
  own template, None if it has none; where a record has tools, they are its
  third argument. `bos_id` is the token that the tokenizer puts in front of a
  text by itself, None if it does not. `special` are the ids of the tokens that
  are no pieces of words, by their texts.

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
  # (text, second text or None, max_length) -> tokens and types, with the
  # special tokens of a whole text; cut at the end, of two the longer one first
  whole: Callable[[str, str | None, int], Whole] | None = None
  # all that is put in front of a text, where that is more than `bos_id`
  begin: tuple[int, ...] = ()
  special: Mapping[str, int] = {}


def start(tokenizer: Tokenizer) -> list[int]:
  """The ids that the tokenizer puts in front of a text by itself.

  >>> start(bytes()), start(bytes()._replace(bos_id=None))
  ([257], [])
  """
  if tokenizer.begin or tokenizer.bos_id is None:
    return list(tokenizer.begin)
  return [tokenizer.bos_id]


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

  def chat(messages, add_generation_prompt, tools=None):
    del tools  # not told
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

  Texts are split as `tokenizer.json` says, also where transformers would build
  the tokenizer anew from its class. Padding uses the tokenizer's pad token, or
  its end token where it has none; the end token of an encoder is the one that
  separates texts. A chat template that asks for today's date gets a fixed one,
  so that a run that is resumed tomorrow sees the same tokens; it runs with
  limits of time and memory (`rendering`). Python code beside a tokenizer is
  never run.

  Raises `Error` if it cannot be had or has no end token, and if a file of it
  holds something else than it should.

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
  )
