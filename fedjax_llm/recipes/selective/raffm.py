"""RaFFM: clients train perceptrons cut to their most salient neurons.

Yu et al. 2023, arXiv 2310.00247.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Dense
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.scopes.ranks import of_profile
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Loss,
  Masks,
  Params,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  'raffm': dict(
    adapter=dict(name='dense', modules=('layers/mlp/.*',)),
    profiles=dict(name='widths', choices=(0.25, 0.5, 1.0)),
    local=dict(name='adamw', learning_rate=3e-3),
  ),
}

_INTO = ('gate_proj', 'up_proj')  # matrices [L, D, F] whose columns are neurons


def raffm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """RaFFM: clients train perceptrons cut to their most salient neurons.

      salience of neuron f in layer l:  s_lf = mean over W of sum_d |W_ldf|,
      client k: the network with the ceil(q_k F) neurons of the largest s_lf,
      W_f <- sum_k w_k W_f,k / sum_k w_k   over the clients that hold neuron f

  for the matrices W into the neurons (gate and up), in every layer. Yu et al.
  2023, arXiv 2310.00247, whose server permutes the neurons so that salient ones
  come first, which leaves the function as it is, and sends a prefix of them:
  here the same neurons are masked in their old order. A neuron of zeros adds
  nothing, so a client computes exactly the smaller network, at the cost of the
  whole one. q_k is the client's profile (`profiles.name=widths`). The order
  follows the server's weights of the round. A neuron that nobody holds keeps
  its value, and other leaves of the adapter are trained by all. With q_k = 1
  for all it is FedAvg. The authors also order the features within the heads of
  attention; that is left out, because rotary positions forbid it.

  Args:
    weighted: whether clients count by their weight.

  Raises:
    Error: a scope or an aggregator in `parts`; from a round, an adapter without
      whole perceptrons, or clients without a width.

  >>> from fedjax_llm import local
  >>> from fedjax_llm.types import Context
  >>> whole = lambda *shape: {'kernel': Dense(jnp.ones(shape))}
  >>> up = jnp.array([[[1.0, 3.0, 2.0, 0.5]]])  # [L, D, F]
  >>> mlp = {'up_proj': {'kernel': Dense(up)}, 'down_proj': whole(1, 4, 1)}
  >>> half = Context(profile={'width': jnp.float32(0.5)})
  >>> masks = neurons().mask({'layers': {'mlp': mlp}}, None, half)
  >>> masks.held['layers']['mlp']['up_proj']['kernel'].value.tolist()
  [[[False, True, True, False]]]
  """
  for section in ('scope', 'aggregator'):
    refuse('raffm', section, parts)
  return fed_avg(
    loss,
    optimizer,
    scope=neurons(),
    aggregator=aggregators.masked_mean('mask', weighted=weighted),
    **parts,
  )


def neurons() -> Scope:
  """Returns the scope: a client of width q holds the salient neurons.

  Columns of gate and up with their biases, and rows of down.
  """
  inner = scopes.everything()

  def labels(params: Params) -> Any:
    mlp = _perceptron(params)
    if mlp is None:
      raise Error(
        "raffm trains perceptrons: adapter.name=dense with 'layers/mlp/.*' "
        'among adapter.modules.'
      )
    return inner.labels(params)

  def mask(start, state, context):
    masks = inner.mask(start, state, context)
    width = of_profile(context.profile, 'width', 'width')
    mlp = _perceptron(start)
    order = places(mlp)
    # A float32 product may lie above a whole number by rounding alone.
    number = jnp.maximum(jnp.ceil(width * order.shape[-1] - 1e-3), 1)
    return restricted(masks, order < number)

  return Scope(labels, mask)


def _perceptron(params: Params) -> Any:
  """Returns the modules at layers/mlp; None where one is not `Dense`."""
  part: Any = params
  for name in ('layers', 'mlp'):
    part = part.get(name) if isinstance(part, Mapping) else None
  if not isinstance(part, Mapping) or not {'up_proj', 'down_proj'} <= {*part}:
    return None
  whole = lambda module: (
    isinstance(module, Mapping)
    and isinstance(module.get('kernel'), Dense)
    and jnp.ndim(module['kernel'].value) == 3
  )
  return part if all(map(whole, part.values())) else None


def places(mlp: Mapping[str, Any]) -> jax.Array:
  """Returns the place of each neuron by salience, 0 for the largest, [L, F].

  Of equal neurons the first one comes first.

  >>> up = jnp.array([[[1.0, -3.0], [1.0, 0.0]]])  # [L, D, F]
  >>> places({'up_proj': {'kernel': Dense(up)}}).tolist()
  [[1, 0]]
  """
  matrices = [mlp[n]['kernel'].value for n in _INTO if n in mlp]
  each = [jnp.sum(jnp.abs(w.astype(jnp.float32)), -2) for w in matrices]
  salience = sum(each) / len(each)
  return jnp.argsort(jnp.argsort(-salience, axis=-1, stable=True), axis=-1)


def restricted(masks: Masks, keep: jax.Array) -> Masks:
  """Returns masks that hold the neurons `keep` [L, F] alone."""

  def of(mask):
    mlp = dict(mask['layers']['mlp'])
    for name, module in mlp.items():
      inner = dict(module)
      outward = name == 'down_proj'  # its rows are the neurons, its bias none
      kept = keep[:, :, None] if outward else keep[:, None, :]
      inner['kernel'] = Dense(inner['kernel'].value & kept)
      if 'bias' in inner and not outward:
        inner['bias'] = Dense(inner['bias'].value & keep)
      mlp[name] = inner
    return {**mask, 'layers': {**mask['layers'], 'mlp': mlp}}

  return Masks(*(of(mask) for mask in masks))
