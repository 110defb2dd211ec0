"""Tests the pages: links, named files, code, commands, tables of results."""

import ast
import contextlib
import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import fedjax_llm
from fedjax_llm import __main__ as programs
from fedjax_llm import export, recipes, train
from fedjax_llm.run import builders, config
from fedjax_llm.run.sections import SPEC

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'fedjax_llm'
FOLDERS = (
  *('', 'colabs', 'configs', 'configs/fields', 'scripts', 'scripts/board'),
  'scripts/timing',
  'scripts/continual_runs',
)
PAGES = sorted(
  [
    *(page for folder in FOLDERS for page in (ROOT / folder).glob('*.md')),
    *PACKAGE.rglob('*.md'),
  ]
)
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
EDGES = 'fedjax_llm/SHARP_EDGES.md'
pages = pytest.mark.parametrize('name', list(TEXTS))


def prose(text: str) -> str:
  """Returns a page without its fenced blocks."""
  return re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.M)


def commands(text: str) -> list[list[str]]:
  """Returns the words of each `python -m fedjax_llm.PROGRAM ...` of a page."""
  lines = '\n'.join(blocks(text, 'bash')).replace('\\\n', ' ').splitlines()
  words = [shlex.split(line, comments=True) for line in lines]
  starts = ['python', '-m']
  return [
    w for w in words if w[:2] == starts and w[2].startswith('fedjax_llm.')
  ]


def anchors(text: str) -> set[str]:
  """Returns the names by which GitHub links to the headings of a page."""
  titles = re.findall(r'^#+ (.*)$', prose(text), re.MULTILINE)
  plain = [re.sub(r'[^\w\- ]', '', title.lower()) for title in titles]
  return {title.replace(' ', '-') for title in plain}


# -------------------------------------------------------------------- links --


@pages
def test_links_lead_somewhere(name):
  for target in re.findall(r'\]\(([^)\s]+)\)', prose(TEXTS[name])):
    if target.startswith('https://'):
      continue
    path, _, anchor = target.partition('#')
    to = (ROOT / name).parent / path if path else ROOT / name
    assert to.exists(), f'{name} links to {path}, which does not exist'
    if anchor:
      assert anchor in anchors(to.read_text()), f'{name}: no heading {target}'


def test_every_page_is_reached_from_the_readme():
  seen, new = set(), {'README.md'}
  while new:
    name = new.pop()
    seen.add(name)
    for path in re.findall(r'\]\(([^)#\s]+\.md)', TEXTS[name]):
      to = ((ROOT / name).parent / path).resolve().relative_to(ROOT)
      new |= {str(to)} - seen
  unlinked = {'fedjax_llm/data/packaged/PROVENANCE.md'}  # named, not linked
  assert set(TEXTS) - unlinked <= seen


@pages
def test_named_files_exist(name):
  folders = 'scripts|configs|tests|fedjax_llm|colabs'
  for path in re.findall(rf'`((?:{folders})/[\w/.-]+)', prose(TEXTS[name])):
    if 'NAME' not in path:
      assert (ROOT / path).exists(), f'{name} names {path}'


@pages
def test_named_tests_exist(name):
  found = re.findall(r'`(tests/\w+\.py)::(\w+)`', TEXTS[name])
  for file, function in found:
    assert f'def {function}(' in (ROOT / file).read_text(), function
  assert found or name != EDGES


def test_every_script_has_its_row():
  text = TEXTS['scripts/README.md'].split('\n## ')[0]
  for path in (ROOT / 'scripts').iterdir():
    sourced = path.name in ('setup', 'allocator')
    if path.is_file() and not path.suffix and not sourced:
      assert f'`scripts/{path.name}`' in text, path.name


# --------------------------------------------------------------------- code --

SECTIONS = {
  f'{name}#{title}': (name, body)
  for name, text in TEXTS.items()
  if name != 'README.md'  # its round is run by test_readme.py
  for title, body in re.findall(
    r'^## (.*?)\n(.*?)(?=^## |\Z)', text, re.DOTALL | re.MULTILINE
  )
  if blocks(body, 'python')
}


