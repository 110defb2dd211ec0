"""FedAPT: contexts that adapt to how much an image is like each client's.

Su et al. 2024, arXiv 2211.07864.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, server
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import Domains
from fedjax_llm.recipes.composing import compose
from fedjax_llm.recipes.images.scored import IMAGES, in_round, node_of
from fedjax_llm.types import FederatedAlgorithm, Key, Loss, LossSum, Params

# What the config of each method changes.
NEEDS = {
  'fed_apt': {
    **IMAGES,
    'adapter': dict(name='domain_context', length=2, num_classes=4),
  },
}


def fed_apt(
  loss: Loss, optimizer: LocalOptimizer, *, num_clients: int, **parts: Any
) -> FederatedAlgorithm:
  """FedAPT: a context for each class, scaled by the keys of the clients.

      client k:  rows_c = meta_c * (1 + key_k),
                 L_k = CE(class) + CE(f(x) Q, k),
      served:    rows_c = meta_c * (1 + sum_k w_k(x) key_k),
                 w(x) = softmax(standardised(f(x) Q) / temperature),
      meta, Q <- mean_k

  Su et al. 2024, arXiv 2211.07864 (supervised form): each client is a domain
  with a random frozen key [P, D], uniform in 0..1; the query Q learns to tell
  the domains apart, so an image gets its own context. The mean is unweighted,
  as in the authors' code, which takes 16 to 24 rows, SGD with 1e-2 and
  temperature 0.01. Serving an image takes a text for every class and image.

  Args:
    num_clients: N.

  Raises:
    Error: a loss that is not of images and names of classes; from `init`, an
      adapter without a domain context.

  >>> from fedjax_llm import local
  >>> method = fed_apt(None, local.optimizer('sgd'), num_clients=3)
  >>> node = Domains(jnp.ones((5, 2, 4)), jnp.ones((6, 0)),
  ...                jnp.ones((0, 2, 4)), jnp.float32(0.01))
  >>> state = method.init(jax.random.key(0), {'scores': node})
  >>> state.params['scores'].keys.shape, state.params['scores'].query.shape
  ((3, 2, 4), (6, 3))
  """
  seen = class_names.needed('fed_apt', loss)

  def wrap(key: Key, params: Params) -> Params:
    node = node_of('fed_apt', params, Domains, 'domain_context')
    names = jax.random.split(jax.random.fold_in(key, 1))
    size, rows = node.query.shape[0], node.meta.shape[1:]
    query = jax.random.uniform(names[0], (size, num_clients), minval=-1.0)
    keys = jax.random.uniform(names[1], (num_clients, *rows))
    node = node._replace(query=query * size**-0.5, keys=keys)
    return {**params, 'scores': node}

  def build(start, batches, context) -> Loss:
    del start, batches
    client = context.client

    def total(base, params, batch, key) -> LossSum:
      node = params['scores']
      mine = {**params, 'scores': node.of_client(client)}
      sums = loss(base, mine, batch, key)
      pooled = seen(base, params, batch).images(None).pooled
      whose = batch._replace(label=jnp.where(batch.label >= 0, client, -1))
      domain = class_names.summed(node.nearness(pooled), whose)
      return sums._replace(total=sums.total + domain.total)

    return total

  parts.setdefault('aggregator', aggregators.uniform_mean())
  return server.on_part(
    functools.partial(
      compose,
      in_round(build, optimizer),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: wrapped,
    put=lambda wrapped, part: part,
  )
