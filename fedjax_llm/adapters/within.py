"""Adapters of the towers of a dual encoder."""

import jax

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def within(adapter: Adapter, *towers: str) -> Adapter:
  """Returns the adapter in one or more towers of a dual encoder.

  For adapters whose places belong to one network (prompts, prefixes,
  bottlenecks); those with `targets` find weights of both towers by their names,
  such as 'vision/.*'.

  Args:
    adapter: of a network alone.
    towers: names in the base, 'text' or 'vision'.

  Raises:
    Error: no tower; from `init`, a tower that the base lacks.

  >>> import jax.numpy as jnp
  >>> from fedjax_llm.adapters import bitfit
  >>> base = {'text': {'bias': jnp.ones(2)}, 'vision': {'bias': jnp.ones(3)}}
  >>> sorted(within(bitfit(), 'vision').init(jax.random.key(0), base))
  ['vision']
  """
  if not towers:
    raise Error('within(adapter, *towers) needs the name of a tower.')

  def init(key: Key, base: Base) -> Params:
    missing = [name for name in towers if name not in base]
    if missing:
      raise Error(
        f'the model has no tower {missing[0]!r}; there are: '
        f'{", ".join(sorted(base))}.'
      )
    keys = jax.random.split(key, len(towers))
    return {
      name: adapter.init(one, base[name])
      for one, name in zip(keys, towers, strict=True)
    }

  return Adapter(init, merge, fold, adapter.peft)
