"""Builds the small base model of the trends: pre-trained once, then cached.

A decoder of 1.0 million parameters on bytes learns English from the reference
manual that every CPython carries (`pydoc_data.topics`, some 700 kB), text that
has nothing in common with the roles of Shakespeare that the trends fine-tune it
on. The manual differs a little between versions of Python, and so do the
weights; results are reported with the version.
"""

import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_llm as fl
from fedjax_llm.types import Batch, Error

STEPS, ROWS, WIDTH = 320, 8, 128
RATE = 4e-3


def network(smoke: bool = False, seed: int = 0) -> fl.models.LoadedModel:
  """Returns the network with random weights."""
  sizes = dict(hidden_size=128, intermediate_size=448, num_layers=4)
  if smoke:
    sizes = dict(hidden_size=32, intermediate_size=64, num_layers=2)
  return fl.models.random(
    vocab_size=fl.data.tokenizers.bytes().vocab_size,
    num_heads=4,
    num_kv_heads=4,
    eos_ids=(fl.data.tokenizers.bytes().eos_id,),
    seed=seed,
    **sizes,
  )


def pretrained(
  smoke: bool = False, say: Callable[[str], None] = print
) -> fl.models.LoadedModel:
  """Returns the base of all trends, cached or trained now (about a minute).

  A `smoke` base has random weights, to test the program only.
  """
  if smoke:
    return network(smoke=True)
  cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  version = '.'.join(map(str, sys.version_info[:2]))
  folder = pathlib.Path(cache).expanduser() / f'reproduce-base-{version}'
  if not (folder / 'model.safetensors').is_file():
    say(f'Pre-training a base into {folder} ...')
    model = network()
    base, before, after, seconds = learn(model, say)
    fl.models.save(folder, model.config, base)
    say(
      f'{STEPS} steps of {ROWS} x {WIDTH} bytes in {seconds:.0f} s: '
      f'{before:.3f} to {after:.3f} nats a byte.'
    )
  return fl.models.pretrained(folder)


def learn(
  model: fl.models.LoadedModel, say: Callable[[str], None]
) -> tuple[dict, float, float, float]:
  """Trains with AdamW; returns weights, first and last loss, seconds."""
  text = np.frombuffer(manual().encode(), np.uint8).astype(np.int32)
  loss = fl.local.causal_lm(model.model, chunk_size=2048)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optax.warmup_cosine_decay_schedule(0, RATE, 40, STEPS, RATE / 20),
      b2=0.98,
      weight_decay=0.1,
    ),
  )
  ones = jnp.ones((ROWS, WIDTH), jnp.int32)
  places = jnp.broadcast_to(jnp.arange(WIDTH), ones.shape)

  @jax.jit
  def step(base, state, tokens):
    def mean(base):
      batch = Batch(tokens, ones > 0, ones, places)
      sums = loss(base, {}, batch, jax.random.key(0))
      return sums.total / sums.count

    value, grads = jax.value_and_grad(mean)(base)
    updates, state = optimizer.update(grads, state, base)
    return optax.apply_updates(base, updates), state, value

  rng, base, losses = np.random.default_rng(0), model.base, []
  state, start = optimizer.init(base), time.monotonic()
  for number in range(STEPS):
    at = rng.integers(0, len(text) - WIDTH, ROWS)
    tokens = text[at[:, None] + np.arange(WIDTH)]
    base, state, value = step(base, state, tokens)
    losses.append(value)
    if number % 50 == 49:
      say(f'  step {number + 1}: {float(value):.3f} nats a byte')
  values = np.asarray(jax.device_get(losses))
  seconds = time.monotonic() - start
  return base, float(values[0]), float(values[-20:].mean()), seconds


def manual() -> str:
  """Returns Python's reference manual without underlines of headings."""
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise Error(
      'pydoc_data.topics, the text of the pre-training, is not part of this '
      f'Python ({platform.python_version()}, {sys.executable}): use a full one.'
    ) from error
  lines = '\n'.join(topics[name] for name in sorted(topics)).split('\n')
  plain = [line for line in lines if not line or set(line) - set('*=-~^')]
  return '\n'.join(plain)
