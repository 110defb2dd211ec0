"""Recovers tokens from the gradients of low-rank factors, where that is exact.

A node adds s (x a) b to the output of a weight. With the inputs X [T, D] of the
T places of a batch and the gradients Y [T, F] of their outputs,

    grad a = s X' (Y b')  [D, R],     grad b = s (X a)' Y  [R, F]

so the columns of grad a lie in the span of the rows of X, and those of grad b
in the span of the rows of X a. Where T is at most the rank of these columns,
and smaller than their length, they span it, and a token was in the batch
exactly if its input lies in it. In the first layer of a network without learned
positions the input of a token depends on nothing else, so all tokens can be
tried: the span check of Petrov et al. 2024 (DAGER, arXiv 2405.15586), for whose
full weights the rank is D. Several weights with one input, such as q, k and v,
give more columns.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models.config import Config
from fedjax_llm.models.network import layers
from fedjax_llm.types import Base, Error


def spanned(
  gradients: Sequence[np.ndarray],
  candidates: np.ndarray,
  *,
  tolerance: float = 1e-3,
) -> np.ndarray:
  """Returns which candidates lie in the span of the gradients' columns.

  Args:
    gradients: of factors with the same inputs, [P, Q_i] each.
    candidates: the input of each token, [V, P].
    tolerance: the largest distance to the span, relative to the length of the
      candidate; singular values below 1e-5 of the largest are noise.

  Returns:
    [V] bool. All are True where the columns span everything: that says nothing.

  Raises:
    Error: no gradients, or lengths that differ.

  >>> inputs = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
  >>> gradient = inputs[:1].T @ np.array([[2.0, 3.0]])  # of the first token
  >>> spanned([gradient], inputs).tolist()
  [True, False, False]
  """
  lengths = {np.shape(x)[0] for x in gradients}
  if lengths != {candidates.shape[1]}:
    raise Error(
      f'spanned: gradients of lengths {sorted(lengths)} and candidates of '
      f'length {candidates.shape[1]}; all must be the same.'
    )
  wide = [np.asarray(x, np.float64) for x in gradients]
  u, s, _ = np.linalg.svd(np.concatenate(wide, 1), full_matrices=False)
  basis = u[:, s > 1e-5 * max(s.max(initial=0.0), 1e-300)]  # [P, rank]
  x = np.asarray(candidates, np.float64)
  away = np.linalg.norm(x - (x @ basis) @ basis.T, axis=1)
  size = np.linalg.norm(x, axis=1)
  return (size > 0) & (away <= tolerance * size)


def inputs(config: Config, base: Base) -> jax.Array:
  """Returns the inputs of the first layer's attention by token, [V, D] float32.

  Raises:
    Error: the input depends on more than the token, or the layer normalises
      after its attention.

  >>> from fedjax_llm.models.config import Config
  >>> base = {'embed_tokens': {'embedding': 2 * jnp.eye(4)},
  ...         'layers': {'input_layernorm': {'scale': jnp.ones((1, 4))}}}
  >>> small = Config('small', 4, 4, 4, num_layers=1, num_heads=1,
  ...                num_kv_heads=1, head_dim=4, max_positions=8)
  >>> inputs(small, base).round().tolist()[0]  # of the mean square 1
  [2.0, 0.0, 0.0, 0.0]
  """
  stack = base.get('layers', {})
  if (
    not config.causal
    or config.num_learned_positions
    or config.residual == 'post'
    or 'input_layernorm' not in stack
  ):
    raise Error(
      f'inversion: in a {config.family} model the input of the first layer '
      'depends on positions, or is not normalised before attention; it needs a '
      'decoder with rotary positions.'
    )
  table = base['embed_tokens']
  tokens = jnp.arange(jax.tree.leaves(table)[0].shape[0])
  x = layers.embed(tokens, table, None, jnp.float32)
  x = x * config.embedding_scale
  first = jax.tree.map(lambda w: w[0], stack['input_layernorm'])
  return layers.norm(x, first, None, config.norm, config.norm_eps)
