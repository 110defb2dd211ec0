"""Low-rank adaptation: W + scale * A B, with W frozen.

Kernels are (in, out), so a token x of width D becomes x W + scale (x A) B with
A of [D, R] and B of [R, F]; over the layers every array has a leading L axis.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.adapters import picked
from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge, product
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.low_rank.starts import singular
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Adapter, Base, Error, Key, Params, known


def lora(
  rank: int = 8,
  alpha: float = 16.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
  lora_dropout: float = 0.0,
  layers: int | str | Sequence[int] | None = None,
) -> Adapter:
  """Returns LoRA, with scale = alpha / rank.

  Hu et al. 2021, arXiv 2106.09685, section 4.1. A starts uniform in
  +-1/sqrt(D), B at zero, as in PEFT: the adapted model starts as the base.

  Args:
    rank: R, at most the smaller side of every target.
    alpha: numerator of the scale.
    targets: see `targets.find`.
    modules_to_save: modules that are trained whole, such as the head of a
      classifier: see `dense`.
    lora_dropout: the probability that an entry of A's input is dropped in
      training: see `local.dropout`.
    layers: the numbers of the layers that have an adapter, from 0, or a regular
      expression that matches them, '[0-7]'; None: all layers.

  Raises:
    Error: a rank below one or above a target's sides; no matching target,
      layer or module; a target that is also trained whole.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((2, 6, 4))}}}
  >>> params = lora(rank=3, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].a.shape, params['layers']['q_proj'].b.shape
  ((2, 6, 3), (2, 3, 4))
  """
  inner = _low_rank(rank, alpha / max(rank, 1), targets)
  inner = in_layers(with_dropout(inner, lora_dropout), layers)
  return saved_beside(inner, modules_to_save)


def rslora(
  rank: int = 8,
  alpha: float = 16.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
  lora_dropout: float = 0.0,
  layers: int | str | Sequence[int] | None = None,
) -> Adapter:
  """Returns rank-stabilised LoRA, with scale = alpha / sqrt(rank).

  Keeps the size of activations and gradients as the rank grows (Kalajdzievski
  2023, arXiv 2312.03732, theorem 3.2). Arguments and errors as in `lora`.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((2, 6, 6))}}}
  >>> params = rslora(rank=4, targets='q_proj').init(jax.random.key(0), base)
  >>> params['layers']['q_proj'].scale
  Array([8., 8.], dtype=float32)
  """
  inner = _low_rank(rank, alpha / max(rank, 1) ** 0.5, targets)
  inner = inner._replace(peft={'use_rslora': True})
  inner = in_layers(with_dropout(inner, lora_dropout), layers)
  return saved_beside(inner, modules_to_save)


def federa(
  rank: int = 8,
  alpha: float = 16.0,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
  lora_dropout: float = 0.0,
  layers: int | str | Sequence[int] | None = None,
) -> Adapter:
  """Returns LoRA that starts from the largest singular directions of the base.

      W = U S V':   a = U_r sqrt(S_r / s),   b = sqrt(S_r / s) V_r',
                    W <- W - s a b,           s = alpha / rank

  so that the adapted model starts as the base. FeDeRA (Yan et al. 2024, arXiv
  2404.18848), which is PiSSA's start (Meng et al. 2024, arXiv 2404.02948) in
  federated training; every client has the same start, computed from the base.
  The subtracted product is in `residual`, which `fold` adds to the base once a
  round. Arguments and errors as in `lora`.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.diag(jnp.arange(3.0))[None]}}}
  >>> node = federa(rank=1, alpha=1.0, targets='q_proj').init(None, base)
  >>> float(node['layers']['q_proj'].residual[0, 2, 2].round(3))
  -2.0
  """
  scale = alpha / max(rank, 1)
  fresh = _low_rank(rank, scale, targets)

  def init(key: Key, base: Base) -> Params:
    del key  # nothing is drawn

    def node(x, weights):
      u, s, v = singular('federa', weights['kernel'], rank)
      root = jnp.sqrt(s / scale)
      new = x._replace(a=u * root[..., None, :], b=root[..., :, None] * v)
      return new._replace(residual=-product(new))

    params = fresh.init(jax.random.key(0), base)
    return _beside(params, base, node)

  inner = with_dropout(fresh._replace(init=init), lora_dropout)
  return saved_beside(in_layers(inner, layers), modules_to_save)


def with_dropout(adapter: Adapter, rate: float) -> Adapter:
  """Returns the adapter with PEFT's field `lora_dropout`.

  Raises:
    Error: a rate below 0, or 1 and above.

  >>> with_dropout(lora(), 0.1).peft
  {'lora_dropout': 0.1}
  """
  if not 0 <= rate < 1:
    raise Error(
      f'adapter.lora_dropout is {rate}; it must be at least 0 and below 1.'
    )
  return adapter._replace(peft={**adapter.peft, 'lora_dropout': rate})


def in_layers(
  adapter: Adapter, layers: int | str | Sequence[int] | None
) -> Adapter:
  """Returns the adapter cut down to some layers: see `picked`; None: all.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.zeros((3, 6, 4))}}}
  >>> some = in_layers(lora(targets='q_proj', rank=2), [0, 2])
  >>> some.init(jax.random.key(0), base)['layers']['q_proj'].a.shape
  (2, 6, 2)
  """
  if layers is None:
    return adapter

  def init(key: Key, base: Base) -> Params:
    return picked.pick(adapter.init(key, base), base, layers)

  return adapter._replace(init=init)


def factorised(
  rank: int = 8,
  targets: str | Sequence[str] = ('q_proj', 'v_proj'),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns an adapter that replaces W by its best product of rank R.

      W = U S V':   W' = a b,   a = U_r sqrt(S_r),   b = sqrt(S_r) V_r'

  The clients' models of FedHM (Yao et al. 2021, arXiv 2111.14655): the part of
  W above rank R is lost, unless R is the smaller side. `residual` is -W.
  Arguments and errors as in `federa`.

  >>> import jax, jax.numpy as jnp
  >>> base = {'layers': {'q_proj': {'kernel': jnp.diag(jnp.arange(3.0))[None]}}}
  >>> params = factorised(rank=1, targets='q_proj').init(None, base)
  >>> left = jnp.diagonal(product(params['layers']['q_proj'])[0])
  >>> abs(left).round(3).tolist()
  [0.0, 1.0, 0.0]
  """
  fresh = _low_rank(rank, 1.0, targets)

  def init(key: Key, base: Base) -> Params:
    del key  # nothing is drawn

    def node(x, weights):
      u, s, v = singular('factorised', weights['kernel'], rank)
      root = jnp.sqrt(s)
      a, b = u * root[..., None, :], root[..., None] * v
      kernel = weights['kernel'].astype(jnp.float32)
      return x._replace(a=a, b=b, residual=-kernel)

    return _beside(fresh.init(jax.random.key(0), base), base, node)

  return saved_beside(fresh._replace(init=init), modules_to_save)


