"""Runs that earlier versions left on a disk: read, exported and resumed.

`golden/make_workdirs.py` wrote them, a folder for each version.
"""

import contextlib
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import export, report, train
from fedjax_llm.report import __main__ as report_program
from fedjax_llm.run import config, rebuild
from fedjax_llm.run.sections import SPEC

WORKDIRS = pathlib.Path(__file__).parent / 'golden' / 'workdirs'
RUNS = sorted(path.parent for path in WORKDIRS.glob('*/*/config.json'))
each = pytest.mark.parametrize(
  'run', RUNS, ids=lambda x: f'{x.parent.name}-{x.name}'
)


def metrics_of(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def copied(run, tmp_path):
  return pathlib.Path(shutil.copytree(run, tmp_path / run.name))


def program(main, *argv):
  """Runs a program in this process and returns what it printed."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = main([str(x) for x in argv])
  assert status == 0, err.getvalue()
  return out.getvalue()


def exported(folder, out, *more):
  program(export.main, '--workdir', folder, '--to', 'peft', '--out', out, *more)
  settings = json.loads((out / 'adapter_config.json').read_text())
  tensors = safetensors.numpy.load_file(out / 'adapter_model.safetensors')
  return settings, tensors


def products(tensors, settings):
  """Returns the change alpha / r B A of each weight."""
  scale = settings['lora_alpha'] / settings['r']
  return {
    name: scale * tensors[name.replace('lora_A', 'lora_B')] @ a
    for name, a in tensors.items()
    if 'lora_A' in name
  }


def same_numbers(metrics, expected):
  """Compares nested metrics up to rounding, whatever else `metrics` has."""
  for name, value in expected.items():
    if name.startswith('time/'):
      continue
    if isinstance(value, dict):
      assert metrics[name].keys() == value.keys(), name
      same_numbers(metrics[name], value)
    else:
      np.testing.assert_allclose(
        metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name
      )


def test_there_are_runs_of_an_earlier_version():
  names = {'ditto', 'fed_pipe', 'flora', 'slora.first', 'slora.second'}
  names |= {'fed_dpa_f.first', 'fed_dpa_f.second'}
  assert names <= {run.name for run in RUNS}


@each
def test_a_round_more_is_that_of_a_run_never_interrupted(run, tmp_path):
  folder = copied(run, tmp_path)
  old = rebuild.read_config(folder)
  conf, notes = config.override(old, [('num_rounds', 3)], SPEC)
  with contextlib.redirect_stdout(io.StringIO()) as out:
    train.train(config.Arguments(conf, str(folder), 'old', notes))
  assert 'resuming after round 2' in out.getvalue()
  *before, last = metrics_of(folder / 'metrics.jsonl')
  assert before == metrics_of(run / 'metrics.jsonl')
  expected = metrics_of(run / 'expected.jsonl')[-1]
  assert last['round'] == expected['round'] == 3
  same_numbers(last, expected)


@each
def test_the_adapter_can_still_be_exported(run, tmp_path):
  folder = copied(run, tmp_path)
  if run.name in ('flora', 'slora.first'):
    # The base has changed, and the factors are those of the start.
    out = tmp_path / 'merged'
    program(export.main, '--workdir', folder, '--to', 'merged', '--out', out)
    tensors, expected = (
      safetensors.numpy.load_file(place / 'model.safetensors')
      for place in (out, run / 'base')
    )
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
      np.testing.assert_allclose(tensors[name], x, atol=1e-6, err_msg=name)
    return
  settings, tensors = exported(folder, tmp_path / 'shared')
  saved = json.loads((run / 'adapter' / 'adapter_config.json').read_text())
  of_stages = '.second' in run.name
  for field in ('r', 'lora_alpha', 'peft_type', 'target_modules', 'task_type'):
    if not of_stages or field not in ('r', 'lora_alpha'):
      assert settings[field] == saved[field]
  # What the run itself wrote at its end.
  adapter = run / 'adapter' / 'adapter_model.safetensors'
  expected = safetensors.numpy.load_file(adapter)
  assert tensors.keys() == expected.keys()
  if of_stages:
    # 0.1.0 wrote residuals of zero into the factors of SLoRA, and FedDPA-F had
    # other factors in the personal part, which has no weight here.
    tensors, expected = products(tensors, settings), products(expected, saved)
  for name, x in expected.items():
    np.testing.assert_allclose(tensors[name], x, atol=1e-6, err_msg=name)


@each
def test_each_client_has_what_it_keeps(run, tmp_path):
  folder = copied(run, tmp_path)
  if not (folder / 'states').is_dir():
    return  # of a method without private state
  last = metrics_of(run / 'metrics.jsonl')[-1]
  names = list(last['evals/personal/own/clients'])
  _, shared = exported(folder, tmp_path / 'shared')
  _, own = exported(folder, tmp_path / 'own', '--client', names[0])
  assert own.keys() == shared.keys()
  apart = [np.abs(own[name] - x).max() for name, x in shared.items()]
  if run.name == 'fed_dpa_f.first':
    assert max(apart) == 0  # a client has no own model before the second stage
  else:
    assert 1e-4 < max(apart) < 1


@each
def test_the_report_shows_the_numbers_of_the_run(run, tmp_path):
  folder = copied(run, tmp_path)
  (record,) = report.read(folder)
  assert record.finished and record.round == 2
  assert list(record.records) == metrics_of(run / 'metrics.jsonl')
  page = tmp_path / 'report.html'
  printed = program(report_program.main, folder, '--out', page)
  assert '1 run, 1 finished' in printed
  loss = record.records[-1]['evals/heldout/loss']
  assert f'{loss:.3f}'[:-1] in page.read_text()