def files(text: str) -> dict[str, str]:
  """Returns the blocks whose first line is `# PATH.py`, by that path."""
  found = [
    (re.match(r'# ([\w/]+\.py)\n', b), b) for b in blocks(text, 'python')
  ]
  return {match[1]: block for match, block in found if match}


@contextlib.contextmanager
def written(page: str, folder: pathlib.Path):
  """Makes the files of a page importable while the block runs."""
  found = files(TEXTS[page])
  for file, block in found.items():
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(block)
  try:
    yield
  finally:
    packages = {path.split('/')[0] for path in found}
    for module in list(sys.modules):
      if module.split('.')[0] in packages:
        del sys.modules[module]


@pytest.mark.parametrize('section', list(SECTIONS))
def test_the_code_of_a_section_runs(section, tmp_path, monkeypatch):
  """Writes the files of the page and runs the section's other blocks."""
  name, body = SECTIONS[section]
  monkeypatch.syspath_prepend(str(tmp_path))
  names = {}
  with written(name, tmp_path):
    for block in blocks(body, 'python'):
      if block not in files(body).values():
        exec(compile(block, name, 'exec'), names)


@pytest.mark.parametrize('name', [x for x in TEXTS if files(TEXTS[x])])
def test_the_files_of_a_page_train(name, tmp_path, monkeypatch):
  """Runs the commands that use a page's files, as one run of one round.

  Each command alone is checked against the signatures of its builders. The node
  of the page has no form in PEFT, so the run writes none and can be merged.
  """
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(tmp_path))
  folder, fields = tmp_path / 'run', []
  with written(name, tmp_path):
    for _, _, program, *words in commands(TEXTS[name]):
      if 'my_lab' in ' '.join(words):
        assert program == 'fedjax_llm.train'
        config.parse(words, SPEC)
        assert words[:3] == ['--config', 'configs/tiny.py:smoke', '--workdir']
        fields += [word for word in words if word.startswith('--config.')]
    assert fields
    short = ['--config.num_rounds=1', '--config.evals.samples=0']
    start = ['--config', 'configs/tiny.py:smoke', '--workdir', str(folder)]
    assert train.main([*start, *fields, *short]) == 0
    note = (folder / 'adapter' / 'no_adapter.txt').read_text()
    assert 'a Diagonal node has no form in PEFT' in note
    out = str(tmp_path / 'merged')
    merge = ['--workdir', str(folder), '--to', 'merged', '--out', out]
    assert export.main([*merge, '--trust-code']) == 0
  assert (folder / 'config.json').read_text().count('my_lab') == len(
    [field for field in fields if 'my_lab' in field]
  )


