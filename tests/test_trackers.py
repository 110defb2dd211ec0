"""Where numbers go beside the record: a CSV file, and services."""

import csv
import json
import sys
import types

import pytest

from fedjax_llm.run import builders, metrics, trackers
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error

CONFIG = {'seed': 3, 'local': {'name': 'adamw', 'learning_rate': 0.1}}


# --------------------------------------------------------------------- csv --


def table(workdir):
  with (workdir / 'metrics.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def test_the_csv_is_the_scalars_of_the_record(tmp_path):
  told = [
    {'evals/new/loss': 6.5, 'evals/new/clients': {'a,"': 6.5}},
    {'local/loss': 5.25, 'clients/out': ['x'], 'uploads/bytes': 12},
    {'local/loss': float('nan'), 'evals/new/loss': 1e-30},
  ]
  record = metrics.recorder(str(tmp_path), tensorboard=False)
  for number, one in enumerate(told):
    record.write(number, one)
  assert (tmp_path / 'metrics.csv').read_text() == (
    'round,evals/new/loss,local/loss,uploads/bytes\n'
    '0,6.5,,\n'
    '1,,5.25,12\n'
    '2,1e-30,,\n'
  )


def test_resumed_the_csv_equals_one_that_was_never_interrupted(tmp_path):
  def write(folder, keep, numbers):
    record = metrics.recorder(str(folder), keep, tensorboard=False)
    for i in numbers:
      more = {'evals/loss': 2.0} if i % 3 == 0 else {}
      record.write(i, {'local/loss': 1 / (1 + i), **more})

  write(tmp_path / 'whole', -1, range(6))
  write(tmp_path / 'cut', -1, range(5))
  with (tmp_path / 'cut' / 'metrics.csv').open('a') as file:
    file.write('5,0.1')  # torn
  write(tmp_path / 'cut', 2, range(3, 6))
  assert table(tmp_path / 'cut') == table(tmp_path / 'whole')
  assert len(table(tmp_path / 'cut')) == 6


# ---------------------------------------------------------------- services --


class Wandb(types.ModuleType):
  """What of wandb is used, and what it was told."""

  def __init__(self):
    super().__init__('wandb')
    self.inits, self.logs, self.ends, self.broken = [], [], [], False

  def init(self, **keywords):
    if self.broken:
      raise RuntimeError('no key\nwandb login')
    self.inits.append(keywords)
    return self

  def log(self, scalars, step, commit):
    assert commit
    if self.broken:
      raise ConnectionError('no way')
    self.logs.append((step, scalars))

  def finish(self, exit_code):
    self.ends.append(exit_code)


class Mlflow(types.ModuleType):
  """The same of mlflow, which keeps experiments."""

  def __init__(self):
    super().__init__('mlflow')
    self.experiments, self.runs, self.batches, self.states = {}, [], [], []

  def MlflowClient(self):
    return self

  def get_experiment_by_name(self, name):
    id = self.experiments.get(name)
    return None if id is None else types.SimpleNamespace(experiment_id=id)

  def create_experiment(self, name):
    return self.experiments.setdefault(name, str(len(self.experiments)))

  def create_run(self, experiment_id, run_name):
    self.runs.append((experiment_id, run_name))
    info = types.SimpleNamespace(run_id=f'run{len(self.runs)}')
    return types.SimpleNamespace(info=info)

  def update_run(self, run_id, status):
    self.states.append((run_id, status))

  def set_terminated(self, run_id, status):
    self.states.append((run_id, status))

  def log_batch(self, run_id, metrics=(), params=()):
    assert len(params) <= 100
    self.batches += [(run_id, *entity) for entity in (*params, *metrics)]


@pytest.fixture
def services(monkeypatch):
  wandb, mlflow = Wandb(), Mlflow()
  entities = types.ModuleType('mlflow.entities')
  entities.__dict__['Param'] = lambda key, value: (key, value)
  entities.__dict__['Metric'] = lambda key, value, time, step: (
    *(key, value, step),
    time > 1.6e12,  # milliseconds
  )
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  monkeypatch.setitem(sys.modules, 'mlflow', mlflow)
  monkeypatch.setitem(sys.modules, 'mlflow.entities', entities)
  return wandb, mlflow


def opened(workdir, keep=-1, **section):
  track = builders.build(section, SPEC.sections['tracking'])
  return metrics.recorder(
    str(workdir),
    keep,
    tensorboard=False,
    track=lambda kept: track(str(workdir), CONFIG, kept),
  )


def told(number):
  return {'local/loss': 1 / (1 + number), 'evals/clients': {'a': 1.0}}


def test_services_get_the_scalars_and_the_config(services, tmp_path):
  wandb, mlflow = services
  record = opened(
    tmp_path / 'mine', to=('wandb', 'mlflow'), project='lab', name='first'
  )
  record.write(0, told(0))
  record.write(1, told(1) | {'local/accuracy': float('nan')})
  record.close(True)
  (begun,) = wandb.inits
  assert (begun['project'], begun['name']) == ('lab', 'first')
  assert begun['config'] == CONFIG and begun['resume'] == 'allow'
  assert begun['dir'] == str(tmp_path / 'mine')
  assert wandb.logs == [(0, {'local/loss': 1.0}), (1, {'local/loss': 0.5})]
  assert wandb.ends == [0]
  assert mlflow.experiments == {'lab': '0'} and mlflow.runs == [('0', 'first')]
  assert ('run1', 'local.learning_rate', '0.1') in mlflow.batches
  assert ('run1', 'local/loss', 0.5, 1, True) in mlflow.batches
  assert mlflow.states == [('run1', 'FINISHED')]
  # The record itself does not depend on who else is told.
  alone = metrics.recorder(str(tmp_path / 'alone'), tensorboard=False)
  alone.write(0, told(0))
  whole = (tmp_path / 'mine' / 'metrics.jsonl').read_text()
  assert whole.startswith((tmp_path / 'alone' / 'metrics.jsonl').read_text())
  assert not (tmp_path / 'alone' / 'trackers.json').exists()


def test_a_resumed_run_goes_on_in_the_same_run_of_a_service(services, tmp_path):
  wandb, mlflow = services
  first = opened(tmp_path, to=('wandb', 'mlflow'))
  for number in range(4):
    first.write(number, told(number))
  first.close(False)
  again = opened(tmp_path, 1, to=('wandb', 'mlflow'))  # from a checkpoint
  for number in range(2, 6):
    again.write(number, told(number))
  again.close(True)
  assert wandb.inits[0]['id'] == wandb.inits[1]['id']
  assert wandb.inits[0]['name'] == tmp_path.name
  assert [step for step, _ in wandb.logs] == list(range(6))  # each once
  assert wandb.ends == [1, 0]
  assert len(mlflow.runs) == 1
  assert [b[3] for b in mlflow.batches if b[1] == 'local/loss'] == [*range(6)]
  assert [state for _, state in mlflow.states] == [
    *('KILLED', 'RUNNING', 'FINISHED'),
  ]


def test_a_service_asked_for_later_hears_of_earlier_rounds(services, tmp_path):
  wandb, _ = services
  first = opened(tmp_path)
  for number in range(3):
    first.write(number, told(number))
  opened(tmp_path, 2, to='wandb').write(3, told(3))
  assert [step for step, _ in wandb.logs] == [0, 1, 2, 3]


def test_a_service_that_fails_does_not_end_the_run(services, tmp_path, capsys):
  wandb, mlflow = services
  record = opened(tmp_path, to=('wandb', 'mlflow'))
  record.write(0, told(0))
  wandb.broken = True
  record.write(1, told(1))
  record.write(2, told(2))
  record.close(True)
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert 'wandb fails after round 0 (no way)' in err
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3
  assert [b[3] for b in mlflow.batches if b[1] == 'local/loss'] == [0, 1, 2]
  assert wandb.ends == [1]
  wandb.broken = False
  opened(tmp_path, 2, to=('wandb', 'mlflow')).write(3, told(3))
  assert [step for step, _ in wandb.logs] == [0, 1, 2, 3]  # nothing is lost


def test_what_cannot_be_tracked_is_one_sentence(
  services, tmp_path, monkeypatch
):
  wandb, mlflow = services
  wandb.broken = True
  with pytest.raises(Error, match=r'tracking.to: wandb refuses: no key$'):
    opened(tmp_path / 'a', to=('mlflow', 'wandb'))
  assert mlflow.states == [('run1', 'KILLED')]
  monkeypatch.setitem(sys.modules, 'mlflow', None)
  with pytest.raises(Error, match=r'mlflow is not installed .*llm\[mlflow\]'):
    opened(tmp_path / 'b', to=['mlflow'])
  assert not (tmp_path / 'b').exists()
  with pytest.raises(Error, match=r"to must be 'wandb' or 'mlflow'"):
    opened(tmp_path / 'c', to='wand')
  wandb.broken = False
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'trackers.json').write_text('{"wandb": 3}')
  with pytest.raises(Error, match=r'trackers.json is damaged'):
    opened(tmp_path / 'd', to='wandb')


def test_asking_nobody_imports_nobody(monkeypatch, tmp_path):
  for name in ('wandb', 'mlflow'):
    monkeypatch.setitem(sys.modules, name, None)
  record = opened(tmp_path)
  record.write(0, told(0))
  record.close(True)
  assert trackers.tracking()(str(tmp_path), {}, []) == []
  assert not (tmp_path / 'trackers.json').exists()
  assert json.loads((tmp_path / 'metrics.jsonl').read_text())['round'] == 0
