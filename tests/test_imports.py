"""The import table: which room may know which, and what stays lazy."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'fedjax_llm'
FILES = sorted(PACKAGE.rglob('*.py'))

BELOW = (
  *('types', 'tree', 'batching', 'checks', 'linalg', 'patterns', 'reading'),
  *('devices', 'nodes', 'data', 'clients', 'scopes', 'adapters', 'models'),
  *('local', 'uploads', 'adversary', 'aggregators', 'server', 'evals'),
  *('recipes', 'privacy', '_early'),
)
# A room may import itself and the rooms of its row.
TABLE = {
  # Ground.
  'types': (),
  'tree': ('types',),
  'batching': ('types',),
  'checks': ('types', 'tree'),
  'linalg': (),
  'patterns': ('types',),
  'reading': ('types',),
  'devices': ('types',),
  'nodes': ('types', 'tree'),
  # Stations, and the wings beside them. Stations never import each other.
  'data': ('types', 'batching', 'reading'),
  'clients': ('types', 'tree', 'batching', 'data', 'scopes'),
  'scopes': ('types', 'tree', 'nodes', 'patterns'),
  'adapters': ('types', 'tree', 'nodes', 'linalg', 'reading', 'patterns'),
  'models': ('types', 'nodes', 'adapters', 'reading'),
  'local': ('types', 'tree', 'batching', 'linalg', 'nodes'),
  'uploads': ('types', 'tree', 'nodes', 'linalg'),
  'adversary': ('types', 'tree', 'nodes', 'data'),
  'aggregators': ('types', 'tree', 'nodes', 'linalg', 'checks'),
  'privacy': ('types', 'tree'),
  'server': (
    *('types', 'tree', 'batching', 'checks', 'nodes'),
    *('clients', 'scopes', 'devices'),
  ),
  'evals': (
    *('types', 'batching', 'reading', 'nodes', 'adapters', 'data', 'models'),
  ),
  'recipes': (
    *('types', 'tree', 'linalg', 'nodes', 'adapters', 'clients', 'scopes'),
    *('local', 'uploads', 'aggregators', 'server'),
  ),
  # Runs, and the programs on them.
  '_early': (),
  'run': BELOW,
  'train': (*BELOW, 'run'),
  'export': (*BELOW, 'run'),
  'generate': (*BELOW, 'run'),
  'evaluate': (*BELOW, 'run'),
  'plan': (*BELOW, 'run'),
  'replay': (*BELOW, 'run'),
  'report': ('types', 'run'),
  'sweep': (*BELOW, 'run'),
  'deploy': (*BELOW, 'run'),
  '__init__': (*BELOW, 'run'),
  '__main__': (),
}
PROGRAMS = (
  *('train', 'export', 'generate', 'plan', 'replay', 'report', 'sweep'),
  'evaluate',
)
# What the language of the house itself may need.
OUTSIDE = {
  'types': ('jax', 'optax', 'numpy'),
  'tree': ('jax',),
}
HEAVY = (
  *('transformers', 'datasets', 'orbax', 'tensorboardX', 'ml_collections'),
  *('flax', 'gguf', 'safetensors', 'torch', 'peft', 'tqdm', 'jinja2'),
  *('matplotlib', 'wandb', 'mlflow', 'dp_accounting', 'lm_eval', 'flwr'),
  *('sacrebleu', 'rouge_score', 'cryptography'),
)


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(source: str, path: pathlib.Path, top_level: bool = False):
  """Dotted names that a file imports, anywhere or outside of functions only."""
  package = ('fedjax_llm', *path.relative_to(PACKAGE).parts[:-1])

  def walk(node):
    for child in ast.iter_child_nodes(node):
      function = isinstance(child, ast.FunctionDef | ast.Lambda)
      typing_only = isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.dump(
        child.test
      )
      if top_level and (function or typing_only):
        continue
      if isinstance(child, ast.Import):
        yield from (alias.name for alias in child.names)
      elif isinstance(child, ast.ImportFrom):
        base = child.module.split('.') if child.module else []
        if child.level:
          base = [*package[: len(package) - child.level + 1], *base]
        yield from ('.'.join([*base, alias.name]) for alias in child.names)
      yield from walk(child)

  return list(walk(ast.parse(source)))


def strangers(source: str, path: pathlib.Path) -> list[str]:
  """Imports of rooms that the file's row of the table does not hold."""
  here = room(path)
  names = [n for n in imports(source, path) if n.split('.')[0] == 'fedjax_llm']
  allowed = (here, *TABLE[here])
  return [n for n in names if n.split('.')[1] not in allowed]


def test_programs_never_import_each_other():
  for program in PROGRAMS:
    assert not {*TABLE[program]} & {*PROGRAMS}


def test_every_file_has_a_row_in_the_table():
  assert {'types', 'tree'} <= set(map(room, FILES))
  assert set(map(room, FILES)) <= set(TABLE)


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_file_imports_only_the_rooms_of_its_row(path):
  assert strangers(path.read_text(), path) == []


@pytest.mark.parametrize('name', sorted(OUTSIDE))
def test_the_language_of_the_house_needs_little(name):
  path = PACKAGE / f'{name}.py'
  found = {n.split('.')[0] for n in imports(path.read_text(), path)}
  found -= {'fedjax_llm', *sys.stdlib_module_names}
  assert found <= set(OUTSIDE[name])


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_heavy_packages_are_imported_inside_functions(path):
  names = imports(path.read_text(), path, top_level=True)
  assert [n for n in names if n.split('.')[0] in HEAVY] == []


def test_the_table_sees_imports_inside_functions_and_relative_ones():
  path = PACKAGE / 'local' / 'sgd.py'
  source = """
from fedjax_llm import tree, server
from fedjax_llm.uploads.codecs import identity
from ..clients import scopes
from . import losses
import fedjax_llm.aggregators.robust
def f():
  from fedjax_llm import recipes
"""
  assert strangers(source, path) == [
    'fedjax_llm.server',
    'fedjax_llm.uploads.codecs.identity',
    'fedjax_llm.clients.scopes',
    'fedjax_llm.aggregators.robust',
    'fedjax_llm.recipes',
  ]
  lazy = 'def f():\n  import transformers\nimport datasets'
  assert imports(lazy, path, top_level=True) == ['datasets']


def test_importing_every_room_loads_no_heavy_package():
  rooms = sorted({room(p) for p in FILES} & set(TABLE))
  heavy = [n for n in HEAVY if n != 'tqdm']
  program = f"""
import importlib, sys
import fedjax_llm
for name in {rooms}:
  importlib.import_module('fedjax_llm.' + name)
assert 'jax' in sys.modules
print([n for n in {heavy} if n in sys.modules])
"""
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=PACKAGE.parent,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[]'
