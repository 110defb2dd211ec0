"""A run in two halves: what one client does, and what the server does.

`open` returns a `Site`. Server and clients open the same config; the server
calls `instruct`, a client `train`, the server `collect`. Messages are mappings
of names to NumPy arrays. A federation of sites computes what the simulation
computes, but for rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import clients, tree
from fedjax_llm.deploy import wire
from fedjax_llm.run import config, experiment
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  ClientState,
  Draw,
  Error,
  FederatedAlgorithm,
  ServerState,
  Uploads,
)

Arrays = dict[str, np.ndarray]


class Site(NamedTuple):
  """One participant of a federation: a client, several clients, or the server.

  `names` are those of the clients, so that a client finds its number. A site
  that only serves needs no texts of its own beyond the sizes that the config's
  sampler asks for.
  """

  built: experiment.Experiment
  algorithm: FederatedAlgorithm
  start: ServerState
  newcomer: ClientState
  run: Callable[..., Any]  # the compiled `train` for a cohort of one
  join: Callable[..., Any]  # the compiled `aggregate`
  row: Any  # the shapes of one client's upload

  @property
  def names(self) -> Sequence[str]:
    return self.built.names

  @property
  def network(self) -> Any:
    return self.built.loaded.config


def open(path: str, *fields: str, say: Callable[[str], None] = print) -> Site:
  """Builds the site of a config, `FILE` or `FILE:ARG`, with changed fields.

  Args:
    path: as `--config` of `train`.
    fields: 'section.field=value', as after `--config.` on a command line.
    say: prints the sentences about clients and texts.

  Raises:
    Error: the config is wrong; the method has no halves, keeps versions of its
      parameters, or sums its messages before they are decoded; a sampler with
      a clock, whose losses and shorter work belong to the simulation.
  """
  words = [f'--config.{field}' for field in fields]
  conf = config.parse(
    ['--config', path, '--workdir', 'none', *words], SPEC
  ).config
  name = conf['algorithm']['name']
  built = experiment.build(conf, say)
  algorithm = built.method()
  if algorithm.train is None or algorithm.aggregate is None:
    raise Error(f'{name} has no halves: it cannot run over a network.')
  if algorithm.plan is not None:
    raise Error(f'{name} plans between rounds; only the simulation does that.')
  start = algorithm.init(built.round_key, built.initial)
  if jax.tree.leaves(start.history):
    raise Error(
      f'{name} keeps versions for late clients; over a network it would need '
      'an asynchronous server.'
    )
  if isinstance(built.sampler, clients.timed.Timed):
    raise Error(
      f'clients.name={conf["clients"]["name"]} simulates who arrives when, and '
      'a network does not: take another sampler.'
    )
  if built.stages is not None:
    raise Error(
      f'stages.name={conf["stages"]["name"]} decides in which rounds a client '
      'has data, and over a network the clients do: leave the section out.'
    )
  newcomer = algorithm.init_client(start.params)
  one = built.make_cohort(Draw(np.zeros(1, np.int32), np.ones(1, bool)), 0)
  one = one._replace(states=tree.broadcast(newcomer, 1))
  row = jax.eval_shape(algorithm.train, start, one, built.base)[0]
  same = lambda u, p: u.shape[1:] == p.shape
  try:
    shaped = all(
      jax.tree.leaves(tree.map_present(same, row.update, start.params))
    )
  except (ValueError, TypeError):
    shaped = False
  if not shaped:
    raise Error(
      f'{name} sums messages before they are decoded; over a network that '
      'needs a protocol of its own.'
    )
  return Site(
    built=built,
    algorithm=algorithm,
    start=start,
    newcomer=newcomer,
    run=jax.jit(algorithm.train),
    join=jax.jit(algorithm.aggregate),
    row=row,
  )


def instruct(site: Site, state: ServerState) -> Arrays:
  """Returns the message of a round to its clients.

  It holds the parameters and the rule's state, which some rules share with
  clients; no moments of the server optimizer.
  """
  return wire.pack(_shown(state), site.network)


def train(
  site: Site, message: Mapping[str, np.ndarray], client: int, kept: Any = None
) -> tuple[Arrays, ClientState, dict[str, float]]:
  """Runs one client's half of a round.

  Args:
    site: of the client.
    message: of the server, from `instruct`.
    client: its number in `site.names`.
    kept: the state that it returned last time; None: it is new.

  Returns:
    Its message to the server, its new state, and its metrics.

  Raises:
    Error: a message of another method or another size; an unknown client.
  """
  if not 0 <= client < len(site.names):
    raise Error(
      f'client {client} is not one of the {len(site.names)} of this federation.'
    )
  shown = wire.unpack(message, _shown(site.start), site.network)
  state = site.start._replace(
    params=shown['params'],
    aggregator=shown['rule'],
    round=jnp.int32(shown['round']),
  )
  draw = Draw(np.array([client], np.int32), np.ones(1, bool))
  cohort = site.built.make_cohort(draw, int(state.round))
  own = site.newcomer if kept is None else kept
  cohort = cohort._replace(states=tree.broadcast(own, 1))
  uploads, states, info = site.run(state, cohort, site.built.base)
  number = lambda x: float(np.mean(jax.device_get(x)))
  metrics = {
    name: number(value)
    for name, value in info.metrics.items()
    if np.size(value) == 1
  }
  sent = wire.pack(tree.take(_sent(uploads), 0), site.network)
  return sent, jax.device_get(tree.take(states, 0)), metrics


def collect(
  site: Site,
  state: ServerState,
  replies: Mapping[int, Mapping[str, np.ndarray]],
) -> ServerState:
  """Runs the server's half of a round on the messages of its clients.

  Args:
    site: of the server.
    state: before the round.
    replies: by client; those that were drawn and are missing dropped out.
  """
  draw = site.built.sampler(int(state.round))
  one = tree.take(_zeros(_sent(site.row)), 0)
  rows = [
    wire.unpack(replies[int(i)], one, site.network)
    if int(i) in replies
    else one
    for i in draw.ids
  ]
  sent = jax.tree.map(lambda *xs: np.stack(xs), *rows)
  here = np.array([i in replies for i in draw.ids.tolist()])
  profiles = site.built.profiles or ()
  uploads = Uploads(
    **sent,
    ids=np.asarray(draw.ids, np.int32),
    profiles=jax.tree.map(
      lambda x: np.asarray(x)[np.maximum(draw.ids, 0)], profiles
    ),
    staleness=np.zeros(len(draw.ids), np.int32),
  )
  uploads = uploads._replace(valid=np.asarray(uploads.valid, bool) & here)
  new, _ = site.join(state, uploads, site.built.base)
  return new


# ------------------------------------------------------------------- parts --


def _shown(state: ServerState) -> dict[str, Any]:
  return {
    'params': state.params, 'rule': state.aggregator, 'round': state.round,
  }  # fmt: skip


_FIELDS = ('update', 'start', 'masks', 'weight', 'valid', 'reports')


def _sent(uploads: Uploads) -> dict[str, Any]:
  return {name: getattr(uploads, name) for name in _FIELDS}


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
