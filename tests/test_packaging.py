"""What an installation holds: packages, configs, data, a command, extras."""

import contextlib
import fnmatch
import importlib
import io
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

from fedjax_llm import __main__ as programs
from fedjax_llm.run import config
from fedjax_llm.types import Error

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'fedjax_llm'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


def _setup(monkeypatch):
  """The arguments of `setuptools.setup` in setup.py."""
  setuptools = pytest.importorskip('setuptools')
  calls = []
  monkeypatch.setattr(setuptools, 'setup', lambda **words: calls.append(words))
  monkeypatch.chdir(ROOT)
  runpy.run_path(str(ROOT / 'setup.py'))
  return calls[0]


def test_the_wheel_holds_every_package_and_the_configs(monkeypatch):
  words = _setup(monkeypatch)
  folders = {path.parent for path in PACKAGE.rglob('*.py')}
  names = {
    '.'.join(folder.relative_to(ROOT).parts)
    for folder in folders
    if folder.name != '__pycache__'
  }
  assert set(words['packages']) == names | {'fedjax_llm.configs'}
  assert words['package_dir'] == {'fedjax_llm.configs': 'configs'}
  assert 'packages' not in PROJECT['tool']['setuptools']  # would win


def test_the_wheel_holds_the_data_that_the_code_reads():
  patterns = PROJECT['tool']['setuptools']['package-data']['fedjax_llm']
  others = [
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob('*')
    if path.is_file() and path.suffix not in ('.py', '.pyc', '.md')
  ]
  assert others, 'the packaged data set is there'
  for file in others:
    assert any(fnmatch.fnmatch(file, p) for p in patterns), file


def test_configs_have_names_in_every_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in CONFIGS:
    for name in (path.stem, path.name, f'configs/{path.name}'):
      assert pathlib.Path(config.located(name)).samefile(path)
  assert config.load('tiny:smoke') == config.load('configs/tiny.py:smoke')
  assert (
    config.load('tiny') == config.load('tiny.py') != config.load('tiny:smoke')
  )
  (tmp_path / 'tiny.py').write_text('def get_config(): return {"mine": 1}')
  assert config.load('tiny.py') == {'mine': 1}  # one's own first
  (tmp_path / 'quickstart').mkdir()
  assert config.located('quickstart').endswith('quickstart.py')
  with pytest.raises(Error, match=r'--config \. is a folder; name a config'):
    config.located('.')
  message = (
    r'--config configs/tony.py: there is no such file, and no config of the '
    r"project of that name \(the nearest is 'tiny'; there are "
  )
  with pytest.raises(Error, match=message):
    config.located('configs/tony.py')
  with pytest.raises(Error, match='there is no such file'):
    config.located('elsewhere/tiny.py')


def test_the_command_is_the_programs():
  module, _, function = PROJECT['project']['scripts']['fedjax_llm'].partition(
    ':'
  )
  main = getattr(importlib.import_module(module), function)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert main([]) == 0
    assert main(['--help']) == 0
  assert out.getvalue() == 2 * f'{programs.listing()}\n'
  for name in programs.PROGRAMS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
      raise SystemExit(main([name, '--help']))
    assert ended.value.code in (0, None) and out.getvalue(), name
  error = io.StringIO()
  with contextlib.redirect_stderr(error):
    assert main(['trian', '--config', 'tiny']) == 1
    assert main(['train', '--config', 'tiny']) == 1
  assert error.getvalue().splitlines() == [
    "error: 'trian' is no program (the nearest is 'train'; there are "
    f'{", ".join(programs.PROGRAMS)}).',
    'error: --workdir is missing (usage: --config FILE.py[:arg] --workdir DIR '
    '[--config.section.field=value]).',
  ]


def test_notebooks_install_from_the_projects_address(tmp_path):
  url = PROJECT['project']['urls']['Repository']
  for notebook in sorted((ROOT / 'colabs').glob('*.ipynb')):
    found = re.findall(r"repository = '([^']*)'", notebook.read_text())
    assert found == [f'git+{url}'], f'{notebook.name}: run scripts/address'
  one = 'colabs/04_partitions.ipynb'
  (tmp_path / 'scripts').mkdir()
  (tmp_path / 'colabs').mkdir()
  for name in (
    'scripts/address',
    'pyproject.toml',
    'colabs/04_partitions.ipynb',
  ):
    (tmp_path / name).write_bytes((ROOT / name).read_bytes())
  new = 'https://example.org/lab/fedjax_llm'
  subprocess.run(
    [sys.executable, tmp_path / 'scripts' / 'address', new],
    check=True,
    capture_output=True,
  )
  assert f"'git+{new}'" in (tmp_path / one).read_text()
  assert f'Repository = "{new}"' in (tmp_path / 'pyproject.toml').read_text()


# Of parts that are being written.
AHEAD = {'dp'}


def test_every_extra_is_named_where_it_is_used():
  texts = ''
  for folder in ('fedjax_llm', 'scripts', 'configs', 'colabs', '.'):
    pattern = '*' if folder == '.' else '**/*'
    for path in sorted((ROOT / folder).glob(pattern)):
      plain = path.suffix in ('', '.py', '.md')
      if path.is_file() and plain and path.name != '.gitignore':
        texts += path.read_text()
  for name in set(PROJECT['project']['optional-dependencies']) - AHEAD:
    uses = (
      rf'\[(\w+,)*{name}(,\w+)*\]',
      rf'scripts/setup (\w+,)*{name}\b',
      rf'extras? [^)\n]*`{name}`',
    )
    assert any(re.search(use, texts) for use in uses), f'the extra {name}'