def _beside(params: Any, base: Any, change: Callable) -> Any:
  """Maps `change(node, weights)` over adapter nodes and their base modules."""
  if isinstance(params, LowRank):
    return change(params, base)
  return {name: _beside(params[name], base[name], change) for name in params}


def _low_rank(rank: int, scale: float, targets: str | Sequence[str]) -> Adapter:
  if rank < 1:
    raise Error(f'adapter.rank is {rank}; it must be at least 1.')
  if known(scale) and scale <= 0:  # `sweep` traces numbers
    raise Error(
      f'adapter.alpha gives the scale {scale:g}; it must be above 0, or the '
      'adapter changes nothing.'
    )

  def init(key: Key, base: Base) -> Params:
    params: dict = {}
    for path in targets_lib.find(base, targets):
      kernel = _node(base, path)['kernel']
      *lead, d, f = kernel.shape
      if rank > min(d, f):
        raise Error(
          f'adapter.rank is {rank}, above the smaller side of '
          f'{"/".join(path)} ({d} x {f}).'
        )
      # Keyed by the target's path: adding a target changes no other node.
      name_key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
      bound = d**-0.5
      a = jax.random.uniform(
        name_key, (*lead, d, rank), jnp.float32, -bound, bound
      )
      node = LowRank(
        a=a,
        b=jnp.zeros((*lead, rank, f), jnp.float32),
        scale=jnp.full(tuple(lead), scale, jnp.float32),
      )
      parent = params
      for name in path[:-1]:
        parent = parent.setdefault(name, {})
      parent[path[-1]] = node
    return params

  return Adapter(init, merge, fold)


def _node(base: Base, path: Sequence[str]) -> Any:
  for name in path:
    base = base[name]
  return base
