"""Wrong command lines, each refused in one sentence with the field's name."""

import pathlib

import pytest
import runs

from fedjax_llm import export, plan, train
from fedjax_llm.models.files import load
from fedjax_llm.run import method
from fedjax_llm.types import Adapter, Error


@pytest.mark.parametrize(
  'word, message',
  [
    (
      'adapter.layers=1.5',
      '--config.adapter.layers must be int or str or Sequence[int] or none, '
      'not 1.5.',
    ),
    (
      'adapter.lora_dropout=1',
      'adapter.lora_dropout is 1; it must be at least 0 and below 1.',
    ),
    (
      'adapter.layers=9',
      'adapter.layers names the layer 9; the model has the layers 0 to 1.',
    ),
    (
      'adapter.name=os:getcwd',
      'adapter.name: os:getcwd returned a str; it must return a Adapter.',
    ),
    (
      'local.learning_rate=high',
      "--config.local.learning_rate must be float, not 'high'.",
    ),
    ('num_rounds=1e3', '--config.num_rounds must be int, not 1000.0.'),
  ],
)
def test_a_wrong_field_is_named(word, message, tmp_path):
  config = f'{runs.ROOT}/configs/tiny.py:smoke'
  words = ['--config', config, '--workdir', tmp_path / 'run']
  error = runs.refused(train, [*words, f'--config.{word}'])
  assert error == f'error: {message}'


def test_a_builder_of_another_kind_is_named():
  fields = {'name': 'my_lab:mine'}
  for section, made, kind in (
    ('algorithm', 'a', 'FederatedAlgorithm'),
    ('local', 3, 'LocalOptimizer'),
    ('task', None, 'Task'),
    ('model', {}, 'LoadedModel'),
  ):
    with pytest.raises(
      Error, match=f'{section}.name: my_lab:mine returned .*{kind}'
    ):
      method.of_kind(section, fields, made)
  adapter = Adapter(lambda *_: {}, lambda *_: {}, lambda *_: ({}, {}))
  assert method.of_kind('adapter', fields, adapter) is adapter
  assert method.of_kind('data', fields, 3) == 3


def test_a_gguf_file_is_no_model_directory(tmp_path):
  file = pathlib.Path(tmp_path / 'x.gguf')
  file.write_bytes(b'GGUF')
  with pytest.raises(Error, match=r'gguf\.convert makes a model directory'):
    load._find(file)


def test_programs_name_a_wrong_config_and_workdir(tmp_path):
  error = runs.refused(plan, ['--config', 'nosuch'])
  assert error.startswith(
    'error: --config nosuch: there is no such file, and no config of the '
    'project of that name ('
  )
  out = ['--to', 'peft', '--out', tmp_path / 'out']
  error = runs.refused(export, ['--workdir', tmp_path, *out])
  assert error == (
    f'error: --workdir {tmp_path} holds no run: there is no config.json in it.'
  )


def test_types_are_those_that_a_config_may_hold(tmp_path):
  config = f'{runs.ROOT}/configs/tiny.py:smoke'
  words = ['--config', config, '--workdir', tmp_path / 'run']
  server = ['--config.server.name=fed_adam', '--config.server.learning_rate=no']
  assert runs.refused(train, [*words, *server]) == (
    "error: --config.server.learning_rate must be float, not 'no'."
  )
