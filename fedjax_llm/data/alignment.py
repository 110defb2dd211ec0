"""Alignment of two tokenizations of a text, and of two vocabularies.

Tokens are compared as bytes (`Tokenizer.pieces`) by edit distance. `matches`
aligns the tokens of a text, `vocabulary` maps each token of one tokenizer to
the nearest of another. Both are computed on the host: an alignment depends on
texts and tokenizers alone, so it is made once for a run.
"""

import functools
from collections.abc import Sequence

import numpy as np

from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Error

NONE = -1  # in `matches`: no token


def edit_distances(a: Sequence[bytes], b: Sequence[bytes]) -> np.ndarray:
  """Returns the edit distances [n, m] of all pairs of n and m byte strings.

  Levenshtein 1966: the least number of insertions, deletions and replacements
  of bytes that make one of the other.

  >>> edit_distances([b'util', b''], [b'utilize', b'untie']).tolist()
  [[3, 2], [7, 5]]
  """
  lengths = np.array([len(x) for x in b], int)
  x, y = _codes(a), _codes(b)  # [n, La], [m, Lb]
  row = np.empty((y.shape[1] + 1, len(a), len(b)), np.int32)
  row[:] = np.arange(len(row))[:, None, None]
  result = np.empty((len(a), len(b)), np.int32)

  def take(size: int) -> None:
    which = np.array([len(one) == size for one in a], bool)
    for j in range(len(b)):
      result[which, j] = row[lengths[j], which, j]

  take(0)
  for i in range(x.shape[1]):
    old, before = row, row[0]
    row = np.empty_like(old)
    row[0] = i + 1
    for j in range(y.shape[1]):
      differs = x[:, i, None] != y[None, :, j]
      row[j + 1] = np.minimum(before + differs, old[j + 1] + 1)
      np.minimum(row[j + 1], row[j] + 1, out=row[j + 1])
      before = old[j + 1]
    take(i + 1)
  return result


