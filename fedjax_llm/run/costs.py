"""The costs of a traced program, before anything is compiled or loaded.

Operations are counted exactly, from the matrix products in the program. Memory
is the largest number of bytes live at a time in a walk through the program in
order; chains of cheap elementwise operations count as fused into their reader,
as the compiler does. The count needs only the program, so it serves every
method. On CPU it is within a tenth of the compiler's own figure for most
programs, and up to a fifth below it for small ones with full rematerialisation.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Calls that the compiler inlines, and the parameter that holds their body.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'checkpoint': 'jaxpr',
  'remat2': 'jaxpr',
}
_VIEWS = {'reshape', 'squeeze', 'expand_dims', 'bitcast_convert_type', 'copy'}
# Elementwise operations too expensive to compute twice.
_DEAR = {
  *('exp', 'exp2', 'log', 'log1p', 'expm1', 'tanh', 'logistic', 'erf'),
  *('sin', 'cos', 'sqrt', 'rsqrt', 'pow', 'div', 'integer_pow', 'cbrt'),
}
_CHEAP = {
  *('add', 'sub', 'mul', 'neg', 'sign', 'abs', 'max', 'min', 'floor', 'ceil'),
  *('eq', 'ne', 'lt', 'le', 'gt', 'ge', 'and', 'or', 'not', 'xor', 'select_n'),
  *('convert_element_type', 'broadcast_in_dim', 'iota', 'slice', 'rev'),
  *('dynamic_slice', 'transpose', 'pad', 'stop_gradient', 'is_finite', 'round'),
  *('shift_left', 'shift_right_logical', 'shift_right_arithmetic', 'square'),
  *('rem', 'clamp', 'add_any', 'name', 'sharding_constraint', 'mul_add'),
  *('optimization_barrier', 'reduce_precision', 'nextafter', 'real', 'pvary'),
}
_FUSED = _DEAR | _CHEAP
_REDUCTIONS = {
  *('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or'),
  *('reduce_prod', 'argmax', 'argmin'),
}
_IN_PLACE = {'dynamic_update_slice', 'scatter', 'scatter-add', 'scatter_add'}


class Costs(NamedTuple):
  """Floating point operations of matrix products by dtype, and peak memory.

  `temporary` is the largest number of bytes live at a time besides the inputs.
  """

  flops: dict[str, float]
  temporary: int


def of(program: Any, *, trips: int = 1) -> Costs:
  """Returns the costs of a closed jaxpr (`jax.make_jaxpr`).

  `trips` is the number of passes of a loop of unknown length.

  >>> f = lambda x, w: jax.numpy.tanh(x @ w).sum()
  >>> x, w = np.zeros((8, 16), 'f'), np.zeros((16, 32), 'f')
  >>> of(jax.make_jaxpr(f)(x, w))
  Costs(flops={'float32': 8192.0}, temporary=1028)
  """
  flops = operations(program, trips=trips)
  return Costs(flops, _peak(program.jaxpr, trips))


def operations(program: Any, *, trips: int = 1) -> dict[str, float]:
  """Returns the operations of a closed jaxpr's matrix products, by dtype.

  It is `of(program).flops`, without the walk for memory. The body of a
  `shard_map` counts once, as the work of one device row.

  >>> x, w = np.zeros((8, 16), 'f'), np.zeros((16, 32), 'f')
  >>> operations(jax.make_jaxpr(lambda x, w: x @ w)(x, w))
  {'float32': 8192.0}
  """
  flops: dict[str, float] = {}
  _count(program.jaxpr, 1.0, trips, flops)
  return flops


def num_bytes(tree: Any) -> int:
  """Returns the bytes of all leaves, arrays or shapes.

  >>> num_bytes({'a': np.zeros((2, 3), 'f'), 'b': None})
  24
  """
  return sum(_size(x) for x in jax.tree.leaves(tree))


def compiled_bytes(compiled: Any) -> int | None:
  """Returns the bytes of a compiled program by the compiler's own analysis.

  They count inputs, outputs that overwrite no input, and temporary memory. The
  result is None where the compiler has no analysis.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )


