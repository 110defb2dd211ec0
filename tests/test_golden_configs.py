"""The resolved form of every config, against the committed one.

A changed default of a builder or of a config changes a file of
`golden/configs`: it has to be meant, and the commit shows it. Written by

    pytest tests/test_golden_configs.py --rewrite-golden

`NAME.json` is the resolved `configs/NAME.py`. `methods/NAME.json` has those
sections and settings of `configs/methods.py:NAME` that are not as in
`methods.json`, whose method is fed_avg.
"""

import json
import pathlib
import runpy

import optax
import pytest

from fedjax_llm import builders, config, sections

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'configs'
PATHS = sorted((ROOT / 'configs').glob('*.py'))
METHODS = runpy.run_path(str(ROOT / 'configs' / 'methods.py'))['NAMES']
METHOD_FILES = {name: GOLDEN / 'methods' / f'{name}.json' for name in METHODS}


@pytest.fixture(autouse=True)
def same_folders(monkeypatch):
  """Where downloads lie must not depend on who runs the test."""
  monkeypatch.setenv('FEDJAX_LLM_CACHE', '/cache')


@pytest.fixture
def rewrite(request):
  return request.config.getoption('--rewrite-golden')


def resolved(name):
  """The resolved config of NAME or NAME:arg, as JSON reads it again."""
  stem, colon, arg = name.partition(':')
  argv = ['--config', f'{ROOT}/configs/{stem}.py{colon}{arg}']
  conf = config.parse([*argv, '--workdir', 'none'], sections.SPEC).config
  return json.loads(json.dumps(config.resolved(conf, sections.SPEC)))


def write(file, value):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')


def read(file):
  assert file.exists(), f'{file} is missing: {__doc__}'
  return json.loads(file.read_text())


def check(name, expected, actual):
  """Fails with the fields that differ, before and now."""
  # A newer optax may have more settings than were recorded.
  optimizer = getattr(optax, str(actual['local']['name']), None)
  known = {'name', 'learning_rate', *(expected.get('local') or {})}
  other = [
    f'local.{field}'
    for field in (builders.fields(optimizer) if optimizer else ())
    if field not in known
  ]
  lines = [
    f'{field}: {at(expected, field)} in the file, now {at(actual, field)}'
    for field in config.same(expected, actual, ignore=other)
  ]
  assert not lines, '\n'.join([f'{name} resolves to another config:', *lines])


def at(values, field):
  for part in field.split('.'):
    if not isinstance(values, dict) or part not in values:
      return 'absent'
    values = values[part]
  return repr(values)


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_a_config_resolves_to_the_committed_one(path, rewrite):
  file, actual = GOLDEN / f'{path.stem}.json', resolved(path.stem)
  if rewrite:
    write(file, actual)
  check(f'configs/{path.name}', read(file), actual)


@pytest.mark.parametrize('name', METHODS)
def test_a_method_resolves_to_the_committed_config(name, rewrite):
  file, actual = METHOD_FILES[name], resolved(f'methods:{name}')
  if rewrite:
    shared = resolved('methods')
    write(file, {k: v for k, v in actual.items() if shared.get(k) != v})
  else:
    shared = read(GOLDEN / 'methods.json')
  check(f'configs/methods.py:{name}', shared | read(file), actual)


def test_every_file_is_that_of_a_config(rewrite):
  known = {GOLDEN / f'{path.stem}.json' for path in PATHS}
  known |= {*METHOD_FILES.values()}
  for file in set(GOLDEN.rglob('*.json')) - known:
    assert rewrite, f'{file} is of no config.'
    file.unlink()


def test_a_changed_default_is_named_with_both_values():
  actual = resolved('tiny')
  changed = json.loads(json.dumps(actual))
  changed['adapter']['rank'] = 5
  message = r'adapter\.rank: 5 in the file, now 4'
  with pytest.raises(AssertionError, match=message):
    check('tiny', changed, actual)
