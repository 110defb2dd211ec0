"""Groups the runs of a sweep that can train as one program.

`together` returns the groups, with the numbers in which their runs differ.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import batching
from fedjax_llm.run import experiment
from fedjax_llm.run.experiment import Experiment
from fedjax_llm.sweep.grid import Run
from fedjax_llm.types import Cohort, Error

# Sections of the method, which the compiled round reads.
METHOD = ('algorithm', 'local', 'upload', 'download', 'aggregator', 'server')
# Sections that only the host reads, to draw clients and their texts.
_HOST = ('partition', 'population', 'clients', 'profiles', 'cohort')
_UNUSED = ('hosts', 'tracking', 'compilation_cache', 'profile')
_FREE = (*_UNUSED, 'checkpoint_every', 'keep_checkpoints')


class Member(NamedTuple):
  """A run with its built experiment, which runs on the same texts share."""

  run: Run
  built: Experiment
  cohort: Cohort  # the cohort of the first round


class Group(NamedTuple):
  """Runs that train as one program, or the reason why they cannot."""

  members: Sequence[Member]
  fields: Sequence[str] = ()  # numbers of the method in which they differ
  fixed: Sequence[str] = ()  # numbers that need a program for each value
  why: str | None = None  # the reason why they cannot train together


def members(runs: Sequence[Run]) -> list[Member]:
  """Builds the members of a sweep, once for all runs on the same texts.

  A model is loaded once for all runs that name it.
  """
  grounds: dict[str, tuple[Experiment, Cohort]] = {}
  models: dict[str, Any] = {}
  result = []
  for run in runs:
    key, model = _ground(run), _text(run, ('task', 'data', 'model'))
    if key not in grounds:
      quiet = lambda _: None
      built = experiment.build(run.conf, quiet, model=models.get(model))
      models.setdefault(model, built.loaded)
      grounds[key] = (built, built.assemble(0)[1])
    result.append(Member(run, *grounds[key]))
  return result


def together(members: Sequence[Member], grid: Sequence[str]) -> list[Group]:
  """Returns the groups, in the order of their first run.

  Runs belong together if their configs differ only in the seed, in sections
  that only the host reads, and in numbers of the method that its builders
  accept as traced values; and if their arrays have the same shapes, except for
  the length of texts.
  """
  numbers = [f for f in grid if f.split('.')[0] in METHOD]
  alike: dict[Any, list[Member]] = {}
  for member in members:
    alike.setdefault(_form(member, numbers), []).append(member)
  groups: list[Group] = []
  for own in alike.values():
    if why := _why_not(own[0]):
      groups.append(Group(own, why=why))
      continue
    fields = [f for f in numbers if len({value(m.run, f) for m in own}) > 1]
    traced = _traceable(own[0], fields)
    fixed = [f for f in fields if f not in traced]
    apart: dict[Any, list[Member]] = {}
    for member in own:
      rest = tuple(value(member.run, f) for f in fixed)
      apart.setdefault(rest, []).append(member)
    groups += [Group(part, traced, fixed) for part in apart.values()]
  return groups


def put(conf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config with values set at dotted fields, unchecked.

  >>> put({'a': {'b': 1, 'c': 2}}, {'a.b': 3})
  {'a': {'b': 3, 'c': 2}}
  """
  new = dict(conf)
  for field, value in values.items():
    first, _, rest = field.partition('.')
    inner = copy.copy(new.get(first)) or {}
    new[first] = put(inner, {rest: value}) if rest else value
  return new


def lead(members: Sequence[Member]) -> Experiment:
  """Returns the experiment that provides the method for all members.

  It does not cut rows to widths: under `vmap` over members every width would be
  computed.
  """
  first = members[0].built
  return first._replace(
    conf=members[0].run.conf,
    settings=first.settings._replace(widths=()),
  )


# ---------------------------------------------------------------- likeness --


def _ground(run: Run) -> str:
  """Returns the sections that are read before the method, as text."""
  parts = [name for name in run.resolved if name not in (*METHOD, *_FREE)]
  return _text(run, parts)


