"""The memory of one step of one client, read from the compiled program."""

import pathlib
import re

from fedjax_llm import plan

ROOT = pathlib.Path(__file__).parents[1]


def test_plan_prints_what_a_step_without_backpropagation_saves():
  """At a small shape; `scripts/memory_wall` prints the same for SmolLM2's."""
  settings = {
    'population.max_length': 64,
    'clients.cohort_size': 1,
    'model.hidden_size': 32,
    'model.num_layers': 3,
    'adapter.rank': 1,
    'adapter.targets': "('q_proj',)",
  }
  fields = [f'--config.{name}={value}' for name, value in settings.items()]
  config = str(ROOT / 'configs' / 'tiny.py')
  text = plan.run(['--config', config, '--steps', *fields])
  lines = re.findall(
    r'^  (\S.*?)  +\S+ \w+, (\S+) x inference; activations (\S+) x$', text, re.M
  )
  whole = {name: float(total) for name, total, _ in lines}
  inner = {name: float(part) for name, _, part in lines}
  assert list(whole) == [
    'two points',
    'forward mode',
    'backpropagation',
    'backpropagation, remat',
  ]
  assert 'a step of one client, compiled' in text
  assert whole['two points'] <= 1.15
  assert inner['forward mode'] <= 2.1  # two of everything, and the direction
  assert inner['backpropagation'] > inner['forward mode']
  assert whole['backpropagation, remat'] < whole['backpropagation']