def path(cost: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
  """Returns the cheapest monotone path through a matrix of costs [n, m].

  A path begins at (0, 0), ends at (n - 1, m - 1) and goes on by (1, 1), (1, 0)
  or (0, 1); its cost is the sum of its entries (dynamic time warping). Of paths
  of equal cost the one with (1, 1), then (1, 0), counted from the end.

  >>> path(np.array([[0, 3], [3, 3], [3, 0]]))
  (3, [(0, 0), (1, 0), (2, 1)])
  """
  n, m = cost.shape
  best = np.full((n + 1, m + 1), np.iinfo(np.int32).max // 2, np.int64)
  best[0, 0] = 0
  for total in range(n + m - 1):  # the entries of one diagonal at once
    i = np.arange(max(0, total - m + 1), min(n, total + 1))
    j = total - i
    before = np.minimum(best[i, j], np.minimum(best[i, j + 1], best[i + 1, j]))
    best[i + 1, j + 1] = cost[i, j] + before
  i, j, steps = n - 1, m - 1, [(n - 1, m - 1)]
  while i or j:
    both, up, left = best[i, j], best[i, j + 1], best[i + 1, j]
    if both <= min(up, left):
      i, j = i - 1, j - 1
    elif up <= left:
      i -= 1
    else:
      j -= 1
    steps.append((i, j))
  return int(best[n, m]), steps[::-1]


def matches(
  own: Sequence[int],
  other: Sequence[int],
  pieces: tuple[Sequence[bytes], Sequence[bytes]],
  table: Sequence[int] | np.ndarray,
) -> np.ndarray:
  """Returns the place in `other` of each token of `own`, or `NONE`, [T] int32.

  Both are tokenizations of one text, aligned by the path of least edit distance
  (`path`). A token has a place where the path gives it one token alone, which
  is the same text or which `table` maps to it (Fan et al. 2024, arXiv
  2406.02224, appendix B).

  Args:
    own, other: token ids.
    pieces: the bytes of all tokens, of the tokenizers of `own` and `other`.
    table: `vocabulary` from the tokens of `other` to those of `own`.

  >>> words = (b'we', b' utilize', b' tokens'), (
  ...   b'we', b' util', b'ize', b' tokens')
  >>> matches((0, 1, 2), (0, 1, 2, 3), words, table=(0, 1, 1, 2)).tolist()
  [0, -1, 3]
  """
  mine = [pieces[0][token] for token in own]
  theirs = [pieces[1][token] for token in other]
  result = np.full(len(own), NONE, np.int32)
  if not mine or not theirs:
    return result
  a, rows = np.unique(np.array(mine, object), return_inverse=True)
  b, columns = np.unique(np.array(theirs, object), return_inverse=True)
  cost = edit_distances(list(a), list(b))[rows][:, columns]
  places: list[list[int]] = [[] for _ in mine]
  for i, j in path(cost)[1]:
    places[i].append(j)
  for i, near in enumerate(places):
    if len(near) == 1:
      j = near[0]
      if mine[i] == theirs[j] or table[other[j]] == own[i]:
        result[i] = j
  return result


@functools.lru_cache(maxsize=16)
def vocabulary(
  source: tuple[bytes, ...], target: tuple[bytes, ...]
) -> np.ndarray:
  """Returns the token of `target` nearest to each of `source`, [V] int32.

  The nearest by edit distance; of several the first in the order of bytes, and
  of equal bytes the one of the lowest id. Only targets whose length can be
  nearer than the best so far are compared.

  >>> vocabulary((b'util', b'a'), (b'a', b'utils', b'until')).tolist()
  [2, 0]
  """
  ids: dict[bytes, int] = {}
  for number, piece in enumerate(target):
    ids.setdefault(piece, number)
  groups: dict[int, list[bytes]] = {}
  for piece in sorted(ids):
    groups.setdefault(len(piece), []).append(piece)
  result = np.empty(len(source), np.int32)
  for number, piece in enumerate(source):
    if piece in ids:
      result[number] = ids[piece]
      continue
    best: tuple[int, bytes] | None = None
    for size in sorted(groups, key=lambda size: abs(size - len(piece))):
      if best is not None and abs(size - len(piece)) > best[0]:
        break
      away = edit_distances([piece], groups[size])[0]
      at = int(np.argmin(away))  # the first of equal ones
      here = (int(away[at]), groups[size][at])
      best = here if best is None else min(best, here)
    assert best is not None
    result[number] = ids[best[1]]
  return result


def pieces(tokenizer: Tokenizer) -> tuple[bytes, ...]:
  """Returns the bytes of all tokens; the special tokens of texts agree.

  Raises:
    Error: the tokenizer has no `pieces`.

  >>> from fedjax_llm.data import tokenizers
  >>> words = pieces(tokenizers.bytes())
  >>> words[97], words[256:]
  (b'a', (b'<pad>', b'<bos>', b'<eos>'))
  """
  if tokenizer.pieces is None:
    raise Error(
      f'{tokenizer.name}: this tokenizer does not tell the bytes of its tokens '
      '(Tokenizer.pieces), so its tokens cannot be aligned.'
    )
  result = list(tokenizer.pieces(range(tokenizer.vocab_size)))
  for name, token in (
    (b'<pad>', tokenizer.pad_id),
    (b'<eos>', tokenizer.eos_id),  # some tokenizers pad by their end token
    (b'<bos>', tokenizer.bos_id),
  ):
    if token is not None and token < len(result):
      result[token] = name
  return tuple(result)


def _codes(words: Sequence[bytes]) -> np.ndarray:
  """Returns byte strings as integers [n, L], padded with -1."""
  longest = max(map(len, words), default=0)
  codes = np.full((len(words), longest), -1, np.int16)
  for row, word in zip(codes, words, strict=True):
    row[: len(word)] = np.frombuffer(word, np.uint8)
  return codes
