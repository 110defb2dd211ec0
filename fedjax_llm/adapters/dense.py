"""Modules that are trained whole beside an adapter: heads, norms.

`dense` returns an `Adapter` that trains whole modules, `beside` one that joins
several adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import patterns
from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.nodes import Dense, protocol
from fedjax_llm.types import Adapter, Base, Error, Key, Params

Path = tuple[str, ...]


def dense(modules: str | Sequence[str]) -> Adapter:
  """Returns an adapter that trains every weight of these modules.

  The `modules_to_save` of PEFT. Each weight is a `Dense` leaf in float32 that
  replaces the weight of the base and starts from its value; aggregators treat
  it as any other leaf.

  Args:
    modules: regular expressions that match one or more whole names at the end
      of a module's path: 'classifier', ('pooler', 'classifier'),
      'layers/.*norm'.

  Raises:
    Error: from `init`, a name that matches no module of the base (the message
      lists the modules), or a tied embedding, which is also the output head.

  >>> base = {'classifier': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
  >>> params = dense('classifier').init(jax.random.key(0), base)
  >>> params['classifier']['bias']
  Dense(value=Array([1., 1., 1.], dtype=float32))
  """

  def init(key: Key, base: Base) -> Params:
    del key  # it starts as the base
    params: dict[str, Any] = {}
    for path in find(base, modules):
      module = base
      parent = params
      for name in path[:-1]:
        module, parent = module[name], parent.setdefault(name, {})
      # A copy: programs donate the buffers of the parameters.
      parent[path[-1]] = {
        name: Dense(jnp.array(leaf, jnp.float32))
        for name, leaf in module[path[-1]].items()
      }
    return params

  return Adapter(init, merge, fold)


def beside(*parts: Adapter) -> Adapter:
  """Joins adapters of different modules into one.

  Raises:
    Error: from `init`, two of the adapters change the same weight.

  >>> base = {'a': {'bias': jnp.ones(2)}, 'b': {'bias': jnp.ones(3)}}
  >>> both = beside(dense('a'), dense('b'))
  >>> sorted(both.init(jax.random.key(0), base))
  ['a', 'b']
  """

  def init(key: Key, base: Base) -> Params:
    params: dict[str, Any] = {}
    for part in parts:
      params = _joined(params, part.init(key, base), ())
    return params

  fields = {k: v for part in parts for k, v in part.peft.items()}
  return Adapter(init, merge, fold, fields)


def saved_beside(adapter: Adapter, modules: str | Sequence[str]) -> Adapter:
  """Joins `adapter` with `dense(modules)`; returns it alone without modules.

  Raises:
    Error: `modules` is an empty string, which names no module.

  >>> saved_beside(dense('a'), '')
  Traceback (most recent call last):
  fedjax_llm.types.Error: adapter.modules_to_save is '', which names no \
module; leave it out, or name one or more modules.
  """
  if modules == '':
    raise Error(
      "adapter.modules_to_save is '', which names no module; leave it out, or "
      'name one or more modules.'
    )
  return beside(adapter, dense(modules)) if modules else adapter


def complete(params: Params, base: Base, modules: Sequence[str]) -> Params:
  """Adds those modules of the base that `params` does not have yet.

  For files that must hold a whole head, trained or not.

  Raises:
    Error: one of the modules has a low-rank leaf, which does not hold its
      weight.

  >>> base = {'score': {'bias': jnp.ones(2)}, 'body': {'bias': jnp.ones(3)}}
  >>> sorted(complete({}, base, ['score']))
  ['score']
  """
  here = [name for name in modules if name in base]
  for name in here:
    if protocol.is_node(params.get(name)):
      raise Error(
        f'adapter.targets: {name} is part of the head, which is trained whole: '
        'name it in adapter.modules_to_save instead.'
      )
  absent = [name for name in here if name not in params]
  if not absent:
    return params
  return {**params, **dense(absent).init(jax.random.key(0), base)}


def find(base: Base, modules: str | Sequence[str]) -> list[Path]:
  """Returns the sorted paths of the modules that the patterns match."""
  there = _modules(base, ())
  chosen: set[Path] = set()
  for name in (modules,) if isinstance(modules, str) else tuple(modules):
    matches = patterns.matcher(
      name, 'adapter.modules_to_save', within=r'(.*/)?({})'
    )
    hits = {p for p in there if matches('/'.join(p))}
    if not hits:
      have = ', '.join('/'.join(p) for p in there)
      raise Error(
        f'adapter.modules_to_save: {name!r} matches no module of the model; '
        f'there are: {have}.'
      )
    chosen |= hits
  own = 'classifier' in base or 'score' in base
  heads = ('kernel' in base.get('lm_head', {})) or own
  if ('embed_tokens',) in chosen and not heads:
    raise Error(
      'adapter.modules_to_save: embed_tokens is also the output head of this '
      'model (tied), which an adapter cannot represent.'
    )
  return sorted(chosen)


def _modules(node: Any, path: Path) -> list[Path]:
  """Returns the paths of the dicts that hold weights."""
  if not isinstance(node, Mapping):
    return []
  below = [
    p for name in sorted(node) for p in _modules(node[name], (*path, name))
  ]
  holds = any(not isinstance(child, Mapping) for child in node.values())
  return [path, *below] if holds else below


def _joined(first: Any, second: Any, path: Path) -> Any:
  if isinstance(first, Mapping) and isinstance(second, Mapping):
    both = {**first, **second}
    for name in first.keys() & second.keys():
      both[name] = _joined(first[name], second[name], (*path, name))
    return both
  whole = not protocol.is_node(first) or protocol.replacement(first)[0]
  kind = 'trained whole' if whole else 'low-rank'
  raise Error(
    f'{"/".join(path)} is {kind} already: leave it out of adapter.targets or '
    'of adapter.modules_to_save.'
  )
