"""AlignFed without T_v: late updates by version, centred, weighted fairly.

Wang et al. 2026, arXiv 2606.08197.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local, tree
from fedjax_llm.aggregators.weights import counted, equal
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.recipes.asynchronous.fed_buff import versions
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  Error,
  FederatedAlgorithm,
  Gradient,
  Loss,
  Model,
  known,
)

# What the config of each method changes.
NEEDS = {
  'align_fed': dict(
    clients=dict(name='buffered', cohort_size=3, concurrency=4),
    system=dict(name='fleet'),
  ),
}


def align_fed(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  num_clients: int,
  pull: float = 0.1,
  gamma: float = 0.2,
  epsilon: float = 1e-8,
  singletons: str = 'keep',
  max_staleness: int = 10,
  **parts: Any,
) -> FederatedAlgorithm:
  """AlignFed without T_v: late updates by version, centred, weighted fairly.

      client   loss + lambda mean ||h - h_start||^2                      (3)
      server   d_k = u_k - mean of u over the clients of k's version     (5)
               w = softmax(-gamma tau_k - log(n_k + 1) / 2
                           - log(||d_k|| + epsilon))                     (7)
               p <- p + sum_k w_k d_k                                    (8)

  Wang et al. 2026, arXiv 2606.08197, equations 3 to 8 **without equation 6**:
  there a linear map T_v, fitted on texts of the server, moves d_k from the
  features of its version v to those of the newest. How T_v is parametrised and
  on which factors of an update it acts could not be established, so it is the
  identity here, and the server needs no texts.

  h is the hidden state before the head, at every token that is not padding (of
  an image its one state); n_k counts the earlier rounds of client k. A version
  with one client has the centred update zero, and by its norm such an update
  gets all the weight, so that the server stops. By default `singletons` are
  therefore not centred; 'zero' is the equation to the letter. The updates of a
  version with several clients keep only their differences: where w is the same
  for all of them they cancel.

  Args:
    model: hidden states.
    num_clients: N.
    pull: lambda; no value of the paper is known to us.
    gamma: the discount of a round of staleness.
    epsilon: the least norm.
    singletons: 'keep' or 'zero'.
    max_staleness: the most rounds that a client may be late.

  Raises:
    Error: an aggregator in `parts`, another word, a number out of range.

  >>> sgd = local.optimizer('sgd')
  >>> align_fed(None, sgd, model=None, num_clients=4, singletons='drop')
  Traceback (most recent call last):
  fedjax_llm.types.Error: align_fed: singletons is 'drop': it is keep or zero.
  """
  refuse('align_fed', 'aggregator', parts)
  return compose(
    local.sgd(loss, optimizer, gradient=anchored(model, pull)),
    aggregator=by_version(num_clients, gamma, epsilon, singletons),
    history=versions(max_staleness),
    **parts,
  )


def anchored(model: Model, pull: float) -> Gradient:
  """Returns the gradient of the loss + lambda mean ||h - h_start||^2.

  The mean is over the tokens of the batch that are not padding, over images
  where each has one state; h_start are the states of the parameters that the
  client received, without a gradient.

  Raises:
    Error: `pull` is negative.
  """
  if known(pull) and not pull >= 0:
    raise Error(f'align_fed: pull is {pull}: it must be 0 or more.')

  def gradient(loss, base, trained, start, batch, key):
    hidden: Any = model.hidden
    anchor = jax.lax.stop_gradient(hidden(base, start, batch))
    real = _real(batch, anchor)

    def of(trained):
      mean, sums = mean_loss(loss, base, trained, start, batch, key)
      apart = hidden(base, tree.merge(trained, start), batch) - anchor
      apart = jnp.where(real[..., None], apart, 0.0).astype(jnp.float32)
      far = jnp.sum(apart**2) / jnp.maximum(jnp.sum(real), 1)
      return mean + pull * far, sums

    return jax.grad(of, has_aux=True)(trained)

  return gradient


def _real(batch: Any, states: jax.Array) -> jax.Array:
  """Returns True where a state is not padding, the shape of states but D."""
  segments = getattr(batch, 'segments', None)
  if segments is None:  # images
    present = getattr(batch, 'present', None)
    here = True if present is None else jnp.asarray(present) > 0
  else:
    here = jnp.asarray(segments) > 0
    if states.ndim == 2:  # one state a text
      here = here.any(-1)
  return jnp.broadcast_to(here, states.shape[:-1])


def by_version(
  num_clients: int,
  gamma: float = 0.2,
  epsilon: float = 1e-8,
  singletons: str = 'keep',
) -> Aggregator:
  """Returns the rule of equations 5, 7 and 8: see `align_fed`.

  Its state are the rounds of each client so far, [N] int32. Weights by numbers
  of examples are not used, and a round of nobody changes nothing.

  Raises:
    Error: another word, a number out of range; from the round, no client ids.

  >>> from fedjax_llm.types import Uploads
  >>> uploads = Uploads(
  ...   jnp.array([[2.0], [4.0], [6.0]]), None, None, jnp.ones(3),
  ...   jnp.ones(3, bool), ids=jnp.arange(3), staleness=jnp.array([0, 0, 1]))
  >>> rule = by_version(3, gamma=0.0)
  >>> out, counts = rule.aggregate(
  ...   uploads, rule.init(None, None), jnp.zeros(1), None)
  >>> round(float(out.delta[0]), 4), counts.tolist()  # (-1 + 1) 6/13 + 6/13
  (0.4615, [1, 1, 1])
  """
  if singletons not in ('keep', 'zero'):
    raise Error(f'align_fed: singletons is {singletons!r}: it is keep or zero.')
  if num_clients < 1:
    raise Error(f'align_fed: num_clients={num_clients} must be at least 1.')
  for name, value, least in (('gamma', gamma, 0), ('epsilon', epsilon, 1e-30)):
    if known(value) and not value >= least:
      raise Error(f'align_fed: {name} is {value}: it must be {least} or more.')

  def aggregate(uploads, state, params, key):
    del key
    if uploads.ids is None:
      raise Error(
        'align_fed: the uploads have no ids of clients (Uploads.ids).'
      )
    here = counted(uploads)
    ids = jnp.asarray(uploads.ids)
    late = uploads.staleness
    late = jnp.zeros(here.shape, jnp.int32) if late is None else late
    group = (late[:, None] == late) & here[:, None] & here  # [K, K]
    size = jnp.sum(group, 1)
    share = group / jnp.maximum(size, 1)[:, None]
    if singletons == 'keep':
      share = jnp.where(size[:, None] == 1, 0.0, share)

    def apart(u):
      flat = u.astype(jnp.float32).reshape(len(u), -1)
      mean = jnp.matmul(share, flat, precision=jax.lax.Precision.HIGHEST)
      return (flat - mean).reshape(u.shape)

    centred = jax.tree.map(apart, uploads.update)
    norm = jax.vmap(tree.norm)(centred)  # [K]
    count = state[jnp.where(here, ids, 0)]
    score = -gamma * late - 0.5 * jnp.log1p(count) - jnp.log(norm + epsilon)
    score = jnp.where(here, score, -jnp.inf)
    # A round of nobody has no largest score.
    score = score - jnp.max(score, where=here, initial=-1e30)
    weight = tree.normalise(jnp.where(here, jnp.exp(score), 0.0))
    delta = tree.map_present(
      lambda d, p: d.astype(p.dtype), tree.weighted_sum(centred, weight), params
    )
    place = jnp.where(here, ids, num_clients)  # beyond the end: dropped
    return Aggregate(delta), state.at[place].add(1, mode='drop')

  return Aggregator(
    lambda params, key: jnp.zeros(num_clients, jnp.int32),
    aggregate,
    weights=equal,  # those of the softmax need the state
  )
