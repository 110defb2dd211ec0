"""FedBiOT: an emulator that the server distils, adapters that clients tune.

Wu et al. 2024, KDD, arXiv 2406.17706.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import local, scopes, server, tree
from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer, distillation
from fedjax_llm.local.sgd import stepped
from fedjax_llm.nodes import Halves
from fedjax_llm.recipes.averaging.fed_prox import fed_prox
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.recipes.split.cutting import layers_of
from fedjax_llm.recipes.two_models import emulators
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Loss,
  Model,
  Params,
  Shared,
  known,
)

# What the config of each method changes. There is one packaged source of texts,
# so the public texts are like those of the clients.
NEEDS = {
  'fed_biot': dict(
    model=dict(num_layers=4),
    public=dict(name='packaged', dataset='shakespeare_mini'),
  ),
}


def fed_biot(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  public: Any = None,
  top: int = 2,
  drop: float = 0.5,
  server_steps: int = 2,
  kl: float = 0.9,
  mu: float = 0.2,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedBiOT: an emulator that the server distils, adapters that clients tune.

      client   min_A  loss(E, A) + mu / 2 ||A - A_t||^2        S steps
      server   A <- sum_k w_k A_k
      server   min_E  ||h_E - h||^2 / (n ms(h))
                      + lambda KL(p(W, A) || p(E, A))          server_steps

  Wu et al. 2024, arXiv 2406.17706. The emulator E is the lower layers with
  layers left out uniformly and an adapter of the server's, the adapter A that
  of the `top` layers. h_E and h are the states of E and of the lower layers W
  on public texts (section `public`), n their number and ms their mean square;
  p are predictions of the next token, at the places that the loss counts. The
  whole network with A alone is served. Losses and defaults are those of the
  authors' program; it takes the penalty on merged weights, here it is on the
  factors. The metric `local/loss` is that of the emulator. With drop=0, mu=0
  and SGD it is FedAvg on the adapters of the upper layers.

  Args:
    model: the network.
    public: batches [M, B, ...] of public texts; round t takes the next ones.
    top: the number of upper layers that clients tune.
    drop: the share of the lower layers that the emulator leaves out.
    server_steps: distillation steps a round, with the clients' optimizer from
      new moments; 0 leaves the emulator as it is.
    kl: lambda.
    mu: weight of the clients' penalty.

  Raises:
    Error: a setting out of range, no public texts, a scope or an `after` in
      `parts`; else as `offsite_tuning`.

  >>> loss = lambda base, params, batch, key: None
  >>> fed_biot(loss, local.optimizer('sgd'), model=None)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_biot distils its emulator on public texts: add \
the section public, such as public.name=packaged, or set server_steps=0.
  """
  for section in ('scope', 'after'):
    refuse('fed_biot', section, parts)
  layout = emulators.checked('fed_biot', 0, top, drop)
  if server_steps < 0:
    raise Error(
      f'algorithm.server_steps is {server_steps}; it must be 0 or more.'
    )
  if known(kl) and kl < 0:
    raise Error(f'algorithm.kl is {kl}; it must be 0 or more.')
  if server_steps and public is None and loss is not None:
    raise Error(
      'fed_biot distils its emulator on public texts: add the section public, '
      'such as public.name=packaged, or set server_steps=0.'
    )

  def after(state, base, data, key):
    del data, key
    emulator = distilled(
      optimizer, model, layout, base, state.params, public,
      first=(state.round - 1) * server_steps, steps=server_steps, kl=kl,
    )  # fmt: skip
    return state._replace(params=state.params._replace(server=emulator))

  joined = functools.partial(emulators.joined, layout=layout)
  plugged = functools.partial(emulators.plugged, layout=layout)
  cut = lambda params: emulators.cut(params, layout, 'fed_biot')
  small = local.viewed(emulators.on_emulator(loss, model, layout), joined)
  if server_steps:
    parts['after'] = after
  fold = parts.pop('fold', None)
  parts['scope'] = scopes.frozen('^server/')
  algorithm = server.on_part(
    functools.partial(fed_prox, small, optimizer, mu=mu, **parts),
    wrap=lambda key, params: cut(params),
    get=joined,
    put=lambda both, params: cut(params),
    serve=lambda both, state: plugged(both),
    fold=fold,
  )
  return _billed(algorithm, layout)


