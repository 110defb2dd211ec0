"""Exchange of messages between models of several architectures.

Clients have models of their own, which nobody averages. What they and the
server send are messages that do not depend on an architecture, such as
predictions on common texts. `exchange` returns a `FederatedAlgorithm`, whose
parameters are those of the server's model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import batching, checks, scopes, tree
from fedjax_llm.server import metrics
from fedjax_llm.types import (
  Base,
  ClientOutput,
  ClientState,
  Cohort,
  Context,
  Error,
  FederatedAlgorithm,
  Key,
  Params,
  ServerState,
  Shared,
)


class Member(NamedTuple):
  """The functions of one architecture among the clients.

  `start(base, state) -> params`: all parameters of a new client, of which it
  trains those where `trains(params)` is not None;
  `train(base, params, batches, context) -> ClientOutput`: on its own texts;
  `tell(base, params, round) -> (message, own)`: a message for the server, and
  what the client remembers of it;
  `learn(base, params, own, message, round) -> (params, metrics)`: from the
  server's message;
  `sizes(base, round) -> (up, down)`: int32 counts of bytes of the messages.
  """

  start: Callable[[Base, ServerState], Params]
  trains: Callable[[Params], Params]
  train: Callable[..., ClientOutput]
  tell: Callable[..., tuple[Any, Any]]
  learn: Callable[..., tuple[Params, Any]]
  sizes: Callable[..., tuple[Any, Any]]


class Centre(NamedTuple):
  """The functions of the server.

  `none(base, state) -> message`: the message of nobody;
  `merge(message, message) -> message`: of two clients, in the order of the
  cohort;
  `learn(base, state, message) -> (params, metrics)`;
  `tell(base, params, round) -> message` for all clients.
  """

  none: Callable[[Base, ServerState], Any]
  merge: Callable[[Any, Any], Any]
  learn: Callable[..., tuple[Params, Any]]
  tell: Callable[..., Any]


class Kept(NamedTuple):
  """The trained parameters of a client, in one array for all architectures."""

  took: Any  # [] bool: False for a client that never took part
  flat: Any  # [P] float32, padded with zeros


def exchange(
  members: Sequence[Member],
  centre: Centre,
  shapes: Callable[[Params], Sequence[Params]],
  *,
  who: str = 'exchange',
) -> FederatedAlgorithm:
  """Returns rounds of training, telling, learning, telling and learning.

      client k    trains on its own texts and tells m_k      for every k
      server      learns from merge(m_1, ..., m_K) and tells m_0
      client k    learns from m_0                            for every k

  Clients come one after another: a scan over the cohort, in each step a
  `lax.switch` over the architectures, so that one program holds each of them
  once and a step computes that of its client alone. A client's architecture is
  its profile 'group'; with a single member there is no profile. Clients keep
  their parameters as `ClientState.local`.

  A client whose numbers are not finite keeps its parameters and is left out. A
  server whose step is not finite stays where it was. The algorithm has no
  halves: the server learns between the clients' two turns.

  Args:
    members: one for each architecture.
    centre: the server.
    shapes: `(params of the server) -> params of a new client`, of each member,
      for their shapes.
    who: the name of the method, for messages.

  Raises:
    Error: from a round, clients without a group in their profile.

  >>> from fedjax_llm.types import Work
  >>> one = Member(
  ...   start=lambda base, state: {'w': jnp.float32(0)},
  ...   trains=lambda params: params,
  ...   train=lambda base, params, x, context: ClientOutput(
  ...     {'w': x[0]}, None, work=Work(jnp.float32(1), jnp.int32(1))),
  ...   tell=lambda base, params, round: (params['w'], ()),
  ...   learn=lambda base, params, own, m, round: ({'w': params['w'] + m}, {}),
  ...   sizes=lambda base, round: (jnp.int32(4), jnp.int32(4)))
  >>> least = Centre(
  ...   none=lambda base, state: jnp.float32(jnp.inf), merge=jnp.minimum,
  ...   learn=lambda base, state, message: ({'w': message}, {}),
  ...   tell=lambda base, params, round: params['w'])
  >>> method = exchange([one], least, lambda params: [params])
  >>> state = method.init(jax.random.key(0), {'w': jnp.float32(9)})
  >>> states = tree.broadcast(method.init_client(state.params), 2)
  >>> x, ones = jnp.array([[3.0], [5.0]]), jnp.ones(2)
  >>> cohort = Cohort(jnp.arange(2), x, ones, ones > 0, states=states)
  >>> state, states, _ = jax.jit(method.round)(state, cohort)
  >>> float(state.params['w']), states.local.flat.tolist()
  (3.0, [[6.0], [8.0]])
  """

  def parts(params: Params) -> list[Params]:
    each = zip(members, shapes(params), strict=True)
    return [jax.eval_shape(m.trains, like) for m, like in each]

  def length(params: Params) -> int:
    count = lambda part: sum(x.size for x in jax.tree.leaves(part))
    return max(map(count, parts(params)))

  def init(key: Key, params: Params) -> ServerState:
    state = ServerState(jnp.int32(0), params, (), params, key)
    # Every leaf has a buffer of its own: a donated buffer may appear only once.
    return jax.tree.map(jnp.copy, state)

  def init_client(params: Params) -> ClientState:
    zeros = jnp.zeros(length(params), jnp.float32)
    return ClientState(local=Kept(jnp.bool_(False), zeros))

  def round(state, cohort: Cohort, base=None, data=None):
    del data
    checks.one_cohort(cohort)
    if cohort.started is not None:
      raise Error(f'{who} has no clients that started in earlier rounds.')
    group = _groups(cohort, len(members), who)
    like, size = parts(state.params), length(state.params)
    number = state.round
    clients = jax.random.split(jax.random.fold_in(state.key, number))[0]

    def params_of(i: int, kept: Kept) -> Params:
      new = members[i].start(base, state)
      old = _unpacked(kept.flat, like[i])
      trained = members[i].trains(new)
      pick = lambda old, new: jnp.where(kept.took, old, new)
      return tree.merge(tree.map_present(pick, old, trained), new)

    def first_turn(i: int) -> Callable[[Cohort], Any]:
      member = members[i]

      def run(row: Cohort):
        keys = jax.random.split(jax.random.fold_in(clients, row.ids), 4)
        context = Context(
          client=row.ids, round=number, key=keys[2], profile=row.profiles
        )
        start = params_of(i, row.states.local)
        out = member.train(base, start, row.batches, context)
        end = tree.merge(tree.add(member.trains(start), out.update), start)
        message, own = member.tell(base, end, number)
        work = jax.tree.map(jnp.asarray, out.work)
        flat = _packed(member.trains(end), size)
        up, down = member.sizes(base, number)
        return flat, message, own, work, dict(out.metrics), up, down

      return run

    def second_turn(i: int) -> Callable[..., Any]:
      member = members[i]

      def run(flat, own, message):
        start = params_of(i, Kept(jnp.bool_(True), flat))
        end, more = member.learn(base, start, own, message, number)
        return _packed(member.trains(end), size), more

      return run

    def one(merged, inputs):
      row, which = inputs
      outs = jax.lax.switch(which, [*map(first_turn, range(len(members)))], row)
      flat, message, *outs = outs
      own, work, more, up, down = outs
      finite = tree.all_finite((flat, more, work))
      counts = row.valid & finite
      both = centre.merge(merged, message)
      keep = lambda new, old: jnp.where(counts, new, old)
      merged = jax.tree.map(keep, both, merged)
      return merged, (flat, own, work, more, up, down, finite)

    start = centre.none(base, state)
    merged, outs = jax.lax.scan(one, start, (cohort, group))
    flat, owns, work, trained, up, down, finite = outs
    reported = jnp.asarray(cohort.valid) & finite

    new, at_server = centre.learn(base, state, merged)
    sound = tree.all_finite(new) & jnp.any(reported)
    new = jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, state.params)
    answer = centre.tell(base, new, number)

    def other(_, inputs):
      flat, own, which = inputs
      turns = [*map(second_turn, range(len(members)))]
      return (), jax.lax.switch(which, turns, flat, own, answer)

    _, (ends, more) = jax.lax.scan(other, (), (flat, owns, group))
    learned = jax.vmap(tree.all_finite)(ends)
    ends = jnp.where(learned[:, None], ends, flat)
    states = cohort.states._replace(
      local=tree.where(reported, Kept(reported, ends), cohort.states.local)
    )
    info = metrics.of_clients(
      metrics.Rows(
        reported=reported,
        finite=finite | ~jnp.asarray(cohort.valid),
        weight=reported.astype(jnp.float32),
        work=work,
        metrics={**trained, **more},
        bytes_up=up[:, None],
        # The answer comes after the uploads, to those who sent one.
        bytes_down=jnp.where(cohort.valid, down, 0)[:, None],
        reports=None,
        places=work.turns * _places(cohort.batches),
      ),
      cohort,
    )
    step = {'server/step_norm': tree.norm(tree.sub(new, state.params))}
    info = info._replace(metrics={**info.metrics, **at_server, **step})
    new = state._replace(params=new, round=number + 1)
    return new, states, info

  def exchanged(params: Params, base: Base, batches: Any) -> tuple[int, int]:
    """Returns the bytes of the messages, of the member that sends most."""
    del params, batches
    both = [m.sizes(base, jnp.int32(0)) for m in members]
    return max(int(up) for up, _ in both), max(int(down) for _, down in both)

  return FederatedAlgorithm(
    init=init,
    init_client=init_client,
    round=round,
    personal=lambda params, state: params,
    exchanged=exchanged,
  )


def client_params(start: Params, kept: Kept) -> Params:
  """Returns the parameters of one client.

  Args:
    start: of a new client of its architecture.
    kept: `ClientState.local`.

  >>> start = {'w': jnp.zeros(2)}
  >>> flat = jnp.array([3.0, 4.0, 0.0])
  >>> [client_params(start, Kept(took, flat))['w'].tolist()
  ...  for took in (False, True)]
  [[0.0, 0.0], [3.0, 4.0]]
  """
  if not bool(kept.took):
    return start
  trained = tree.select(start, scopes.everything().labels(start), Shared)
  return tree.merge(_unpacked(jnp.asarray(kept.flat), trained), start)


def _groups(cohort: Cohort, num: int, who: str) -> jax.Array:
  """Returns the architecture of each client, [K] int32."""
  if num == 1:
    return jnp.zeros(len(cohort.ids), jnp.int32)
  profiles = cohort.profiles
  if 'group' not in (profiles or {}):
    raise Error(
      f'{who} has {num} architectures and needs the group of each client in '
      'its profile: use the section client_models.'
    )
  return jnp.asarray(profiles['group'], jnp.int32)


def _packed(trained: Params, size: int) -> jax.Array:
  flat = [x.astype(jnp.float32).ravel() for x in jax.tree.leaves(trained)]
  whole = jnp.concatenate(flat)
  return jnp.pad(whole, (0, size - whole.size))


def _unpacked(flat: jax.Array, like: Params) -> Params:
  leaves, structure = jax.tree.flatten(like)
  new, at = [], 0
  for leaf in leaves:
    part = flat[at : at + leaf.size]
    new.append(part.reshape(leaf.shape).astype(leaf.dtype))
    at += leaf.size
  return jax.tree.unflatten(structure, new)


def _places(batches: Any) -> int:
  """Returns the token places of one step of one client; 0 without texts."""
  texts = batching.texts(batches) if batching.kinds(batches) else []
  return sum(x.tokens.shape[-2] * x.tokens.shape[-1] for x in texts)
