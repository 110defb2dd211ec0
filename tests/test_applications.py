"""Configs of applications, on the generated data of their schemas."""

import json
import pathlib
import runpy

import pytest

from fedjax_llm import data
from fedjax_llm.run import builders, config, sections, tasks
from fedjax_llm.types import Error

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / 'configs' / 'applications.py'
NAMES = runpy.run_path(str(PATH))['NAMES']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Writes the generated data once."""
  out = tmp_path_factory.mktemp('applications')
  script = runpy.run_path(str(ROOT / 'scripts' / 'make_application_data'))
  script['main'](['--out', str(out), '--rows', '240'])
  return out


def parsed(arg, *more):
  words = ['--config', f'{PATH}:{arg}', '--workdir', 'none', *more]
  return config.parse(words, sections.SPEC).config


@pytest.mark.parametrize('name', NAMES)
def test_an_application_reads_generated_data_of_its_schema(name, folder):
  conf = parsed(name, f'--config.data.path={folder}/{name}.jsonl')
  build = {key: sections.SPEC.sections[key] for key in ('data', 'partition')}
  records = builders.build(conf['data'], build['data'])
  deal = builders.build(conf['partition'], build['partition'])
  settings = {k: v for k, v in conf['population'].items() if k != 'template'}
  task = tasks.classification() if name == 'finance' else None
  labels = task.labels(records) if task and task.labels else None
  people = data.build(
    records, data.bytes(), partition=deal, template='plain', labels=labels,
    **settings,
  )  # fmt: skip
  clients = {
    'finance': 20, 'medicine': 6, 'code': 6, 'law': 12, 'recommendation': 20
  }  # fmt: skip
  assert len(people.names) + len(people.new_names) == clients[name]
  assert len(people.new_names) >= 1 and len(people.train[0]) > 1
  assert people.report['clients_left_out'] == 0
  if name != 'finance':
    assert people.report['replies_left_out'] == 0


def test_generated_data_are_the_same_for_the_same_seed(folder, tmp_path):
  script = runpy.run_path(str(ROOT / 'scripts' / 'make_application_data'))
  script['main'](['--out', str(tmp_path), '--rows', '240'])
  for name in NAMES:
    same = (folder / f'{name}.jsonl').read_bytes()
    assert (tmp_path / f'{name}.jsonl').read_bytes() == same
  lines = (tmp_path / 'law.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    for text, start in zip(*row['answers'].values(), strict=True):
      assert row['context'][start:].startswith(text)


def test_every_application_has_a_smoke_form_and_others_are_refused():
  for name in NAMES:
    assert parsed(f'{name}-smoke')['data']['name'] == 'packaged'
  with pytest.raises((Error, ValueError), match="has no 'medicin'; there are"):
    parsed('medicin')
