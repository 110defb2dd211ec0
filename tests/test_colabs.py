"""Every notebook runs from top to bottom."""

import json
import pathlib

import pytest

COLABS = sorted((pathlib.Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))


@pytest.mark.parametrize('path', COLABS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
  matplotlib = pytest.importorskip('matplotlib')
  matplotlib.use('Agg')
  names: dict = {}
  for cell in json.loads(path.read_text())['cells']:
    if cell['cell_type'] == 'code':
      assert not cell['outputs'], 'commit notebooks without their outputs'
      exec(compile(''.join(cell['source']), path.name, 'exec'), names)
