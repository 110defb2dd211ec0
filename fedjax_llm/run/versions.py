"""Runs of earlier versions: their configs and states in those of this one.

A config is read through `translated`, a checkpoint through `earlier_state`, so
that a run of an earlier version resumes, is exported and is reported by the
present programs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.aggregators.low_rank.by_node import Added
from fedjax_llm.run.builders import named
from fedjax_llm.types import ServerState

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
  >>> translated({'algorithm': {'name': 'p_fed_pg'}})
  {'algorithm': {'server_rate': 1.0, 'name': 'p_fed_pg'}}
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
  if isinstance(test := new.get('evals'), Mapping):  # after 0.2.0
    new['evals'] = {'evaluators': [{'name': 'likelihood'}], **test}
  if named(new.get('algorithm')) == 'p_fed_pg':  # its rate was 1, unnamed
    new['algorithm'] = {'server_rate': 1.0, **new['algorithm']}
  return _pooled(new)


def _pooled(conf: dict[str, Any]) -> dict[str, Any]:
  """Names the partition of a centralised run, which 0.2.0 did not name."""
  names = [named(conf.get(part)) for part in _POOLED]
  if names[0] != 'centralised' or names[1] in (None, 'pooled'):
    return conf
  return {**conf, 'partition': {'name': 'pooled', 'of': conf['partition']}}


class Earlier(NamedTuple):
  """A state as an earlier version wrote it."""

  template: Any  # its structure and types
  upgrade: Callable[[Any], Any]  # such a state -> one of this version


def earlier_state(template: Any, names: Sequence[str]) -> Earlier | None:
  """Returns the earlier structure whose leaves have these names, or None.

  In 0.1.0 the state of FedEx-LoRA and FLoRA was the bytes of the residual of
  the last round, an array for each node, in place of `Added`. Its ranks are
  computed from these bytes; clients did not keep what they have received, so
  after an upgrade each is billed from the last residual on.

  Args:
    template: a state of this version, arrays or their shapes.
    names: the names of the leaves of a checkpoint.

  >>> earlier_state({'params': 1}, ['params'])  # as it is now
  """
  if not isinstance(template, ServerState):
    return None
  is_added = lambda x: isinstance(x, Added)
  state = jax.tree.map(
    lambda x: x.rank if is_added(x) else x,
    template.aggregator,
    is_leaf=is_added,
  )
  before = template._replace(aggregator=state)
  paths = jax.tree_util.tree_leaves_with_path(before)
  if [tree.path_name(path) for path, _ in paths] != list(names):
    return None
  if jax.tree.structure(before) == jax.tree.structure(template):
    return None

  def upgrade(old: ServerState) -> ServerState:
    def node(added, num_bytes, params):
      if added is None:
        return None
      new = Added.none(params)
      few = num_bytes // new.factors
      dense = new.dense // new.factors + 1  # a rank that makes dense cheaper
      rank = jnp.where(num_bytes < new.dense, few, dense)
      return new.plus(rank.astype(jnp.int32))

    aggregator = jax.tree.map(
      node,
      template.aggregator,
      old.aggregator,
      old.params,
      is_leaf=lambda x: x is None or is_added(x),
    )
    return old._replace(aggregator=aggregator)

  return Earlier(before, upgrade)
