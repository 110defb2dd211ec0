"""The cells of `scripts/memory_wall`: one client, one kind of step each.

A cell is a kind of gradient with its optimizer. `peak` compiles its step at the
shape of a real client, `train` takes steps until a number of forward passes is
spent, `estimates` counts the memory of larger models from their shapes.
"""

import datetime
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, tree
from fedjax_llm.local.gradients import backprop
from fedjax_llm.plan import modes, steps, work
from fedjax_llm.run import config, costs, experiment
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Gradient, Shared

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGER = ('meta-llama/Llama-3.2-1B', 'meta-llama/Llama-3.1-8B')


class Kind(NamedTuple):
  """A kind of step: its gradient, its settings, and what it sends."""

  gradient: Gradient | None  # None: a forward pass, of which nothing is learned
  fields: Mapping[str, Any]  # of the config
  optimizer: str = 'sgd'
  rates: tuple[float, ...] = ()  # tried; the best final loss counts
  # (bytes of the adapter, steps) -> bytes up in a round
  sent: Callable[[int, int], int] = lambda adapter, steps: adapter


# Another kind, such as split learning, is one more entry.
KINDS: dict[str, Kind] = {
  'inference': Kind(None, {}, sent=lambda adapter, steps: 0),
  'two points': Kind(
    local.along(local.two_point()),
    {},
    rates=(1e-4, 1e-3),
    sent=lambda adapter, steps: 4 * steps,  # a slope a step, of common seeds
  ),
  'forward mode': Kind(
    local.along(local.forward_mode()),
    {},
    rates=(1e-4, 1e-3),
    sent=lambda adapter, steps: 4 * steps,
  ),
  'backpropagation': Kind(backprop, {}, 'adamw', (2e-3,)),
  'backpropagation, remat': Kind(
    backprop, {'model.remat': 'full'}, 'adamw', (2e-3,)
  ),
}


def conf_of(smoke: bool, **fields: Any) -> Any:
  """Returns the config of one client with all training texts."""
  settings = {
    'block_size': 1,
    'partition': {'name': 'iid', 'num_clients': 1},
    'population.new_clients': 0,
    'clients.cohort_size': 1,
    'adapter.rank': 4,
    **fields,
  }
  if smoke:
    settings['population.max_clients'] = 1
  words = [f'--config.{name}={value}' for name, value in settings.items()]
  file = str(ROOT / 'configs' / 'quickstart.py') + (':smoke' if smoke else '')
  return config.parse(['--config', file, '--workdir', '.', *words], SPEC).config


def peak(kind: Kind, shape: tuple[int, int], smoke: bool) -> dict[str, int]:
  """Returns the bytes of the compiled step of rows x tokens of `shape`."""
  fields = {
    'cohort.batch_size': shape[0],
    'population.max_length': shape[1],
    **kind.fields,
  }
  planned = work.read(conf_of(smoke, **fields), num_clients=1)
  loss = local.causal_lm(planned.model.model, chunk_size=128)
  if not smoke:
    planned = planned._replace(loss=loss)
  found = steps.peak('', planned, kind.gradient)
  return {
    'base': found.base,
    'others': found.others,
    'temporary': found.temporary,
    'total': found.total,
    'adapter': costs.num_bytes(
      tree.select(
        planned.initial, scopes.everything().labels(planned.initial), Shared
      )
    ),
  }


def estimates(name: str, shape: tuple[int, int]) -> dict[str, int]:
  """Returns the estimated bytes of every kind's step for a model of a name."""
  result = {}
  for kind_name, kind in KINDS.items():
    fields = {
      'cohort.batch_size': shape[0],
      'population.max_length': shape[1],
      'model.dtype': 'bfloat16',
      **kind.fields,
    }
    planned = work.read(conf_of(False, **fields), model=name, num_clients=1)
    result[kind_name] = modes.estimate('', planned, kind.gradient).total
  return result


def train(
  name: str,
  kind: Kind,
  *,
  passes: float,
  shape: tuple[int, int],
  smoke: bool,
  seed: int,
  until: float,
) -> dict[str, Any] | None:
  """Returns the curve of the best rate; None where the time is over before.

  A step counts as many forward passes as its matrix products are those of one.
  """
  best: dict[str, Any] | None = None
  built = None
  for rate in kind.rates:
    fields = {
      'seed': seed,
      'cohort.batch_size': shape[0],
      'population.max_length': shape[1],
      'cohort.num_steps': int(passes / 2) + 1,
      'evals.per_client': 8,
      **kind.fields,
    }
    if built is None:
      conf = conf_of(smoke, **fields)
      built = experiment.build(conf, say=lambda text: None)
    curve = _curve(built, kind, rate, passes, until)
    if curve is None:
      return None
    print(f'{name}, rate {rate}: {curve["curve"][-1]}', flush=True)
    if best is None or curve['curve'][-1][1] < best['curve'][-1][1]:
      best = curve
  return best


def _curve(built, kind, rate, passes, until) -> dict[str, Any] | None:
  loss = built.task.loss(built.loaded)
  optimizer = local.optimizer(kind.optimizer, rate)
  start = built.initial
  labels = scopes.everything().labels(start)
  gradient: Any = kind.gradient

  def step(base, trained, state, batch, key, index):
    grads, _ = gradient(loss, base, trained, start, batch, key)
    updates, state = optimizer.update(grads, state, trained, index)
    moved = jax.tree.map(lambda p, u: p + u, trained, updates)
    return moved, state

  batches = built.assemble(0)[1].batches
  take = lambda i: jax.tree.map(lambda x: jnp.asarray(x[0, i]), batches)
  trained = tree.select(start, labels, Shared)
  state, key = optimizer.init(trained), built.round_key
  arguments = (built.base, trained, state, take(0), key, jnp.int32(0))
  count = lambda f, *args: sum(
    costs.operations(jax.make_jaxpr(f)(*args)).values()
  )
  forward = count(
    lambda base, p, x: loss(base, p, x, key), built.base, start, take(0)
  )
  each = count(step, *arguments) / forward
  run = jax.jit(step)
  score = jax.jit(lambda base, p, x: loss(base, p, x, key)[:2])
  groups = [rows for rows, _ in built.tests().heldout]

  def heldout(trained):
    sums = [0.0, 0.0]
    params = tree.merge(trained, start)
    for rows in groups:
      for i in range(len(jax.tree.leaves(rows)[0])):
        one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), rows)
        total, number = score(built.base, params, one)
        sums = [sums[0] + float(total), sums[1] + float(number)]
    return sums[0] / sums[1]

  num = int(passes / each)
  curve, seconds = [[0.0, heldout(trained)]], []
  for index in range(num):
    if time.monotonic() > until:
      return None
    began = time.monotonic()
    trained, state = jax.block_until_ready(
      run(
        built.base, trained, state, take(index),
        jax.random.fold_in(key, index), jnp.int32(index),
      )
    )  # fmt: skip
    seconds.append(time.monotonic() - began)
    if (index + 1) % max(num // 4, 1) == 0 or index + 1 == num:
      curve.append([round(each * (index + 1), 2), heldout(trained)])
  return {
    'rate': rate,
    'optimizer': kind.optimizer,
    'steps': num,
    'passes_a_step': each,
    'seconds_a_step': statistics.median(seconds[1:] or seconds),
    'curve': curve,
  }


def machine() -> dict[str, Any]:
  """Returns the date, the machine and versions, for the record of a cell."""
  return {
    'date': datetime.date.today().isoformat(),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, '
    f'{jax.devices()[0].platform}',
    'load': os.getloadavg()[0],
    'jax': jax.__version__,
  }
