"""Bottleneck adapters: small networks with a residual behind or beside layers.

`bottleneck` returns an `Adapter`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts.draws import at_least
from fedjax_llm.nodes import Activation, Bottleneck, Parallel
from fedjax_llm.types import Adapter, Base, Error, Key, Params

_FORMS = ('houlsby', 'pfeiffer', 'parallel')


def bottleneck(
  size: int = 16,
  form: Literal['houlsby', 'pfeiffer', 'parallel'] = 'pfeiffer',
  activation: str = 'relu',
  scale: float = 1.0,
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns bottleneck adapters of `size` features in every layer.

      y' = y + scale * (f(z @ down + b) @ up + c)

      houlsby    behind attention and behind the perceptron, z = y: Houlsby et
                 al. 2019, arXiv 1902.00751
      pfeiffer   behind the perceptron, z = y: Pfeiffer et al. 2021, arXiv
                 2005.00247
      parallel   beside the perceptron, z its input: He et al. 2022, arXiv
                 2110.04366, who scale by 4

  where y is the output of the sublayer before the block adds its residual.
  `down` starts uniform in +-1 / sqrt(D) and the rest at zero: the adapted model
  starts as the base.

  Args:
    size: R, the features of the bottleneck.
    form: see above.
    activation: f; a name of `nodes.Activation`: identity, relu, silu, tanh,
      gelu, gelu_tanh.
    scale: a constant, which is not trained.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one, an unknown form or activation; from `init`, a
      model without layers of this kind.

  >>> kernel = jnp.ones((2, 6, 4))
  >>> base = {'layers': {'mlp': {'down_proj': {'kernel': kernel}}}}
  >>> params = bottleneck(3).init(jax.random.key(0), base)
  >>> params['layers']['mlp']['down_proj']['output'].down.shape
  (2, 4, 3)
  """
  at_least(size=size)
  if form not in _FORMS:
    raise Error(
      f'adapter.form is {form!r}; it must be one of: {", ".join(_FORMS)}.'
    )
  kind = activation_of(activation)

  def node(key: Key, lead: tuple[int, ...], width: int) -> Bottleneck:
    bound = width**-0.5
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return Bottleneck(
      down=jax.random.uniform(
        key, (*lead, width, size), jnp.float32, -bound, bound
      ),
      up=zeros((*lead, size, width)),
      down_bias=zeros((*lead, size)),
      up_bias=zeros((*lead, width)),
      scale=None if scale == 1 else jnp.full(lead, scale, jnp.float32),
      activation=kind,
    )

  def start(key: Key, base: Base) -> Params:
    one, two = jax.random.split(key)

    def behind(key, *path):
      *lead, _, width = kernel_of(base, *path).shape
      return {path[1]: {'output': node(key, tuple(lead), width)}}

    layers: dict[str, Any] = {}
    if form == 'parallel':
      *lead, width, _ = kernel_of(base, 'mlp', 'up_proj').shape
      layers['mlp'] = {'parallel': Parallel(node(one, tuple(lead), width))}
    else:
      layers['mlp'] = behind(one, 'mlp', 'down_proj')
    if form == 'houlsby':
      layers['self_attn'] = behind(two, 'self_attn', 'o_proj')
    return {'layers': layers}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)


def activation_of(name: str) -> Activation:
  """Returns the activation of a name.

  Raises:
    Error: there is none of this name.

  >>> activation_of('relu').value
  'relu'
  """
  names = [kind.value for kind in Activation]
  if name not in names:
    raise Error(
      f'adapter.activation is {name!r}; it must be one of: {", ".join(names)}.'
    )
  return Activation(name)


def kernel_of(base: Base, *path: str) -> Any:
  """Returns the matrices [L, D, F] of a module of the layers.

  Raises:
    Error: the model has no such module.

  >>> kernel_of({'layers': {'q': {'kernel': 1}}}, 'q')
  1
  """
  module = base.get('layers', {})
  for name in path:
    module = module.get(name, {})
  if 'kernel' not in module:
    raise Error(
      f'the model has no layers/{"/".join(path)}, where a bottleneck adapter '
      'stands.'
    )
  return module['kernel']
