"""The tests whose arithmetic may differ on a GPU, run there."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from stages import Points, attempt

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Networks, nodes, local training, rules and low-rank algebra on tiny arrays.
FILES = (
  *('test_attention.py', 'test_low_rank.py', 'test_nodes.py'),
  *('test_local.py', 'test_uploads.py', 'test_aggregators.py'),
  *('test_tree.py', 'test_algorithm.py', 'test_halves.py'),
)


def points(dry: bool, have: frozenset[str]) -> Points:
  for name in FILES[:1] if dry else FILES:
    yield from attempt(name, have, lambda name=name: passed(name, dry))


def passed(name: str, dry: bool) -> dict[str, Any]:
  """Runs a test file in float32 without TF32; returns counts and failures.

  A test that fails is a result and no error of the stage: tolerances were
  chosen on CPUs.
  """
  env = {
    **os.environ,
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5',
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
  }
  if not dry:  # conftest.py chooses the CPU unless another is named
    env['JAX_PLATFORMS'] = env.get('JAX_PLATFORMS') or 'cuda,cpu'
  words = ['-k', 'refused'] if dry else []  # few: '-q' is in pyproject.toml
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', *words, f'tests/{name}'],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  text = done.stdout
  counts = {
    kind: int(number)
    for number, kind in re.findall(r'(\d+) (passed|failed|skipped|error)', text)
  }
  failures = re.findall(r'^(?:FAILED|ERROR) (\S+)', text, re.MULTILINE)
  if not counts:
    lines = (text + done.stderr).strip().splitlines() or ['no output']
    raise RuntimeError(f'pytest ended with {done.returncode}: {lines[-1]}')
  return {**counts, 'failures': failures[:20]}
