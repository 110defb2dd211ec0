"""FedSP: soft prompts are the messengers between a large and a small network.

Dong et al. 2023, Findings of EMNLP, arXiv 2311.06805.

    client   theta_k <- steps on F(c(theta_k), p),   then p_k <- steps on p
    server   p <- sum_k w_k p_k,   then p <- steps of the whole network on
             public texts; everything but p is frozen

where c is the client's network: its lowest layers, repeated up to the depth of
the whole one. Order and sharing of layers are as in the authors' program.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, tree
from fedjax_llm.adapters import halves
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.local.gradients import backprop
from fedjax_llm.local.sgd import stepped
from fedjax_llm.recipes.composing import compose, only, refuse
from fedjax_llm.recipes.split.cutting import layers_of
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Frozen,
  Loss,
  Model,
  Params,
  Private,
  Scope,
  Shared,
)

# What the config of each method changes. There is one packaged source of texts,
# so the public texts are like those of the clients.
NEEDS = {
  'fed_sp': dict(
    adapter=dict(name='soft_prompt', modules_to_save=('q_proj', 'v_proj')),
    public=dict(name='packaged', dataset='shakespeare_mini'),
  ),
}

PROMPT = '^(inputs|generator)/|/prefix/'  # names of the leaves that travel


def fed_sp(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  public: Any = None,
  cell: int = 1,
  server_steps: int = 2,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSP: clients train a small network and a prompt, the server the prompt.

  Dong et al. 2023, arXiv 2311.06805. A client's network repeats the `cell`
  lowest layers L / cell times; whatever the adapter has beside its prompt, such
  as `adapter.modules_to_save`, is the client's change of it and stays private.
  Both of its phases take all batches of the round, the first trains the
  network, the second the prompt. The prompt alone travels, and the whole
  network is served with it alone. The authors' program also distils the
  client's network before the rounds and has terms of distillation within them,
  which its runs leave out; here there is neither. The metric `local/loss` is of
  the small network.

  Args:
    model: the whole network.
    public: batches [M, B, ...] of public texts; round t takes the next ones.
    cell: the number of different layers of a client's network, a divisor of L.
    server_steps: steps on public texts a round, with the clients' optimizer
      from new moments; 0 for none.

  Raises:
    Error: a setting out of range, no public texts, a scope or an `after` in
      `parts`, a loss without `build`; from `init`, an adapter without a prompt
      or without anything else in the layers; from the round, a cell that does
      not divide L.

  >>> fed_sp(None, local.optimizer('sgd'), model=None, cell=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.cell is 0; it must be at least 1.
  """
  for section in ('scope', 'after'):
    refuse('fed_sp', section, parts)
  if cell < 1:
    raise Error(f'algorithm.cell is {cell}; it must be at least 1.')
  if server_steps < 0:
    raise Error(
      f'algorithm.server_steps is {server_steps}; it must be 0 or more.'
    )
  if server_steps and public is None and loss is not None:
    raise Error(
      'fed_sp trains its prompt on public texts: add the section public, such '
      'as public.name=packaged, or set server_steps=0.'
    )
  small = repeated(loss, model, cell)
  update = local.phases(
    Phase(local.sgd(small, optimizer), _labels(Frozen, Private)),
    Phase(local.sgd(small, optimizer), _labels(Shared, Frozen)),
  )

  def after(state, base, data, key):
    del data
    params = trained(
      *(loss, optimizer, base, state.params, public, key),
      first=(state.round - 1) * server_steps,
      steps=server_steps,
    )
    return state._replace(params=params)

  if server_steps:
    parts['after'] = after
  hint = (
    'trains a prompt beside the layers of a small network: adapter.name='
    "soft_prompt adapter.modules_to_save=('q_proj','v_proj')."
  )
  scope = only('fed_sp', _labels(Shared, Private), _both, hint)
  algorithm = compose(update, scope=scope, **parts)
  # A client's own leaves belong to its small network.
  return algorithm._replace(personal=lambda params, state: params)


def _labels(prompt: Any, others: Any) -> Scope:
  return scopes.labelled({PROMPT: prompt, '': others})


def _both(params: Params) -> bool:
  names = scopes.leaf_paths(params)
  prompts = [name for name in names if re.search(PROMPT, name)]
  below = [name for name in names if name.startswith('layers/')]
  return bool(prompts) and bool(set(below) - set(prompts))


def repeated(loss: Loss, model: Model, cell: int) -> Loss:
  """Returns the loss of the network of the `cell` lowest layers, repeated.

  It is built where it is first called, since a method that only reads a trained
  state has no network.
  """

  def hidden(base: Any, params: Params, batch: Any) -> jax.Array:
    number = halves.num_layers(params, 'fed_sp')
    if number % cell:
      raise Error(
        f'algorithm.cell is {cell}; it must divide the {number} layers of the '
        'network.'
      )
    layers = [*range(cell)] * (number // cell)
    return layers_of(model)(base, params, batch, layers)

  def on(base, params, batch, key):
    small = local.on_model(loss, Model(hidden, model.logits))
    return small(base, params, batch, key)

  return on


def trained(
  loss: Loss,
  optimizer: LocalOptimizer,
  base: Any,
  params: Params,
  public: Any,
  key: Any,
  *,
  first: Any,
  steps: int,
) -> Params:
  """Returns the parameters after steps of the prompt in the whole network.

  Step i takes batch (first + i) mod M.
  """
  prompt = tree.select(params, _labels(Shared, Frozen).labels(params), Shared)
  mask = tree.map_present(lambda _: jnp.bool_(True), prompt)
  number = jax.tree.leaves(public)[0].shape[0]

  def step(i, carry):
    now, moments = carry
    batch = tree.take(jax.tree.map(jnp.asarray, public), (first + i) % number)
    here = jax.random.fold_in(key, i)
    grads, sums = backprop(loss, base, now, params, batch, here)
    real = (sums.count > 0) & tree.all_finite(grads)
    grads = tree.map_present(lambda g: jnp.where(real, g, 0), grads)
    new, moments, _ = stepped(
      optimizer, grads, moments, now, mask, first + i, real
    )
    return new, moments

  start = (prompt, optimizer.init(prompt))
  prompt, _ = jax.lax.fori_loop(0, steps, step, start)
  return tree.merge(prompt, params)
