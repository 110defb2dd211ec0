"""(IA)3: vectors that scale keys, values and the inside of the perceptron.

`ia3` returns an `Adapter`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fedjax_llm.adapters import targets as targets_lib
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.nodes import Scaled
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def ia3(
  targets: str | Sequence[str] = ('k_proj', 'v_proj', 'down_proj'),
  feedforward: str | Sequence[str] = ('down_proj',),
  modules_to_save: str | Sequence[str] = (),
) -> Adapter:
  """Returns (IA)3: one trained factor for each feature, ones at the start.

      y' = l * y      the output of a target, its bias included
      y' = (l * x) W  where the target is in `feedforward`

  Liu et al. 2022, arXiv 2205.05638, equation 1: by default it scales the keys,
  the values, and the features between the matrices of the perceptron.

  Args:
    targets: see `targets.find`.
    feedforward: targets with scaled inputs; () for none.
    modules_to_save: see `lora`.

  Raises:
    Error: no matching target, or a feedforward module that is no target.

  >>> import jax
  >>> base = {'layers': {'k_proj': {'kernel': jnp.ones((2, 6, 4))}}}
  >>> params = ia3('k_proj', feedforward=()).init(jax.random.key(0), base)
  >>> params['layers']['k_proj']['output'].scale.shape
  (2, 4)
  """

  def start(key: Key, base: Base) -> Params:
    of = lambda names: targets_lib.find(base, names, 'adapter.feedforward')
    inside = set(of(feedforward) if feedforward else ())
    chosen = set(targets_lib.find(base, targets))
    for path in sorted(inside - chosen):
      raise Error(
        f'adapter.feedforward names {"/".join(path)}, which adapter.targets '
        'does not.'
      )

    def node(scaled_inputs: bool, kernel: Any) -> dict[str, Scaled]:
      *lead, inputs, features = kernel.shape
      size = inputs if scaled_inputs else features
      place = 'input' if scaled_inputs else 'output'
      return {place: Scaled(jnp.ones((*lead, size), jnp.float32))}

    del key  # nothing is drawn
    params: dict[str, Any] = {}
    for path in sorted(chosen):
      module, parent = base, params
      for name in path:
        module = module[name]
      for name in path[:-1]:
        parent = parent.setdefault(name, {})
      parent[path[-1]] = node(path in inside, module['kernel'])
    return params

  return saved_beside(Adapter(start, merge, fold), modules_to_save)