def gap(
  model: Model,
  layout: emulators.Layout,
  base: Any,
  parts: Halves,
  batch: Any,
  kl: float,
) -> jax.Array:
  """Returns the server's loss of one batch, between emulator and network."""
  layers, whole = layers_of(model), emulators.plugged(parts, layout)
  small = emulators.joined(parts, layout)
  num = halves.num_layers(whole, 'fed_biot')
  above = range(num - layout.top, num)
  want = layers(base, whole, batch, range(num - layout.top), ends=False)
  got = layers(base, small, batch, layout.kept(num), ends=False)
  here = (jnp.asarray(batch.segments) > 0)[..., None]
  if want.shape[1] != here.shape[1]:
    raise Error('fed_biot distils states of tokens: leave prompts out.')
  square = lambda x: jnp.sum(jnp.where(here, x.astype(jnp.float32), 0) ** 2)
  value = square(got - want) / jnp.maximum(square(want), 1e-12)

  def seen(params: Params, states: jax.Array) -> distillation.Predictions:
    top = lambda base, params, batch: layers(base, params, batch, above, states)
    return distillation.predictions(
      Model(top, model.logits, read=model.read), base, params, batch
    )

  teacher, student = seen(whole, want), seen(small, got)
  nats = distillation.divergence(teacher.logits, student.logits, teacher.mask)
  return value + kl * jnp.sum(nats) / jnp.maximum(jnp.sum(teacher.mask), 1)


def distilled(
  optimizer: LocalOptimizer,
  model: Model,
  layout: emulators.Layout,
  base: Any,
  parts: Halves,
  public: Any,
  *,
  first: Any,
  steps: int,
  kl: float,
) -> Params:
  """Returns the server's part after some steps on `gap`.

  Step i takes batch (first + i) mod M. Adapters of layers that the emulator
  does not have stay as they are.
  """
  trained = tree.select(
    parts.server, scopes.everything().labels(parts.server), Shared
  )
  num = halves.num_layers(emulators.joined(parts, layout), 'fed_biot')
  has = np.isin(np.arange(num - layout.top), layout.kept(num))
  mask = tree.map_present(
    lambda x: has.reshape(-1, *[1] * (x.ndim - 1)), trained
  )
  number = jax.tree.leaves(public)[0].shape[0]

  def slope(trained, batch):
    emulator = tree.merge(trained, parts.server)
    return gap(model, layout, base, parts._replace(server=emulator), batch, kl)

  def step(i, carry):
    trained, moments = carry
    batch = tree.take(jax.tree.map(jnp.asarray, public), (first + i) % number)
    grads = jax.grad(slope)(trained, batch)
    real = tree.all_finite(grads)
    grads = tree.map_present(lambda g: jnp.where(real, g, 0), grads)
    new, moments, _ = stepped(
      optimizer, grads, moments, trained, mask, first + i, real
    )
    return new, moments

  start = (trained, optimizer.init(trained))
  trained, _ = jax.lax.fori_loop(0, steps, step, start)
  return tree.merge(trained, parts.server)


def _billed(
  algorithm: FederatedAlgorithm, layout: emulators.Layout
) -> FederatedAlgorithm:
  """Returns the method with the bytes of the emulator's adapter down."""
  assert algorithm.train is not None
  first = algorithm.train

  def with_emulator(info, state, cohort):
    size, parts = 0, state.params
    num = halves.num_layers(emulators.joined(parts, layout), 'fed_biot')
    sent = tree.select(
      parts.server, scopes.everything().labels(parts.server), Shared
    )
    for x in jax.tree.leaves(sent):
      size += x[: len(layout.kept(num))].nbytes
    there = (jnp.asarray(cohort.ids) >= 0).astype(jnp.int32)
    down = jnp.concatenate([info.bytes_down, size * there[:, None]], axis=1)
    return info._replace(bytes_down=down)

  def train(state, cohort, base=None):
    uploads, states, info = first(state, cohort, base)
    return uploads, states, with_emulator(info, state, cohort)

  def round(state, cohort, base=None, data=None):
    new, states, info = algorithm.round(state, cohort, base, data)
    return new, states, with_emulator(info, state, cohort)

  return algorithm._replace(train=train, round=round)