@pages
def test_commands_are_those_of_the_programs(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  for _, _, program, *words in commands(TEXTS[name]):
    kind = program.split('.')[1]
    assert kind in programs.PROGRAMS, program
    files = [PACKAGE / f'{kind}.py', *(PACKAGE / kind).rglob('*.py')]
    source = ''.join(f.read_text() for f in files if f.exists())
    for word in words:
      if word.startswith('--') and not word.startswith('--config'):
        flag = word.split('=')[0]
        assert f"'{flag}'" in source or kind == 'train', (program, flag)
    if kind == 'train' and 'my_lab' not in ' '.join(words):
      config.parse(words, SPEC)  # raises where a field does not exist


def test_fields_that_pages_name_exist(monkeypatch):
  """Each `--config.field=value` of the prose is accepted by the tiny config."""
  monkeypatch.chdir(ROOT)
  fields = {
    flag
    for text in TEXTS.values()
    for code in re.findall(r'`([^`\n]+)`', prose(text))
    for flag in re.findall(r'--config\.[\w.]+=\S+', code)
  }
  start = ['--config', 'configs/tiny.py', '--workdir', 'runs/none']
  for flag in sorted(fields):
    value = flag.split('=')[1].split(':')[0]
    if value.isupper() or value == 'value' or 'my_lab' in value:
      continue  # a placeholder
    config.parse([*start, *shlex.split(flag)], SPEC)
  assert len(fields) > 10


def test_names_in_the_table_of_sections_exist():
  """Every section has its row, in flow order; every name is a builder's."""
  text = TEXTS['configs/README.md'].split('## Fields')[1].split('\n## ')[0]
  lines = [x.split('|')[1:-1] for x in text.splitlines() if x[:3] == '| `']
  table = {cells[0].strip(' `'): cells[2] for cells in lines}
  assert list(table) == [x for x in SPEC.sections if '.' not in x]
  for section, cell in table.items():
    for name in re.findall(r'`(\w+)`', cell):
      builders.resolve_builder(section, name, SPEC.sections[section])


# ------------------------------------------------------------------- tables --


@pytest.fixture(scope='module')
def page_tables():
  path = ROOT / 'scripts/page_tables.py'
  spec = importlib.util.spec_from_file_location('page_tables', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_tables_are_those_of_the_committed_results(page_tables):
  text = TEXTS[page_tables.PAGE]
  tables = page_tables.tables()
  assert set(re.findall('<!-- table: (.*?) -->', text)) == set(tables)
  for name, table in tables.items():
    assert page_tables.replaced(text, name, table) == text, (
      f'{name} differs from its results: run scripts/page_tables.py'
    )


def test_a_page_without_the_markers_is_refused(page_tables):
  with pytest.raises(ValueError, match="no table 'a'"):
    page_tables.replaced('# A page', 'a', '| new |')


def rows(text: str, name: str) -> list[list[str]]:
  """Returns the cells of a marked table, without its two first lines."""
  (table,) = re.findall(f'<!-- table: {name} -->(.*?)<!-- end', text, re.DOTALL)
  lines = table.strip().splitlines()[2:]
  return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


def test_every_method_has_its_row(page_tables):
  table = rows(TEXTS[page_tables.METHODS], 'methods')
  named = [re.findall(r'`(\w+)`', cells[2])[0] for cells in table]
  assert sorted(named) == sorted(recipes.__all__)


def test_every_family_has_its_row(page_tables):
  from fedjax_llm.models import families

  table = rows(TEXTS[page_tables.MODELS], 'models')
  against = {x for row in table for x in re.findall(r'`(\w+)`', row[1])}
  kinds = {
    kind
    for kind, family in families.FAMILIES.items()
    if against & set(family.heads)
  }
  assert kinds == set(families.FAMILIES)


# -------------------------------------------------------------- sharp edges --


def test_every_sharp_edge_has_a_guard():
  edges = TEXTS[EDGES].split('\n## Privacy')[0].split('\n### ')[1:]
  assert len(edges) > 20
  for edge in edges:
    assert '- Guard: ' in edge, edge.split('\n')[0]


def test_quoted_errors_are_those_of_the_package():
  trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob('*.py')]
  texts = [
    node.value
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  plain = ' '.join(TEXTS[EDGES].split())
  quoted = re.findall(r'error "(.*?)"', plain)
  assert quoted
  for sentence in quoted:
    assert any(sentence in text for text in texts), sentence


# ----------------------------------------------------------------- programs --


def test_the_package_lists_its_programs():
  done = subprocess.run(
    [sys.executable, '-m', 'fedjax_llm'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  for name in programs.PROGRAMS:
    first = importlib.import_module(f'fedjax_llm.{name}').__doc__ or ''
    assert any(
      line.split(maxsplit=1) == [name, first.split('\n')[0]] for line in lines
    ), name


def test_no_program_is_missing_from_the_list():
  guard = "if __name__ == '__main__':"
  files = [path for path in PACKAGE.glob('*.py') if guard in path.read_text()]
  there = {path.stem for path in files} - {'__main__'}
  there |= {path.parent.name for path in PACKAGE.glob('*/__main__.py')}
  assert there == set(programs.PROGRAMS)
  assert fedjax_llm.__version__ in TEXTS['fedjax_llm/CHANGELOG.md']
