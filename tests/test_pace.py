"""What a run says of its devices: rates, memory, waits, traces."""

import csv
import gzip
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm import report, train
from fedjax_llm.run import metrics, pace, peaks, profiling
from fedjax_llm.types import Error

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('FEDJAX_LLM_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'peaks.json'


def test_a_rate_is_measured_once_for_each_machine_and_dtype(cache):
  asked = []

  def measured(dtype):
    asked.append(dtype)
    return 100.0 * len(asked)

  assert peaks.known('float32', measured) == 100.0
  assert peaks.known('float32', measured) == 100.0
  assert peaks.known('bfloat16', measured) == 200.0
  assert asked == ['float32', 'bfloat16']
  kept = json.loads(cache.read_text())
  assert sorted(kept.values()) == [100.0, 200.0]
  assert all(jax.devices()[0].device_kind in name for name in kept)


def test_a_rate_measured_again_keeps_the_larger(cache):
  rates = iter([100.0, 300.0, 50.0])
  measured = lambda dtype: next(rates)
  assert peaks.known('float32', measured) == 100.0
  assert peaks.known('float32', measured, again=True) == 300.0
  assert peaks.known('float32', measured, again=True) == 300.0
  assert list(json.loads(cache.read_text()).values()) == [300.0]


def test_a_round_faster_than_the_rate_measures_it_once_more():
  asked = []

  def rate(dtype, again=False):
    asked.append(again)
    return 1000.0 if again else 100.0

  program = jax.make_jaxpr(lambda w: w @ w)(jnp.ones((4, 4)))  # 128 operations
  one = pace.of(program, trips=1, rate=rate)
  share = lambda seconds: one.measured(seconds, pace.Waits())[
    'time/share_of_peak'
  ]
  assert share(2.0) == 0.64 and asked == [False]
  assert share(1.0) == 0.128 and asked == [False, True]
  assert share(0.1) == 1.28 and asked == [False, True]  # no third time


DAMAGED = ['{', '[1]', '{"%s": "fast"}', '{"%s": -1}']


@pytest.mark.parametrize('content', DAMAGED)
def test_a_file_of_rates_that_is_no_such_file_is_written_anew(cache, content):
  cache.parent.mkdir()
  cache.write_text(
    content.replace('%s', json.dumps(peaks.key('float32'))[1:-1])
  )
  assert peaks.known('float32', lambda dtype: 3.0) == 3.0
  assert json.loads(cache.read_text())[peaks.key('float32')] == 3.0


def test_a_rate_counts_two_operations_a_product(monkeypatch):
  now = iter(range(100))
  monkeypatch.setattr(peaks.time, 'perf_counter', lambda: float(next(now)))
  devices = jax.local_device_count()
  assert peaks.measure(side=8, calls=2) == 2 * devices * 8**3 / 1.0


def test_a_share_asks_for_the_rate_of_each_dtype():
  rates = {'bfloat16': 400.0, 'float32': 100.0}
  flops = {'bfloat16': 800.0, 'float32': 200.0}
  # 2 s at the rates of both, in 4 s; with one rate for all it were 1000 / 1600.
  assert peaks.share(flops, 4.0, lambda x: 2 * rates[x]) == 0.5
  assert peaks.share({}, 4.0, rates.__getitem__) == 0.0


def test_a_pace_counts_all_device_rows_and_local_steps():
  def steps(w, n):
    return jax.lax.while_loop(
      lambda at: at[0] < n, lambda at: (at[0] + 1, at[1] @ at[1]), (0, w)
    )[1]

  program = jax.make_jaxpr(steps)(jnp.ones((4, 4)), 3)
  one = pace.of(program, trips=3, rows=2, rate=lambda dtype: 1000.0)
  fields = one.measured(2.0, pace.Waits(0.5, 0.25, 1.0))
  assert fields['time/share_of_peak'] == 3 * 2 * (2 * 4**3) / 1000 / 2
  assert (fields['time/waiting'], fields['time/checkpoint']) == (1.75, 1.0)
  assert fields['time/memory'] > 1e6
  full = pace.of(program, trips=3, rate=lambda dtype: None)
  assert 'time/share_of_peak' not in full.measured(2.0, pace.Waits())


def test_a_watch_gives_the_time_of_the_end_even_of_an_error():
  started = time.monotonic()
  done = pace.watch(jnp.ones(3) * 2)
  assert started <= done() <= time.monotonic()

  class Broken:
    def block_until_ready(self):
      raise RuntimeError('device')

  assert pace.watch(Broken())() >= started


def test_the_progress_line_names_the_longest_wait_only_where_it_matters():
  values = {'time/total': 2.0, 'time/memory': 10**9}
  assert pace.words(values, pace.Waits(states=0.19)) == ['1.00 GB']
  (said,) = pace.words({'time/total': 2.0}, pace.Waits(0.3, 0.2, 0.1))
  assert said == 'waited 0.3 s for client states'
  # A checkpoint lies between two rounds: 2 s of 4 s.
  (said,) = pace.words({'time/total': 2.0}, pace.Waits(checkpoint=2.0))
  assert said == 'waited 2.0 s for the checkpoint'


@pytest.mark.parametrize('setting', [0, (1, -2), 'all', (1.5,), True])
def test_a_round_to_profile_is_a_whole_number(setting):
  with pytest.raises(Error, match=r'profile is .* must be a round above 0'):
    profiling.rounds(setting)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Two rounds, of which the second one, after a resumption, is profiled."""
  folder = tmp_path_factory.mktemp('run') / 'run'
  fields = {
    'clients.cohort_size': 2,
    'model.name': 'multihost:shallow',
    'adapter.targets': 'q_proj',
    'local.name': 'sgd',
    'evals.samples': 0,
    'evals.every': 9,
    'compilation_cache': 'none',
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('FEDJAX_LLM_CACHE', str(folder.parent / 'cache'))
    for more in ({'num_rounds': 1}, {'num_rounds': 2, 'profile': 2}):
      words = [f'--config.{k}={v}' for k, v in {**fields, **more}.items()]
      config = ['--config', str(ROOT / 'configs' / 'tiny.py:smoke')]
      assert train.main([*config, '--workdir', str(folder), *words]) == 0
  return folder


def test_a_run_records_its_pace(run):
  records = metrics.read(str(run / 'metrics.jsonl'))
  assert [r['round'] for r in records] == [0, 1, 2]
  for record in records[1:]:
    assert record['time/share_of_peak'] > 0
    assert record['time/memory'] > 1e6
    assert record['time/waiting'] >= record['time/data']
  # Nothing was saved before the first round of a process.
  assert [r['time/checkpoint'] for r in records[1:]] == [0.0, 0.0]
  with open(run / 'metrics.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert float(rows[-1]['time/share_of_peak']) > 0
  page = report.page([run])
  for title in ('Share of the measured rate', 'Memory in use', 'Waiting for'):
    assert title in page


def test_a_profiled_round_leaves_a_trace_for_both_programs(run):
  (file,) = profiling.files(run / 'profile')
  # TensorBoard finds LOGDIR/plugins/profile/TIME/HOST.xplane.pb.
  assert file.parts[-4:-2] == ('plugins', 'profile')
  (perfetto,) = file.parent.glob('*.trace.json.gz')
  events = json.loads(gzip.decompress(perfetto.read_bytes()))['traceEvents']
  assert any(event.get('name') == 'round' for event in events)
  profile = profiling.longest(file, number=5)
  assert len(profile.operations) == 5
  assert profile.busy >= sum(o.seconds for o in profile.operations) > 0
  lengths = [o.seconds for o in profile.operations]
  assert lengths == sorted(lengths, reverse=True)
  assert profiling.note(run / 'profile').startswith(str(file.parent))
