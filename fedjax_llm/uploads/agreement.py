"""Secure sums between processes: key agreement, masks and shares, on the host.

`secure` simulates them in one program. Here every client has keys of its own
(X25519 and HKDF of the package `cryptography`, extra `secure`), and secrets are
shared so that any `threshold` clients can stand in for one that dropped out:

    agree     the seed that two clients share
    stream    uint32 numbers of a seed (ChaCha20)
    split     shares of a secret, and `recover` from enough of them
    hidden    one client's numbers under its masks
    revealed  the sum, with the masks that are left over taken away
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm.types import Error

# The order of the field of shares, a Mersenne prime above any 32 bytes.
PRIME = 2**521 - 1
_PAIR = b'secure sum of two clients'


def package() -> Any:
  """Returns the module `cryptography.hazmat.primitives`.

  Raises:
    Error: the package is not installed.
  """
  try:
    import cryptography.hazmat.primitives.asymmetric.x25519  # pyright: ignore
    import cryptography.hazmat.primitives.ciphers  # pyright: ignore
    import cryptography.hazmat.primitives.kdf.hkdf  # pyright: ignore
  except ImportError as error:
    raise Error(
      'the keys of secure sums need the package cryptography, which is not '
      "installed: pip install 'fedjax_llm[secure]'."
    ) from error
  return cryptography.hazmat.primitives


# ------------------------------------------------------------------- shares --


def split(secret: bytes, num: int, threshold: int) -> dict[int, int]:
  """Returns shares 1 ... n of a secret; any `threshold` of them recover it.

  The values of a random polynomial of degree t - 1 at 1 ... n, whose value at 0
  is the secret, modulo `PRIME` (Shamir 1979). Fewer shares are independent of
  the secret.

  Raises:
    Error: a threshold out of range, a secret of more than 64 bytes.

  >>> shares = split(b'seed', 5, 3)
  >>> recover({place: shares[place] for place in (5, 1, 3)}, 4)
  b'seed'
  """
  if not 1 <= threshold <= num:
    raise Error(f'threshold is {threshold}: it must be from 1 to {num}.')
  if len(secret) > 64:
    raise Error(f'a secret has {len(secret)} bytes: at most 64 are shared.')
  terms = [int.from_bytes(secret, 'big')]
  terms += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]

  def at(x: int) -> int:
    value = 0
    for term in reversed(terms):
      value = (value * x + term) % PRIME
    return value

  return {x: at(x) for x in range(1, num + 1)}


def recover(shares: Mapping[int, int], size: int) -> bytes:
  """Returns the secret of `size` bytes from at least `threshold` shares.

  Raises:
    Error: the shares fit no secret of that size; they are too few or altered.
  """
  secret = 0
  for x, share in shares.items():
    above = below = 1
    for other in shares:
      if other != x:
        above = above * -other % PRIME
        below = below * (x - other) % PRIME
    secret = (secret + share * above * pow(below, -1, PRIME)) % PRIME
  if secret >= 256**size:
    raise Error(
      f'{len(shares)} shares do not recover a secret of {size} bytes: they are '
      'too few, or altered.'
    )
  return secret.to_bytes(size, 'big')


# --------------------------------------------------------------------- keys --


class Keys(NamedTuple):
  """One client's secrets of a round, and its public key, 32 bytes each."""

  private: bytes  # of X25519: recovered where the client drops out
  own: bytes  # the seed of its own mask: recovered where it reports
  public: bytes


def keys() -> Keys:
  """Returns fresh keys; a client draws new ones every round."""
  private = package().asymmetric.x25519.X25519PrivateKey.generate()
  raw = private.private_bytes_raw()
  return Keys(raw, secrets.token_bytes(32), public_of(raw))


def public_of(private: bytes) -> bytes:
  """Returns the public key of a private one."""
  curve = package().asymmetric.x25519
  key = curve.X25519PrivateKey.from_private_bytes(private)
  return key.public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, round: int) -> bytes:
  """Returns the seed that the owners of two keys share in a round, 32 bytes."""
  primitives = package()
  curve = primitives.asymmetric.x25519
  mine = curve.X25519PrivateKey.from_private_bytes(private)
  shared = mine.exchange(curve.X25519PublicKey.from_public_bytes(public))
  return primitives.kdf.hkdf.HKDF(
    algorithm=primitives.hashes.SHA256(),
    length=32,
    salt=round.to_bytes(8, 'big'),
    info=_PAIR,
  ).derive(shared)


def stream(seed: bytes, num: int) -> np.ndarray:
  """Returns uint32 numbers [num] of a seed, by ChaCha20."""
  ciphers = package().ciphers
  cipher = ciphers.Cipher(ciphers.algorithms.ChaCha20(seed, bytes(16)), None)
  return np.frombuffer(cipher.encryptor().update(bytes(4 * num)), '<u4')


# ------------------------------------------------------------------ messages --


def _pairs(
  client: int, private: bytes, publics: Mapping[int, bytes], round: int,
  num: int, others: Sequence[int],
) -> np.ndarray:  # fmt: skip
  """Returns the sum of the masks that a client shares with others, signed."""
  total = np.zeros(num, np.uint32)
  for other in others:
    if other == client:
      continue
    mask = stream(agree(private, publics[other], round), num)
    total = total + mask if client < other else total - mask
  return total


def hidden(
  numbers: np.ndarray,
  client: int,
  own: Keys,
  publics: Mapping[int, bytes],
  round: int,
) -> np.ndarray:
  """Returns a client's message, modulo 2^32.

      y_k = x_k + PRG(b_k) + sum_(j > k) PRG(s_kj) - sum_(j < k) PRG(s_kj)

  (Bonawitz et al. 2017, figure 4). The mask of its own seed b_k hides x_k also
  from a server that claims that the client dropped out.

  Args:
    numbers: x_k, uint32 [P].
    client: its id.
    own: its keys.
    publics: the public keys of all clients that agreed, by id.
    round: the number of the round.
  """
  num = len(numbers)
  masks = _pairs(client, own.private, publics, round, num, list(publics))
  return numbers + stream(own.own, num) + masks


def revealed(
  messages: Mapping[int, np.ndarray],
  publics: Mapping[int, bytes],
  seeds: Mapping[int, bytes],
  privates: Mapping[int, bytes],
  round: int,
) -> np.ndarray:
  """Returns the sum of the numbers of all clients with a message.

  Args:
    messages: by client id.
    publics: the public keys of all clients that agreed, by id.
    seeds: the recovered b_k of the clients with a message.
    privates: the recovered private keys of the clients without one.
    round: the number of the round.

  Raises:
    Error: a secret is missing, one that is not needed was recovered (both
      secrets of a client reveal its numbers), or a key is another's.
  """
  here, gone = set(messages), set(publics) - set(messages)
  if set(seeds) != here or set(privates) != gone:
    raise Error(
      'a secure sum needs the own seed of each client with a message '
      f'({sorted(here)}, has {sorted(seeds)}) and the private key of each '
      f'other one ({sorted(gone)}, has {sorted(privates)}).'
    )
  num = len(next(iter(messages.values())))
  total = np.zeros(num, np.uint32)
  for client, message in messages.items():
    total = total + message - stream(seeds[client], num)
  for client, private in privates.items():
    if public_of(private) != publics[client]:
      raise Error(f'the key of client {client} is not the one of before.')
    # What it would have added cancels what the others added for it.
    total = total + _pairs(client, private, publics, round, num, sorted(here))
  return total
