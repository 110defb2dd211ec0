"""Checks of aggregation rules and of the results that they return.

They return the checked rule, function or result, or raise `Error`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from fedjax_llm import tree
from fedjax_llm.types import (
  Aggregator,
  AnyAggregator,
  Cohort,
  Error,
  StreamingAggregator,
)


def as_rule(x: Any, where: str) -> AnyAggregator:
  """Returns x if it is a built rule.

  Raises:
    Error: x is a builder that was not called, a bare function, a name, or
      anything else.

  >>> as_rule('median', 'aggregator')  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: aggregator is the name 'median': build it, ...
  """
  if isinstance(x, Aggregator | StreamingAggregator):
    return x
  if isinstance(x, str):
    raise Error(
      f'{where} is the name {x!r}: build it, aggregators.{x}(); names belong '
      'in a config.'
    )
  if callable(x):
    name = getattr(x, '__name__', repr(x))
    if _is_builder(x):
      raise Error(f'{where} is the builder {name}: call it, {name}(...).')
    raise Error(
      f'{where} is the function {name}: a rule of one function (update, '
      f'weight) -> delta is lifted, aggregators.from_rule({name}).'
    )
  raise Error(
    f'{where} is of type {type(x).__name__}, but must be an Aggregator or a '
    'StreamingAggregator.'
  )


def one_cohort(cohort: Any) -> None:
  """Raises an `Error` unless a round or a scan of rounds gets one `Cohort`.

  >>> one_cohort([])  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: a round takes one Cohort, not a list: ...
  """
  if not isinstance(cohort, Cohort):
    raise Error(
      f'a round takes one Cohort, not a {type(cohort).__name__}: call it for '
      'each cohort, or pass tree.stack(cohorts) to differentiable.rounds.'
    )


def as_function(fn: Any) -> Callable:
  """Returns fn if it can be a rule's function `(update, weight) -> delta`.

  Raises:
    Error: a rule that is built, a builder, or no function of two arguments.

  >>> as_function(3)  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: from_rule needs a function ..., not int.
  """
  wanted = 'from_rule needs a function (update, weight) -> delta'
  if isinstance(fn, Aggregator | StreamingAggregator):
    raise Error(f'{wanted}, but this is a rule already: use it as it is.')
  if not callable(fn):
    raise Error(f'{wanted}, not {type(fn).__name__}.')
  name = getattr(fn, '__name__', repr(fn))
  if _is_builder(fn):
    raise Error(f'{wanted}, but {name} builds a rule: use {name}(...).')
  try:
    signature = inspect.signature(fn)
  except (TypeError, ValueError):  # built in
    return fn
  try:
    signature.bind(None, None)
  except TypeError as error:
    raise Error(
      f'{wanted}, but {name}{signature} does not take two arguments.'
    ) from error
  return fn


def _is_builder(x: Any) -> bool:
  """Returns True for a function that says so, or that needs no argument."""
  annotation = str(getattr(x, '__annotations__', {}).get('return', ''))
  if 'Aggregator' in annotation:
    return True
  try:
    known = inspect.signature(x).parameters.values()
  except (TypeError, ValueError):  # built in
    return False
  by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
  return all(p.kind in by_name or p.default is not p.empty for p in known)


def first_difference(result: Any, wanted: Any) -> str:
  """Describes where a tree of arrays first differs from one of shapes, or ''.

  >>> shapes = {'w': jax.ShapeDtypeStruct((2,), 'float32')}
  >>> first_difference({'w': jax.numpy.ones(3)}, shapes)
  'w has the shape (3,) instead of (2,)'
  >>> first_difference({'v': jax.numpy.ones(2)}, shapes)
  'w is missing'
  """
  got, want = tree.named(result), tree.named(wanted)
  for name, like in want.items():
    here = name or 'the result'
    if name not in got:
      return f'{here} is missing'
    shape = jax.numpy.shape(got[name])
    if shape != like.shape:
      return f'{here} has the shape {shape} instead of {like.shape}'
  for name in got:
    if name not in want:
      return f'{name or "the result"} is no leaf of an update'
  if jax.tree.structure(result) != jax.tree.structure(wanted):
    return 'the containers are of other types than those of the update'
  return ''


def traced(name: str, fn: Callable, *args: Any) -> Any:
  """Returns fn(*args), and explains an error about a traced value.

  Raises:
    Error: fn turns a traced value into a Python bool, number or NumPy array.
  """
  try:
    return fn(*args)
  except (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
  ) as error:
    raise Error(
      f'{name} asks{_line(fn, error)} for the value of an array that is known '
      'only while a round runs (a Python if, while, float(), int() or NumPy '
      'call): use jnp.where, jax.lax.cond, jax.lax.while_loop or jnp instead.'
    ) from error


def _line(fn: Callable, error: Exception) -> str:
  code = getattr(fn, '__code__', None)
  trace, line = error.__traceback__, ''
  while trace is not None and code is not None:
    if trace.tb_frame.f_code.co_filename == code.co_filename:
      line = f' in {code.co_filename}, line {trace.tb_lineno},'
    trace = trace.tb_next
  return line
