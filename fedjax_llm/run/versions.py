"""Runs of earlier versions: their configs in the words of this one.

A workdir is read through `translated`, so that a run of an earlier version
resumes, is exported and is reported by the present programs.
"""

from collections.abc import Mapping
from typing import Any

from fedjax_llm.run.builders import named

# Fields that moved: (section, field) before -> (section, field) now.
MOVED = {
  ('algorithm', 'clip_norm'): ('local', 'clip_norm'),  # after 0.1.0
}
_POOLED = ('algorithm', 'partition')


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a resolved config of any version with the fields of this one.

  >>> old = {'algorithm': {'name': 'ditto', 'clip_norm': 0.5}, 'local': {}}
  >>> translated(old)
  {'algorithm': {'name': 'ditto'}, 'local': {'clip_norm': 0.5}}
  """
  new = dict(config)
  for (section, field), (to, name) in MOVED.items():
    before = new.get(section)
    if not isinstance(before, Mapping) or field not in before:
      continue
    new[section] = {k: v for k, v in before.items() if k != field}
    there = new.get(to)
    if isinstance(there, Mapping):
      new[to] = {name: before[field], **there}
  return _pooled(new)


def _pooled(conf: dict[str, Any]) -> dict[str, Any]:
  """Names the partition of a centralised run, which 0.2.0 did not name."""
  names = [named(conf.get(part)) for part in _POOLED]
  if names[0] != 'centralised' or names[1] in (None, 'pooled'):
    return conf
  return {**conf, 'partition': {'name': 'pooled', 'of': conf['partition']}}
