"""Checks the arguments of `generate` and pads prompts to a few shapes."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm.models.config import Config, longest_text
from fedjax_llm.types import Error, Params


def seeds(values: Sequence[int] | None, num: int) -> np.ndarray:
  """Returns the seed of each prompt [num]: 0, 1, ... if `values` is None."""
  if values is None:
    return np.arange(num, dtype=np.uint32)
  if len(values) != num:
    raise Error(f'There are {len(values)} seeds for {num} prompts.')
  for seed in values:
    if not 0 <= seed < 2**32:
      raise Error(f'The seed {seed} is not between 0 and 2**32 - 1.')
  return np.asarray(values, np.uint32)


def owners(
  which: Sequence[int] | None,
  params: Params,
  adapters: Sequence[Any],
  num: int,
) -> np.ndarray | None:
  """Returns the index of each prompt's adapter; None without `adapters`."""
  if which is None and not adapters:
    return None
  if jax.tree.leaves(params):
    raise Error('Prompts are read with params or with adapters, not with both.')
  if which is None or len(which) != num:
    have = 'not given' if which is None else f'of {len(which)} entries'
    raise Error(f'`which` is {have}: it names an adapter for {num} prompts.')
  for index in which:
    if not -1 <= index < len(adapters):
      raise Error(
        f'`which` names adapter {index}; there are {len(adapters)}, from 0 on, '
        'and -1 for none.'
      )
  return np.asarray(which, np.int32)


def groups(kinds: Sequence[Hashable]) -> list[list[int]]:
  """Returns the indices of equal entries together.

  >>> groups(['a', 'b', 'a'])
  [[0, 2], [1]]
  """
  result: dict[Hashable, list[int]] = {}
  for index, kind in enumerate(kinds):
    result.setdefault(kind, []).append(index)
  return list(result.values())


def filled(values: np.ndarray, num: int, filler: int) -> np.ndarray:
  return np.pad(values, (0, num - len(values)), constant_values=filler)


def check(
  config: Config | None,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  num_rows: Sequence[int] = (),
) -> None:
  """Raises `Error` for a prompt that cannot be read or continued.

  `num_rows` are the positions that an adapter takes before each; (): none.
  """
  if config is not None and not config.causal:
    raise Error(f'A {config.family} model is an encoder: it writes no text.')
  for index, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise Error(f'Prompt {index} is empty.')
    if config is None:
      continue
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
      raise Error(
        f'Prompt {index} has a token outside the vocabulary of '
        f'{config.vocab_size}.'
      )
    total = len(prompt) + max_new_tokens
    ahead = num_rows[index] if num_rows else 0
    if ahead + total > longest_text(config):
      rows = f' behind {ahead} prompt rows' if ahead else ''
      raise Error(
        f'Prompt {index} and {max_new_tokens} new tokens are {total} tokens'
        f'{rows}; the model has {longest_text(config)} positions.'
      )


def _bucket(number: int, least: int) -> int:
  """Returns the next power of two, at least `least`."""
  return max(least, 1 << (number - 1).bit_length())


def pad(prompts) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right to [B, P]; returns them and their lengths [B].

  Extra rows have length 0.
  """
  rows = _bucket(len(prompts), 1)
  width = _bucket(max(map(len, prompts)), 16)
  tokens = np.zeros((rows, width), np.int32)
  lengths = np.zeros(rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return tokens, lengths
