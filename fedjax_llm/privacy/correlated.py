"""The rule of correlated noise: DP-FTRL with a matrix mechanism.

`correlated_mean` returns a `StreamingAggregator` whose noises cancel in part
over rounds, without any assumption on how clients are sampled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.privacy import streams
from fedjax_llm.privacy.clipping import noisy_mean
from fedjax_llm.privacy.streams import coefficients as coefficients
from fedjax_llm.privacy.streams import column as column
from fedjax_llm.types import Aggregate, StreamingAggregator, Traits


class State(NamedTuple):
  """The state of `correlated_mean`; `past` holds the noises of other rounds.

  >>> State(clip=0.5, noise_multiplier=1.1, past=()).clip
  0.5
  """

  clip: Any  # [] float32
  noise_multiplier: Any  # [] float32, z
  past: Any  # [M, ...] float32 a leaf; banded: the newest first
  # With a stream: ([] int32, the round; [] float32, the stream's sensitivity).
  more: Any = ()


def _saturated(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns an array in another dtype, cut to its finite numbers."""
  most = float(jnp.finfo(dtype).max)
  return jnp.clip(x, -most, most).astype(dtype)


def correlated_mean(
  clip: float,
  noise_multiplier: float,
  denominator: float,
  bands: int = 1,
  *,
  stream: streams.Stream | None = None,
) -> StreamingAggregator:
  """Returns the rule (sum_k clip(u_k) + y_t) / denominator, y = C^-1 n.

      n_t ~ N(0, (z clip |C|)^2)

  C and |C|, what one of k turns changes at most, divided by sqrt(k), are those
  of a stream. The mechanism on all rounds is then one Gaussian of multiplier
  z / sqrt(k), the composition of k of multiplier z. One band is independent
  noise.

  Args:
    clip: the largest norm of a client's update, as in `noisy_mean`.
    noise_multiplier: z.
    denominator: a public number of clients.
    bands: b of `streams.banded`, at most the rounds between two turns of a
      client; without a stream.
    stream: another one, for the rounds and turns of the run.

  Raises:
    Error: a number out of range.

  >>> rule = correlated_mean(1.0, 0.0, 4.0, bands=3)
  >>> rule.init({'w': jnp.zeros(2)}, jax.random.key(0)).past['w'].shape
  (2, 2)
  """
  inner = noisy_mean(clip, noise_multiplier, denominator)
  chosen = streams.banded(bands) if stream is None else stream

  def init(params, key):
    del key
    past = tree.map_present(
      lambda p: jnp.zeros((chosen.size, *p.shape), jnp.float32), params
    )
    more = ()
    if stream is not None:
      more = (jnp.int32(0), jnp.float32(stream.sensitivity))
    return State(jnp.float32(clip), jnp.float32(noise_multiplier), past, more)

  def finalize(sums, state, params, key):
    own, _ = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(sums.total)
    keys = jax.random.split(own, max(len(leaves), 1))
    number = state.more[0] if state.more else None
    noises, pasts = [], []
    for x, past, k in zip(leaves, treedef.flatten_up_to(state.past), keys):
      noise, past = chosen.step(past, number, k, noise_multiplier * clip)
      noises.append(x + noise)
      pasts.append(past)
    # An outcome that is not finite would undo the round and, with it, `past`:
    # the noise of later rounds would not be C^-1 n any more.
    delta = tree.map_present(
      lambda x, p: _saturated(x / denominator, p.dtype),
      jax.tree.unflatten(treedef, noises),
      params,
    )
    every = tree.map_present(lambda _: jnp.bool_(True), delta)
    state = state._replace(past=jax.tree.unflatten(treedef, pasts))
    if state.more:
      state = state._replace(more=(state.more[0] + 1, state.more[1]))
    return Aggregate(delta, trained=every), state

  return inner._replace(
    init=init,
    finalize=finalize,
    traits=Traits(always=True, private=finalize),
  )
