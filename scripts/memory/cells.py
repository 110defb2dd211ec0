"""The cells of `scripts/memory_wall`: one client, one kind of step each.

A cell is a kind of gradient with its optimizer. `peak` compiles its step at the
shape of a real client, `train` takes steps until a number of forward passes is
spent, `estimates` counts the memory of larger models from their shapes.
"""

import datetime
import functools
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters, local, scopes, tree
from fedjax_llm.local.gradients import backprop
from fedjax_llm.plan import modes, steps, work
from fedjax_llm.recipes.split import cutting
from fedjax_llm.recipes.two_models import emulators
from fedjax_llm.recipes.zeroth_order import fed_kseed_base
from fedjax_llm.run import config, costs, experiment
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Gradient, LossSum, Shared

ROOT = pathlib.Path(__file__).resolve().parents[2]
LARGER = ('meta-llama/Llama-3.2-1B', 'meta-llama/Llama-3.1-8B')

LONG = 'two points'  # the kind that goes on to `--more` passes


class Kind(NamedTuple):
  """A kind of step: its gradient, its settings, and what it sends."""

  gradient: Gradient | None  # None: a forward pass, of which nothing is learned
  fields: Mapping[str, Any]  # of the config
  optimizer: str = 'sgd'
  rates: tuple[float, ...] = ()  # tried; the best final loss counts
  # (bytes of the adapter, steps) -> bytes up in a round
  sent: Callable[[int, int], int] = lambda adapter, steps: adapter
  # Layers of all L that the client holds; None: all.
  holds: Callable[[int], int] | None = None
  # (loss, model, layers held) -> the loss that the client trains; None: as it
  # is. In a network of all layers the second is None.
  part: Callable[[Any, Any, int | None], Any] | None = None
  # params -> params of the whole network that is evaluated.
  serve: Callable[[Any], Any] = lambda params: params
  # planned -> (a step of base, params, batch, key), in place of the gradient's
  step: Callable[[Any], Callable[..., Any]] | None = None
  follows: str = ''  # the kind whose steps these are, so its curve is taken


CUT = 3  # layers of the client in split learning, as in SplitLoRA's program
EMULATOR = emulators.Layout(bottom=1, top=1, drop=0.5)


def below_the_cut(loss: Any, model: Any, held: int | None) -> Any:
  """Returns the client's share of a step of split learning.

  The gradient of half the squared states is the states themselves: a step then
  holds, as the client does, one array of their size that comes from above.
  """
  del loss

  def half(base, params, batch, key):
    del key
    layers = cutting.layers_of(model)
    h = layers(base, params, batch, range(held or CUT), ends=False)
    total = 0.5 * jnp.sum(h.astype(jnp.float32) ** 2)
    return LossSum(total, jnp.float32(1), jnp.float32(0))

  return half


def outer(params: Any) -> Any:
  """Returns the adapter of an emulator, of which the outer layers train."""
  parts = emulators.cut(params, EMULATOR, 'emulator')
  still = jax.tree.map(jax.lax.stop_gradient, parts.server)
  return emulators.joined(parts._replace(server=still), EMULATOR)


def on_emulator(loss: Any, model: Any, held: int | None) -> Any:
  """Returns the loss of an emulator, in a network of its layers or of all."""
  if held is not None:
    return local.viewed(loss, outer)
  return local.viewed(emulators.on_emulator(loss, model, EMULATOR), plugged)


def plugged(params: Any) -> Any:
  """Returns the outer layers' adapters in the whole network."""
  parts = emulators.cut(params, EMULATOR, 'emulator')
  return emulators.plugged(parts, EMULATOR)


def split_bytes(adapter: int, steps: int) -> int:
  """Returns the bytes up of split learning: states and tokens in every step."""
  places = SHAPE[0] * SHAPE[1]
  return adapter + steps * places * (4 * WIDTH + 13)


