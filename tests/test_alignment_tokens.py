"""Alignment of tokens and vocabularies, against brute force."""

import numpy as np
import pytest
import references_exchange as reference
import tiny_tokenizers

from fedjax_llm.data import alignment, tokenizers
from fedjax_llm.types import Error

WORDS = [b'', b'a', b'ab', b'ba', b'abc', b'bca', b'aabb', b'cabba', b'\xff']


def test_edit_distances_equal_the_recursion():
  got = alignment.edit_distances(WORDS, WORDS[::-1])
  want = [[reference.distance(a, b) for b in WORDS[::-1]] for a in WORDS]
  assert got.tolist() == want
  assert alignment.edit_distances([], [b'a']).shape == (0, 1)


def test_the_path_is_the_cheapest_of_all():
  rng = np.random.default_rng(0)
  for n in range(1, 6):
    for m in range(1, 6):
      cost = rng.integers(0, 4, (n, m))
      every = {
        tuple(path): sum(cost[i, j] for i, j in path)
        for path in reference.paths(n, m)
      }
      total, steps = alignment.path(cost)
      assert every[tuple(steps)] == total == min(every.values())


def test_a_vocabulary_is_mapped_to_the_nearest_words():
  words = (b'ab', b'abc', b'b', b'ca', b'aabba', b'aa')
  some = (b'abab', b'', b'c', b'aa', b'bacabba', b'cc', b'zzzzzzzzz')
  want = [reference.nearest(word, words) for word in some]
  assert alignment.vocabulary(some, words).tolist() == want
  assert alignment.vocabulary(words, words).tolist() == list(range(len(words)))


def of(text, one, other):
  pieces = alignment.pieces(one), alignment.pieces(other)
  table = alignment.vocabulary(pieces[1], pieces[0])
  own, theirs = one.encode(text), other.encode(text)
  return own, theirs, alignment.matches(own, theirs, pieces, table)


def test_one_tokenizer_is_aligned_with_itself():
  for tokenizer in (tokenizers.bytes(), tokenizers.pairs()):
    own, _, places = of('then it was on', tokenizer, tokenizer)
    assert places.tolist() == list(range(len(own)))
    pieces = alignment.pieces(tokenizer)
    table = alignment.vocabulary(pieces, pieces)
    assert [pieces[i] for i in table] == list(pieces)


def test_tokens_match_where_one_has_the_text_of_one_other():
  letters, pairs = tokenizers.bytes(), tokenizers.pairs()
  # 't', 'h', 'e', 'n' and 'th', 'en'; then the same letters in both
  own, theirs, places = of('then. x', pairs, letters)
  assert (len(own), len(theirs)) == (5, 7)
  assert places.tolist() == [-1, -1, 4, 5, 6]
  own, theirs, places = of('then. x', letters, pairs)
  assert places[4:].tolist() == [2, 3, 4]
  # A letter matches a pair only where the table says so.
  table = alignment.vocabulary(
    alignment.pieces(pairs), alignment.pieces(letters)
  )
  for at, j in enumerate(places[:4]):
    assert j == -1 or table[theirs[j]] == own[at]


def test_bytes_of_the_tokens_of_files(tmp_path):
  path = tiny_tokenizers.write(tmp_path / 'byte-level')
  tokenizer = tokenizers.pretrained(path)
  text = 'to bé'
  assert tokenizer.pieces is not None
  whole = b''.join(tokenizer.pieces(tokenizer.encode(text)))
  assert whole == text.encode()
  own, _, places = of(text, tokenizers.bytes(), tokenizer)
  assert places.tolist() == list(range(len(own)))
  bare = tokenizers.bytes()._replace(pieces=None)
  with pytest.raises(Error, match='does not tell the bytes of its tokens'):
    alignment.pieces(bare)
