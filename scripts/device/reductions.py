"""Aggregation rules on a stack of adapters: bytes and operations a second."""

from typing import Any

from aggregation import LAYERS, RANK, WIDTH, ours, uploads_of
from clock import median
from stages import Points, attempt


def points(dry: bool, have: frozenset[str]) -> Points:
  for num in (4,) if dry else (64, 1024):
    uploads: dict[int, Any] = {}

    def stack(num: int = num, uploads: Any = uploads) -> Any:
      if num not in uploads:
        uploads[num] = uploads_of(num, 0)
      return uploads[num]

    for rule in ('mean', 'trimmed mean', 'krum', 'product mean'):
      yield from attempt(
        f'{rule}, {num} clients',
        have,
        lambda rule=rule, stack=stack: measured(rule, stack()),
      )


def measured(rule: str, uploads: Any) -> dict[str, Any]:
  """Returns the seconds of a rule, and the rate at which it reads the stack."""
  import jax

  call = ours(uploads)[rule]
  wait = lambda: jax.block_until_ready(call())
  seconds = median(wait, rounds=7, seconds=4.0)
  size = sum(x.nbytes for x in jax.tree.leaves(uploads.update))
  result = {
    'seconds': seconds,
    'bytes': size,
    'bytes_per_second': size / seconds,
  }
  num = len(uploads.weight)
  done = {
    'krum': 2.0 * num * size / 4,
    'product mean': 2.0 * 2 * num * RANK * LAYERS * WIDTH**2,
  }
  if rule in done:
    result['operations_per_second'] = done[rule] / seconds
  return result
