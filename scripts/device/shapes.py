"""The models and cohorts of the device checks, fixed in advance.

`--dry` replaces widths, layers and rows by tiny ones and keeps the rest.
"""

import types
from typing import Any, NamedTuple

import peak
import regimes

WIDE: dict[str, Any] = {
  'vocab_size': 32768,
  'hidden_size': 1024,
  'intermediate_size': 2816,
  'num_layers': 8,
  'num_heads': 16,
  'num_kv_heads': 16,
}
BILLION: dict[str, Any] = {  # the shape of Llama 3.2 1B
  'vocab_size': 128256,
  'hidden_size': 2048,
  'intermediate_size': 8192,
  'num_layers': 16,
  'num_heads': 32,
  'num_kv_heads': 8,
  'tied': True,
}
DRY: dict[str, Any] = {
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_layers': 2,
  'num_heads': 2,
  'num_kv_heads': 2,
}
RANK, ALPHA = 8, 16.0
LOOP = 8  # clients of a loop over clients: its speed needs no more


class Work(NamedTuple):
  """A cohort on a model: K clients with S steps of B rows of T tokens."""

  name: str
  model: dict[str, Any]
  clients: int
  batch: int
  length: int
  steps: int

  @property
  def tokens(self) -> int:
    return self.clients * self.batch * self.length * self.steps

  @property
  def needed(self) -> int:
    """Places with a loss in a batch: the second half of each row."""
    return self.batch * (self.length // 2)

  @property
  def operations(self) -> float:
    """The operations that a round needs at least: `peak.counted`."""
    config = types.SimpleNamespace(**self.model)
    config.head_dim = config.hidden_size // config.num_heads
    sizes = self.clients, self.batch, self.length, self.steps
    regime = regimes.Regime(*sizes, self.model)
    return peak.counted(regime, config, self.needed)

  def result(self, seconds: float) -> dict[str, Any]:
    """Returns the numbers that all frameworks report for a round."""
    return {
      'seconds': seconds,
      'clients': self.clients,
      'tokens': self.tokens,
      'tokens_per_second': self.tokens / seconds,
      'operations': self.operations,
    }


def work(
  clients: int, batch: int, length: int, dry: bool, *, billion: bool = False
) -> Work:
  """Returns the work of a cohort, with a name such as '64x1x128'.

  With `dry` it keeps its name and has at most 4 clients and rows of 8 tokens.
  """
  name = f'{"1B " if billion else ""}{clients}x{batch}x{length}'
  if dry:
    small = {**DRY, **({'tied': True} if billion else {})}
    return Work(name, small, min(clients, 4), batch, 8, 2)
  model = BILLION if billion else WIDE
  return Work(name, model, clients, batch, length, 1 if billion else 2)


def main(dry: bool) -> list[Work]:
  """The first comparison: 64 clients with short and with long rows."""
  return [work(64, 1, 128, dry), work(64, 4, 512, dry)]


def others(dry: bool) -> list[Work]:
  """The other cohorts of both row shapes."""
  rows = [(k, *row) for row in ((1, 128), (4, 512)) for k in (8, 256, 1)]
  return [work(*row, dry) for row in rows]


def billion(dry: bool) -> Work:
  """Eight clients on a model of a billion parameters."""
  return work(8, 4, 512, dry, billion=True)


def loop(whole: Work) -> Work:
  """Returns the part of the work that a loop over clients measures."""
  return whole._replace(clients=min(whole.clients, LOOP))
