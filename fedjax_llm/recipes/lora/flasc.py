"""FLASC: dense training between a sparse download and a sparse upload.

Kuo et al. 2024, arXiv 2406.05233.
"""

from typing import Any

from fedjax_llm import aggregators, scopes, server, tree, uploads
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import SLOWLY, refuse
from fedjax_llm.types import Context, Error, FederatedAlgorithm, Loss, Shared

# What the config of each method changes.
NEEDS = {
  'flasc': SLOWLY,
}


def flasc(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  download_density: float = 0.25,
  upload_density: float = 0.25,
  per: str = 'tree',
  server_learning_rate: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
  variant: str = 'paper',
  **parts: Any,
) -> FederatedAlgorithm:
  """FLASC: dense training between a sparse download and a sparse upload.

      start_k = top_k(P);   u_k = top_k(end_k - start_k);
      P <- FedAdam(P, mean_k u_k)

  Kuo et al. 2024, arXiv 2406.05233, algorithm 1: the server keeps P dense,
  every client chooses its own entries, and clients count the same. Densities
  that the paper sweeps are powers of 1/4. A density of one both ways is
  FedAdam on LoRA. The paper chooses entries over all factors together; since
  b starts at zero, that starves b at first, and `per='leaf'` does not.

  Args:
    download_density, upload_density, per: see `uploads.top_k`.
    server_learning_rate, b1, b2, tau: of the server, see `server.fed_adam`.
    variant: 'paper', the default, is algorithm 1 with the FedAdam that it cites
      and serves P dense. 'code' follows the authors' program: the server is
      torch's AdamW (`server.adamw` with its defaults, of these settings only
      the learning rate), and the model evaluated and served is top_k(P), as a
      client would download it.

    Raises:
      Error: a density out of range, another variant; a server, an upload or a
        download in `parts`.

  >>> from fedjax_llm import local
  >>> from jax import numpy as jnp
  >>> method = flasc(None, local.optimizer('adamw'), upload_density=1 / 16)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m  # FedAdam's
  {'w': Array([0., 0.], dtype=float32)}
  """
  for section in ('server', 'upload', 'download'):
    refuse('flasc', section, parts)
  if variant not in ('paper', 'code'):
    raise Error(f"flasc: variant={variant!r} is neither 'paper' nor 'code'.")
  download = uploads.top_k(download_density, per)
  step = server.fed_adam(server_learning_rate, b1, b2, tau)
  if variant == 'code':
    step = server.adamw(server_learning_rate)
  algorithm = fed_avg(
    loss,
    optimizer,
    download=download,
    upload=uploads.top_k(upload_density, per),
    server=step,
    **{'aggregator': aggregators.uniform_mean(), **parts},
  )
  if variant == 'paper':
    return algorithm
  labels = (parts.get('scope') or scopes.everything()).labels

  def personal(params, state):
    shared = tree.select(params, labels(params), Shared)
    masks = tree.full_masks(params, labels(params))
    message, _ = download.encode(shared, masks, (), Context())
    sparse = tree.merge(download.decode(message, params, Context()), params)
    return algorithm.personal(sparse, state)

  return algorithm._replace(personal=personal)
