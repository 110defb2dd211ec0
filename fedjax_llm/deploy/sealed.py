"""Rounds over a network whose messages are encrypted in part.

Three parties: clients `seal` their messages with the public key, the server
adds the ciphertexts (`uploads.encrypted.add`, no secret key), and the holder of
the secret key, who sees no single message, opens the sum and runs the server's
half with `collect`. The clear entries of single messages are seen by the
server. `plan` refuses what a secure sum refuses: rules that are not linear.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import tree
from fedjax_llm.deploy import wire
from fedjax_llm.deploy.halves import Arrays, Site
from fedjax_llm.types import Error, Masks, ServerState, Uploads
from fedjax_llm.uploads import encrypted


class Plan(NamedTuple):
  """The agreement of all parties before the first round."""

  mask: np.ndarray  # [P] bool, of the arrays in the order of `names`
  names: tuple[str, ...]  # the arrays of an update on the wire
  shapes: tuple[tuple[int, ...], ...]
  scheme: encrypted.Scheme
  largest: float  # the bound of an encrypted weight * entry

  @property
  def most_bytes(self) -> int:
    """Returns the most bytes of one client's message."""
    return encrypted.most_bytes(self.mask, self.scheme)


def plan(
  site: Site,
  scores: Any,
  share: float,
  scheme: encrypted.Scheme | None = None,
  largest: float = 1.0,
) -> Plan:
  """Returns the plan that encrypts the entries with the largest scores.

  Args:
    site: of any party.
    scores: the tree of `encrypted.sensitivity`, with the leaves of an update.
    share: the encrypted share of all entries, from 0 to 1.
    scheme: `encrypted.ckks()` if None.
    largest: the bound of an encrypted |w_k u_k|; a client beyond it fails.

  Raises:
    Error: a rule or a method that a secure sum cannot carry; scores of another
      shape; as `encrypted.most_sensitive`.
  """
  conf = site.built.conf
  site.built.method(conf={**conf, 'upload': {'name': 'secure_sum'}})  # or raise
  update = _row(site)
  same = lambda x, y: np.shape(x) == np.shape(y)
  try:
    fits = all(jax.tree.leaves(jax.tree.map(same, update, scores)))
  except (ValueError, TypeError):
    fits = False
  if not fits:
    raise Error(
      'plan: scores must be a tree of arrays with the shapes of an update.'
    )
  ranked = _arrays(site, scores)
  return Plan(
    mask=encrypted.most_sensitive(list(ranked.values()), share),
    names=tuple(ranked),
    shapes=tuple(x.shape for x in ranked.values()),
    scheme=scheme or encrypted.ckks(),
    largest=largest,
  )


def seal(
  plan: Plan, reply: Mapping[str, np.ndarray], public: bytes
) -> encrypted.Message:
  """Returns the message of a client from its reply of `halves.train`.

  The weight travels in the clear; masks, reports and the start do not travel.

  Raises:
    Error: a reply that does not count (a client that dropped out); as
      `encrypted.seal`.
  """
  if not np.all(reply['valid']):
    raise Error('seal: this reply is not valid, so the client sends nothing.')
  flat = np.concatenate([np.ravel(reply[name]) for name in plan.names])
  return encrypted.seal(
    flat, plan.mask, plan.scheme, public,
    weight=float(reply['weight']), largest=plan.largest,
  )  # fmt: skip


def collect(
  site: Site,
  state: ServerState,
  plan: Plan,
  total: encrypted.Message,
  secret: bytes,
) -> ServerState:
  """Runs the server's half on the sum of the clients' messages.

  Args:
    site: of the holder of the secret key.
    state: before the round.
    plan: of all parties.
    total: of `encrypted.add`.
    secret: the secret key.

  Raises:
    Error: as `encrypted.unseal`.
  """
  mean = encrypted.unseal(total, plan.mask, plan.scheme, secret)
  ends = np.cumsum([int(np.prod(shape)) for shape in plan.shapes])[:-1]
  arrays = {
    name: part.reshape(shape)
    for name, part, shape in zip(plan.names, np.split(mean, ends), plan.shapes)
  }
  network = site.network
  update = wire.unpack(arrays, {'update': _row(site)}, network)['update']
  row = lambda x: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x)
  ones = jax.tree.map(lambda x: jnp.ones((1,) * (1 + x.ndim), bool), update)
  uploads = Uploads(
    update=row(update),
    start=row(state.params),
    masks=Masks(ones, ones),
    weight=jnp.full(1, total.weight, jnp.float32),
    valid=jnp.ones(1, bool),
    ids=jnp.full(1, -1, jnp.int32),
  )
  new, _ = site.join(state, uploads, site.built.base)
  return new


def _row(site: Site) -> Any:
  """Returns the update of one client as zeros."""
  zeros = lambda x: np.zeros(x.shape, x.dtype)
  return tree.take(jax.tree.map(zeros, site.row.update), 0)


def _arrays(site: Site, update: Any) -> Arrays:
  return wire.pack({'update': update}, site.network)
