"""What is damaged is named, and nothing older that is whole is lost."""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
import runs

from fedjax_llm import replay, train
from fedjax_llm.report import __main__ as report
from fedjax_llm.run import checkpoint, narration, rebuild, workdir

FIELDS = {'algorithm__name': 'local_only', 'keep_checkpoints': 3}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return runs.texts(tmp_path_factory.mktemp('data') / 'texts.jsonl')


def command(data, folder, rounds, **fields):
  given = {**FIELDS, 'num_rounds': rounds, **fields}
  return runs.arguments(data, folder, **given)


@pytest.fixture(scope='module')
def four(data, tmp_path_factory):
  """A finished run of four rounds whose clients keep something."""
  folder = tmp_path_factory.mktemp('four') / 'run'
  runs.done(train, command(data, folder, 4))
  return folder


@pytest.fixture(scope='module')
def five(data, four, tmp_path_factory):
  """The same with a fifth round: how it must end, whatever happens to it."""
  folder = tmp_path_factory.mktemp('five') / 'run'
  shutil.copytree(four, folder)
  runs.done(train, command(data, folder, 5))
  return folder


@pytest.fixture
def folder(four, tmp_path):
  return pathlib.Path(shutil.copytree(four, tmp_path / 'run'))


def edited(file, change):
  """Changes a JSON file as a program would that knows nothing of checksums."""
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


# ----------------------------------------------------------- the newest round -


MANIFESTS = {
  'a leaf without a field': lambda x: x['leaves'][0].pop('impl'),
  'a leaf of another name': lambda x: x['leaves'][0].update(name='other'),
  'another file of a leaf': lambda x: x['leaves'][0].update(file_key='other'),
  'leaves that are none': lambda x: x.update(leaves=[1]),
  'a file outside': lambda x: x['files'].update(
    {'../x': {'bytes': 1, 'sha256': ''}}
  ),
  'the round': lambda x: x.update(round=3),
}


@pytest.mark.parametrize('summed', [True, False])
def test_a_manifest_that_tells_something_else_is_damaged(tmp_path, summed):
  """Also one that has no checksum of its own, as of an older run."""
  state = {'params': {'q': np.ones(3, np.float32)}}
  saver = checkpoint.open(tmp_path)
  for number in (1, 2):
    saver.save(number, state)
  file = tmp_path / 'round_00000002/manifest.json'
  if not summed:
    edited(file, lambda x: x.pop('sha256'))
  content = file.read_bytes()
  texts = {'[' * 100_000: 'no manifest', '[]': 'no manifest', '': ''}
  for damage in [*MANIFESTS.items(), *texts.items()]:
    kind, change = damage
    if kind in MANIFESTS:
      if not summed and kind == 'a leaf of another name':
        continue  # that of another run, as far as one can know
      edited(file, change)
    else:
      file.write_text(kind)
    found = checkpoint.open(tmp_path).restore(state)
    assert found is not None and found.round == 1, kind
    assert str(file.parent) in found.notices[0]
    file.write_bytes(content)
  for i in range(0, len(content), 37):
    if not summed:
      break
    bad = bytearray(content)
    bad[i] ^= 1
    file.write_bytes(bad)
    found = checkpoint.open(tmp_path).restore(state)
    assert found is not None
    # What a bit of white space was is no matter.
    assert found.round == 1 or json.loads(bad) == json.loads(content)


