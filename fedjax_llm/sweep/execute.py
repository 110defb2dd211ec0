"""Trains the runs of a sweep, together where possible, else one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedjax_llm.devices import compilation
from fedjax_llm.run import config, metrics
from fedjax_llm.run.sections import SPEC
from fedjax_llm.sweep import folder as folders
from fedjax_llm.sweep import groups, population, singly
from fedjax_llm.sweep.grid import Run, short


def execute(
  runs: Sequence[Run],
  folder: folders.Folder,
  grid: Sequence[str],
  *,
  at_once: int | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Trains the runs that have not ended, and reports the groups with `say`.

  The groups follow from all runs, ended or not, so that an interrupted sweep
  continues in the same groups.
  """
  ended = {run.name for run in runs if folders.outcome(folder, run)}
  waiting = lambda some: [run for run in some if run.name not in ended]
  if ended:
    say(f'{len(ended)} of {len(runs)} runs have ended before.')
  if len(ended) == len(runs):
    return
  if jax.device_count() > 1:
    say(f'{_count(runs)} one after another: each uses all devices.')
    singly.train_each(waiting(runs), folder, say)
    return
  if any((run.conf.get('tracking') or {}).get('to') for run in runs):
    say('tracking: runs that train together are not tracked.')
  settings = config.settings(runs[0].conf, SPEC)
  compilation.keep(settings.compilation_cache)
  together = groups.together(groups.members(runs), grid)
  names = short(list(grid))
  many = [group for group in together if group.why is None]
  alone = [group for group in together if group.why is not None]
  for field in dict.fromkeys(f for group in many for f in group.fixed):
    say(f'{field}: a program for each of its values, which builders must know.')
  likelihoods: dict[Any, Any] = {}
  ready = [population.ready(group, likelihoods, at_once) for group in many]
  parts = [
    (group, one, part)
    for group, one in zip(many, ready)
    for part in one.parts
    if waiting(m.run for m in part)
  ]
  total = sum(m.run.conf['num_rounds'] for *_, part in parts for m in part)
  for group, one in {
    id(group): (group, one) for group, one, _ in parts
  }.values():
    say(_plan(group, one, names))
  bar, done = metrics.progress(total), 0
  try:
    for _, one, part in parts:
      done = population.train(one, part, folder, bar, done)
  finally:
    bar.close()
  for group in alone:
    if left := waiting(m.run for m in group.members):
      say(f'{_count(left)} one after another: {group.why}.')
      singly.train_each(left, folder, say)


def _plan(group: groups.Group, one: population.Population, names: Any) -> str:
  seeds = len({m.run.seed for m in group.members})
  differ = ([f'{seeds} seeds'] if seeds > 1 else []) + [
    f'every {names[field]}' for field in group.fields
  ]
  text = (
    f'{_count(group.members)} by one program, {len(one.parts[0])} at a time'
  )
  return text + (f': {" x ".join(differ)}' if differ else '')


def _count(runs: Sequence[Any]) -> str:
  return f'{len(runs)} run{"s" if len(runs) > 1 else ""}'
