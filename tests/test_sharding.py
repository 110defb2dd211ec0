"""Clients over devices: the same round, and what crosses between them."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any, cast

import jax
import numpy as np
import pytest

from fedjax_llm.devices import sharding
from fedjax_llm.types import Error

# rule : rows of the mesh ('clients') : columns ('model') : block : cohort
ONE_ROW = ['mean:1:2:0:8']  # all devices share one copy of the base
MEAN = ['mean:8:1:0:8', 'mean:4:2:0:8', 'mean:2:4:0:8', 'mean:2:2:2:8']
RAGGED = ['mean:4:1:0:6', 'median:4:2:0:8']  # padded; a rule on the stack
PMAP = ['mean:8:1:0:8:pmap']
ALONE = ['mean:1:1:0:8', 'median:1:1:0:8']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  done = subprocess.run(
    [
      sys.executable,
      pathlib.Path(__file__).with_name('sharded.py'),
      *MEAN,
      *RAGGED,
      *ONE_ROW,
      *PMAP,
      *ALONE,
      f'train:{tmp_path_factory.mktemp("trained") / "run"}',
    ],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('shape', MEAN + RAGGED + ONE_ROW + PMAP)
def test_a_mesh_changes_nothing_but_rounding(runs, shape):
  got, want = runs[shape], runs[f'{shape.split(":")[0]}:1:1:0:8']
  for x, y in zip(got['params'], want['params'], strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-5)
  assert got['bytes'] == want['bytes'] > 0
  assert got['reported'][:6] == [True] * 5 + [False]


@pytest.mark.parametrize('shape', MEAN + RAGGED + ONE_ROW + PMAP)
def test_the_next_round_is_the_same_program(runs, shape):
  assert runs[shape]['compiled_once']


@pytest.mark.parametrize('shape', MEAN + ONE_ROW)
def test_a_round_takes_its_cohort_as_it_lies(runs, shape):
  assert runs[shape]['as_it_lies']


def test_the_next_cohort_travels_while_the_devices_work(runs):
  """Within a round nothing waits and nothing moves but the one transfer."""
  told = runs['train']
  last = ['joined', 'step', 'summarise']  # what clients keep, by itself
  ahead = ['joined', 'step', 'joined', 'summarise']
  assert told['events'] == ['joined', *ahead, *ahead, *last]
  assert told['places'] == [[True, "P('clients',)"]]
  assert told['compiled'] == 1


@pytest.mark.parametrize('shape', MEAN + PMAP)
def test_one_all_reduce_a_round_crosses_clients(runs, shape):
  found = runs[shape]['collectives']
  assert found['clients'] == 1  # the whole adapter tree and the weights, fused
  assert (found['model'] > 0) == (shape.split(':')[2] != '1')


def test_an_execution_that_cannot_be_is_refused():
  rows = sharding.mesh(1)
  with pytest.raises(Error, match="execution is 'vmap'; it must be one of"):
    sharding.over_clients(lambda shared, rows: rows, rows, 'vmap')
  two = jax.sharding.AbstractMesh((1, 2), ('clients', 'model'))
  with pytest.raises(Error, match='execution=pmap knows no model axis'):
    sharding.over_clients(lambda shared, rows: rows, cast(Any, two), 'pmap')


def test_devices_that_do_not_divide_into_rows_are_refused():
  with pytest.raises(Error, match='mesh_model is 3'):
    sharding.mesh(3, devices=np.arange(8))


def test_cpu_devices_that_come_too_late_are_refused():
  jax.devices()  # JAX has looked
  sharding.split_cpu(jax.local_device_count())
  with pytest.raises(Error, match='cpu_devices is 3, but JAX has begun with'):
    sharding.split_cpu(3)