DAMAGE = {
  'a manifest': (
    'checkpoints/round_00000004/manifest.json',
    lambda file: edited(file, MANIFESTS['a leaf without a field']),
  ),
  'a journal': (
    'states/journal_00000004',
    lambda file: file.write_bytes(file.read_bytes()[:-40]),
  ),
  'no journal': ('states/journal_00000004', lambda file: file.unlink()),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_newest_round_is_named_and_the_one_before_is_used(
  data, folder, five, kind
):
  name, damage = DAMAGE[kind]
  damage(folder / name)
  printed = runs.done(train, command(data, folder, 5))
  assert str(folder / 'checkpoints/round_00000004') in printed
  assert pathlib.Path(name).name in printed
  assert 'resuming after round 3' in printed
  assert runs.outcome(folder) == runs.outcome(five)


def test_a_damaged_base_of_all_rounds_is_an_error_that_names_it(data, folder):
  path = folder / 'states/base.ids'
  content = bytearray(path.read_bytes())
  content[3] ^= 64
  path.write_bytes(content)
  told = runs.refused(train, command(data, folder, 5))
  assert f'{path} is damaged: its checksum does not fit' in told


def test_a_changed_client_state_ends_the_run_that_reads_it(data, folder):
  path = folder / 'states/base.rows'
  rows = np.fromfile(path, np.float32)
  (rows * -3 + 0.5).astype(np.float32).tofile(path)
  told = runs.refused(train, command(data, folder, 30))
  assert f'{path} is damaged: the checksum of client' in told


def test_a_replay_passes_over_what_is_damaged(folder):
  (folder / 'states/journal_00000003').unlink()
  told = runs.done(replay, ['--workdir', folder, '--round', 4, rebuild.TRUST])
  assert 'from the checkpoint of round 2' in told and 'equal' in told


# ---------------------------------------------------------------- the end --


@pytest.mark.parametrize(
  'name, how',
  [
    ('adapter/adapter_model.safetensors', 'lost'),
    ('adapter/adapter_model.safetensors', 'changed'),
    ('base/model.safetensors', 'lost'),
    ('samples.json', 'lost'),
    ('report.txt', 'changed'),
    ('finished.json', 'changed'),
  ],
)
def test_what_a_finished_run_has_lost_is_made_again(data, folder, name, how):
  path, before = folder / name, runs.everything(folder)
  if how == 'lost':
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-1] + b'\xff')
  printed = runs.done(train, command(data, folder, 4))
  assert 'resuming after round 4' in printed
  after = runs.everything(folder)
  # The config of the adapter tells where its base lies: elsewhere here.
  for file in ('adapter/adapter_model.safetensors', 'base/model.safetensors'):
    assert after[pathlib.Path(file)][0] == before[pathlib.Path(file)][0]
  assert json.loads((folder / 'samples.json').read_text())['samples'] == []
  runs.done(report, [folder, '--out', folder.with_name('out.html')])


def test_without_checkpoints_a_lost_adapter_is_an_error(data, folder):
  shutil.rmtree(folder / 'checkpoints')
  (folder / 'adapter/adapter_model.safetensors').unlink()
  before = runs.everything(folder)
  told = runs.refused(train, command(data, folder, 4))
  assert (
    'adapter/adapter_model.safetensors of this finished run is lost' in told
  )
  after = runs.everything(folder)
  assert {k: v[0] for k, v in after.items() if k.name != '.lock'} == {
    k: v[0] for k, v in before.items() if k.name != '.lock'
  }


# --------------------------------------------------------------- side files --


def test_a_record_that_is_missing_is_told(data, folder, five):
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[:2] + lines[3:]))
  printed = runs.done(train, command(data, folder, 5))
  assert f'{path} has no record of round 2: reports lack it.' in printed
  lines = [x for i, x in enumerate(runs.records(five)) if i != 2]
  assert [x['local/loss'] for x in runs.records(folder)[1:]] == [
    x['local/loss'] for x in lines[1:]
  ]
  runs.done(report, [folder, '--out', folder.with_name('out.html')])


@pytest.mark.parametrize(
  'change, words',
  [
    (
      lambda x: [*x[:2], x[1], *x[2:]],
      ':3 is of round 1, after one of round 1',
    ),
    (lambda x: [x[1], x[0], *x[2:]], ':2 is of round 0, after one of round 1'),
    (lambda x: [*x[:2], '{"round": true}', *x[3:]], ':3 is no record'),
    (lambda x: [*x[:2], '{"round": -1}', *x[3:]], ':3 is no record'),
    (lambda x: [*x[:2], '[' * 100_000, *x[3:]], ':3 is no record'),
    (
      lambda x: [*x[:2], '{"round": 2, "local/loss": "low"}', *x[3:]],
      ":3 is damaged: local/loss is 'low', not a number or null",
    ),
    (
      lambda x: [*x[:2], '{"round": 2, "evals/heldout/clients": []}', *x[3:]],
      ':3 is damaged: evals/heldout/clients is [], not an object',
    ),
  ],
)
def test_records_that_are_none_are_named(data, folder, change, words):
  path = folder / 'metrics.jsonl'
  path.write_text('\n'.join(change(path.read_text().splitlines())) + '\n')
  for program, more in (
    (train, command(data, folder, 5)),
    (report, [folder, '--out', folder.with_name('out.html')]),
    (replay, ['--workdir', folder, '--round', 4, rebuild.TRUST]),
  ):
    assert f'{path}{words}' in runs.refused(program, more)


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('clients.json', {'clients': 'x'}, "clients is 'x', not an object"),
    ('clients.json', {'clients': {'ann': 3}}, 'clients of ann is 3, not an'),
    (
      'clients.json',
      {'clients': {'ann': {'examples': 'two'}}},
      "clients of ann: examples is 'two', not a whole number",
    ),
    ('clients.json', {'clients': {'ann': {}}}, 'ann has no examples'),
    ('clients.json', {'unit': '\ud800'}, "unit is '\\ud800', not a name"),
    ('samples.json', {'samples': 5}, 'samples is 5, not a list'),
    ('samples.json', {'samples': [5]}, 'samples[0] is 5, not an object'),
    (
      'samples.json',
      {'samples': [{'client': 5, 'prompt': None, 'reply': 3}]},
      'samples[0]: client is 5, not a text',
    ),
    (
      'samples.json',
      {'samples': [{'client': 'a', 'prompt': 'b', 'reply': 'c', 'after': []}]},
      'samples[0]: after is [], not a text',
    ),
    ('samples.json', {'round': 'x'}, "round is 'x', not a number"),
    ('config.json', [], 'holds no object'),
  ],
)
def test_side_files_of_a_report_are_named(folder, name, content, words):
  path = folder / name
  path.write_text(json.dumps(content))
  told = runs.refused(report, [folder, '--out', folder.with_name('out.html')])
  assert f'{path} is damaged' in told and words in told


