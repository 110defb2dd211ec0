"""The device script: stages, limits, resumption, points on tiny shapes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PLACES = [str(ROOT / 'scripts' / name) for name in ('device', 'benchmarks')]


@pytest.fixture(scope='module', autouse=True)
def places():
  with pytest.MonkeyPatch.context() as patch:
    for place in PLACES:
      patch.syspath_prepend(place)
    yield


def module(name):
  return importlib.import_module(name)


def absent(name):
  return importlib.util.find_spec(name) is None


# ------------------------------------------------------------------ driver --


def stage(name, limit=10):
  return module('stages').Stage(name, 'none:none', limit, 'a stage')


def ran(monkeypatch, tmp_path, stages, outcomes, **settings):
  """Runs stages whose processes are replaced; returns results and limits."""
  driver, asked = module('driver'), []

  def child(stage, points, limit, keep, dry, env, say):
    asked.append((stage.name, sorted(points), limit))
    for name, result in outcomes[stage.name][1].items():
      keep(name, result)
    return outcomes[stage.name][0], 'last words'

  monkeypatch.setattr(driver, 'child', child)
  file = tmp_path / 'results.json'
  results = driver.opened(file, dry=False)
  driver.run(stages, results, file, say=lambda text: None, **settings)
  assert json.loads(file.read_text()) == results
  return results, asked


def test_a_second_call_goes_on_where_the_first_was_cut_off(
  monkeypatch, tmp_path
):
  stages = [stage('a'), stage('b'), stage('c')]
  first = {
    'a': ('done', {'x': {'seconds': 1.0}}),
    'b': ('stopped', {'y': {'seconds': 2.0}}),
    'c': ('failed', {}),
  }
  results, _ = ran(monkeypatch, tmp_path, stages, first)
  states = {name: x['status'] for name, x in results['stages'].items()}
  assert states == {'a': 'done', 'b': 'stopped', 'c': 'failed'}
  assert results['stages']['c']['error'] == 'last words'
  second = {
    'b': ('done', {'z': {'seconds': 3.0}}),
    'c': ('done', {}),
  }
  results, asked = ran(monkeypatch, tmp_path, stages, second)
  assert asked == [('b', ['y'], 10), ('c', [], 10)]
  assert sorted(results['stages']['b']['points']) == ['y', 'z']
  assert 'error' not in results['stages']['c']


def test_a_budget_shortens_and_leaves_out_stages(monkeypatch, tmp_path):
  driver = module('driver')
  now = [0.0]
  monkeypatch.setattr(driver.time, 'monotonic', lambda: now[0])
  done = {name: ('done', {}) for name in 'abc'}
  stages = [stage('a', 50), stage('b', 50), stage('c', 50)]
  _, asked = ran(monkeypatch, tmp_path, stages, done, budget=0.5)
  assert [limit for _, _, limit in asked] == [30.0] * 3
  new = tmp_path / 'new'
  new.mkdir()
  results, asked = ran(monkeypatch, new, stages, done, budget=0.2)
  assert asked == []
  assert module('summary').text(results).startswith('== a (not started)')


def test_shares_and_ratios_are_of_the_same_work():
  summary = module('summary')
  point = lambda speed: {
    'tokens_per_second': speed,
    'operations': 8e9,
    'seconds': 2.0,
  }
  loop = 'torch, loop, eager'
  results = {
    'stages': {
      'machine': {
        'status': 'done',
        'points': {'rates': {'bfloat16': 1e10}},
      },
      'ours': {
        'status': 'done',
        'points': {'64x1x128, ours': point(90.0), '8x1x128, ours': point(30.0)},
      },
      'peers': {
        'status': 'done',
        'points': {
          f'64x1x128, {loop}': point(30.0),
          '8x1x128, torch, vmap': point(10.0),
          '8x4x512, torch, vmap': {'error': 'no memory'},
        },
      },
    }
  }
  summary.add_shares(results)
  assert results['stages']['ours']['points']['8x1x128, ours'][
    'share_of_peak'
  ] == pytest.approx(0.4)
  # A loop over clients is compared with every cohort of the same rows.
  assert summary.ratios(results) == [
    '== ratios',
    f'ours / 64x1x128: {loop} 3.00',
    f'ours / 8x1x128: {loop} 1.00; torch, vmap 3.00',
  ]
  assert '64x1x128, ours: 90 tokens/s, 40.0 % of peak' in summary.text(results)


def test_the_script_runs_a_stage_in_a_process_of_its_own(tmp_path):
  words = [sys.executable, ROOT / 'scripts' / 'device_checks', '--dry']
  words += ['--only', 'machine', '--out', tmp_path]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  (result,) = json.loads((tmp_path / 'dry.json').read_text())['stages'].values()
  assert result['status'] == 'done'
  assert result['points']['devices']['backend'] == 'cpu'
  assert result['points']['rates']['bfloat16'] > 0
  assert result['points']['versions']['jax']
  if absent('torch'):
    skipped = result['points']['torch']['skipped']
    assert skipped == 'torch is not installed here'


def test_a_stage_ends_at_its_limit_with_its_children(tmp_path):
  driver = module('driver')
  status, _ = driver.child(
    module('stages').STAGES[0],
    {},
    0.05,
    lambda name, result: None,
    True,
    driver.environment(tmp_path, []),
    lambda text: None,
  )
  assert status == 'stopped'


def test_the_first_stages_fit_into_eight_minutes():
  stages = module('stages').STAGES
  names = [s.name for s in stages[:5]]
  assert names == ['machine', 'parity', 'ours', 'peers', 'profile']
  assert sum(s.limit for s in stages[:5]) <= 8 * 60


# ------------------------------------------------------------------ points --


def test_rounds_are_measured_and_profiled(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('DEVICE_CHECKS_OUT', str(tmp_path))
  work = module('shapes').main(dry=True)[0]
  ((name, result),) = module('rounds').point(work, 'ours', frozenset())
  assert name == '64x1x128, ours'
  assert result['tokens'] == 4 * 2 * 1 * 8
  speed = result['tokens'] / result['seconds']
  assert result['tokens_per_second'] == pytest.approx(speed)
  # No less than what a round needs, and no more than twice of it for rows of
  # 8 tokens, where attention computes all of its T x T places.
  assert result['operations'] < result['executed'] < 2 * result['operations']
  assert result['program_bytes'] > 0 and result['compile_seconds'] > 0
  assert list(module('rounds').point(work, 'ours', frozenset([name]))) == []
  result = module('profiled').profile(work)
  assert len(result['longest']) == 5
  assert (tmp_path / 'round_64x1x128.trace.json.gz').stat().st_size > 0
  assert 'the longest:' in capsys.readouterr().out


def test_parity_is_measured_against_float32_on_the_cpu():
  parity = module('parity')
  result = parity.attention('xla', 'bfloat16', 16)
  assert result['ok'] and 0 < result['gradient'] < 0.06
  assert not parity.judged({'output': float('nan')}, 'highest')['ok']
  assert not parity.judged({'output': 0.002}, 'highest')['ok']
  assert parity.judged({'output': 0.002}, 'float32')['ok']
  x, y = {'a': [3.0, 4.0]}, {'a': [3.0, 5.0]}
  assert parity.error(x, y) == pytest.approx(1 / 34**0.5)


def test_rules_are_measured_on_a_stack():
  names = []
  for name, result in module('reductions').points(True, frozenset()):
    names.append(name)
    assert result['bytes'] == 4 * 4 * 2 * 2 * 6 * 512 * 8
    rate = result['bytes'] / result['seconds']
    assert result['bytes_per_second'] == pytest.approx(rate)
  assert names[0] == 'mean, 4 clients' and len(names) == 4


def test_a_missing_package_leaves_a_point_out():
  attempt = module('stages').attempt

  def measure():
    import no_such_package  # noqa: F401  # pyright: ignore

  assert list(attempt('x', frozenset(), measure)) == [
    ('x', {'skipped': 'no_such_package is not installed here'})
  ]
  fails = lambda: {'a': 1 / 0}
  ((_, result),) = attempt('x', frozenset(), fails)
  assert result == {'error': 'ZeroDivisionError: division by zero'}


@pytest.mark.skipif(
  absent('torch') or absent('peft'), reason='needs torch and peft'
)
def test_the_loops_of_pytorch_run_on_tiny_shapes():
  peers = module('peers')
  work = module('shapes').main(dry=True)[0]
  for measure in (peers.loop, peers.stacked, peers.trainer):
    result = measure(work)
    assert result['tokens'] == 4 * 2 * 1 * 8
    assert result['tokens_per_second'] > 0
  assert module('parity').in_torch()['ok']


# ----------------------------------------------------------------- offline --


def test_the_core_runs_without_packages_of_the_programs():
  """A round without ml-collections, datasets, tensorboardX, qwix and tqdm."""
  program = """
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in NAMES:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

NAMES = {'ml_collections', 'datasets', 'tensorboardX', 'qwix', 'tqdm'}
sys.meta_path.insert(0, Blocked())
import jax
import fedjax_llm as fl
from fedjax_llm import plan, train
from fedjax_llm.run import pace, profiling
import rounds, shapes
work = shapes.work(2, 1, 8, True)
loaded, params, cohort, loss = rounds.setting(work)
method = fl.recipes.fed_avg(loss, fl.local.optimizer('adamw', 1e-3))
state = jax.eval_shape(method.init, jax.random.key(0), params)
_, _, info = jax.eval_shape(method.round, state, cohort, loaded.base)
print(info.reported.shape)
assert not NAMES & set(sys.modules)
"""
  path = os.pathsep.join([*PLACES, str(ROOT)])
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '(2,)'