def _form(member: Member, numbers: Sequence[str]) -> Any:
  """Returns a key that is equal for members of one program, without numbers."""
  run, built = member.run, member.built
  kept = [k for k in run.resolved if k not in ('seed', *_HOST, *_FREE)]
  left = {f: '#' for f in numbers if _is_number(value(run, f))}
  text = _text(run._replace(resolved=put(run.resolved, left)), kept)
  # Rows of texts can be padded, so their length is left out.
  batches = batching.narrowed(member.cohort.batches, 0)
  shapes = [np.shape(x) for x in jax.tree.leaves(batches)]
  shapes += [np.shape(x) for x in jax.tree.leaves(member.cohort.profiles)]
  shapes += [(x.shape, x.dtype) for x in jax.tree.leaves(built.initial)]
  counted = experiment.counts_clients(run.conf)
  return text, str(shapes), len(built.owned) if counted else None


def _text(run: Run, parts: Sequence[str]) -> str:
  return json.dumps({k: run.resolved.get(k) for k in parts}, sort_keys=True)


def value(run: Run, field: str) -> Any:
  """Returns the value of a field in a run: a number, or JSON text."""
  inner: Any = run.resolved
  for part in field.split('.'):
    inner = inner.get(part) if isinstance(inner, Mapping) else None
  return inner if _is_number(inner) else json.dumps(inner, sort_keys=True)


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool)


# ------------------------------------------------------------- what cannot --


def _why_not(member: Member) -> str | None:
  """Returns the reason why runs must train one after another, or None."""
  if member.run.conf.get('privacy'):
    return 'privacy counts with the clients and the budget of each run'
  if member.run.conf.get('stages'):
    return 'each is evaluated at the ends of its stages'
  algorithm = member.built.method(conf=member.run.conf)
  name = member.run.conf['algorithm']['name']
  if algorithm.plan is not None:
    return f'{name} plans on the host between rounds'
  state = jax.eval_shape(
    algorithm.init, member.built.round_key, member.built.initial
  )
  kept = jax.eval_shape(algorithm.init_client, state.params)
  if jax.tree.leaves(kept):
    return f'{name} keeps something of every client between rounds'
  return None


def writes_base(member: Member) -> bool:
  """Returns True if a round of the method writes into the base.

  Members that train at once would then each need a base of their own.
  """
  algorithm = member.built.method(conf=member.run.conf)
  state = jax.eval_shape(
    algorithm.init, member.built.round_key, member.built.initial
  )
  same = []

  def fold(base, params):
    folded, _ = member.built.adapter.fold(base, params)
    pairs = zip(jax.tree.leaves(base), jax.tree.leaves(folded))
    same.extend(a is b for a, b in pairs)
    return ()

  jax.eval_shape(fold, member.built.base, state.params)
  return not all(same)


def _traceable(member: Member, fields: Sequence[str]) -> tuple[str, ...]:
  """Returns the fields with numbers that can be traced, determined by trial."""
  if not fields or _traces(member, fields):
    return tuple(fields)
  able = tuple(f for f in fields if _traces(member, (f,)))
  return able if len(able) < 2 or _traces(member, able) else able[:1]


def _traces(member: Member, fields: Sequence[str]) -> bool:
  """Returns True if a round with these numbers traced has the same shapes."""
  built = lead([member])

  def round(values, cohort, key, params, base):
    method = built.method(conf=put(built.conf, values))
    state = built.method().init(key, params)
    newcomer = method.init_client(state.params)
    return method.round(state, cohort._replace(states=newcomer), base)

  rest = (member.cohort, built.round_key, built.initial, built.base)
  plain = jax.eval_shape(lambda *rest: round({}, *rest), *rest)
  try:
    numbers = {f: np.float32(0.1) for f in fields}
    traced = jax.eval_shape(round, numbers, *rest)
  except (
    Error,
    TypeError,
    ValueError,
    ArithmeticError,
    jax.errors.JAXTypeError,
  ):
    return False
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  return kinds(plain) == kinds(traced)
