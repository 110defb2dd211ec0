"""Every public name is told, with an example that runs.

Public are the names of the rooms that `import fedjax_llm as fl` offers: what a
room's `__init__` brings together, of the modules that it lists what they list
or, without a list, define. Doctests run with the suite.
"""

import ast
import inspect
import os
import pathlib
import subprocess
import sys
import types as python_types

import pytest

import fedjax_llm
from fedjax_llm import types

FRONT = ast.parse(pathlib.Path(str(fedjax_llm.__file__)).read_text())
NAMES = [
  alias.asname
  for node in FRONT.body
  if isinstance(node, ast.ImportFrom)
  for alias in node.names
]
ROOMS = {
  name: room
  for name in NAMES
  if name and inspect.ismodule(room := getattr(fedjax_llm, name))
  if not name.startswith('_')
}


def offered(room: python_types.ModuleType, name: str) -> dict[str, object]:
  """What can be called as `fl.name...`, by that name."""
  listed = getattr(room, '__all__', ())
  is_package = hasattr(room, '__path__')
  found = {}
  for key in dict.fromkeys((*vars(room), *listed)):
    value = getattr(room, key)
    if inspect.ismodule(value):
      if key in listed and value.__name__.startswith(f'{room.__name__}.'):
        found |= offered(value, f'{name}.{key}')
    elif not key.startswith('_') and callable(value):
      home = getattr(value, '__module__', None) or ''
      own = home.startswith(room.__name__) if is_package else key in listed
      if own or (not listed and home == room.__name__):
        found[f'{name}.{key}'] = value
  return found


PUBLIC = {
  key: value
  for name, room in ROOMS.items()
  if name != 'types'
  for key, value in offered(room, name).items()
}


def docstring(thing: object) -> str:
  """Its own: a NamedTuple that has none is given its signature by Python."""
  if not inspect.isclass(thing):
    return thing.__doc__ or ''
  told = vars(thing).get('__doc__') or ''
  return '' if told.startswith(f'{thing.__name__}(') else told


def test_the_rooms_are_found():
  rooms = {'adapters', 'aggregators', 'clients', 'data', 'evals', 'local'}
  assert rooms | {'models', 'recipes', 'server', 'tree', 'types'} <= set(ROOMS)
  assert {'recipes.fed_avg', 'tree.norm', 'data.sources.hf'} <= set(PUBLIC)
  assert len(PUBLIC) > 150


def test_every_public_name_has_an_example():
  everything = {**PUBLIC, 'Error': fedjax_llm.Error}
  silent = [name for name, x in everything.items() if '>>>' not in docstring(x)]
  assert not silent, f'without an example: {", ".join(sorted(silent))}'


CONTRACTS = [
  node
  for node in ast.parse(pathlib.Path(types.__file__).read_text()).body
  if isinstance(node, ast.ClassDef)
]


@pytest.mark.parametrize('node', CONTRACTS, ids=lambda node: node.name)
def test_every_contract_and_field_is_told(node):
  lines = pathlib.Path(types.__file__).read_text().splitlines()
  told = ast.get_docstring(node) or ''
  assert told
  fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
  for item in fields:
    commented = '#' in ''.join(lines[item.lineno - 1 : item.end_lineno])
    commented |= lines[item.lineno - 2].lstrip().startswith('#')
    name = ast.unparse(item.target)
    assert commented or name in told, f'{node.name}.{name} is not explained'


def test_the_reference_is_built_and_every_name_leads_somewhere(tmp_path):
  pytest.importorskip('pdoc')
  script = (
    pathlib.Path(__file__).parents[1] / 'scripts/reference_pages/build.py'
  )
  done = subprocess.run(
    [sys.executable, str(script), '--out', str(tmp_path)],
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / 'fedjax_llm/evals.html').read_text()
  assert 'href="../fedjax_llm/adapters/multi.html#blend"' in page
  contracts = (tmp_path / 'fedjax_llm/types.html').read_text()
  assert 'end - start on trained leaves' in contracts  # a field's comment
  assert 'Alias for field' not in contracts
