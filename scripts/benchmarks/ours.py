"""fedjax_llm: runs the cohort as one program, through the public interface.

`--devices 2` makes JAX use the CPU as two devices, with clients on both:
`cpu_devices` of a config.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peer

import fedjax_llm as fl
from fedjax_llm import batching, models, recipes
from fedjax_llm.adapters import peft
from fedjax_llm.devices import sharding
from fedjax_llm.models import families
from fedjax_llm.run import blocks
from fedjax_llm.types import Batch, Cohort


def setting(args, **model_settings):
  """Returns the model, the adapter, the cohort on the device, and the loss."""
  loaded = models.pretrained(str(args.work / 'model'), **model_settings)
  params = peft.load(
    args.work / 'adapter',
    path_of=lambda name: families.our_path(name, loaded.config),
  )
  tokens, mask = peer.data(args.work)
  k, _, _, t = tokens.shape
  ones = np.ones_like(tokens)
  batches = Batch(tokens, mask, ones, ones * np.arange(t, dtype=np.int32))
  batches = batching.bounded(batches)
  cohort = Cohort(
    ids=jnp.arange(k, dtype=jnp.int32),
    batches=jax.tree.map(jnp.asarray, batches),
    weight=jnp.ones(k),
    valid=jnp.ones(k, bool),
  )
  return loaded, params, cohort, fl.local.causal_lm(loaded.model)


def optimizer(args):
  decay = {'weight_decay': 0.0} if args.optimizer == 'adamw' else {}
  return fl.local.optimizer(args.optimizer, args.rate, **decay)


def as_auto(cohort) -> int:
  """Returns the choice of block_size='auto' with unlimited memory."""
  k, _, b, t = cohort.batches.tokens.shape
  return blocks.rule(b * t, k, jax.default_backend())


class Run(NamedTuple):
  """A method that is ready to train: `step()` runs one round."""

  step: Callable[[], None]
  params: Callable[[], Any]  # what the server has now
  program: Callable[[], Any]  # a round on one device, traced
  text: Callable[[], str]  # of the compiled round
  loaded: Any


def ready(args, block: int = 0, **model_settings) -> Run:
  """Prepares FedAvg on all devices in blocks of `block` clients (0: auto)."""
  loaded, params, cohort, loss = setting(args, **model_settings)
  mesh = sharding.mesh() if jax.device_count() > 1 else None
  base = loaded.base
  if mesh is not None:
    base = sharding.widened(sharding.place(base, mesh), mesh)
  method = lambda mesh: recipes.fed_avg(
    loss,
    optimizer(args),
    block_size=block or as_auto(cohort),
    measure=None,
    mesh=mesh,
  )
  algorithm = method(mesh)
  step = sharding.compiled(algorithm.round, mesh)
  state = sharding.everywhere(algorithm.init(jax.random.key(0), params), mesh)
  program = lambda: jax.make_jaxpr(method(None).round)(
    algorithm.init(jax.random.key(0), params), cohort, loaded.base
  )

  def text():
    return step.lower(state, cohort, base).compile().as_text()

  def one_round():
    nonlocal state
    state, _, info = step(state, cohort, base)
    jax.block_until_ready((state.params, info))

  return Run(one_round, lambda: state.params, program, text, loaded)


def main() -> None:
  args = peer.arguments('block', 'unroll', 'devices')
  sharding.split_cpu(int(args.devices or 1))
  extra = {'unroll': int(args.unroll)} if args.unroll else {}
  run = ready(args, int(args.block or 0), **extra)
  peer.measure(args, run.step)
  save(args, run.params(), run.loaded.config)


def save(args, params, config) -> None:
  """Saves the adapter as a PEFT directory and reads it, for PEFT's names."""
  from safetensors.numpy import load_file

  peft.save(
    args.out / 'peft',
    params,
    module_name=lambda path, layer: families.hf_module_name(
      path, layer, config, part=True
    ),
    fused=lambda path: families.fused_rows(config, path),
    base_model='',
  )
  peer.save(args, load_file(args.out / 'peft' / 'adapter_model.safetensors'))


if __name__ == '__main__':
  main()
