"""The README's Python is run, and what it names is there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import data, recipes

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def test_the_round_of_the_readme_runs_and_learns(capsys):
  block = next(b for b in BLOCKS if 'algorithm.round' in b)
  assert len(block.strip().splitlines()) <= 20
  exec(compile(block, 'README.md', 'exec'), {})
  losses = [
    float(line.split()[1])
    for line in capsys.readouterr().out.split('\n')
    if line
  ]
  assert losses[-1] < losses[0]


def test_the_rule_of_the_readme_is_an_aggregator():
  block = next(b for b in BLOCKS if 'from_rule' in b)
  names: dict = {}
  exec(compile(block, 'README.md', 'exec'), names)
  rule = names['by_norm']()
  update = {'w': jnp.array([[1.0, 0.0], [0.0, 10.0]])}
  uploads = names['fl'].types.Uploads(
    update, None, None, jnp.ones(2), jnp.array([True, True])
  )
  got, _ = rule.aggregate(uploads, (), {'w': jnp.zeros(2)}, jax.random.key(0))
  # w / ||u||: 1 and 1/10, so both clients move the mean by 1/1.1.
  assert jnp.allclose(got.delta['w'], jnp.array([1.0, 1.0]) / 1.1, rtol=1e-5)


def test_the_task_of_the_readme_makes_batches_of_pictures():
  block = next(b for b in BLOCKS if 'tasks.Task' in b)
  names: dict = {}
  exec(compile(block, 'README.md', 'exec'), names)
  task = names['pictures']()
  records = [
    data.Record(image=np.full((2, 2, 1), i, np.float32), label=label)
    for i, label in enumerate('ba')
  ]
  how = data.Encoding(data.bytes(), labels=task.labels(records))
  examples = [x for r in records for x in task.encode(r, how).examples]
  batch = task.collate(examples, 1, 0)([[x] for x in examples])
  assert batch.label.tolist() == [1, 0]
  assert batch.pixels[:, 0, 0, 0].tolist() == [0, 1]


def test_every_recipe_has_its_row():
  missing = [name for name in recipes.__all__ if f'`{name}`' not in TEXT]
  assert not missing


def test_files_that_the_readme_names_are_there():
  named = set(
    re.findall(r'`((?:scripts|configs|tests|fedjax_llm)/[\w/.]+)`', TEXT)
  )
  assert named
  for path in named:
    assert (ROOT / path).exists(), path
