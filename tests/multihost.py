"""Run by test_multihost.py, in one process or in several: the training program.

Its model has one layer and only query weights: compiled in no time. With
AT=process:round:signal a process sends itself a signal in the middle of a
round. With WEIGHTS=path each writes the shapes in which it holds the matrices
then.
"""

import itertools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import train
from fedjax_llm.devices import exchange, hosts
from fedjax_llm.models import config
from fedjax_llm.models.files import load
from fedjax_llm.types import Model


def shallow(vocab_size, eos_ids):
  shape = config.Config(
    family='llama',
    vocab_size=vocab_size,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
    eos_ids=tuple(eos_ids),
  )
  rng = np.random.default_rng(0)
  base = jax.tree.map(
    lambda sides: jnp.asarray(0.2 * rng.standard_normal(sides), jnp.float32),
    config.shapes(shape),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  loaded = load.assemble(shape, base, name='shallow')

  def hidden(base, params, batch):
    query = lambda tree: tree['layers']['self_attn']['q_proj']
    x, node = base['embed_tokens']['embedding'][batch.tokens], query(params)
    change = node.scale[0] * ((x @ node.a[0]) @ node.b[0])
    return x + x @ query(base)['kernel'][0] + change

  def logits(base, params, hidden):
    return hidden @ base['lm_head']['kernel']

  return loaded._replace(model=Model(hidden, logits))


def fate(process: int, round: int, name: str) -> None:
  """Lets the process that is meant send itself the signal in that round."""
  rounds, fetched = itertools.count(1), exchange.rows_from_first

  def watched(*args):
    if next(rounds) == round and hosts.index() == process:
      os.kill(os.getpid(), signal.Signals[name])
    return fetched(*args)

  exchange.rows_from_first = watched


def weights(path: str) -> None:
  """Shapes of all that a process holds of a matrix, in every round."""
  fetched = exchange.rows_from_first

  def watched(*args):
    held = {
      str(shard.data.shape)
      for x in jax.live_arrays()
      if x.shape == (1, 32, 32)
      for shard in x.addressable_shards
    }
    with open(f'{path}.{hosts.index()}', 'a') as file:
      print(*sorted(held), sep='; ', file=file)
    return fetched(*args)

  exchange.rows_from_first = watched


if __name__ == '__main__':
  if 'WEIGHTS' in os.environ:
    weights(os.environ['WEIGHTS'])
  if 'AT' in os.environ:
    process, number, name = os.environ['AT'].split(':')
    fate(int(process), int(number), name)
  sys.exit(train.main(sys.argv[1:]))
