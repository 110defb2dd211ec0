"""Mixtures of a personal and a shared adapter, chosen at test time.

Builders return a `Loss` or a search over `Dual` parameters, so that
`evals.personal` can evaluate every client with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.nodes import Dual
from fedjax_llm.types import (
  Base,
  Batch,
  Error,
  Key,
  Loss,
  LossSum,
  Model,
  Params,
)


class Instances(NamedTuple):
  """A client's adapters, and the hidden states of some of its own texts.

  >>> Instances(Dual(shared={}, personal={}), jnp.ones((5, 2))).states.shape
  (5, 2)
  """

  params: Dual
  states: Any  # [S, D], by `text_states` of the local model
  valid: Any = None  # [S] bool: states that belong to a text; None: all


def text_states(model: Model, *, at: str = 'prompt') -> Callable[..., Any]:
  """Returns a function for h(x), the last layer's state at one token of a text.

  Args:
    model: its `hidden` is used.
    at: 'prompt', the token before the first learned one, so that a reply does
      not influence its own weight; 'end', the last token. One text a row.

  Returns:
    `states(base, params, batch) -> [B, D]` float32.

  Raises:
    Error: another `at`.

  >>> hidden = lambda base, params, batch: batch.tokens[..., None] * 1.0
  >>> tokens = jnp.array([[7, 8, 9]])
  >>> text = Batch(tokens, jnp.array([[False, False, True]]), tokens, tokens)
  >>> text_states(Model(hidden, None))(None, {}, text).tolist()  # before 9
  [[8.0]]
  """
  if at not in ('prompt', 'end'):
    raise Error(f"text_states: at={at!r} is neither 'prompt' nor 'end'.")

  def states(base: Base, params: Params, batch: Batch) -> jax.Array:
    hidden = model.hidden(base, params, batch)  # [B, T, D]
    length = jnp.sum(batch.segments > 0, axis=-1)
    place = length - 1
    if at == 'prompt':
      learned = jnp.any(batch.loss_mask, axis=-1)
      first = jnp.argmax(batch.loss_mask, axis=-1)
      place = jnp.where(learned, first - 1, place)
    index = jnp.maximum(place, 0)[:, None, None]
    return jnp.take_along_axis(hidden, index, 1)[:, 0].astype(jnp.float32)

  return states


def local_model(params: Dual) -> Params:
  """Returns the personal adapter alone, with the residuals of the shared one.

  Residuals belong to the base, which both adapters share.

  >>> local_model(Dual({'q': 1.0}, {'q': 2.0}))
  {'q': 2.0}
  """
  return multi.with_residuals(params.personal, params.shared)


def instance_weights(
  model: Model, *, strength: float = 0.5, at: str = 'prompt'
) -> Callable[..., jax.Array]:
  """Returns a function for FedDPA's weight of the local adapter on each text.

      alpha(x) = strength / S sum_{j <= S} cos(h(x), h(x_j))

  over S texts x_j of the client's own training data, with h of the local model
  (Yang et al. 2024, arXiv 2403.19211; the authors' code takes S = 5, strength
  0.5 and the prompt's last token).

  Returns:
    `weights(base, instances, batch) -> [B]`.

  >>> def hidden(base, params, batch):
  ...   return jax.nn.one_hot(batch.tokens, 2)
  >>> mine = Instances(Dual({}, {}), jnp.array([[0.0, 1.0]]))
  >>> tokens = jnp.array([[0, 0], [1, 1]])
  >>> texts = Batch(tokens, tokens < 0, tokens, tokens + 1)
  >>> instance_weights(Model(hidden, None))(None, mine, texts).tolist()
  [0.0, 0.5]
  """
  states_of = text_states(model, at=at)

  def weights(base: Base, instances: Instances, batch: Batch) -> jax.Array:
    unit = lambda x: (
      x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
    )
    here = unit(states_of(base, local_model(instances.params), batch))
    near = unit(instances.states)
    cosine = jnp.matmul(here, near.T, precision=jax.lax.Precision.HIGHEST)
    return strength * jnp.mean(cosine, axis=-1, where=instances.valid)

  return weights


def instance_mixed(
  loss: Loss, model: Model, *, strength: float = 0.5, at: str = 'prompt'
) -> Loss:
  """Returns the loss of W x + alpha(x) local x + (1 - alpha(x)) global x.

  alpha is computed for each row by `instance_weights`.

  Args:
    loss: sums for each row of a batch, [B].
    model: computes the states.
    strength, at: see `instance_weights`.

  Returns:
    A `Loss` on `Instances`, for `evals.personal`.

  >>> from fedjax_llm.nodes import LowRank
  >>> hidden = lambda base, params, batch: jnp.ones((*batch.tokens.shape, 2))
  >>> def loss(base, params, batch, key):
  ...   return LossSum((params.a @ params.b)[:, 0], jnp.ones(1), jnp.ones(1))
  >>> node = lambda x: LowRank(jnp.full((1, 1), x), jnp.ones((1, 1)), 1.0)
  >>> mine = Instances(Dual(node(0.0), node(8.0)), jnp.ones((5, 2)))
  >>> tokens = jnp.ones((1, 3), jnp.int32)
  >>> text = Batch(tokens, tokens > 0, tokens, tokens)
  >>> sums = instance_mixed(loss, Model(hidden, None))(None, mine, text, None)
  >>> round(float(sums.total[0]), 3)  # cosine 1 to the own texts: 8 / 2
  4.0
  """
  weigh = instance_weights(model, strength=strength, at=at)

  def mixed(base, params: Instances, batch: Batch, key: Key) -> LossSum:
    alpha = weigh(base, params, batch)
    both = params.params
    own = multi.without_residuals(both.personal)

    def row(share, text):
      served = multi.mix((own, both.shared), (share, 1 - share))
      one = jax.tree.map(lambda x: x[None], text)
      sums = loss(base, served, one, key)
      return jax.tree.map(lambda x: x[0], sums)

    return jax.vmap(row)(alpha, batch)

  return mixed


def fuse(
  loss: Loss,
  *,
  penalty: float = 0.05,
  first: tuple[float, float] = (0.5, 0.5),
  num_candidates: int = 8,
  num_generations: int = 20,
  spread: float = 0.5,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Returns FDLoRA's gradient-free search for the weights of two adapters.

      min over (w_1, w_2) of L(w_1 theta_p + w_2 theta_s)
                             + penalty (|w_1| + |w_2|)

  on a few texts, L the token mean (Qi et al. 2024, arXiv 2406.07925). The paper
  leaves the search to a library; here every generation draws `num_candidates`
  normal steps with standard deviation `spread`, which shrinks by 0.85 each
  generation, and keeps the best weights so far.

  Returns:
    `search(base, params: Dual, batch, key) -> (weights [2], objective)`, to be
    jitted and `vmap`ped over clients; `adapters.multi.blend` makes the adapter.

  Raises:
    Error: a negative penalty, fewer than one candidate or generation.

  >>> def loss(base, params, batch, key):
  ...   return LossSum((params['w'] - 4.0) ** 2, *jnp.float32([1, 1]))
  >>> pair = Dual(shared={'w': jnp.float32(0)}, personal={'w': jnp.float32(4)})
  >>> search = jax.jit(fuse(loss, penalty=0.0))
  >>> weights, objective = search(None, pair, None, jax.random.key(0))
  >>> round(float(weights[0]), 1)  # all of the personal one
  1.0
  """
  if penalty < 0 or num_candidates < 1 or num_generations < 1:
    raise Error(
      f'fuse: penalty={penalty} must not be negative, and num_candidates='
      f'{num_candidates} and num_generations={num_generations} must be at '
      'least 1.'
    )

  def search(base: Base, params: Dual, batch: Any, key: Key):
    def objective(weights):
      pair = (params.personal, params.shared)
      fused = multi.blend(pair, (weights[0], weights[1]))
      sums = loss(base, fused, batch, key)
      mean = jnp.sum(sums.total) / jnp.maximum(jnp.sum(sums.count), 1.0)
      return mean + penalty * jnp.sum(jnp.abs(weights))

    def generation(carry, number):
      best, value = carry
      draws = jax.random.normal(
        jax.random.fold_in(key, number), (num_candidates, 2)
      )
      tried = best + spread * 0.85**number * draws
      values = jax.vmap(objective)(tried)
      least = jnp.nanargmin(values)
      better = values[least] < value
      return (
        jnp.where(better, tried[least], best),
        jnp.where(better, values[least], value),
      ), None

    begin = jnp.asarray(first, jnp.float32)
    (best, value), _ = jax.lax.scan(
      generation,
      (begin, objective(begin)),
      jnp.arange(num_generations),
    )
    return best, value

  return search
