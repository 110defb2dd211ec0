"""The comparison of methods: equal budgets, or no table."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

FILE = (
  pathlib.Path(__file__).parents[1] / 'scripts/methods_comparison/tables.py'
)


@pytest.fixture(scope='module')
def tables():
  spec = importlib.util.spec_from_file_location('methods_tables', FILE)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def workdir(folder, after, tokens=100, own=None, error=None):
  """A run of two rounds whose clients end with these losses."""
  tested = lambda losses: {
    'evals/heldout/clients': losses,
    'evals/new/client_mean': 4.0,
  }
  moved = {'uploads/bytes': 2e6, 'downloads/bytes': 3e6, 'time/round': 1.5}
  if error is not None:
    moved['aggregators/error'] = error
  rounds = [{'round': n, 'local/tokens': tokens, **moved} for n in (1, 2)]
  rounds[-1] |= tested(after)
  if own is not None:
    rounds[-1]['evals/personal/own/clients'] = own
  before = {'round': 0, **tested({'ann': 5.0, 'bob': 7.0})}
  folder.mkdir()
  lines = [json.dumps(each) for each in (before, *rounds)]
  (folder / 'metrics.jsonl').write_text('\n'.join(lines))
  return folder


def test_a_table_tells_losses_differences_and_bytes(tables, tmp_path):
  runs = {}
  for seed, loss in enumerate((3.0, 3.5, 4.0)):
    runs['fed_it', seed] = workdir(
      tmp_path / f'it{seed}', {'ann': loss, 'bob': loss + 1}, error=0.1
    )
    # bob was never drawn: he is served what everybody starts with.
    runs['local_only', seed] = workdir(
      tmp_path / f'own{seed}', {'ann': 5.0, 'bob': 7.0}, own={'ann': loss}
    )
  found = tables.collect(runs)
  assert found['tokens'] == {0: 200, 1: 200, 2: 200}
  told = found['methods']['local_only'][1]
  assert (told['loss'], told['worst'], told['unseen']) == (5.25, 7.0, 4.0)
  assert (told['up'], told['down'], told['error']) == (4.0, 6.0, None)
  # Seed by seed the difference is that of bob alone.
  apart = [(3.0 + x) / 2 for x in (0, -0.5, -1.0)]
  mean, half = tables.against(found, 'local_only', 'loss')
  assert mean == pytest.approx(np.mean(apart))
  assert half == pytest.approx(4.302653 * np.std(apart, ddof=1) / np.sqrt(3))
  (row,) = [x for x in tables.markdown(found).split('\n') if '`fed_it`' in x]
  assert row.startswith('| `fed_it` | one rank | 4.000 ± 1.242 |')
  assert row.endswith('|  | 4.0 | 6.0 | 1.0e-01 | 1.5 |')


def test_unequal_budgets_give_no_table(tables, tmp_path):
  losses = {'ann': 3.0, 'bob': 3.0}
  runs = {
    ('fed_it', 0): workdir(tmp_path / 'it', losses),
    ('ditto', 0): workdir(tmp_path / 'ditto', losses, tokens=101),
  }
  with pytest.raises(SystemExit, match=r'ditto trained on 202 tokens.*on 200'):
    tables.collect(runs)
  missing = {('fed_it', 0): tmp_path / 'nowhere'}
  with pytest.raises(SystemExit, match='nowhere is missing'):
    tables.collect(missing)
