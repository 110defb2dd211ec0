"""Cells of the comparisons in scripts: their files, order and budget."""

import doctest
import importlib.util
import json
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[1] / 'scripts' / 'cell_files.py'


@pytest.fixture
def cell_files(monkeypatch):
  spec = importlib.util.spec_from_file_location('cell_files', PATH)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  # A script may have imported the same file: doctest asks this table.
  monkeypatch.setitem(sys.modules, 'cell_files', module)
  return module


def test_the_examples_are_right(cell_files):
  result = doctest.testmod(cell_files)
  assert result.attempted >= 4 and not result.failed


def test_cells_without_a_file_are_missing_in_their_order(cell_files, tmp_path):
  path_of = lambda cell: tmp_path / 'cells' / f'{cell}.json'
  assert cell_files.missing('bac', path_of) == ['b', 'a', 'c']
  cell_files.save(path_of('a'), {'x': 1})
  assert cell_files.missing('bac', path_of) == ['b', 'c']
  assert path_of('a').read_text() == '{\n "x": 1\n}\n'
  cell_files.save(path_of('a'), {'y': 1, 'x': 2}, sort_keys=True)
  assert path_of('a').read_text() == '{"x": 2, "y": 1}\n'


def test_a_cell_that_cannot_be_written_leaves_the_one_before(
  cell_files, tmp_path
):
  file = tmp_path / 'cell.json'
  cell_files.save(file, {'x': 1})
  with pytest.raises(TypeError):
    cell_files.save(file, {'x': object()})
  assert json.loads(file.read_text()) == {'x': 1}
  assert [path.name for path in tmp_path.glob('*.json')] == ['cell.json']


def test_a_budget_counts_from_its_begin(cell_files, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(cell_files.time, 'monotonic', lambda: now[0])
  budget = cell_files.budget(2.0)
  now[0] = 190.0
  assert (budget.spent(), budget.left()) == (90.0, 30.0)
  now[0] = 230.0
  assert budget.left() == -10.0
