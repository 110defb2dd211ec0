"""Runs of earlier versions: their configs and states in those of this one.

A config is read through `translated`, a checkpoint through `earlier_state`, the
clients' states through `open_store`, so that a run of an earlier version
resumes, is exported and is reported by the present programs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import clients, tree
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.aggregators.low_rank.by_node import Added
from fedjax_llm.local import Counted
from fedjax_llm.nodes import Dual
from fedjax_llm.run.builders import named
from fedjax_llm.server.stages import Kept, Staged
from fedjax_llm.types import ClientState, ServerState

# Fields that moved: (section, field) before -> (section, field) now.
MOVED = {
  ('algorithm', 'clip_norm'): ('local', 'clip_norm'),  # after 0.1.0
}
_POOLED = ('algorithm', 'partition')
# Methods of two stages whose state did not name its stage in 0.1.0, and the
# field of the length of the first.
_FIRST = {'slora': 'first_rounds', 'fed_dpa_f': 'federated_rounds'}


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


def earlier_state(
  template: Any, names: Sequence[str], conf: Mapping[str, Any] | None = None
) -> Earlier | None:
  """Returns the earlier structure whose leaves have these names, or None.

  Args:
    template: a state of this version, arrays or their shapes.
    names: the names of the leaves of a checkpoint.
    conf: the config of the run, in the fields of this version.

  >>> earlier_state({'params': 1}, ['params'])  # as it is now
  """
  if not isinstance(template, ServerState):
    return None
  for earlier in (_of_bytes(template), _of_one_stage(template, conf or {})):
    if earlier is None:
      continue
    paths = jax.tree_util.tree_leaves_with_path(earlier.template)
    if [tree.path_name(path) for path, _ in paths] == list(names):
      return earlier
  return None


def _of_bytes(template: ServerState) -> Earlier | None:
  """Returns the state of FedEx-LoRA and FLoRA of 0.1.0; None for other rules.

  It was the bytes of the residual of the last round, an array for each node, in
  place of `Added`. Its ranks are computed from these bytes; clients did not
  keep what they have received, so after an upgrade each is billed from the last
  residual on.
  """
  is_added = lambda x: isinstance(x, Added)
  state = jax.tree.map(
    lambda x: x.rank if is_added(x) else x,
    template.aggregator,
    is_leaf=is_added,
  )
  before = template._replace(aggregator=state)
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


def _of_one_stage(
  template: ServerState, conf: Mapping[str, Any]
) -> Earlier | None:
  """Returns the state of SLoRA and FedDPA-F of 0.1.0; None for other methods.

  Their rounds told the stage, and one server optimizer and one rule went on in
  both. After an upgrade each stage has a copy of their states; only that of the
  present stage is read, as a stage begins with new ones.
  """
  section = conf.get('algorithm') or {}
  field, states = _FIRST.get(named(section) or ''), template.aggregator
  if field is None or not isinstance(states, Staged):
    return None
  before = template._replace(
    optimizer=template.optimizer[0], aggregator=states.each[0]
  )

  def upgrade(old: ServerState) -> ServerState:
    copies = lambda x: tuple(jax.tree.map(jnp.copy, x) for _ in states.each)
    stage = int(int(old.round) >= section[field])
    params = old.params
    if stage and isinstance(params, Dual):
      # In the second stage of FedDPA-F a personal part starts as the shared.
      own = multi.with_residuals(params.shared, params.personal)
      params = params._replace(personal=jax.tree.map(jnp.copy, own))
    return old._replace(
      params=params,
      optimizer=copies(old.optimizer),
      aggregator=Staged(jnp.int32(stage), copies(old.aggregator)),
    )

  return Earlier(before, upgrade)


def open_store(
  directory: str | os.PathLike,
  template: ClientState,
  conf: Mapping[str, Any],
  *,
  begins: bool = False,
  **options: Any,
) -> clients.store.Store:
  """Opens the clients' states of a run of any version.

  Args:
    directory: the folder of the states.
    template: the state of a client that never took part.
    conf: the config of the run, in the fields of this version.
    begins: see `clients.store.open`; so are the other options.

  Raises:
    Error: see `clients.store.open`.

  >>> import tempfile
  >>> state = ClientState(private=np.zeros(2))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   open_store(folder, state, {}, at_round=0).seen().tolist()
  []
  """
  earlier = _earlier_client(template, conf)
  if earlier is None:
    return clients.store.open(directory, template, begins=begins, **options)
  return clients.upgraded.open(directory, template, *earlier, **options)


def _earlier_client(
  template: ClientState, conf: Mapping[str, Any]
) -> Earlier | None:
  """Returns the client state of SLoRA and FedDPA-F of 0.1.0, or None.

  A client with private parameters counted the rounds of the second stage. Its
  rows do not tell whether it took part in the first: True is taken, which a
  client of the second stage does not read.
  """
  local = template.local
  if named(conf.get('algorithm')) not in _FIRST or not isinstance(local, Kept):
    return None
  if not jax.tree.leaves(template):
    return None
  counts = bool(jax.tree.leaves(template.private))
  zero = np.int32(0)
  before = (Counted(zero, ()), ()) if counts else ()

  def upgrade(old: ClientState) -> ClientState:
    num = len(jax.tree.leaves(old)[0])
    took = np.zeros((num, len(local.each)), bool)
    took[:, 0] = True
    if counts:
      took[:, 1] = np.asarray(old.local[0].rounds) > 0
    return old._replace(local=local._replace(took=took))

  return Earlier(template._replace(local=before), upgrade)
