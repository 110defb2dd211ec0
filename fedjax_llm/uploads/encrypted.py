"""Selective homomorphic encryption: sums of partly encrypted messages.

The most sensitive entries of an update are encrypted so that ciphertexts can be
added, the others travel in the clear (FedML-HE: Jin et al. 2023, arXiv
2303.10837). On the host, between processes:

    sensitivity      the score of each entry, and `most_sensitive` the mask
    ckks             the scheme CKKS, by the package TenSEAL
    seal             one client's message
    add              the sum of messages, which needs no secret key
    unseal           the weighted mean of the clients' numbers

Who adds must not have the secret key: it would open single messages.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Error


class Scheme(NamedTuple):
  """Encryption under which ciphertexts of numbers can be added.

  `keys() -> (secret, public)`; `encrypt(public, numbers [n]) -> bytes`;
  `add(public, [bytes, ...]) -> bytes`; `decrypt(secret, bytes, n) -> [n]`
  float64; `num_bytes(n) -> ` the most bytes of a ciphertext of n numbers;
  `slots` numbers go into one ciphertext; a sum must stay within +-`largest`.
  """

  keys: Callable[[], tuple[bytes, bytes]]
  encrypt: Callable[[bytes, np.ndarray], bytes]
  add: Callable[[bytes, Sequence[bytes]], bytes]
  decrypt: Callable[[bytes, bytes, int], np.ndarray]
  num_bytes: Callable[[int], int]
  slots: int
  largest: float


class Message(NamedTuple):
  """A message of one client, or a sum of such.

  >>> Message((b'1234',), np.zeros(3, np.float32), 2.0, 1.0, 1).num_bytes
  20
  """

  encrypted: tuple[bytes, ...]  # weight * number of the chosen entries
  clear: np.ndarray  # [P - chosen] float32, the same of the others
  weight: float
  largest: float  # the bound of an encrypted number
  num_clients: int

  @property
  def num_bytes(self) -> int:
    """Returns the bytes of ciphertexts, clear numbers and the weight."""
    return sum(map(len, self.encrypted)) + 4 * len(self.clear) + 4


# --------------------------------------------------------------- the entries --


def sensitivity(
  loss: Callable[[Any, Any, jax.Array], jax.Array],
  params: Any,
  inputs: Any,
  labels: jax.Array,
) -> Any:
  """Returns the sensitivity of each parameter to the labels, a tree.

      S_m = 1/M sum_i || d/dy_i (d loss(w, x_i, y_i) / d w_m) ||

  over M examples (FedML-HE, arXiv 2303.10837, for a scalar label; here with the
  Euclidean norm over the entries of a label): how far the gradient of a
  parameter depends on the labels. Each client scores its own data, and the mask
  is that of the mean of all scores, which can be a mean of messages that are
  encrypted in full.

  Args:
    loss: `(params, input, label) -> []`, for one example with a label that is
      an array of floats, such as one-hot rows.
    params: a tree of float arrays.
    inputs: [M, ...], or a pytree of such.
    labels: [M, ...] float.

  >>> loss = lambda w, x, y: -jnp.sum(y * jax.nn.log_softmax(x * w))
  >>> scores = sensitivity(loss, jnp.zeros(2), jnp.ones(1), jnp.eye(2)[:1])
  >>> scores.round(3).tolist()  # (1/2, -1/2) for both entries
  [0.7070000171661377, 0.7070000171661377]
  """

  def one(x, y):
    slopes = jax.jacfwd(lambda y: jax.grad(loss)(params, x, y))(y)
    return jax.tree.map(
      lambda p, j: jnp.linalg.norm(j.reshape(*p.shape, -1), axis=-1),
      params,
      slopes,
    )

  each = jax.vmap(one)(inputs, labels)
  return jax.tree.map(lambda x: jnp.mean(x, 0), each)


def most_sensitive(scores: Any, share: float) -> np.ndarray:
  """Returns a mask [P] bool of the largest scores, in the order of the leaves.

  round(share * P) entries are chosen; among equal scores the first ones.

  Raises:
    Error: a share outside of [0, 1]; scores that are not finite.

  >>> most_sensitive({'a': jnp.array([0.1, 3.0]), 'b': jnp.ones(2)}, 0.5)
  array([False,  True,  True, False])
  """
  if not 0 <= share <= 1:
    raise Error(f'most_sensitive: share={share} must be from 0 to 1.')
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(scores)]
  flat = np.concatenate(leaves) if leaves else np.zeros(0)
  if not np.isfinite(flat).all():
    raise Error('most_sensitive: the scores hold numbers that are not finite.')
  order = np.argsort(-flat, kind='stable')
  mask = np.zeros(len(flat), bool)
  mask[order[: round(share * len(flat))]] = True
  return mask


# ------------------------------------------------------------------ messages --


def seal(
  numbers: np.ndarray,
  mask: np.ndarray,
  scheme: Scheme,
  public: bytes,
  *,
  weight: float = 1.0,
  largest: float = 1.0,
) -> Message:
  """Returns one client's message: w u, encrypted where the mask is True.

  Args:
    numbers: u, [P] float.
    mask: [P] bool, the same for all clients.
    scheme: such as `ckks()`.
    public: the public key.
    weight: w, which travels in the clear.
    largest: the bound of an encrypted |w u|.

  Raises:
    Error: lengths that differ; numbers that are not finite, or beyond
      `largest`.
  """
  numbers, mask = np.asarray(numbers, np.float64), np.asarray(mask, bool)
  if numbers.shape != mask.shape:
    raise Error(
      f'seal: numbers {numbers.shape} and mask {mask.shape} must have the same '
      'shape [P].'
    )
  weighted = weight * numbers
  if not np.isfinite(weighted).all():
    raise Error('seal: the update holds numbers that are not finite.')
  secret = weighted[mask]
  if (most := np.abs(secret).max(initial=0.0)) > largest:
    raise Error(
      f'seal: an entry to be encrypted is {most:g} times its weight, above '
      f'largest={largest:g}, the bound that keeps sums in range.'
    )
  parts = [
    scheme.encrypt(public, secret[i : i + scheme.slots])
    for i in range(0, len(secret), scheme.slots)
  ]
  clear = weighted[~mask].astype(np.float32)
  return Message(tuple(parts), clear, float(weight), float(largest), 1)


def add(messages: Sequence[Message], scheme: Scheme, public: bytes) -> Message:
  """Returns the sum of messages; it needs the public key alone.

  Raises:
    Error: no messages; messages of several masks; more clients than the range
      of the scheme holds.
  """
  if not messages:
    raise Error('add: there are no messages.')
  sizes = {(len(x.encrypted), len(x.clear)) for x in messages}
  if len(sizes) > 1:
    raise Error(
      f'add: messages of {sorted(sizes)} ciphertexts and clear numbers; all '
      'clients must encrypt the same entries.'
    )
  reach = sum(x.num_clients * x.largest for x in messages)
  if reach > scheme.largest:
    raise Error(
      f'add: the sum may reach {reach:g}, and the scheme holds '
      f'{scheme.largest:g}: lower largest, or the weights.'
    )
  columns = zip(*(x.encrypted for x in messages))
  return Message(
    tuple(scheme.add(public, parts) for parts in columns),
    np.stack([x.clear for x in messages]).sum(0, dtype=np.float32),
    sum(x.weight for x in messages),
    max(x.largest for x in messages),
    sum(x.num_clients for x in messages),
  )


def unseal(
  total: Message, mask: np.ndarray, scheme: Scheme, secret: bytes
) -> np.ndarray:
  """Returns the weighted mean [P] float64 of the numbers in a sum.

  Raises:
    Error: a mask that is not that of the messages; weights of zero.
  """
  mask = np.asarray(mask, bool)
  chosen = int(mask.sum())
  parts = math.ceil(chosen / scheme.slots)
  if (len(total.encrypted), len(total.clear)) != (parts, len(mask) - chosen):
    raise Error(
      f'unseal: the mask chooses {chosen} of {len(mask)} entries, which is '
      'another mask than that of the messages.'
    )
  if not total.weight > 0:
    raise Error(f'unseal: the weights sum to {total.weight:g}, not above 0.')
  result = np.empty(len(mask))
  result[~mask] = total.clear
  opened = [
    scheme.decrypt(secret, part, min(scheme.slots, chosen - i * scheme.slots))
    for i, part in enumerate(total.encrypted)
  ]
  result[mask] = np.concatenate(opened) if opened else ()
  return result / total.weight


def most_bytes(mask: np.ndarray, scheme: Scheme) -> int:
  """Returns the most bytes of a message under a mask, without encrypting.

  >>> most_bytes(np.arange(5000) < 2049, ckks())  # 2 ciphertexts, 2951 numbers
  143904
  """
  chosen = int(np.sum(mask))
  whole, rest = divmod(chosen, scheme.slots)
  size = whole * scheme.num_bytes(scheme.slots)
  size += scheme.num_bytes(rest) if rest else 0
  return size + 4 * (len(mask) - chosen) + 4


# -------------------------------------------------------------------- scheme --


def ckks(
  degree: int = 4096, bits: Sequence[int] = (50, 59), scale_bits: int = 36
) -> Scheme:
  """Returns CKKS for sums alone, by TenSEAL (Cheon et al. 2017).

  `degree` / 2 numbers share a ciphertext of two polynomials over all primes but
  the last. Sums need no multiplication, so one prime and the special one
  suffice; SEAL refuses parameters below 128 bits of security. A decrypted
  number differs by some 1e-7 for each client. Decrypted sums must not be
  published as they are: their error tells of the secret key (Li and Micciancio
  2021).

  Args:
    degree: of the polynomials, a power of two.
    bits: of the primes.
    scale_bits: a number x is stored as round(2^scale_bits x).

  Raises:
    Error: too few primes, or no room for numbers; from its functions, the
      package is missing.

  >>> scheme = ckks()
  >>> scheme.slots, scheme.largest, scheme.num_bytes(1)
  (2048, 4096.0, 66048)
  """
  bits = tuple(bits)
  if len(bits) < 2:
    raise Error(f'ckks: bits={bits} must be two primes or more.')
  room = sum(bits[:-1]) - scale_bits - 2  # a sign, and the noise
  if room < 1:
    raise Error(
      f'ckks: scale_bits={scale_bits} leaves no room for numbers below '
      f'bits={bits}.'
    )

  def whole(raw: bytes) -> Any:
    return _tenseal().context_from(raw)

  def keys() -> tuple[bytes, bytes]:
    ts = _tenseal()
    try:
      context = ts.context(ts.SCHEME_TYPE.CKKS, degree, -1, list(bits))
    except ValueError as error:
      raise Error(f'ckks: {degree=}, {bits=}: {error}.') from error
    context.global_scale = 2.0**scale_bits
    some = dict(save_galois_keys=False, save_relin_keys=False)
    return (
      context.serialize(save_public_key=True, save_secret_key=True, **some),
      context.serialize(save_public_key=True, save_secret_key=False, **some),
    )

  def encrypt(public: bytes, numbers: np.ndarray) -> bytes:
    ts, values = _tenseal(), np.asarray(numbers, np.float64).tolist()
    return ts.ckks_vector(whole(public), values).serialize()

  def add(public: bytes, parts: Sequence[bytes]) -> bytes:
    ts, context = _tenseal(), whole(public)
    total, *others = (ts.ckks_vector_from(context, part) for part in parts)
    for other in others:
      total += other
    return total.serialize()

  def decrypt(secret: bytes, part: bytes, num: int) -> np.ndarray:
    vector = _tenseal().ckks_vector_from(whole(secret), part)
    return np.asarray(vector.decrypt())[:num]

  def num_bytes(num: int) -> int:
    del num  # a ciphertext is whole, and SEAL's compression saves some
    return 2 * degree * 8 * (len(bits) - 1) + 512

  return Scheme(
    keys, encrypt, add, decrypt, num_bytes, degree // 2, 2.0 ** min(room, 60)
  )


def _tenseal() -> Any:
  try:
    import tenseal  # pyright: ignore
  except ImportError as error:
    raise Error(
      'encrypted sums need the package tenseal, which is not installed: pip '
      "install 'fedjax_llm[encrypted]'."
    ) from error
  return tenseal
