"""Shared set-up: a CPU, and programs that compile fast rather than run fast."""

import atexit
import collections
import gc
import os
import pathlib
import shutil
import tempfile
from importlib import metadata

import pytest

# Programs and references that tests use or run; with --doctest-modules every
# file would be imported.
collect_ignore = ['golden', 'multihost.py', 'sharded.py', 'tiny.py', 'toy.py']
collect_ignore_glob = ['references*.py']

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
# Test programs are tiny: most of their time would go into optimising them.
XLA_FLAGS = (
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_parallel_codegen_split_count=1',
)
# A third of the time of compiling; a later version stops at an unknown flag.
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 12):
  XLA_FLAGS = (*XLA_FLAGS, '--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(XLA_FLAGS))

# A trace makes many objects, few of them garbage: they are searched less often.
gc.set_threshold(100_000, 20, 20)

# Programs compiled by one test, or one process of it, serve the others.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _folder = tempfile.mkdtemp(prefix='fedjax_llm_programs_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _folder
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
  # Workers of xdist find the variable set: the folder is the first process's.
  atexit.register(shutil.rmtree, _folder, ignore_errors=True)


# Whole processes, runs and notebooks: run with SLOW=1, as `.ci/run` does, or
# when the file is named on the command line.
SLOW = (
  *('test_colabs.py', 'test_configs.py', 'test_differentiable.py'),
  *('test_fuzz.py',),
  *('test_methods.py', 'test_multihost.py', 'test_old_runs.py'),
  *('test_plan.py', 'test_programs.py', 'test_replay.py'),
  *('test_reproduce.py', 'test_sharding.py', 'test_sweep.py'),
)


def pytest_addoption(parser):
  what = 'write tests/golden/configs anew: test_golden_configs.py'
  parser.addoption('--rewrite-golden', action='store_true', help=what)


def pytest_collection_modifyitems(config, items):
  named = {pathlib.Path(arg.split('::')[0]).name for arg in config.args}
  skip = pytest.mark.skip(reason='slow: run by SLOW=1 scripts/test')
  for item in items:
    slow = item.path.name in SLOW and item.path.name not in named
    if slow and os.environ.get('SLOW') != '1':
      item.add_marker(skip)


@pytest.fixture(autouse=True, scope='module')
def released():
  """Frees the programs of a file: a process may map only so many of them."""
  yield
  import jax

  jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
  """Prints the ten files whose tests took longest, set-up included."""
  seconds = collections.defaultdict(float)
  for reports in terminalreporter.stats.values():
    for report in reports:
      if isinstance(report, pytest.TestReport):
        seconds[report.nodeid.split('::')[0]] += report.duration
  if len(seconds) > 1:
    terminalreporter.write_sep('=', 'slowest 10 files')
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:10]:
      terminalreporter.write_line(f'{seconds[name]:8.1f}s {name}')
