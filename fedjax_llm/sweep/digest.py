"""A digest of a function and of everything it calls.

A sweep keeps the runs that are done. They stay valid for a rule only while the
rule's code is unchanged: its own code, the helpers that it calls, the values of
its closure, and the globals that it reads. Installed packages are identified by
their names.
"""

import dis
import functools
import hashlib
import inspect
import pathlib
import sys
import sysconfig
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

# The prefix of the text that replaces a digest that cannot be computed.
UNKNOWN = 'unknown: '

_PLACES = [
  pathlib.Path(place).resolve()
  for name, place in sysconfig.get_paths().items()
  if name in ('stdlib', 'platstdlib', 'purelib', 'platlib')
]
_PLAIN = bool | int | float | complex | str | bytes | type(None) | type(...)


def of(function: Any) -> str:
  """Returns the digest of a function, or `UNKNOWN` and the reason.

  >>> def scale(factor): return lambda x: factor * x
  >>> of(scale(2)) == of(scale(2)), of(scale(2)) == of(scale(3))
  (True, False)
  >>> of(scale(iter('ab')))
  'unknown: factor of <lambda> is a str_ascii_iterator'
  """
  walk = _Walk()
  try:
    walk.value(function, getattr(function, '__name__', 'the rule'))
  except _Unknown as unknown:
    return f'{UNKNOWN}{unknown}'
  return walk.sum.hexdigest()[:16]


class _Unknown(Exception):
  pass


class _Walk:
  """Feeds values to a checksum, each object once."""

  def __init__(self) -> None:
    self.sum = hashlib.sha256()
    self.seen: dict[int, Any] = {}  # kept alive, or an id might be another's

  def feed(self, *words: Any) -> None:
    self.sum.update(repr(words).encode())

  def value(self, x: Any, name: str) -> None:
    if isinstance(x, _PLAIN):
      self.feed(type(x).__name__, x)
      return
    if id(x) in self.seen:
      self.feed('again', list(self.seen).index(id(x)))
      return
    self.seen[id(x)] = x
    if isinstance(x, types.CodeType):
      self.code(x, name)
    elif isinstance(x, types.FunctionType):
      self.function(x)
    elif isinstance(x, types.MethodType):
      self.value(x.__func__, name)
      self.value(x.__self__, name)
    elif isinstance(x, types.ModuleType):
      self.feed('module', x.__name__)
    elif isinstance(x, functools.partial):
      self.value((x.func, x.args, x.keywords), name)
    elif isinstance(x, type):
      self.type(x)
    elif callable(wrapped := getattr(x, '__wrapped__', None)):  # such as jit
      self.feed(type(x).__name__, getattr(x, '__qualname__', ''))
      if not (_installed(x) and _installed(inspect.unwrap(x))):
        self.value(wrapped, name)
    elif _installed(x):
      self.feed('installed', x.__module__, getattr(x, '__qualname__', ''))
    elif isinstance(x, Mapping):
      self.feed('mapping', len(x))
      for key in sorted(x, key=repr):
        self.value(key, name)
        self.value(x[key], f'{name}[{key!r}]')
    elif isinstance(x, tuple | list):
      self.feed(type(x).__name__, len(x))
      for i, item in enumerate(x):
        self.value(item, f'{name}[{i}]')
    elif isinstance(x, set | frozenset):
      self.value(sorted(x, key=repr), name)
    elif hasattr(x, '__array__'):
      array = np.asarray(x)
      if array.dtype.hasobject:
        raise _Unknown(f'{name} is an array of objects')
      self.feed('array', str(array.dtype), array.shape, array.tobytes())
    elif isinstance(getattr(x, '__dict__', None), dict):
      self.type(type(x))
      self.value(vars(x), name)
    else:
      raise _Unknown(f'{name} is a {type(x).__name__}')

  def code(self, code: types.CodeType, name: str) -> None:
    self.feed(code.co_code, code.co_names, code.co_varnames, code.co_argcount)
    for constant in code.co_consts:
      self.value(constant, name)

  def function(self, f: types.FunctionType) -> None:
    if _installed(f):
      self.feed('installed', f.__module__, f.__qualname__)
      # An installed decorator may have closed over the user's function.
      self.closure(f)
      return
    self.code(f.__code__, f.__name__)
    self.value(f.__defaults__, f'a default of {f.__name__}')
    self.value(f.__kwdefaults__, f'a default of {f.__name__}')
    self.closure(f)
    for path in sorted(_globals(f.__code__)):
      value: Any = f.__globals__.get(path[0], None)
      for attribute in path[1:]:
        if not isinstance(value, types.ModuleType) or _installed(value):
          break
        value = getattr(value, attribute, None)
      self.feed(path)
      self.value(value, f'{".".join(path)} of {f.__name__}')

  def closure(self, f: types.FunctionType) -> None:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ()):
      try:
        content = cell.cell_contents
      except ValueError:  # nothing is there yet
        continue
      self.feed(name)
      self.value(content, f'{name} of {f.__name__}')

  def type(self, x: type) -> None:
    self.feed('type', x.__module__, x.__qualname__)
    if _installed(x):
      return
    for base in x.__bases__:
      self.value(base, base.__name__)
    for name, member in sorted(vars(x).items()):
      if isinstance(member, property):
        members = [member.fget, member.fset]
      elif isinstance(member, staticmethod | classmethod):
        members = [member.__func__]
      else:
        members = [member]
      for one in members:
        if isinstance(one, types.FunctionType | _PLAIN):
          self.value(one, f'{x.__name__}.{name}')


def _globals(code: types.CodeType) -> set[tuple[str, ...]]:
  """Returns the globals that code reads, with the attributes it reads of them.

  >>> sorted(_globals((lambda x: np.linalg.svd(len(x))).__code__))
  [('len',), ('np', 'linalg', 'svd')]
  """
  paths: set[tuple[str, ...]] = set()
  path: tuple[str, ...] = ()
  for step in dis.get_instructions(code):
    if step.opname in ('LOAD_GLOBAL', 'LOAD_NAME'):
      if path:
        paths.add(path)
      path = (step.argval,)
    elif path and step.opname in ('LOAD_ATTR', 'LOAD_METHOD'):
      path = (*path, step.argval)
    else:
      if path:
        paths.add(path)
      path = ()
  if path:
    paths.add(path)
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      paths |= _globals(constant)
  return paths


def _installed(x: Any) -> bool:
  """Returns True for code of Python, of an installed package or of this one.

  It is False for instances, which may hold the user's code.
  """
  if not (inspect.ismodule(x) or hasattr(x, '__qualname__')):
    return isinstance(x, np.ufunc)
  name = x.__name__ if inspect.ismodule(x) else getattr(x, '__module__', None)
  if not isinstance(name, str):
    return inspect.isbuiltin(x)
  root = name.split('.')[0]
  if root == 'fedjax_llm' or root in sys.stdlib_module_names:
    return root != '__main__'
  module = sys.modules.get(root)
  file = getattr(module, '__file__', None)
  if file is None:  # a prompt, or a namespace of somebody's files
    places = getattr(module, '__path__', ())
    return any(_inside(place) for place in places)
  return _inside(file)


def _inside(place: str) -> bool:
  path = pathlib.Path(place).resolve()
  return any(path.is_relative_to(installed) for installed in _PLACES)
