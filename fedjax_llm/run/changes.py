"""The settings of a run that may change when it resumes, and their record.

`config.json` notes a change under `changes`; `settings_of` returns the config
as of a round.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.types import Error

# Fields that may change between a run and its resumption, without changing a
# number that was already written.
FREE = (
  *('num_rounds', 'checkpoint_every', 'keep_checkpoints'),
  *('checkpoint_writers', 'compilation_cache', 'profile'),
  *('chosen', 'hosts', 'tracking'),
  *('mesh_model', 'execution', 'cpu_devices'),  # rounding, from here on
  *('evals', 'changes'),
)
# A change of these fields is printed, and noted in config.json.
NOTED = ('num_rounds', 'evals', 'clients.cohort_size')
# The keys of config.json that are not fields of the config.
NOTES = ('chosen', 'changes')

_ABSENT = 'absent'
# Values that mean the same: an older version did not write the field.
SAME = [(_ABSENT, None), (_ABSENT, False), (_ABSENT, {}), (_ABSENT, [])]


def shown(tree: Any, field: str) -> str:
  """Returns the value of a dotted field as text."""
  value = get(tree, field)
  return value if value is _ABSENT else repr(value)


def get(tree: Any, field: str) -> Any:
  """Returns the value of a dotted field; 'absent' where there is none."""
  for name in field.split('.'):
    if not isinstance(tree, Mapping) or name not in tree:
      return _ABSENT
    tree = tree[name]
  return tree


def is_one(field: str, fields: Sequence[str]) -> bool:
  """Returns True if a field is one of `fields`, or lies in one."""
  return any(field == one or field.startswith(f'{one}.') for one in fields)


def sizes(resolved: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the cohort size's field, where no other setting depends on it."""
  free = get(resolved, 'clients.name') in ('uniform', 'by_size')
  # There the size sets the number of steps in a round.
  free &= get(resolved, 'partition.name') != 'pooled'
  return ('clients.cohort_size',) if free else ()


def settings_of(
  raw: Mapping[str, Any], number: int | None = None
) -> dict[str, Any]:
  """Returns the config in a config.json as of round `number` (None: the last).

  >>> fields = {'clients.cohort_size': {'was': 4, 'is': 8}}
  >>> raw = {'clients': {'cohort_size': 8}}
  >>> raw['changes'] = [{'after': 3, 'fields': fields}]
  >>> settings_of(raw), settings_of(raw, 3)
  ({'clients': {'cohort_size': 8}}, {'clients': {'cohort_size': 4}})

  Raises:
    Error: its entry 'changes' is damaged.
  """
  settings = {k: v for k, v in raw.items() if k not in NOTES}
  if number is None:
    return settings
  for after, fields in reversed(changes_of(raw)):
    if after < number:
      continue
    for field, values in fields.items():
      *path, last = field.split('.')
      inner = settings
      for part in path:
        if not isinstance(inner.get(part), Mapping | None):
          raise Error(f"config.json is damaged: 'changes' names {field!r:.60}.")
        inner[part] = dict(inner.get(part) or {})
        inner = inner[part]
      if values['was'] == _ABSENT:
        inner.pop(last, None)
      else:
        inner[last] = values['was']
  return settings


def changes_of(
  raw: Mapping[str, Any],
) -> list[tuple[int, Mapping[str, Mapping[str, Any]]]]:
  """Returns pairs (round, fields changed after it) of a config.json."""
  try:
    return [
      (
        int(one['after']),
        {k: {'was': v['was'], 'is': v['is']} for k, v in one['fields'].items()},
      )
      for one in raw.get('changes') or []
    ]
  except (TypeError, KeyError, ValueError, AttributeError) as error:
    raise Error(
      f"config.json is damaged: 'changes' is {raw['changes']!r:.60}."
    ) from error
