"""LoRA from the QR factors of the weights, and with a scale for the cohort.

`orthogonal` and `sfed_lora` return an `Adapter`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_llm import linalg
from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge, product
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.low_rank.lora import lora
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def orthogonal(
  rank: int = 8,
  alpha: float = 16.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns LoRA that starts from the QR factors of the base.

      W' = Q T:   b = Q[:, :R]',   s a = T[:R]',   W <- W - s a b,
      s = alpha / rank

  The start of ILoRA (arXiv 2511.16069), where W' is the weight of an output by
  its inputs: b's rows are orthonormal and span the first R inputs' columns of
  W'. The adapted model starts as the base, and every client has the same start.
  The subtracted product is in `residual`, which `fold` adds to the base once a
  round. Arguments and errors as in `lora`; a quantised base is refused.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': 2 * jnp.eye(3)[None]}}}
  >>> params = orthogonal(rank=1, targets='q_proj').init(None, base)
  >>> product(params['layers']['q_proj'])[0, 0].tolist()  # starts as the base
  [0.0, 0.0, 0.0]
  >>> abs(params['layers']['q_proj'].b[0]).tolist()
  [[1.0, 0.0, 0.0]]
  """
  scale = alpha / max(rank, 1)
  t = lambda x: jnp.swapaxes(x, -1, -2)

  def node(key: Key, kernel: jax.Array) -> LowRank:
    del key  # nothing is drawn
    if hasattr(kernel, 'qvalue'):
      raise Error(
        'orthogonal starts from the QR factors of the weights, which a '
        'quantised base does not have: leave model.quantisation out.'
      )
    if rank > min(kernel.shape[-2:]):
      raise Error(
        f'adapter.rank is {rank}, above the smaller side of a target, '
        f'{min(kernel.shape[-2:])}.'
      )
    q, rows = linalg.qr(t(kernel).astype(jnp.float32))
    new = LowRank(
      t(rows)[..., :rank] / scale,
      t(q[..., :rank]),
      jnp.full(kernel.shape[:-2], scale, jnp.float32),
    )
    return new._replace(residual=-product(new))

  if rank < 1:
    raise Error(f'adapter.rank is {rank}; it must be at least 1.')

  def init(key: Key, base: Base) -> Params:
    key = jax.random.key(0) if key is None else key
    return targets_lib.grow(base, targets, key, node)

  return saved_beside(Adapter(init, merge, fold), modules_to_save)


def sfed_lora(
  rank: int = 8,
  alpha: float = 16.0,
  clients: int = 8,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
  lora_dropout: float = 0.0,
  layers: int | str | Sequence[int] | None = None,
) -> Adapter:
  """Returns LoRA with scale = alpha sqrt(clients / rank), for an averaged a.

  The scale of SFed-LoRA (arXiv 2603.08058): the mean of N clients' factors
  shrinks by sqrt(N), so activations keep their size for every rank and cohort.
  With one client it is rank-stabilised LoRA. Arguments and errors as in `lora`.

  Args:
    clients: N, the clients that are averaged in a round. Which number counts
      where not all take part, the paper leaves open: set the cohort's size.

  Raises:
    Error: as in `lora`; no client.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((1, 6, 6))}}}
  >>> adapter = sfed_lora(rank=4, clients=16, targets='q_proj')
  >>> adapter.init(jax.random.key(0), base)['layers']['q_proj'].scale.tolist()
  [32.0]
  """
  if clients < 1:
    raise Error(f'adapter.clients is {clients}; it must be at least 1.')
  factor = (clients * max(rank, 1)) ** 0.5  # lora divides by the rank
  return lora(
    rank, alpha * factor, targets, modules_to_save, lora_dropout, layers
  )
