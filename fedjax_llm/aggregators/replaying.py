"""Rules on coefficients in a seeded basis.

`on_coefficients` takes any rule to the coefficients of `nodes.Seeded`,
`replaying` also bills the rounds that a client missed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.checks import as_rule
from fedjax_llm.nodes import Seeded
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  AnyAggregator,
  Masks,
  Uploads,
)


def on_coefficients(inner: AnyAggregator) -> AnyAggregator:
  """Returns a rule on `Seeded` parameters: `inner` on their coefficients.

  The rule sees the coefficients [K, ...] of the clients and nothing else; the
  other fields have no update.

  >>> from fedjax_llm.aggregators import as_stack, median
  >>> params = Seeded({'w': jnp.ones(9)}, jnp.zeros(2))
  >>> sent = jnp.array([[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]])
  >>> three = Seeded({'w': None}, sent)
  >>> uploads = Uploads(three, three, Masks(three, three), jnp.ones(3),
  ...                   jnp.ones(3, bool))
  >>> rule = on_coefficients(median())
  >>> rule.aggregate(uploads, (), params, None)[0].delta.coefficients.tolist()
  [3.0, 4.0]
  """
  as_rule(inner, 'on_coefficients: inner')

  def own(uploads: Uploads) -> Uploads:
    return uploads._replace(
      update=uploads.update.coefficients,
      start=uploads.start.coefficients,
      masks=Masks(*(m.coefficients for m in uploads.masks)),
    )

  def outcome(result: Aggregate, params: Seeded) -> Aggregate:
    none = jax.tree.map(lambda _: None, params)
    return Aggregate(none._replace(coefficients=result.delta))

  def weights(uploads: Uploads) -> jax.Array:
    uploads = own(uploads)
    return uploads.weight if inner.weights is None else inner.weights(uploads)

  def init(params: Seeded, key: Any) -> Any:
    return inner.init(params.coefficients, key)

  if isinstance(inner, Aggregator):

    def aggregate(uploads, state, params, key):
      result, state = inner.aggregate(
        own(uploads), state, params.coefficients, key
      )
      return outcome(result, params), state

    return inner._replace(init=init, aggregate=aggregate, weights=weights)

  def accumulate(sums, uploads, state, params):
    return inner.accumulate(sums, own(uploads), state, params.coefficients)

  def finalize(sums, state, params, key):
    result, state = inner.finalize(sums, state, params.coefficients, key)
    return outcome(result, params), state

  return inner._replace(
    init=init,
    zero=lambda params: inner.zero(params.coefficients),
    accumulate=accumulate,
    finalize=finalize,
    weights=weights,
  )


class Replays(NamedTuple):
  """The inner rule's state, and the rounds that changed the parameters."""

  inner: Any
  rounds: Any  # [] int32
  dense: Any  # [] float32, the bytes of the parameters
  each: Any  # [] int32, the bytes of one round's coefficients and seed


def replaying(inner: AnyAggregator, log_rounds: int = 64) -> AnyAggregator:
  """Returns a rule on `Seeded`, with the bytes of rounds that clients missed.

  The coefficients mean the same directions for all clients of a round and
  others in the next, so the server optimizer may keep no moments. At the start
  of a round a client receives the seed of that round, and for every round since
  it last took part the mean coefficients and their seed: 4 (J + 1) bytes. A
  client that was absent for more than `log_rounds` rounds receives the
  parameters. A newcomer has the initial parameters.

  >>> from fedjax_llm.aggregators import uniform_mean
  >>> rule = replaying(on_coefficients(uniform_mean()))
  >>> params = Seeded({'w': jnp.ones(99)}, jnp.zeros((1, 5)))
  >>> state = rule.init(params, jax.random.key(0))._replace(rounds=jnp.int32(3))
  >>> counts, seen = rule.num_bytes(state, jnp.int32(1))
  >>> int(counts), int(seen)  # two rounds of five scalars and a seed, a seed
  (52, 3)
  """
  rule = as_rule(inner, 'replaying: inner')
  traits = rule.traits._replace(changes_basis=True)

  def init(params: Seeded, key: Any) -> Replays:
    leaves = jax.tree.leaves(params.params)
    dense = sum(x.size * x.dtype.itemsize for x in leaves)
    return Replays(
      rule.init(params, key),
      jnp.int32(0),
      jnp.float32(dense),
      jnp.int32(4 * (params.coefficients.size + 1)),
    )

  def num_bytes(state: Replays, seen: Any) -> tuple[Any, Any]:
    since = 0 if isinstance(seen, tuple) else seen
    missed = state.rounds - since
    most = jnp.iinfo(jnp.int32).max - 256  # the largest that float32 holds
    whole = jnp.minimum(state.dense, most).astype(jnp.int32)
    replay = jnp.minimum(missed, log_rounds) * state.each
    return 4 + jnp.where(missed > log_rounds, whole, replay), state.rounds

  def after(result: Any, state: Replays) -> Any:
    delta, new = result
    return delta, state._replace(inner=new, rounds=state.rounds + 1)

  more: dict[str, Any] = dict(init=init, traits=traits, num_bytes=num_bytes)
  if isinstance(rule, Aggregator):
    return rule._replace(
      aggregate=lambda uploads, state, params, key: after(
        rule.aggregate(uploads, state.inner, params, key), state
      ),
      **more,
    )
  return rule._replace(
    accumulate=lambda sums, uploads, state, params: rule.accumulate(
      sums, uploads, state.inner, params
    ),
    finalize=lambda sums, state, params, key: after(
      rule.finalize(sums, state.inner, params, key), state
    ),
    **more,
  )
