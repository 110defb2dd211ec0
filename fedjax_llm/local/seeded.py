"""Local training whose message is a coefficient a direction.

`in_basis` returns a `LocalUpdate` on `nodes.Seeded` parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.local.optimizers import LocalOptimizer
from fedjax_llm.local.sgd import contents
from fedjax_llm.local.zeroth_order import Slope, slopes
from fedjax_llm.nodes import Seeded, directions
from fedjax_llm.types import (
  ClientOutput,
  Context,
  Error,
  Key,
  LocalUpdate,
  Loss,
  LossSum,
  Params,
  Shared,
  Work,
)


class Basis(NamedTuple):
  """The directions of a method, the same for clients and server.

  `place(start, context, step) -> [n]`: the places in `coefficients`, flat, of
  the directions of a step; `keys(seed, round, place [...]) -> keys [...]` of
  these directions; `point(start) -> params` from which a client starts.
  """

  place: Callable[[Seeded, Context, Any], jax.Array]
  keys: Callable[[Any, Any, jax.Array], Key]
  point: Callable[[Seeded], Params]


def fresh(num: int) -> Basis:
  """Returns a basis that is drawn anew in every round, `num` places a step.

  >>> basis = fresh(2)
  >>> start = Seeded({'w': jnp.ones(3)}, jnp.zeros((4, 2)), jnp.uint32(7))
  >>> basis.place(start, Context(), 3).tolist()
  [6, 7]
  """

  def keys(seed, round, place):
    key = jax.random.fold_in(jax.random.key(seed), round)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, place)

  def place(start, context, step):
    return step * num + jnp.arange(num)

  return Basis(place, keys, lambda start: start.params)


def in_basis(
  loss: Loss,
  optimizer: LocalOptimizer,
  slope: Slope,
  basis: Basis,
  *,
  labels: Callable[[Params], Any],
  distribution: str = 'normal',
  report: bool = False,
  who: str = 'in_basis',
) -> LocalUpdate:
  """Returns steps of p <- p - eta / n sum_i s_i z_i that send coefficients.

  Every step estimates the slopes s_i along its n directions of the basis and
  adds -eta s_i / n to the coefficients at their places; the update holds these
  alone. A step without a loss token changes nothing.

  Args:
    loss: of the parameters in `Seeded.params`.
    optimizer: plain SGD: its learning rate, of the step over the whole run.
    slope: the estimate of a directional derivative.
    basis: the directions.
    labels: of the parameters: directions act on the leaves labelled Shared.
    distribution: of the directions.
    report: the client's report is (places [S, n], slopes [S, n]), with places
      of -1 for steps that were not taken.
    who: the name of the method, for error messages.

  Raises:
    Error: an optimizer with moments: a coefficient is a plain step along one
      direction; from the round, more steps than there are coefficients.

  >>> from fedjax_llm.local.optimizers import optimizer
  >>> from fedjax_llm.local.zeroth_order import forward_mode
  >>> from fedjax_llm.types import Frozen, Masks
  >>> square = lambda base, p, x, key: LossSum(p['w'] ** 2, *jnp.ones(2))
  >>> update = in_basis(
  ...   square, optimizer('sgd', 0.25), forward_mode(), fresh(1),
  ...   labels=lambda p: {'w': Shared}, distribution='rademacher')
  >>> start = Seeded({'w': jnp.float32(4)}, jnp.zeros((2, 1)), jnp.uint32(7))
  >>> context = Context(round=0, key=jax.random.key(0))
  >>> out = update.run(None, start, (), jnp.ones(2), Masks(None, None), context)
  >>> abs(out.update.coefficients).tolist()  # 4 -> 2 -> 1
  [[2.0], [1.0]]
  """
  plain_sgd(optimizer, who)
  directions.check(distribution, who)

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    params = basis.point(start)
    trained = tree.select(params, labels(params), Shared)
    num_steps = jax.tree.leaves(batches)[0].shape[0]
    texts, needed = contents(batches, num_steps)

    def step(index, carry):
      now, coefficients, kept, (sums, taken, norm) = carry
      batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)
      place = basis.place(start, context, index)  # [n]
      keys = basis.keys(start.seed, context.round, place)
      key = jax.random.fold_in(context.key, index)

      def function(point):
        return mean_loss(loss, base, point, params, batch, key)

      each, more = slopes(slope, function, now, keys, distribution, start.mask)
      real = more.count > 0  # a step without a loss token is padding
      rate = optimizer.learning_rate(context.round * num_steps + index)
      change = jnp.where(real, -rate * each / len(place), 0.0)
      keys, change = jax.lax.optimization_barrier((keys, change))
      now = directions.combined(now, keys, change, distribution, start.mask)
      mean = jnp.sqrt(jnp.mean(each**2))
      new = (more, jnp.int32(1), mean)
      totals = jax.tree.map(
        lambda t, x: t + jnp.where(real, x, 0), (sums, taken, norm), new
      )
      if report:
        row = jnp.where(real, place, -1), each
        kept = jax.tree.map(lambda x, r: x.at[index].set(r), kept, row)
      return now, coefficients.at[place].add(change), kept, totals

    flat = jnp.zeros(start.coefficients.size, jnp.float32)
    shape = (num_steps, basis.place(start, context, 0).size)
    if start.coefficients.ndim > 1 and num_steps > start.coefficients.shape[0]:
      raise Error(
        f'{who}: a client takes {num_steps} steps a round and num_steps is '
        f'{start.coefficients.shape[0]}: set it to cohort.num_steps.'
      )
    kept = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)) if report else ()
    zero = jnp.float32(0)
    totals = (LossSum(zero, zero, zero), jnp.int32(0), zero)
    _, flat, kept, totals = jax.lax.fori_loop(
      0, needed, step, (trained, flat, kept, totals)
    )
    sums, taken, norm = totals
    work = Work(tokens=sums.count, steps=taken)
    if texts:
      used = sum(jnp.sum(x.segments > 0, dtype=jnp.float32) for x in texts)
      work = work._replace(used=used, turns=jnp.int32(needed))
    none = jax.tree.map(lambda _: None, start)
    return ClientOutput(
      update=none._replace(coefficients=flat.reshape(start.coefficients.shape)),
      masks=masks,
      report=kept if report else None,
      work=work,
      metrics={
        'loss': sums.total / jnp.maximum(sums.count, 1.0),
        'accuracy': sums.correct / jnp.maximum(sums.count, 1.0),
        'slope': norm / jnp.maximum(taken, 1),
      },
    )

  return LocalUpdate(lambda trainable: (), run)


def plain_sgd(optimizer: LocalOptimizer, who: str) -> None:
  """Raises `Error` for an optimizer that is not SGD without momentum.

  >>> from fedjax_llm.local.optimizers import optimizer
  >>> plain_sgd(optimizer('adamw'), 'decomfl')
  Traceback (most recent call last):
  fedjax_llm.types.Error: decomfl needs local.name=sgd without momentum or \
clipping, not adamw: a coefficient is a plain step along one direction.
  """
  plain = not any(optimizer.keywords.values()) and optimizer.clip_norm is None
  if optimizer.name != 'sgd' or not plain:
    raise Error(
      f'{who} needs local.name=sgd without momentum or clipping, not '
      f'{optimizer.name}'
      f'{"" if plain else " with these settings"}: a coefficient is a plain '
      'step along one direction.'
    )
