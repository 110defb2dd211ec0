"""Values that may be computed with, but not differentiated in reverse."""

from typing import Any

import jax

from fedjax_llm.types import Error


def one_way(values: Any, sentence: str) -> Any:
  """Returns the arrays; their gradient in reverse raises an `Error`.

  A loop whose number of steps is known only while it runs has no gradient in
  reverse, and JAX's own message does not say which setting gives it one.
  Derivatives in forward mode (`jax.jvp`) pass.

  >>> import jax.numpy as jnp
  >>> try:
  ...   jax.grad(lambda x: one_way(x, 'no gradient here.'))(jnp.float32(1))
  ... except Error as error:
  ...   print(error)
  no gradient here.
  """

  def refuse(_, cotangent):
    raise Error(sentence)

  @jax.custom_jvp
  def same(x):
    return x

  @same.defjvp
  def _(at, moved):
    (x,), (tangent,) = at, moved
    out = jax.custom_derivatives.linear_call(
      lambda _, t: t, refuse, (), tangent
    )
    return x, out

  floating = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
  return jax.tree.map(lambda x: same(x) if floating(x) else x, values)
