"""The memory of one step of one client by memory mode, before a compilation.

`modes` returns the estimate of each mode that a config does not use yet: layers
computed again, micro-batches, a quantised base, an adapter in upper layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_llm.local.gradients import backprop
from fedjax_llm.plan import steps, work
from fedjax_llm.run import config, costs, metrics
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error, Gradient


class Mode(NamedTuple):
  """A memory mode, and the estimated bytes of a step that uses it."""

  field: str  # of the command line, '' for the config as it is
  planned: work.Work
  base: int  # the frozen weights
  others: int  # adapter, texts
  temporary: int  # activations and all else between them

  @property
  def total(self) -> int:
    return self.base + self.others + self.temporary


# Fields and their values, given the sizes and the number of layers.
CHANGES: tuple[tuple[str, Callable[[work.Sizes, int], Any]], ...] = (
  ('model.remat', lambda sizes, layers: 'dots'),
  ('model.remat', lambda sizes, layers: 'full'),
  ('memory.micro_batch', lambda sizes, layers: max(sizes.batch // 2, 1)),
  ('memory.micro_batch', lambda sizes, layers: 1),
  ('model.quantisation', lambda sizes, layers: 'int8'),
  ('adapter.layers', lambda sizes, layers: list(range(layers // 2, layers))),
)


def estimate(
  field: str, planned: work.Work, gradient: Gradient | None = backprop
) -> Mode:
  """Returns the estimated memory of a step, with backpropagation by default.

  The largest number of bytes live at a time is counted in the traced program
  (`costs`), without compiling it. None: a forward pass alone.
  """
  step = steps.client_step(planned.loss, gradient)
  arguments = steps.shapes(planned)
  program = jax.make_jaxpr(step)(*arguments)
  return Mode(
    field,
    planned,
    base=costs.num_bytes(planned.base),
    others=costs.num_bytes(arguments[1:]),
    temporary=costs.of(program).temporary,
  )


def modes(
  conf: Mapping[str, Any], read: Callable[..., work.Work]
) -> list[Mode]:
  """Returns the step of a config as it is, then with each mode alone.

  Args:
    conf: a checked config.
    read: `(conf) -> Work`, the round of a config as shapes.
  """
  result = [estimate('', read(conf))]
  layers = result[0].planned.model.config.num_layers
  for field, change in CHANGES:
    value = change(result[0].planned.sizes, layers)
    section, _, name = field.partition('.')
    if (conf.get(section) or {}).get(name) == value:
      continue
    try:
      changed, _ = config.override(conf, [(field, value)], SPEC)
      text = str(value).replace(' ', '')
      mode = estimate(f'--config.{field}={text}', read(changed))
    except (Error, ImportError):
      continue  # this model, adapter or method has no such setting
    if mode.field not in [other.field for other in result]:
      result.append(mode)
  return result


def rows(result: list[Mode]) -> list[tuple[str, str]]:
  """Returns the lines of a plan: the mode, its memory and what it saves.

  >>> less = Mode('--config.x=1', None, 100, 0, 20)
  >>> some = [Mode('', None, 100, 0, 60), less]
  >>> rows(some)
  [('  as it is', '160 B, base 100 B'), ('  --config.x=1', '120 B, saves 40 B')]
  """
  human = metrics.human_bytes
  first = result[0]
  lines = [('  as it is', f'{human(first.total)}, base {human(first.base)}')]
  for mode in result[1:]:
    saved = first.total - mode.total
    text = f'saves {human(saved)}' if saved >= 0 else f'adds {human(-saved)}'
    lines.append((f'  {mode.field}', f'{human(mode.total)}, {text}'))
  return lines