@pytest.mark.parametrize(
  'notes',
  [
    {'chosen': {'block_size': 'x'}},
    {'chosen': {'block_size': -1}},
    {'chosen': [1]},
    {'changes': 5},
    {'changes': [5]},
    {'changes': [{'after': 9, 'fields': {'seed.x': {'was': 1, 'is': 2}}}]},
    {'changes': [{'after': 9, 'fields': {'seed': {'was': 1}}}]},
    {'changes': [{'after': 'x', 'fields': {}}]},
  ],
)
def test_notes_of_a_config_are_checked(folder, notes):
  file = folder / 'config.json'
  edited(file, lambda x: x.update(notes))
  words = ['--workdir', folder, '--round', 4, rebuild.TRUST]
  told = runs.refused(replay, words)
  assert 'config.json' in told and 'damaged' in told


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
  state = {'q': np.ones(3, np.float32)}
  saver = checkpoint.open(tmp_path, max_to_keep=1)
  saver.save(1, state)
  (tmp_path / 'round_7').mkdir()
  assert checkpoint.open(tmp_path).rounds() == [1]
  saver.save(2, state)
  assert saver.rounds() == [2] and (tmp_path / 'round_7').is_dir()


# ------------------------------------------------------------ while it works --


@pytest.mark.parametrize(
  'gone, how',
  [
    ('', 'removed'),
    ('states', 'replaced'),
    ('checkpoints', 'removed'),
    ('metrics.jsonl', 'removed'),
    ('states/base.json', 'removed'),
    ('.lock', 'removed'),
  ],
)
def test_a_folder_that_goes_while_a_run_works_ends_it(
  data, folder, monkeypatch, gone, how
):
  path, left_out = folder / gone, narration.left_out

  def at(told, info, draw, names, number):
    if number == 6:
      copy = folder.with_name('elsewhere')
      path.rename(copy)  # kept: nothing else gets its inode
      if how == 'replaced' and copy.is_dir():
        path.mkdir()
      elif how == 'replaced':
        path.write_text('')
    return left_out(told, info, draw, names, number)

  monkeypatch.setattr(narration, 'left_out', at)
  told = runs.refused(train, command(data, folder, 9))
  assert str(folder if gone == '.lock' else path) in told
  assert 'while this run was at work' in told or 'is damaged' in told
  if gone == '':
    assert not folder.exists() or not list(folder.iterdir())


# ------------------------------------------------------------------- numbers --


@pytest.mark.parametrize('rate', ['1e999', '1e38'])
def test_parameters_that_are_no_numbers_end_the_run(data, tmp_path, rate):
  folder = tmp_path / 'run'
  told = runs.refused(
    train,
    command(
      data,
      folder,
      1,
      algorithm__name='fed_avg',
      server__name='sgd',
      server__learning_rate=rate,
      local__learning_rate=1e3,
    ),
  )
  assert 'not finite' in told or 'must be' in told
  assert not (folder / 'adapter').exists()
  assert not (folder / 'report.txt').exists()


# --------------------------------------------------------------- the last net -


def test_what_nobody_has_foreseen_is_a_sentence_and_a_log(
  data, tmp_path, monkeypatch
):
  def breaks(*_):
    raise KeyError('a name\nin two lines')

  monkeypatch.setattr(narration, 'describe', breaks)
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr(tempfile, 'tempdir', None)
  status, _, err = runs.run(train, command(data, tmp_path / 'run', 1))
  assert status == 1 and err.count('\n') == 1
  start, _, path = err.strip().rstrip('.').partition('The traceback is in ')
  assert start == (
    f"error: {workdir.UNFORESEEN}, KeyError: 'a name\\nin two lines'. "
  )
  text = pathlib.Path(path).read_text()
  assert 'in breaks' in text and pathlib.Path(path).parent == tmp_path
