"""A soft prompt with rows that all texts share and rows of a text's group."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.pool import Choice, mean_of_tokens, unit
from fedjax_llm.nodes.prompt import Prompt
from fedjax_llm.nodes.protocol import mismatch
from fedjax_llm.types import Error


class Grouped(NamedTuple):
  """Shared rows, and those of the group whose key is nearest to the text.

  Deng et al. 2024, arXiv 2310.18285 (SGPT):

      g(x) = argmin_g (1 - cos(relu(q(x)), key_g)) (share_g + 0.0005)

  The rows [shared; groups_g(x)] stand in front of the text. q is the mean of
  its embedded tokens, as in `Pool`. `share` balances the groups in training: a
  group that had many texts is farther away; ones leave the nearest key.

  >>> node = Grouped(jnp.zeros((3, 4)), jnp.ones((5, 2, 4)), jnp.eye(5, 4),
  ...                jnp.ones(5))
  >>> node.length(), node.choose(jnp.ones((7, 6, 4)), None).rows.shape
  (5, (7, 5, 4))
  """

  shared: Any  # [P, D]
  groups: Any  # [G, Q, D]
  keys: Any  # [G, D]
  share: Any  # [G]

  PLACES = ('inputs',)
  FROZEN = ('share',)

  def length(self) -> int:
    return jnp.shape(self.shared)[0] + jnp.shape(self.groups)[1]

  def before(self, x: jax.Array) -> jax.Array:
    del x
    raise Error('a prompt of groups needs the text: `choose` comes before.')

  def _near(self, x: jax.Array, real: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines [B, G], and the group of each text, [B]."""
    query = jax.nn.relu(jax.lax.stop_gradient(mean_of_tokens(x, real)))
    alike = unit(query) @ unit(self.keys).T
    return alike, jnp.argmin((1 - alike) * (self.share + 5e-4), -1)

  def choose(self, x: jax.Array, real: Any) -> Prompt:
    """Returns the prompt of each text of embedded tokens x [B, T, D]."""
    _, group = self._near(x, real)
    shared = jnp.broadcast_to(
      self.shared, (x.shape[0], *jnp.shape(self.shared))
    )
    return Prompt(jnp.concatenate([shared, self.groups[group]], axis=1))

  def statistics(self, x: jax.Array, real: Any) -> Choice:
    alike, group = self._near(x, real)
    present = jnp.ones(x.shape[0]) if real is None else jnp.any(real, 1)
    present = present.astype(jnp.float32)
    mine = jnp.take_along_axis(alike, group[:, None], axis=1)[:, 0]
    distance = jnp.sum((1 - mine) * present) / jnp.maximum(present.sum(), 1)
    counts = jnp.zeros(jnp.shape(self.keys)[0]).at[group].add(present)
    return Choice(distance, counts)

  def no_statistics(self) -> Choice:
    """Returns the statistics of no text: zeros, in float32."""
    return Choice(jnp.float32(0), jnp.zeros(self.keys.shape[0]))

  def write(self, weight: Any) -> Any:
    return Prompt(self.shared).write(weight)

  def check(self, shape: tuple[int, ...], path: tuple[str, ...]) -> None:
    groups = jnp.shape(self.groups)
    for name, array, lead in (
      ('shared', self.shared, jnp.shape(self.shared)[:1]),
      ('groups', self.groups, groups[:2]),
      ('keys', self.keys, groups[:1]),
    ):
      if jnp.shape(array) != (*lead, *shape):
        raise mismatch((*path, name), jnp.shape(array), (*lead, *shape))

  def peft(self) -> Any:
    raise Error(
      'the prompt of a group depends on the text, and PEFT has no such adapter.'
    )
