"""Parity with float32 on the CPU, and the speed of attention by itself.

A float32 reference runs on the CPU of the same process. An error is
||x - reference|| / ||reference||, for a round over the change of the adapter.
"""

import argparse
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rounds
import shapes
from clock import median
from stages import Points, attempt

import fedjax_llm as fl
from fedjax_llm import models
from fedjax_llm.models.network import attention as attention_lib
from fedjax_llm.models.network.attention import Places

# Allowed errors. float32 products run in TF32 on a GPU unless highest is asked.
ALLOWED = {'highest': 1e-4, 'float32': 1e-2, 'bfloat16': 6e-2}
WORK = shapes.Work('tiny', {**shapes.DRY, 'hidden_size': 64}, 4, 2, 32, 3)


def points(dry: bool, have: frozenset[str]) -> Points:
  for name in rounds.implementations():
    for precision in ('highest', 'float32', 'bfloat16'):
      if name == 'cudnn' and precision != 'bfloat16':
        continue
      yield from attempt(
        f'attention {name}, {precision}',
        have,
        lambda name=name, p=precision: attention(name, p, 16 if dry else 256),
      )
  for name, precision in [
    *((name, 'bfloat16') for name in rounds.implementations()),
    *(('xla', 'highest'), ('blocked', 'highest'), ('xla', 'float32')),
  ][: 1 if dry else None]:
    yield from attempt(
      f'round {name}, {precision}',
      have,
      lambda name=name, p=precision: one_round(name, p),
    )
  yield from attempt('round of torch, highest', have, in_torch)


def on_cpu() -> Any:
  return jax.default_device(jax.devices('cpu')[0])


