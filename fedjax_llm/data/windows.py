"""Lays the pieces of a dialogue as token ids and cuts long ones into windows.

A window begins at the border of a turn where one fits, and never inside the
header of a turn.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_llm.data import tokenizers
from fedjax_llm.data.chat import Piece
from fedjax_llm.data.messages import Message
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Example


def with_start(ids: list[int], tokenizer: Tokenizer) -> list[int]:
  """Returns the ids after the tokens that the tokenizer puts before a text.

  >>> from fedjax_llm.data import tokenizers
  >>> with_start([104, 105], tokenizers.bytes())
  [257, 104, 105]
  """
  start = tokenizers.start(tokenizer)
  return ids if ids[: len(start)] == start else start + ids


def kept_start(ids: list[int], tokenizer: Tokenizer) -> list[int]:
  """Returns the tokens kept in front of these ids when they are cut left.

  >>> from fedjax_llm.data import tokenizers
  >>> kept_start([257, 104, 105], tokenizers.bytes())
  [257]
  """
  start = tokenizers.start(tokenizer)
  return start if ids[: len(start)] == start else []


def lay(
  dialogue: Sequence[Piece], tokenizer: Tokenizer
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
  """Returns the token ids of all pieces, learned spans, and starts of turns.

  The starts are those of the turns that follow a reply.

  A tokenizer may encode a piece differently at the start of a text (a leading
  space), so the tokens of a piece are those that it adds to the text before it;
  only if it would change the tokens of that text is it encoded alone.

  >>> from fedjax_llm.data import tokenizers
  >>> dialogue = [Piece('ab'), Piece('c', learned=True), Piece('d')]
  >>> lay(dialogue, tokenizers.bytes())
  ([257, 97, 98, 99, 100], [(3, 4)], [4])
  """
  ids: list[int] = []
  spans, turns, replied = [], [], False
  text, done = '', []  # the text and its ids since the last end token
  for piece in dialogue:
    whole = tokenizer.encode(text + piece.text)
    if whole[: len(done)] == done:
      new = whole[len(done) :]
      text, done = text + piece.text, whole
    else:
      new = tokenizer.encode(piece.text)
      text, done = piece.text, new
    if piece.end:
      new = [*new, tokenizer.eos_id]
      text, done = '', []
    before = len(ids)
    ids = ids + new if ids else with_start(new, tokenizer)
    if piece.learned:
      # A bos before a first reply is not part of the reply.
      spans.append((before or len(ids) - len(new), len(ids)))
    if replied:  # the space after the reply belongs to the turn before
      blank = lambda i: tokenizer.decode([i]).isspace()
      turns.append(before + len(list(itertools.takewhile(blank, new))))
    replied = piece.learned or piece.end
  return ids, spans, turns


class Borders(NamedTuple):
  """Token positions at which a chat may be cut on its left.

  >>> Borders(turns=[9], contents=[(3, 8), (12, 20)]).turns
  [9]
  """

  turns: list[int]  # where the turns after replies begin
  contents: list[tuple[int, int]]  # [start, end) of each message's own text


def contents(
  dialogue: Sequence[Piece], messages: Sequence[Message], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
  """Returns the token spans of the messages' own texts, without headers.

  A message that the template wrote in other words has no span.

  >>> from fedjax_llm.data import tokenizers
  >>> messages = [{'role': 'user', 'content': 'Hi'}]
  >>> contents([Piece('USER: Hi ASSISTANT:')], messages, tokenizers.bytes())
  [(7, 9)]
  """
  text = ''.join(piece.text for piece in dialogue)
  spans, done = [], 0
  for message in messages:
    content = message['content'].strip()
    start = text.find(content, done) if content else -1
    if start < 0:
      continue
    done = start + len(content)
    ends = (lay(_until(dialogue, n), tokenizer)[0] for n in (start, done))
    first, end = map(len, ends)
    spans.append((first, end))
  return spans


def _until(dialogue: Sequence[Piece], size: int) -> list[Piece]:
  """Returns the pieces of the first `size` characters."""
  pieces = []
  for piece in dialogue:
    if size <= len(piece.text):
      return [*pieces, Piece(piece.text[:size])]
    size -= len(piece.text)
    pieces.append(piece)
  return pieces


def border(borders: Borders, start: int, end: int) -> int:
  """Returns where a text that is cut at `start` or later begins.

  It is the first start of a turn in [start, end). If there is none, it is
  `start` inside a message's own text, and the next such text if `start` is
  inside a header.

  >>> borders = Borders([4, 9, 15], [(6, 9), (17, 30)])
  >>> border(borders, 6, 12), border(borders, 16, 30), border(borders, 20, 30)
  (9, 17, 20)
  """
  for turn in borders.turns:
    if start <= turn < end:
      return turn
  for first, last in borders.contents:
    if first <= start < last:
      return start
    if start < first < end:
      return first
  return start


def example(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Example:
  """Returns an example whose loss counts the spans, never the first token.

  >>> example([7, 8, 9], [(0, 2)]).loss_mask.astype(int).tolist()
  [0, 1, 0]
  """
  mask = np.zeros(len(tokens), bool)
  for start, end in spans:
    mask[start:end] = True
  mask[:1] = False  # the first token cannot be predicted
  return Example(np.asarray(tokens, np.int32), mask)


def windows(
  ids: list[int],
  spans: list[tuple[int, int]],
  borders: Borders,
  keep: list[int],
  max_length: int,
  cut: bool,
) -> tuple[list[Example], int, int, int]:
  """Builds examples in which each reply is learned exactly once.

  Returns the examples, the number of truncated prompts, of replies that were
  left out, and of replies that were cut. Windows are cut from the last reply to
  the first. A window begins with a turn, unless the prompt of its last reply
  alone is too long; then it begins inside the text of a message. `keep` (the
  bos) stays in front of a truncated prompt.

  >>> borders = Borders([], [(2, 6)])
  >>> (row,), truncated, _, _ = windows(
  ...   [9, 1, 2, 3, 4, 5, 6, 7], [(7, 8)], borders, [9], 4, False)
  >>> row.tokens.tolist(), truncated
  ([9, 5, 6, 7], 1)
  """
  examples = []
  truncated = left_out = num_cut = 0
  rest = list(spans)
  while rest:
    first, end = rest[-1]
    # Earlier tokens are cut, but a reply keeps one token before it.
    start = max(0, end - max_length)
    lead: list[int] = []
    if start:
      lead, start = keep, border(borders, end - max_length + len(keep), first)
    needs = start + (1 if start and not lead else 0)
    if first < needs:
      rest.pop()
      if not cut:
        left_out += 1
        continue
      num_cut += 1
      start = max(0, first - max_length // 2)
      start = border(borders, start, first) if start else 0
      lead = keep if start else []
      room = max_length - len(lead)
      covered, end = [(first, min(end, start + room))], start + room
    else:
      covered = [span for span in rest if span[0] >= needs]
      rest = rest[: len(rest) - len(covered)]
    shift = len(lead) - start
    examples.append(
      example(
        lead + ids[start:end], [(a + shift, b + shift) for a, b in covered]
      )
    )
    truncated += start > 0
  return examples[::-1], truncated, left_out, num_cut
