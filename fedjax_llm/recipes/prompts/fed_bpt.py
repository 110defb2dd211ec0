"""FedBPT: clients and the server search a low-dimensional prompt by CMA-ES.

Sun et al. 2024, arXiv 2310.01467.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import scopes, server, tree
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.aggregators.weights import counted
from fedjax_llm.local import LocalOptimizer, evolution
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Batch,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Scope,
  Shared,
  Work,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_bpt': dict(
    adapter=dict(name='soft_prompt'),
    algorithm=dict(dimension=16, population=6, generations=2),
  ),
}


_DISTURBED = 311  # purpose of the random stream


def fed_bpt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  dimension: int = 500,
  population: int = 20,
  generations: int = 8,
  sigma: float = 1.0,
  perturbed: float = 0.0,
  together: int | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedBPT: clients and the server search a low-dimensional prompt by CMA-ES.

      prompt = p_0 + A z,   z in R^d, A fixed and random,
      client: a copy of the server's (m, sigma, C), I generations of P samples
              whose values are the loss on its data; it sends its mean m_k, the
              loss there, and the sigma_kj of its generations,
      server: sigma <- sqrt(sum_kj sigma_kj^2 / (K mu)),  (m, sigma, C) <- one
              generation whose samples are the m_k, all of them parents;
              clients go on with  sigma_c <- sigma_c sigma_after / sigma_before

  Sun et al. 2024, arXiv 2310.01467, as the authors' code has it, with
  mu = P / 2 and the equations of `local.evolution`. Only the loss is evaluated:
  nothing is differentiated, and the config's optimizer is not used. The values
  are token means over all batches of a round. With `perturbed` = r a client's
  values are L(z; X) / L(z; X~), which does not reward a prompt that answers
  whatever the text is: X~ has random tokens in the places of a share r of the
  text, see `disturbed`. It costs a second pass. A client
  receives d^2 + d + 1 numbers, and sends d + I + 1. Clients
  count the same. A is drawn from the seed; its entries have the deviation of
  the leaf of the adapter that they change, over sqrt(d).

  Args:
    dimension: d.
    population, generations: P and I, on each client.
    sigma: the first step size.
    perturbed: r, 0 for values L(z; X); the authors' runs have 0.5.
    together: samples whose loss is computed at the same time; all if None.

  Raises:
    Error: an aggregator, a scope or a server in `parts`; d, P or I too small;
      r outside of [0, 1).

  >>> from fedjax_llm import local, nodes
  >>> method = fed_bpt(None, local.optimizer('sgd'), dimension=4)
  >>> params = {'inputs': nodes.Prompt(jnp.ones((3, 8)))}
  >>> state = method.init(jax.random.key(0), params)
  >>> state.params['z'].shape, method.personal(state.params, None)['inputs']
  ((4,), Prompt(rows=Array([[1., 1., 1., 1., 1., 1., 1., 1.],
         [1., 1., 1., 1., 1., 1., 1., 1.],
         [1., 1., 1., 1., 1., 1., 1., 1.]], dtype=float32)))
  """
  del optimizer
  for section in ('aggregator', 'scope', 'server'):
    refuse('fed_bpt', section, parts)
  least = dict(dimension=1, population=2, generations=1)
  for name, number in dict(
    dimension=dimension, population=population, generations=generations
  ).items():
    if number < least[name]:
      raise Error(
        f'algorithm.{name} is {number}; it must be at least {least[name]}.'
      )
  if known(perturbed) and not 0 <= perturbed < 1:
    raise Error(
      f'algorithm.perturbed is {perturbed}; it must be at least 0 and below 1.'
    )
  own = evolution.constants(evolution.raw_weights(population), dimension)

  def wrap(key: Key, params: Params) -> Params:
    return {
      'z': jnp.zeros(dimension, jnp.float32),
      'fitness': jnp.float32(0),
      'sigmas': jnp.zeros(generations, jnp.float32),
      'first': params,
      'projection': _projection(key, params, dimension),
    }

  update = LocalUpdate(
    lambda trainable: (),
    functools.partial(
      _search, loss, own, population, generations, together, perturbed
    ),
  )
  return server.on_part(
    functools.partial(
      compose,
      update,
      scope=_scope(),
      aggregator=_rule(sigma, population // 2),
      **{'measure': None, **parts},
    ),
    wrap=wrap,
    get=prompted,
    put=lambda wrapped, part: {**wrapped, 'first': part},
    fold=None,
  )


def prompted(wrapped: Params) -> Params:
  """Returns the adapter p_0 + A z of the wrapped parameters."""
  return _at(wrapped, wrapped['z'])


def _at(wrapped: Params, z: jax.Array) -> Params:
  def leaf(x, a):
    change = jnp.tensordot(z, a, 1, precision=jax.lax.Precision.HIGHEST)
    return (x + change).astype(x.dtype)

  changed = tree.map_present(leaf, wrapped['first'], wrapped['projection'])
  return tree.merge(changed, wrapped['first'])


def _projection(key: Key, params: Params, dimension: int) -> Params:
  """Returns A, [d, ...] for each leaf that is trained, None for the others."""
  labels = scopes.everything().labels(params)
  chosen = tree.select(params, labels, Shared)
  leaves, treedef = jax.tree.flatten(chosen)
  drawn = []
  for number, x in enumerate(leaves):
    spread = jnp.std(x.astype(jnp.float32))
    spread = jnp.where(spread > 0, spread, 1.0) / dimension**0.5
    one = jax.random.fold_in(jax.random.fold_in(key, 5), number)
    drawn.append(spread * jax.random.normal(one, (dimension, *x.shape)))
  return jax.tree.unflatten(treedef, drawn)


def _scope() -> Scope:
  """Returns the scope: z travels both ways, the other numbers only up."""
  inner = scopes.frozen('^(first|projection)/')

  def mask(start, state, context):
    full = inner.mask(start, state, context)
    none = {name: jnp.bool_(False) for name in ('fitness', 'sigmas')}
    return Masks({**full.held, **none}, full.trained)

  return Scope(inner.labels, mask)


def _search(
  loss, own, population, generations, together, perturbed,
  base, start, state, batches, masks, context,
) -> ClientOutput:  # fmt: skip
  sigma, covariance = context.news

  def totals(z, batches=batches):
    params = _at(start, z)
    each = jax.lax.map(
      lambda batch: loss(base, params, batch, context.key), batches
    )
    return jax.tree.map(jnp.sum, each)

  mean = lambda sums: sums.total / jnp.maximum(sums.count, 1.0)
  plain = value = lambda z: mean(totals(z))
  if not (known(perturbed) and perturbed == 0):
    size = draws.embedding(base).shape[0]
    noisy = disturbed(batches, context.key, perturbed, size)
    moved = jnp.any(noisy.tokens != batches.tokens)

    def value(z):
      below = jnp.where(moved, mean(totals(z, noisy)), 1.0)
      return mean(totals(z)) / jnp.maximum(below, 1e-6)

  def generation(number, carry):
    strategy, sigmas = carry
    key = jax.random.fold_in(context.key, number)
    samples = evolution.asked(strategy, key, population)
    values = jax.lax.map(value, samples, batch_size=together or population)
    strategy = evolution.moved(strategy, samples, values, own)
    return strategy, sigmas.at[number].set(strategy.sigma)

  begun = evolution.started(start['z'], sigma, covariance)
  found, sigmas = jax.lax.fori_loop(
    0, generations, generation, (begun, jnp.zeros(generations, jnp.float32))
  )
  sums = totals(found.mean)
  nats = mean(sums)
  none = jax.tree.map(lambda _: None, start)
  update = {
    **none,
    'z': found.mean - start['z'],
    'fitness': nats if value is plain else value(found.mean),
    'sigmas': sigmas,
  }
  steps = jnp.int32(generations * population)
  accuracy = sums.correct / jnp.maximum(sums.count, 1.0)
  return ClientOutput(
    update,
    masks,
    state,
    work=Work(tokens=sums.count, steps=steps),
    metrics={'loss': nats, 'accuracy': accuracy},
  )


def disturbed(batch: Batch, key: Key, share: Any, num_tokens: int) -> Batch:
  """Returns the batch with random tokens in the places of a share of them.

  Each real token is replaced with probability `share` by one drawn from all
  `num_tokens`. Tokens that are learned stay; texts that are classified have
  none. They are drawn once for a round of a client, so that the values of all
  its samples can be compared.

  >>> tokens = jnp.arange(1, 4)[None]
  >>> batch = Batch(tokens, tokens > 2, jnp.ones_like(tokens), tokens)
  >>> disturbed(batch, jax.random.key(0), 1.0, 1).tokens.tolist()
  [[0, 0, 3]]
  """
  where, what = jax.random.split(jax.random.fold_in(key, _DISTURBED))
  shape = jnp.shape(batch.tokens)
  free = jnp.asarray(batch.segments) > 0
  if batch.label is None:
    free &= ~jnp.asarray(batch.loss_mask)
  free &= jax.random.bernoulli(where, share, shape)
  drawn = jax.random.randint(what, shape, 0, num_tokens)
  return batch._replace(tokens=jnp.where(free, drawn, batch.tokens))


def _rule(sigma: float, mu: int) -> Aggregator:
  """Returns the server's generation; its state is (sigma_c, strategy)."""

  def init(params, key):
    del key
    first = evolution.started(jnp.array(params['z']), sigma)
    return jnp.float32(sigma), first

  def aggregate(uploads, state, params, key):
    del key
    sigma_c, strategy = state
    here = counted(uploads)
    number = jnp.sum(here)
    means = params['z'] + uploads.update['z']
    values = jnp.where(here, uploads.update['fitness'], jnp.inf)
    means = jnp.where(here[:, None], means, params['z'])
    # Weights of `number` parents: those of the others are zero.
    place = jnp.arange(1, len(here) + 1)
    raw = jnp.where(
      place <= number, jnp.log(number + 0.5) - jnp.log(place), 0.0
    )
    squares = jnp.where(here[:, None], uploads.update['sigmas'] ** 2, 0.0)
    before = jnp.sqrt(jnp.sum(squares) / jnp.maximum(number * mu, 1))
    before = jnp.where(before > 0, before, 1.0)
    constants = evolution.constants(raw, params['z'].shape[0])
    new = evolution.moved(
      strategy._replace(mean=params['z'], sigma=before),
      means,
      values,
      constants,
    )
    none = jax.tree.map(lambda _: None, params)
    still = {n: jnp.zeros_like(params[n]) for n in ('fitness', 'sigmas')}
    delta = {**none, **still, 'z': new.mean - params['z']}
    return Aggregate(delta), (sigma_c * new.sigma / before, new)

  def broadcast(state) -> Any:
    sigma_c, strategy = state
    return sigma_c, strategy.covariance

  return Aggregator(init, aggregate, broadcast=broadcast)