def error(x: Any, reference: Any) -> float:
  """Returns ||x - reference|| / ||reference|| over all leaves, in float64."""
  pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(reference)))
  square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))
  apart = sum(
    square(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    for a, b in pairs
  )
  return (apart / sum(square(b) for _, b in pairs)) ** 0.5


def judged(values: dict[str, float], precision: str) -> dict[str, Any]:
  """Adds whether all errors are allowed; NaN is not."""
  allowed = ALLOWED[precision]
  return {**values, 'ok': all(x <= allowed for x in values.values())}


# --------------------------------------------------------------- attention --


def inputs(length: int, *, clients: int = 2, heads: int = 4, dtype: Any) -> Any:
  """Returns q, k, v of several clients, and places of two texts and padding."""
  rng = np.random.default_rng(0)
  draw = lambda h: jnp.asarray(
    rng.standard_normal((clients, 2, length, h, 64), np.float32), dtype
  )
  first, second = length // 3, length // 2
  sizes = [first, second, length - first - second]
  segments = np.stack([np.repeat([1, 2, 0], sizes), np.ones(length, int)])
  at = np.arange(length) - np.where(segments == 2, first, 0)
  places = Places(at.astype(np.int32), segments.astype(np.int32))
  return (draw(heads), draw(heads // 2), draw(heads // 2)), places


def program(name: str, places: Places, dtype: Any) -> Any:
  """Returns the outputs and the gradients of attention, under vmap."""

  def run(qkv):
    real = (places.segments > 0)[..., None, None]

    def loss(qkv):
      q, k, v = (x.astype(dtype) for x in qkv)
      out = attention_lib.attention(
        q, k, v, places, places, implementation=name
      )
      out = jnp.where(real, out.astype(jnp.float32), 0)
      return jnp.sum(jnp.sin(out)), out

    return jax.grad(loss, has_aux=True)(qkv)

  return jax.jit(jax.vmap(run))


def attention(name: str, precision: str, length: int) -> dict[str, Any]:
  """Compares outputs and gradients of one implementation under vmap."""
  with on_cpu():
    qkv, places = inputs(length, dtype=jnp.float32)
    wanted = jax.device_get(program('blocked', places, jnp.float32)(qkv))
  qkv, places = inputs(length, dtype=jnp.float32)
  dtype = jnp.bfloat16 if precision == 'bfloat16' else jnp.float32
  with jax.default_matmul_precision(
    'highest' if precision == 'highest' else 'default'
  ):
    gradient, out = jax.device_get(program(name, places, dtype)(qkv))
  values = {'gradient': error(gradient, wanted[0])}
  return judged({'output': error(out, wanted[1]), **values}, precision)


def attention_speed(dry: bool, have: frozenset[str]) -> Points:
  """Seconds of attention with its gradient, by implementation and length."""
  for length in (512, 2048):
    for name in rounds.implementations():
      yield from attempt(
        f'attention {name}, {length} tokens',
        have,
        lambda name=name, t=length: speed(name, 16 if dry else t, dry),
      )


def speed(name: str, length: int, dry: bool) -> dict[str, Any]:
  clients = 2 if dry else 16384 // length
  sizes = {'clients': clients, 'heads': 2 if dry else 16}
  qkv, places = inputs(length, dtype=jnp.bfloat16, **sizes)
  run = program(name, places, jnp.bfloat16)
  call = lambda: jax.block_until_ready(run(qkv))
  return {'seconds': median(call, seconds=2.0), 'clients': clients}


# ------------------------------------------------------------------ rounds --


def trained(loaded: Any, params: Any, cohort: Any) -> tuple[Any, float]:
  """Returns the change of the adapter in one round of SGD, and the loss."""
  algorithm = fl.recipes.fed_avg(
    fl.local.causal_lm(loaded.model),
    fl.local.optimizer('sgd', 0.1),
    block_size=2,
    measure=None,
  )
  state = algorithm.init(jax.random.key(0), params)
  state, _, info = jax.jit(algorithm.round)(state, cohort, loaded.base)
  after, loss = jax.device_get((state.params, info.metrics['local/loss']))
  change = jax.tree.map(np.subtract, after, jax.device_get(params))
  return change, float(loss)


def tiny(**settings: Any) -> tuple[Any, Any, Any]:
  """Returns a tiny model, an adapter that is not zero, and a cohort."""
  with on_cpu():  # the same numbers for all
    loaded = models.random(max_positions=128, **WORK.model, **settings)
    params = fl.adapters.lora(shapes.RANK, shapes.ALPHA).init(
      jax.random.key(0), loaded.base
    )
  rng = np.random.default_rng(0)
  filled = lambda x: (
    np.asarray(x) if np.any(x) else rng.normal(0, 0.02, x.shape).astype('f4')
  )
  params = jax.tree.map(filled, params)
  host = lambda x: jax.tree.map(np.asarray, x)
  loaded = loaded._replace(base=host(loaded.base))
  return loaded, params, host(rounds.cohort(WORK))


@functools.cache
def reference() -> tuple[Any, float]:
  loaded, params, cohort = tiny(compute_dtype='float32', attention='blocked')
  with on_cpu():
    return trained(loaded, params, cohort)


def one_round(name: str, precision: str) -> dict[str, Any]:
  """Compares a round of four clients with three steps of SGD."""
  wanted, wanted_loss = reference()
  dtype = 'bfloat16' if precision == 'bfloat16' else 'float32'
  loaded, params, cohort = tiny(compute_dtype=dtype, attention=name)
  with jax.default_matmul_precision(
    'highest' if precision == 'highest' else 'default'
  ):
    change, loss = trained(loaded, params, cohort)
  apart = abs(loss - wanted_loss) / wanted_loss
  return judged({'change': error(change, wanted), 'loss': apart}, precision)


def in_torch() -> dict[str, Any]:
  """Compares the PyTorch+PEFT loop of the comparisons, in float32."""
  import torch

  import peers  # isort: skip  (it needs torch)
  import regimes
  from ours import setting
  from safetensors.numpy import load_file

  # TF32 is off in torch unless it is asked for.
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder) / 'work'
    sizes = WORK.clients, WORK.batch, WORK.length, WORK.steps
    with on_cpu():
      regimes.make('tiny', work, 0, regimes.Regime(*sizes, WORK.model))
      args = argparse.Namespace(work=work, optimizer='sgd', rate=0.1)
      loaded, params, cohort, _ = setting(
        args, compute_dtype='float32', attention='blocked'
      )
      wanted, _ = trained(loaded, params, cohort)
    client = peers.of_files(args, device)
    start = client.start()
    sums = [torch.zeros_like(p) for p in start]
    for k in range(client.num_clients):
      client.train(start, k)
      client.add_to(sums)
    after = client.named([total / client.num_clients for total in sums])
    before = load_file(work / 'adapter' / 'adapter_model.safetensors')
  named = {name: after[name] - before[name] for name in before}
  # PEFT's factors are (r, in) and (out, r), ours (L, in, r) and (L, r, out).
  theirs = _stacked(named, WORK.model['num_layers'])
  attention = wanted['layers']['self_attn']
  ours = {
    f'{target}.{factor}': getattr(attention[target], factor.lower())
    for target in ('q_proj', 'v_proj')
    for factor in 'AB'
  }
  return judged({'change': error(theirs, ours)}, 'highest')


def _stacked(named: dict[str, Any], layers: int) -> dict[str, Any]:
  def one(target: str, factor: str) -> np.ndarray:
    place = 'base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight'
    each = (named[place.format(i, target, factor)].T for i in range(layers))
    return np.stack(list(each))

  return {
    f'{target}.{factor}': one(target, factor)
    for target in ('q_proj', 'v_proj')
    for factor in 'AB'
  }