def _size(x: Any) -> int:
  dtype = getattr(x, 'dtype', None)
  if dtype is None:
    return 0
  item = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else None
  return math.prod(x.shape) * (item or np.dtype(dtype).itemsize)


def _inner(eqn: Any) -> list[tuple[Any, int]]:
  """Returns the bodies of an equation with their passes (0: `trips`)."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'scan':
    return [(params['jaxpr'].jaxpr, params['length'])]
  if name == 'while':
    return [(params['body_jaxpr'].jaxpr, 0)]
  if name == 'cond':
    return [(branch.jaxpr, 1) for branch in params['branches']]
  bodies = []
  for value in params.values():
    body = getattr(value, 'jaxpr', value)
    if hasattr(body, 'eqns'):
      bodies.append((body, 1))
  return bodies


# -------------------------------------------------------------- operations --


def _count(
  jaxpr: Any, times: float, trips: int, flops: dict[str, float]
) -> None:
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      left = eqn.invars[0].aval
      deep = math.prod(left.shape[i] for i in contract)
      done = 2.0 * deep * math.prod(eqn.outvars[0].aval.shape) * times
      kind = np.dtype(left.dtype).name
      flops[kind] = flops.get(kind, 0.0) + done
      continue
    inner = _inner(eqn)
    if name == 'cond':  # one branch runs: count the most expensive
      options: list[dict[str, float]] = []
      for body, _ in inner:
        options.append({})
        _count(body, times, trips, options[-1])
      worst = max(options, key=lambda option: sum(option.values()))
      for kind, done in worst.items():
        flops[kind] = flops.get(kind, 0.0) + done
      continue
    for body, number in inner:
      _count(body, times * (number or trips), trips, flops)


# ------------------------------------------------------------------ memory --


class _Step(NamedTuple):
  eqn: Any
  inputs: tuple[Any, ...]  # names: variables of the flat program
  outputs: tuple[Any, ...]


def _flat(jaxpr: Any) -> tuple[list[_Step], dict[Any, Any]]:
  """Returns the equations with calls inlined, and the name of each variable."""
  steps: list[_Step] = []
  names: dict[Any, Any] = {}

  def name(scope, v):
    if hasattr(v, 'val'):
      return None  # a literal
    return names.get((scope, v), (scope, v))

  def walk(body, scope):
    for eqn in body.eqns:
      inputs = tuple(name(scope, v) for v in eqn.invars)
      key = _CALLS.get(eqn.primitive.name)
      if key and key in eqn.params:
        inside = eqn.params[key]
        inside = getattr(inside, 'jaxpr', inside)
        deeper = object()
        for v, outer in zip(inside.invars, inputs):
          names[deeper, v] = outer
        walk(inside, deeper)
        for v, got in zip(eqn.outvars, inside.outvars):
          names[scope, v] = name(deeper, got)
      else:
        outputs = tuple((scope, v) for v in eqn.outvars)
        steps.append(_Step(eqn, inputs, outputs))

  walk(jaxpr, None)
  outs = {v: name(None, v) for v in jaxpr.outvars if not hasattr(v, 'val')}
  return steps, outs


def _peak(jaxpr: Any, trips: int, owned: Sequence[bool] = ()) -> int:
  """Returns the largest number of bytes live at a time, without the inputs.

  `owned` marks inputs that may be overwritten once they are dead: a loop's.
  """
  steps, outs = _flat(jaxpr)
  end = len(steps)
  readers: dict[Any, list[int]] = {}
  maker: dict[Any, int] = {}
  for i, step in enumerate(steps):
    for v in step.inputs:
      if v is not None:
        readers.setdefault(v, []).append(i)
    for v in step.outputs:
      maker[v] = i
  kept = {v for v in outs.values() if v is not None}
  mine = {(None, v) for v, own in zip(jaxpr.invars, owned) if own}

  def is_view(step):  # a matrix is transposed by the product that reads it
    kind = step.eqn.primitive.name
    flat = kind == 'transpose' and step.eqn.invars[0].aval.ndim == 2
    return flat or kind in _VIEWS

  def fuses(i):  # reads its operands as it goes
    kind = steps[i].eqn.primitive.name
    return kind in _FUSED or kind in _REDUCTIONS or kind in _VIEWS

  virtual: set[Any] = set()  # never written to memory
  for v, i in maker.items():
    kind = steps[i].eqn.primitive.name
    read = readers.get(v, [])
    if v in kept:
      continue
    if is_view(steps[i]) or (
      kind in _FUSED
      and all(fuses(j) for j in read)
      and (len(set(read)) <= 1 or kind in _CHEAP)
    ):
      virtual.add(v)

  # A value lives until its last reader, and as long as what is fused from it.
  last: dict[Any, int] = {}
  for i in range(end - 1, -1, -1):
    step = steps[i]
    until = i
    for v in step.outputs:
      final = end if v in kept else max(readers.get(v, [i]), default=i)
      final = max(final, last.get(v, i))
      last[v] = final
      if v in virtual:
        until = max(until, final)
    for v in step.inputs:
      if v is not None:
        last[v] = max(last.get(v, 0), until)

  size = lambda v: _size(v[1].aval)
  live, worst = 0, 0
  dying: dict[int, int] = {}  # bytes that end with a step
  for i, step in enumerate(steps):
    fresh = [v for v in step.outputs if v not in virtual]
    new = sum(size(v) for v in fresh)
    free: list[Any] = []
    if fuses(i) or step.eqn.primitive.name in _IN_PLACE:
      free = [
        v
        for v in set(step.inputs)
        if v is not None
        and last.get(v) == i
        and v not in virtual
        and (v in mine or v in maker)
      ]
    # An elementwise result overwrites an operand that dies here.
    for v in fresh:
      twin = next((f for f in free if size(f) >= size(v)), None)
      if twin is not None:
        free.remove(twin)
        new -= size(v)
    inside = _inside(step, trips, last, i, maker)
    worst = max(worst, live + new + inside)
    live += sum(size(v) for v in fresh)
    for v in fresh:
      dying[last[v]] = dying.get(last[v], 0) + size(v)
    live -= dying.pop(i, 0)
    worst = max(worst, live)
  return worst


def _inside(step: _Step, trips: int, last, i: int, maker) -> int:
  """Returns the bytes of an equation's bodies besides inputs and outputs."""
  eqn = step.eqn
  name = eqn.primitive.name
  if name == 'scan':
    num_consts, num_carry = _scanned(eqn.params)
    body = eqn.params['jaxpr'].jaxpr
    slices = body.invars[num_consts + num_carry :]
    carries = [False] * num_consts + [True] * num_carry
    return _peak(body, trips, carries) + _slices(body, slices)
  if name == 'while':
    skip = eqn.params['cond_nconsts'] + eqn.params['body_nconsts']
    body = eqn.params['body_jaxpr'].jaxpr
    carries = [False] * eqn.params['body_nconsts']
    carries += [True] * (len(eqn.invars) - skip)
    return _peak(body, trips, carries)
  return max([_peak(body, trips) for body, _ in _inner(eqn)], default=0)


def _scanned(params: Any) -> tuple[int, int]:
  """Returns the numbers of constants and of carries of a scan."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  consts, carry, _ = params['ft_in'].unpack()  # from jax 0.11 on
  return len(consts), len(carry)


def _slices(body: Any, slices: Sequence[Any]) -> int:
  """Returns the bytes of scan input slices that must be materialised."""
  steps, _ = _flat(body)
  whole = set()
  for step in steps:
    kind = step.eqn.primitive.name
    if kind not in _FUSED and kind not in _REDUCTIONS:
      whole |= {v for v in step.inputs if v is not None}
  return sum(_size(v.aval) for v in slices if (None, v) in whole)
