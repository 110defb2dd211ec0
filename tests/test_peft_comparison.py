"""The comparison of kinds of tuning: its plan, and tables of equal budgets."""

import importlib.util
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'scripts/peft_comparison'


@pytest.fixture(scope='module')
def parts():
  """The modules `compare` and `tables`."""
  names = ('cells', 'tables')
  before = {name: sys.modules.pop(name, None) for name in names}
  sys.path.insert(0, str(FOLDER))
  spec = importlib.util.spec_from_file_location(
    'peft_compare', FOLDER / 'compare.py'
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(FOLDER))
    for name in names:
      sys.modules.pop(name, None)
      if (old := before[name]) is not None:
        sys.modules[name] = old
  return module, module.tables


def search(sent, seconds=1.0):
  return dict(bytes_a_round=sent, seconds_a_round=seconds, seconds_a_test=0.0)


def test_the_budget_cuts_rounds_of_all_kinds_alike(parts):
  compare, _ = parts
  kinds = {'full': search(90, 5.0), 'LoRA': search(10), 'bias': search(2)}
  plan = compare.fitted(kinds, 4, None)
  assert plan == {
    'rounds': 4, 'bytes': 40, 'by_bytes': {'full': 0, 'LoRA': 4, 'bias': 8}
  }  # fmt: skip
  # Three seeds of 4 x 5 + 4 + 8 seconds; of two rounds half of it.
  assert compare.seconds(kinds, plan) == 32.0
  for left, rounds in ((96.0, 4), (95.0, 3), (48.0, 2), (0.0, 2)):
    assert compare.fitted(kinds, 4, left)['rounds'] == rounds


def test_every_kind_of_a_model_has_rates_and_the_same_texts(parts):
  compare, _ = parts
  for model, kinds in compare.cells.MODELS.items():
    for kind, (_, rates) in kinds.items():
      assert list(rates) == sorted(rates) and len(rates) == 3
      fields = compare.cells.settings(model, kind, 1, smoke=False)
      alike = {k: v for k, v in fields.items() if k != 'adapter'}
      first = compare.cells.settings(model, 'LoRA', 1, smoke=False)
      first.pop('adapter')
      if (model, kind) == ('smollm2', 'full'):  # one client after another
        assert alike.pop('block_size') == 1 and first.pop('block_size') == 2
      assert alike == first


def write(folder, kind, seed, curve, **more):
  cell = dict(
    model='smollm2', kind=kind, seed=seed, rate=1e-3, numbers=1000,
    equal_tokens=2, equal_bytes=4, seconds_a_round=1.0,
    curve=[
      dict(round=r, tokens=100 * r, bytes=1e6 * r, loss=loss)
      for r, loss in curve
    ],
    **more,
  )  # fmt: skip
  path = folder / 'smollm2' / f'{kind.replace(" ", "_")}-{seed}.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(cell))
  return path


def test_a_table_reads_both_budgets_from_one_run(parts, tmp_path):
  _, tables = parts
  for seed, end in enumerate((4.0, 4.2, 4.4)):
    write(tmp_path, 'LoRA', seed, [(0, 5.0), (2, end), (4, end - 1)])
  path = write(tmp_path, 'full', 0, [(0, 5.0), (2, 3.0)])
  text = path.read_text()
  path.write_text(text.replace('"equal_bytes": 4', '"equal_bytes": 0'))
  text = tables.markdown(tables.read(tmp_path)['smollm2'])
  full, lora, _, missing = text.splitlines()[2:]
  assert full == (
    '| full | 1,000 | 0.001 | 5.000 | 3.000 | 2 | no round fits | 0 | 0 | 1.0 |'
  )
  assert lora == (
    '| LoRA | 1,000 | 0.001 | 5.000 | 4.200 (4.000 to 4.400) | 2 '
    '| 3.200 (3.000 to 3.400) | 4 | 4 | 1.0 |'
  )
  assert missing == 'Missing: full, seed 1; full, seed 2.'


def test_unequal_tokens_give_no_table(parts, tmp_path):
  _, tables = parts
  write(tmp_path, 'LoRA', 0, [(0, 5.0), (2, 4.0)])
  path = write(tmp_path, 'full', 0, [(0, 5.0), (2, 4.0)])
  path.write_text(path.read_text().replace('200', '201'))
  with pytest.raises(SystemExit, match='LoRA, seed 0 learned 200 tokens'):
    tables.markdown(tables.read(tmp_path)['smollm2'])
