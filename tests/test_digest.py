"""A rule is the same rule only if all that it calls is the same."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_llm import aggregators
from fedjax_llm.sweep import digest
from fedjax_llm.sweep import folder as folders
from fedjax_llm.types import Error

RULE = """
import functools
import math
import helpers
import jax
import jax.numpy as jnp
from helpers import table
FACTOR = 2
GRID = [1, 2]
class Box:
  size = 3
  def scale(self, x):
    return self.size * inner(x)
def inner(x):
  return x + 1
def deeper(x):
  def local(y):
    return inner(y) - 1
  return local(x)
def rule(x, *, bias=0.5):
  box = Box()
  x = FACTOR * deeper(x) + bias + GRID[0] + math.pi
  return box.scale(x) + jnp.sum(helpers.parts.twice(x)) + table['a']
compiled = jax.jit(rule)
partly = functools.partial(rule, bias=2)
"""
HELPERS = """
import types
table = {'a': 1.0, 'b': [1, 2]}
parts = types.ModuleType('parts')
exec('def twice(x): return 2 * x', parts.__dict__)
unused = 1
"""


def module(name, source, monkeypatch):
  made = types.ModuleType(name)
  monkeypatch.setitem(sys.modules, name, made)
  exec(source, made.__dict__)
  return made


def rule(monkeypatch, old='', new='', name='rule', where='rule'):
  sources = {'helpers': HELPERS, 'rule': RULE}
  if old:
    assert old in sources[where]
    sources[where] = sources[where].replace(old, new, 1)
  module('helpers', sources['helpers'], monkeypatch)
  return getattr(module('rule', sources['rule'], monkeypatch), name)


@pytest.mark.parametrize('name', ['rule', 'compiled', 'partly'])
@pytest.mark.parametrize(
  'where, old, new',
  [
    ('rule', 'FACTOR = 2', 'FACTOR = 3'),
    ('rule', 'GRID = [1, 2]', 'GRID = [1, 3]'),
    ('rule', 'return x + 1', 'return x + 2'),
    ('rule', 'inner(y) - 1', 'inner(y) - 2'),
    ('rule', 'size = 3', 'size = 4'),
    ('rule', 'self.size * inner(x)', 'self.size - inner(x)'),
    ('rule', 'math.pi', 'math.e'),
    ('rule', 'jnp.sum', 'jnp.max'),
    ('helpers', "'a': 1.0", "'a': 2.0"),
    ('helpers', 'return 2 * x', 'return 3 * x'),
  ],
)
def test_a_change_of_what_a_rule_calls_is_another_digest(
  monkeypatch, name, where, old, new
):
  before = digest.of(rule(monkeypatch, name=name))
  assert not before.startswith(digest.UNKNOWN)
  assert digest.of(rule(monkeypatch, name=name)) == before
  after = digest.of(rule(monkeypatch, old, new, name=name, where=where))
  assert after != before and not after.startswith(digest.UNKNOWN)


@pytest.mark.parametrize(
  'where, old, new',
  [
    ('helpers', 'unused = 1', 'unused = 2'),
    ('rule', 'def rule', '# of no matter\ndef rule'),
  ],
)
def test_a_change_of_something_else_is_the_same(monkeypatch, where, old, new):
  before = digest.of(rule(monkeypatch))
  assert digest.of(rule(monkeypatch, old, new, where=where)) == before


def test_what_a_closure_holds_counts():
  def scaled(factor):
    return lambda x: factor * x

  arrays = [np.arange(3), np.arange(3) + 0.5, jnp.arange(3)]
  sums = {digest.of(scaled(factor)) for factor in (1, 1.0, '1', *arrays)}
  assert len(sums) == 6
  assert digest.of(scaled(np.arange(3))) == digest.of(scaled(np.arange(3)))
  nested = lambda x: scaled(scaled(scaled(x)))
  assert digest.of(nested(1)) != digest.of(nested(2))
  jitted = lambda x: jax.jit(functools.partial(scaled(x), 3))
  assert digest.of(jitted(1)) != digest.of(jitted(2))


def test_what_packages_bring_has_one():
  def rule(x, weight=None):
    parts = jax.vmap(lambda y: jax.nn.relu(jnp.linalg.svd(y)[1]))(x)
    return optax.tree.norm(parts) + aggregators.mean().traits.linear

  for value in (rule, jax.jit(rule), aggregators.from_rule(rule), jnp.sum):
    assert not digest.of(value).startswith(digest.UNKNOWN), digest.of(value)
  for value in (np.add, jnp.add, jax.nn.silu, optax.adam(1e-3)):
    assert not digest.of(value).startswith(digest.UNKNOWN), digest.of(value)
  assert digest.of(optax.adam(1e-3)) != digest.of(optax.adam(1e-2))
  assert digest.of(aggregators.from_rule(rule)) != digest.of(
    aggregators.from_rule(lambda x, weight: x)
  )


def test_functions_that_call_each_other_have_one():
  def even(n):
    return n == 0 or odd(n - 1)

  def odd(n):
    return n != 0 and even(n - 1)

  assert not digest.of(even).startswith(digest.UNKNOWN)


def test_where_there_is_no_digest_runs_are_not_used_again(tmp_path):
  def opaque():
    handle = iter([1])
    return lambda x: next(handle) * x

  found = digest.of(opaque())
  assert found == 'unknown: handle of <lambda> is a list_iterator'
  whose = {'config': {}, 'sources': {'mine': found}}
  first = folders.open(tmp_path / 'sweep', whose)
  first.lock.close()
  with pytest.raises(
    Error, match=r'whether mine computes what it did .*handle'
  ):
    folders.open(tmp_path / 'sweep', whose)
