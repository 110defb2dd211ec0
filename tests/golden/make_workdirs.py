"""Writes tiny runs of this version of the program, for test_old_runs.py.

    PYTHONPATH=. python tests/golden/make_workdirs.py v0_1_0 [NAME ...]

Every folder of `tests/golden/workdirs/NAME` is the workdir of a finished run
of two rounds, without its event files, and `expected.jsonl` in it has the
metrics of the same run with three rounds, never interrupted. A later version
must be able to read, export and resume these runs.
"""

import os
import pathlib
import shutil
import sys
import tempfile

from fedjax_llm import train
from fedjax_llm.run import config
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
# Of all runs: five clients and a new one, short texts, a model of one layer.
# Plain steps with momentum: numbers that hardly depend on the machine.
SHARED = (
  *('seed=3', 'population.max_clients=6', 'population.new_clients=1'),
  *('population.max_length=48', 'cohort.num_steps=2', 'cohort.batch_size=2'),
  *('clients.cohort_size=3', 'evals.every=1', 'evals.per_client=1'),
  *('model.hidden_size=16', 'model.num_layers=1', 'model.num_heads=2'),
  *('model.num_kv_heads=1', 'model.intermediate_size=16'),
  *('model.max_positions=128', 'keep_checkpoints=1', 'evals.common=4'),
  *('adapter.rank=2', 'evals.sample_tokens=4'),
  *('local.name=sgd', 'local.learning_rate=2.0', 'local.momentum=0.9'),
)
RUNS = {
  # Clients' private state, and replies.
  'ditto': ('algorithm.strength=0.5', 'evals.samples=1'),
  # A plan of the server's.
  'fed_pipe': ('profiles.choices=(300,900)', 'evals.samples=0'),
  # A changed base, and bytes that clients have missed.
  'flora': ('evals.samples=0',),
  # Two stages, of which the second begins after three rounds or after one.
  'slora.first': ('algorithm.first_rounds=3', 'evals.samples=0'),
  'slora.second': ('algorithm.first_rounds=1', 'evals.samples=0'),
  'fed_dpa_f.first': ('algorithm.federated_rounds=3', 'evals.samples=0'),
  'fed_dpa_f.second': ('algorithm.federated_rounds=1', 'evals.samples=0'),
}
CLIP = 0.05  # a bound that these gradients exceed


def arguments(name: str, workdir: str, num_rounds: int):
  """The checked command line of a run."""
  method = name.split('.')[0]
  argv = ['--config', f'{ROOT}/configs/methods.py:{method}']
  argv += ['--workdir', workdir]
  settings = (*SHARED, *RUNS[name], f'num_rounds={num_rounds}')
  argv += [f'--config.{setting}' for setting in settings]
  try:
    return config.parse([*argv, f'--config.local.clip_norm={CLIP}'], SPEC)
  except Error:  # it was a setting of the algorithm up to 0.1.0
    return config.parse([*argv, f'--config.algorithm.clip_norm={CLIP}'], SPEC)


def main() -> None:
  out = HERE / 'workdirs' / sys.argv[1]
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # a run records the path of its workdir
    for name in sys.argv[2:] or RUNS:
      shutil.rmtree(out / name, ignore_errors=True)
      train.train(arguments(name, name, 2))
      train.train(arguments(name, f'{name}_of_three', 3))
      shutil.copytree(
        name,
        out / name,
        ignore=shutil.ignore_patterns('tensorboard', '.lock'),
      )
      longer = pathlib.Path(f'{name}_of_three', 'metrics.jsonl')
      shutil.copyfile(longer, out / name / 'expected.jsonl')


if __name__ == '__main__':
  main()
