"""Modules that are trained whole beside an adapter: heads, norms."""

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
  """Every weight of these modules is trained, from what the base has.

  The `modules_to_save` of PEFT. Each weight is a `Dense` leaf in float32 that
  takes the place of the base's; aggregators see it as any other leaf.

  Args:
    modules: regular expressions that match the end of a module's path, from
      one name on: 'classifier', ('pooler', 'classifier'), 'layers/.*norm'.

  Raises:
    Error: from `init`, a name that matches no module of the base (the message
      lists what there is), or a tied embedding, which is also the output head.

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
      # A copy: programs give the memory of the parameters away.
      parent[path[-1]] = {
        name: Dense(jnp.array(leaf, jnp.float32))
        for name, leaf in module[path[-1]].items()
      }
    return params

  return Adapter(init, merge, fold)


def beside(*parts: Adapter) -> Adapter:
  """Several adapters as one, each of other modules.

  Raises:
    Error: from `init`, two of them change the same weight.

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
  """`adapter`, and `modules` trained whole where any are named."""
  return beside(adapter, dense(modules)) if modules else adapter


def complete(params: Params, base: Base, modules: Sequence[str]) -> Params:
  """`params` with all of these modules of the base that it does not have yet.

  For a file that has to hold a head whole, trained or not.

  Raises:
    Error: a low-rank leaf on one of them, which says nothing of its weight.

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
  """Paths of the modules that the patterns name, sorted: see `dense`."""
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
  heads = ('kernel' in base.get('lm_head', {})) or 'classifier' in base
  if ('embed_tokens',) in chosen and not heads:
    raise Error(
      'adapter.modules_to_save: embed_tokens is also the output head of this '
      'model (tied), which an adapter cannot say of it.'
    )
  return sorted(chosen)


def _modules(node: Any, path: Path) -> list[Path]:
  """Paths of the dicts that hold weights."""
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
