"""P-tuning: a soft prompt that an encoder computes from trained rows."""

import itertools
from typing import Literal

import jax

from fedjax_llm.adapters.changes import fold, merge
from fedjax_llm.adapters.dense import saved_beside
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.nodes.encoded import Encoded
from fedjax_llm.types import Adapter, Base, Error, Key, Params


def p_tuning(
  length: int = 16,
  encoder: Literal['mlp', 'lstm'] = 'mlp',
  hidden_size: int | None = None,
  num_layers: int = 2,
  modules_to_save: str | list[str] | tuple[str, ...] = (),
) -> Adapter:
  """Returns the prompt of P-tuning: `length` rows through a small encoder.

  Liu et al. 2021, arXiv 2103.10385, section 3.2. Rows and encoder are trained
  and sent; files for other tools hold the encoder's result only, which is a
  soft prompt.

  Args:
    length: P, the number of rows; each takes one of the model's positions.
    encoder: 'mlp', three layers with a ReLU between them (PEFT's default), or
      'lstm', a bidirectional LSTM with a perceptron of two layers behind it
      (the paper's).
    hidden_size: H of the encoder, by default the width of the model.
    num_layers: layers of the LSTM.
    modules_to_save: see `lora`.

  Raises:
    Error: a size below one, or an unknown encoder.

  >>> import jax.numpy as jnp
  >>> base = {'embed_tokens': {'embedding': jnp.ones((5, 4))}}
  >>> node = p_tuning(3).init(jax.random.key(0), base)['inputs']
  >>> node.rows.shape, len(node.mlp), node.plain().rows.shape
  ((3, 4), 3, (3, 4))
  """
  draws.at_least(length=length, num_layers=num_layers)
  if encoder not in ('mlp', 'lstm'):
    raise Error(f'adapter.encoder is {encoder!r}; it must be mlp or lstm.')
  if hidden_size is not None:
    draws.at_least(hidden_size=hidden_size)

  def start(key: Key, base: Base) -> Params:
    width = draws.embedding(base).shape[1]
    inner = hidden_size or width
    keys = iter(jax.random.split(key, 4 + 2 * num_layers))
    rows = jax.random.normal(next(keys), (length, width))
    sides = (width, inner, inner, width)
    lstm = []
    if encoder == 'lstm':
      sides = (2 * inner, 2 * inner, width)
      for inputs in (width, *[2 * inner] * (num_layers - 1)):
        both = [draws.direction(next(keys), inputs, inner) for _ in range(2)]
        lstm.append((both[0], both[1]))
    mlp = [draws.affine(next(keys), d, f) for d, f in itertools.pairwise(sides)]
    return {'inputs': Encoded(rows, tuple(mlp), tuple(lstm))}

  return saved_beside(Adapter(start, merge, fold), modules_to_save)
