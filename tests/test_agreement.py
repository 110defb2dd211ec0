"""Secure sums between processes: shares, keys, drop-outs."""

import itertools

import numpy as np
import pytest

from fedjax_llm.types import Error
from fedjax_llm.uploads import agreement


def test_enough_shares_recover_a_secret_and_fewer_do_not():
  secret = bytes(range(32))
  shares = agreement.split(secret, 5, 3)
  for some in itertools.combinations(shares, 3):
    assert agreement.recover({x: shares[x] for x in some}, 32) == secret
  assert agreement.recover(shares, 32) == secret
  # Two of them give a number of 521 bits, of 256 by a chance of 2^-265.
  with pytest.raises(Error, match='2 shares do not recover'):
    agreement.recover({x: shares[x] for x in (1, 4)}, 32)
  with pytest.raises(Error, match='threshold is 6'):
    agreement.split(secret, 5, 6)


def test_the_sum_is_exact_after_a_drop_out():
  pytest.importorskip('cryptography')
  ids, round = (3, 8, 11, 20), 7
  rng = np.random.default_rng(0)
  numbers = {k: rng.integers(0, 2**32, 50, dtype=np.uint32) for k in ids}
  mine = {k: agreement.keys() for k in ids}
  publics = {k: mine[k].public for k in ids}
  one = agreement.agree(mine[3].private, publics[8], round)
  assert one == agreement.agree(mine[8].private, publics[3], round)
  assert one != agreement.agree(mine[8].private, publics[3], round + 1)
  messages = {
    k: agreement.hidden(numbers[k], k, mine[k], publics, round) for k in ids
  }
  # Every client holds a share of both secrets of every client.
  shares = {
    k: [agreement.split(s, 4, 3) for s in (mine[k].own, mine[k].private)]
    for k in ids
  }
  back = lambda k, which: agreement.recover(
    {x: shares[k][which][x] for x in (1, 2, 4)}, 32
  )
  for lost in ((), (11,)):
    here = [k for k in ids if k not in lost]
    total = agreement.revealed(
      {k: messages[k] for k in here},
      publics,
      {k: back(k, 0) for k in here},
      {k: back(k, 1) for k in lost},
      round,
    )
    want = np.sum([numbers[k] for k in here], 0, dtype=np.uint32)
    np.testing.assert_array_equal(total, want)
  both = {k: back(k, 0) for k in ids}
  with pytest.raises(Error, match='needs the own seed of each client with a'):
    agreement.revealed({3: messages[3]}, publics, both, {}, round)
  with pytest.raises(Error, match='client 11 is not the one of before'):
    agreement.revealed(
      {k: messages[k] for k in (3, 8, 20)},
      publics,
      {k: back(k, 0) for k in (3, 8, 20)},
      {11: mine[3].private},
      round,
    )
