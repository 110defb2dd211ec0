"""Notebooks: each runs from top to bottom, and is stored as it ran."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fedjax_llm.types import Error

COLABS = sorted((pathlib.Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))
each = pytest.mark.parametrize('path', COLABS, ids=lambda path: path.stem)


def code(path: pathlib.Path) -> list[dict]:
  cells = json.loads(path.read_text())['cells']
  return [cell for cell in cells if cell['cell_type'] == 'code']


@each
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  matplotlib = pytest.importorskip('matplotlib')
  monkeypatch.chdir(tmp_path)
  cells = [''.join(cell['source']) for cell in code(path)]
  if any('XLA_FLAGS' in cell for cell in cells):
    # How many devices there are is settled when jax starts.
    pathlib.Path('cells.py').write_text('\n'.join(cells))
    env = {**os.environ, 'MPLBACKEND': 'Agg'}
    done = subprocess.run(
      [sys.executable, 'cells.py'], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return
  matplotlib.use('Agg')
  names: dict = {'__name__': '__main__'}
  for cell in cells:
    exec(compile(cell, path.name, 'exec'), names)
  matplotlib.pyplot.close('all')


@each
def test_a_notebook_is_stored_with_what_it_said(path):
  cells = code(path)
  counts = [cell['execution_count'] for cell in cells]
  assert counts == [*range(1, len(cells) + 1)], 'run scripts/execute_colabs'
  outputs = [output for cell in cells for output in cell['outputs']]
  assert not [x for x in outputs if x['output_type'] == 'error']
  assert any('image/png' in x.get('data', {}) for x in outputs)
  assert cells[-1]['outputs'], 'the last cell answers the question'
  for folder in ('/tmp', '/home', '/root', '/Users', str(path.parent.parent)):
    assert folder not in json.dumps(
      [{**x, 'data': {**x.get('data', {}), 'image/png': ''}} for x in outputs]
    )


def test_a_mistake_in_a_cell_is_told_in_its_sentence_alone():
  # IPython shows what this method gives in place of a traceback.
  assert Error('alpha is -1.')._render_traceback_() == ['Error: alpha is -1.']
