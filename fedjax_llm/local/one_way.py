"""Arrays that raise an `Error` if they are differentiated in reverse.

`one_way` returns such arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fedjax_llm.types import Error

_same = Primitive('one_way')  # the identity; its transpose raises
_same.def_impl(lambda x, *, sentence: x)
_same.def_abstract_eval(lambda x, *, sentence: x)
mlir.register_lowering(_same, lambda ctx, x, *, sentence: [x])


def _refuse(cotangent, x, *, sentence):
  raise Error(sentence)


def _batched(args, axes, *, sentence):
  return _same.bind(args[0], sentence=sentence), axes[0]


ad.deflinear2(_same, _refuse)
batching.primitive_batchers[_same] = _batched


def one_way(values: Any, sentence: str) -> Any:
  """Returns the arrays; their gradient in reverse raises an `Error`.

  A loop with a number of steps known only at run time has no gradient in
  reverse, and JAX's own message does not name the setting that enables one.
  Derivatives in forward mode (`jax.jvp`) pass.

  >>> try:
  ...   jax.grad(lambda x: one_way(x, 'no gradient here.'))(jnp.float32(1))
  ... except Error as error:
  ...   print(error)
  no gradient here.
  """

  def leaf(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return _same.bind(x, sentence=sentence)

  return jax.tree.map(leaf, values)