def in_product(planned: Any) -> Callable[..., Any]:
  """Returns two points on whole weights, perturbed inside of their products.

  Of ten steps the last: nine directions are those of the steps before.
  """
  nodes = jax.eval_shape(adapters.swayed().init, None, planned.base)
  blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nodes)

  def step(base, params, batch, key):
    keys = jax.random.split(key, 10)

    def value(size):
      sizes = jnp.full(10, -1e-6).at[9].set(size)
      every = fed_kseed_base.swayed(blank, keys, sizes, 10)
      return planned.loss(base, every, batch, key).total

    above = value(1e-3)
    key, above = jax.lax.optimization_barrier((key, above))
    return params, (above - value(-1e-3)) / 2e-3

  return step


SHAPE, WIDTH = (4, 512), 576  # of the peak; of SmolLM2-135M
KINDS: dict[str, Kind] = {
  'inference': Kind(None, {}, sent=lambda adapter, steps: 0),
  'two points': Kind(
    local.along(local.two_point()),
    {},
    rates=(1e-4, 1e-3, 1e-2),
    sent=lambda adapter, steps: 4 * steps,  # a slope a step, of common seeds
  ),
  'forward mode': Kind(
    local.along(local.forward_mode()),
    {},
    rates=(1e-4, 1e-3),
    sent=lambda adapter, steps: 4 * steps,
  ),
  'two points, whole weights': Kind(
    None,
    {},
    sent=lambda adapter, steps: 8 * steps,
    step=in_product,
  ),
  'split learning, client': Kind(
    backprop,
    {},
    'adamw',
    sent=split_bytes,
    holds=lambda layers: CUT,
    part=below_the_cut,
    follows='backpropagation',
  ),
  'emulator': Kind(
    backprop,
    {},
    'adamw',
    (2e-3,),
    holds=lambda layers: len(EMULATOR.numbers(layers)),
    part=on_emulator,
    serve=plugged,
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
    settings |= {'population.max_clients': 1, 'model.num_layers': 4}
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
  planned = part_of(kind, conf_of(smoke, **fields), chunk=not smoke)
  found = steps.peak(
    '', planned, kind.gradient, kind.step and kind.step(planned)
  )
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


def part_of(
  kind: Kind, conf: Any, *, model: str = '', chunk: bool = False
) -> work.Work:
  """Returns the round of a client that holds the layers of its kind."""
  read = functools.partial(work.read, conf, num_clients=1, model=model)
  planned, held = read(), None
  if kind.holds is not None:
    held = kind.holds(planned.model.config.num_layers)
    planned = read(num_layers=held)
  loss = planned.loss
  if chunk:
    loss = local.causal_lm(planned.model.model, chunk_size=128)
  if kind.part is not None:
    loss = kind.part(loss, planned.model.model, held)
  return planned._replace(loss=loss)


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
    planned = part_of(kind, conf_of(False, **fields), model=name)
    if kind.step is None:  # products by blocks are counted when compiled
      result[kind_name] = modes.estimate('', planned, kind.gradient).total
  return result


def train(
  name: str,
  kind: Kind,
  *,
  passes: float,
  more: float,
  shape: tuple[int, int],
  smoke: bool,
  seed: int,
  until: float,
) -> dict[str, Any] | None:
  """Returns the curve of the best rate; None where the time is over before.

  A step counts as many forward passes as its matrix products are those of one.
  After `passes` the best rate goes on to `more` passes or until the time is
  over; these are the entries of the curve above `passes`.
  """
  fields = {
    'seed': seed,
    'cohort.batch_size': shape[0],
    'population.max_length': shape[1],
    'cohort.num_steps': int(max(passes, more) / 2) + 1,
    'evals.per_client': 8,
    **kind.fields,
  }
  conf = conf_of(smoke, **fields)
  built = experiment.build(conf, say=lambda text: None)
  best: Any = None
  for rate in kind.rates:
    descent = Descent(built, kind, rate)
    if not descent.go(passes, until):
      return None
    print(f'{name}, rate {rate}: {descent.curve[-1]}', flush=True)
    if best is None or descent.curve[-1][1] < best.curve[-1][1]:
      best = descent
  equal = len(best.curve)
  if more > passes:
    best.go(more, until)
    print(f'{name}, on: {best.curve[-1]}', flush=True)
  return {
    'rate': best.rate,
    'optimizer': kind.optimizer,
    'steps': best.done,
    'equal': equal,  # entries of the curve up to `passes`
    'passes_a_step': best.each,
    'seconds_a_step': statistics.median(best.seconds[1:] or best.seconds),
    'curve': best.curve,
  }


class Descent:
  """Steps of one kind at one rate, with the held-out loss on the way.

  The loss is computed after 1, 2, 4, 8 and 16 steps, then after every 16, and
  at the end of each call of `go`.
  """

  def __init__(self, built: Any, kind: Kind, rate: float):
    model, loss = built.loaded.model, built.task.loss(built.loaded)
    mine = loss if kind.part is None else kind.part(loss, model, None)
    optimizer = local.optimizer(kind.optimizer, rate)
    start, gradient = built.initial, kind.gradient
    assert gradient is not None

    def step(base, trained, state, batch, key, index):
      grads, _ = gradient(mine, base, trained, start, batch, key)
      updates, state = optimizer.update(grads, state, trained, index)
      moved = jax.tree.map(lambda p, u: p + u, trained, updates)
      return moved, state

    batches = built.assemble(0)[1].batches
    real = np.asarray(batches.loss_mask[0].any((-2, -1)))
    number = int(real.sum())  # texts of the client, taken again when used up
    self.take = lambda i: jax.tree.map(
      lambda x: jnp.asarray(x[0, i % number]), batches
    )
    self.built, self.kind, self.rate = built, kind, rate
    labels = scopes.everything().labels(start)
    self.trained = tree.select(start, labels, Shared)
    self.state = optimizer.init(self.trained)
    key = built.round_key
    arguments = (
      *(built.base, self.trained, self.state, self.take(0), key),
      jnp.int32(0),
    )
    count = lambda f, *args: sum(
      costs.operations(jax.make_jaxpr(f)(*args)).values()
    )
    forward = count(
      lambda base, p, x: loss(base, p, x, key), built.base, start, self.take(0)
    )
    self.each = count(step, *arguments) / forward
    self.step = jax.jit(step)
    self.score = jax.jit(
      lambda base, p, x: loss(base, kind.serve(p), x, key)[:2]
    )
    self.done, self.seconds = 0, []
    self.curve = [[0.0, self.heldout()]]

  def heldout(self) -> float:
    sums = [0.0, 0.0]
    params = tree.merge(self.trained, self.built.initial)
    for rows, _ in self.built.tests().heldout:
      for i in range(len(jax.tree.leaves(rows)[0])):
        one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), rows)
        total, number = self.score(self.built.base, params, one)
        sums = [sums[0] + float(total), sums[1] + float(number)]
    return sums[0] / sums[1]

  def go(self, passes: float, until: float) -> bool:
    """Steps until passes are spent; returns False where the time is over."""
    end, in_time = int(passes / self.each), True
    while self.done < end and in_time:
      began = time.monotonic()
      in_time = began < until
      index = self.done
      self.trained, self.state = jax.block_until_ready(
        self.step(
          self.built.base, self.trained, self.state, self.take(index),
          jax.random.fold_in(self.built.round_key, index), jnp.int32(index),
        )
      )  # fmt: skip
      self.seconds.append(time.monotonic() - began)
      self.done += 1
      due = self.done in (1, 2, 4, 8) or self.done % 16 == 0
      if due or self.done == end or not in_time:
        now = round(self.each * self.done, 2)
        self.curve.append([now, self.heldout()])
    return in_time


def machine() -> dict[str, Any]:
  """Returns the date, the machine and versions, for the record of a cell."""
  return {
    'date': datetime.date.today().isoformat(),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, '
    f'{jax.devices()[0].platform}',
    'load': os.getloadavg()[0],
    'jax': jax.__version__,
  }
