"""Every config: what it says is true, and its `:smoke` form runs."""

import contextlib
import importlib.util
import io
import json
import pathlib

import pytest

from fedjax_llm import train
from fedjax_llm.run import config, sections

ROOT = pathlib.Path(__file__).parents[1]
PATHS = sorted((ROOT / 'configs').glob('*.py'))
each = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)


def parsed(path, *more):
  given = ['--config', str(path), '--workdir', 'none']
  return config.parse([*given, *more], sections.SPEC).config


@each
def test_the_smoke_form_runs_on_nothing_but_the_repository(path, tmp_path):
  folder = tmp_path / 'run'
  given = ['--config', f'{path}:smoke', '--workdir', str(folder)]
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    # Replies are another program to compile; test_train.py looks at them.
    status = train.main([*given, '--config.evals.samples=0'])
  assert status == 0, err.getvalue()
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  first, *_, last = (json.loads(line) for line in lines)
  assert last['round'] == 2
  assert last['evals/heldout/loss'] < first['evals/heldout/loss']
  assert 'held-out loss' in out.getvalue()
  # A model of which every weight is trained is no adapter, and says so.
  whole = parsed(f'{path}:smoke')['adapter']['name'] == 'dense'
  file = 'no_adapter.txt' if whole else 'adapter_model.safetensors'
  assert (folder / 'adapter' / file).exists()


@each
def test_the_config_itself_is_one_that_the_program_takes(path):
  conf = parsed(path)
  resolved = config.resolved(conf, sections.SPEC)
  assert config.same(resolved, json.loads(json.dumps(resolved))) == []
  assert conf['num_rounds'] > parsed(f'{path}:smoke')['num_rounds']


@each
def test_the_docstring_says_what_it_is_and_how_to_run_it(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  text = module.__doc__ or ''
  assert text.split('\n')[0].endswith('.')
  assert f'configs/{path.name}' in text.replace('mine.py', path.name)


def test_forkme_tells_of_every_section_in_the_order_of_the_flow():
  text = (ROOT / 'configs' / 'forkme.py').read_text()
  names = [name for name in sections.SPEC.sections if '.' not in name]
  places = [text.index(f'config.{name} = ') for name in names]
  assert places == sorted(places)
  for field in sections.Settings._fields:
    assert f'config.{field} = ' in text
