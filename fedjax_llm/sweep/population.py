"""Trains runs that differ only in numbers as one program.

    states [P, ...], cohorts [U, K, ...] of U <= P kinds, numbers [P]

P members of a population, each with its own seed, clients and settings: one
`vmap` over members around the round of `fed_opt`. The base has no axis of
members, so its products stay one GEMM over members and clients.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import batching, data, tree
from fedjax_llm.run import blocks, costs, metrics, narration, rates
from fedjax_llm.run.experiment import Experiment
from fedjax_llm.sweep import folder as folders
from fedjax_llm.sweep import groups, texts
from fedjax_llm.types import Draw

Step = Callable[..., tuple[Any, Mapping[str, jax.Array]]]

_pick = jax.jit(tree.take)
_sound = jax.jit(jax.vmap(tree.all_finite))


class Population(NamedTuple):
  """A group that is prepared for training, in parts that train at once."""

  lead: Experiment  # provides the method for all members
  fields: Sequence[str]  # numbers of the method in which members differ
  parts: Sequence[Sequence[groups.Member]]
  num_kinds: int  # U: members of a part on different texts, at most
  length: int  # T, the same for all cohorts
  bounds: Sequence[int | None]  # `batching.bounded` of all cohorts
  block_size: int | None
  step: Step
  examine: Mapping[int, Callable[..., dict[str, Any]]]  # by id of `built`


def ready(
  group: groups.Group,
  likelihoods: dict[Any, Callable[..., Any]],
  at_once: int | None = None,
) -> Population:
  """Returns the `Population` of a group.

  Args:
    group: runs that can train together.
    likelihoods: evaluation programs, shared with other groups.
    at_once: the number of members of a part; None: see `num_at_once`.
  """
  members = group.members
  lead = groups.lead(members)
  block_size = lead.block_size()
  size = at_once or num_at_once(group, lead, block_size)
  num_parts = -(-len(members) // size)
  size = -(-len(members) // num_parts)  # parts of even size
  parts = [members[i : i + size] for i in range(0, len(members), size)]
  builds = list({id(m.built): m.built for m in members}.values())
  width = max(built.width for built in builds)
  tests = texts.alike([b._replace(width=width).tests() for b in builds])
  key = id(lead.loaded)
  if key not in likelihoods:
    likelihoods[key] = lead.likelihood()
  examine = {
    id(built): built.examiner(
      lead.method(), tests=test, together=likelihoods[key]
    )
    for built, test in zip(builds, tests)
  }
  return Population(
    lead=lead,
    fields=group.fields,
    parts=parts,
    num_kinds=max(len({id(m.built) for m in part}) for part in parts),
    length=max(batching.width(m.cohort.batches) for m in members),
    bounds=batching.most([m.cohort.batches for m in members]),
    block_size=block_size,
    step=program(lead, block_size),
    examine=examine,
  )


def program(lead: Experiment, block_size: int | None) -> Step:
  """Returns the round of all members, compiled once.

  `step(values, states, cohorts, kind, base) -> (states, info)`: `values` are
  numbers [P] by field, and member p trains on row `kind[p]` of `cohorts`.
  """

  def step(values, states, cohorts, kind, base):
    def member(values, state, at):
      # Built while it is traced: the numbers are then inputs of the program.
      method = lead.method(block_size, conf=groups.put(lead.conf, values))
      # The states of clients hold no arrays here; their structure may be deep.
      cohort = tree.take(cohorts, at)
      cohort = cohort._replace(states=method.init_client(state.params))
      state, _, info = method.round(state, cohort, base)
      return state, info

    return jax.vmap(member)(values, states, kind)

  return jax.jit(step, donate_argnums=1)


def num_at_once(
  group: groups.Group, lead: Experiment, block_size: int | None
) -> int:
  """Returns the number of members that train at once, within half the memory.

  Matrix products with more rows than the limit of `run.blocks` gain nothing:
  on two CPU cores a round of 32 members of 2,048 rows each took 1.4 times the
  processor time of 32 rounds of one, which share the compiled program as well
  (2026-11-22).
  """
  first, num = group.members[0], len(group.members)
  if groups.writes_base(first):
    return 1  # or every member would need a base of its own
  num_clients, steps, places = batching.axes(first.cohort.batches)
  together = min(block_size or num_clients, num_clients)
  size = blocks.rule(together * places, num)
  limit = blocks.memory()
  if limit is None or size == 1:
    return size
  method = lead.method(block_size)
  key, params = first.built.round_key, first.built.initial
  state = jax.eval_shape(method.init, key, params)
  # Without private state: it has no leaf.
  newcomer = jax.eval_shape(method.init_client, state.params)
  cohort = first.cohort._replace(states=newcomer)
  trace = jax.make_jaxpr(method.round)(state, cohort, lead.base)
  each = costs.of(trace, trips=steps).temporary
  each += 2 * costs.num_bytes(state) + costs.num_bytes(cohort)
  fits = (limit / 2 - costs.num_bytes(lead.base)) // each
  return max(min(size, int(fits)), 1)


def train(
  population: Population,
  part: Sequence[groups.Member],
  folder: folders.Folder,
  bar: metrics.Progress,
  done: int,
) -> int:
  """Trains a part; its runs are written when all of them have ended.

  The metrics equal those of `train` for each run, up to rounding; a time is the
  run's share. A run that diverges ends early, and the others go on.

  Args:
    population: the population of the part.
    part: the members to train.
    folder: the folder of the sweep, with one folder for each run.
    bar: the progress bar, which counts the rounds of all runs.
    done: the number of rounds that were done before.

  Returns:
    The number of rounds done, those before included.
  """
  began = time.monotonic()
  lead, share = population.lead, len(part)
  settings, test = lead.settings, lead.test
  values, states, builds, kind = _begin(population, part)
  rounds: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in part]
  ended: dict[int, folders.Outcome] = {}
  rates_of = [member.built.rates(member.run.conf) for member in part]

  def examined(i: int) -> dict[str, Any]:
    built = part[i].built
    return population.examine[id(built)](
      lead.base, _pick(states.params, i), None, built.round_key
    )

  def assembled(number: int) -> tuple[list[Draw], Any]:
    pairs = [built.assemble(number) for built in builds]
    stack = texts.stacked(
      [cohort for _, cohort in pairs],
      population.num_kinds,
      population.length,
      population.bounds,
    )
    return [draw for draw, _ in pairs], jax.device_put(stack)

  ready = time.monotonic()
  for i in range(share):
    start = time.monotonic()
    rounds[i].append((0, examined(i)))
    rounds[i][-1][1]['time/setup'] = (ready - began) / share
    rounds[i][-1][1]['time/evals'] = time.monotonic() - start
  following = assembled(0)
  for number in range(1, settings.num_rounds + 1):
    start = time.monotonic()
    draws, cohorts = following
    states, on_device = population.step(
      values, states, cohorts, kind, lead.base
    )
    # The next cohorts are made and transferred while the device computes.
    sent = time.monotonic()
    if number < settings.num_rounds:
      following = assembled(number)
    prepared = time.monotonic()
    on_host = jax.device_get(on_device)
    sound = jax.device_get(_sound(states.params))
    each = (time.monotonic() - start) / share
    tested = number % test.every == 0 or number == settings.num_rounds
    losses, tokens = [], 0.0
    for i, member in enumerate(part):
      if i in ended:
        continue
      info = tree.take(on_host, i)
      one = metrics.summarise(info)
      draw, names = draws[kind[i]], member.built.names
      try:
        one, note = narration.left_out(one, info, draw, names, number)
        if not sound[i]:
          raise narration.Diverged(narration.not_finite(number))
      except narration.Diverged as diverged:
        ended[i] = folders.Outcome(number - 1, str(diverged))
        bar.write(f'{member.run.name} ended: {diverged}')
        continue
      if note:
        bar.write(f'{member.run.name}: {note}')
      one |= rates_of[i](number, rates.num_steps(cohorts.batches, 2))
      losses.append(one['local/loss'])
      tokens += one['local/tokens']
      start_of = time.monotonic()
      if tested:
        one |= examined(i)
      one |= {
        'time/data': (prepared - sent) / share,
        'time/round': each - (prepared - sent) / share,
        'time/evals': time.monotonic() - start_of,
        'time/tokens_per_second': one['local/tokens'] / each,
      }
      rounds[i].append((number, one))
    loss = float(np.mean(losses)) if losses else float('nan')
    bar.update(done + number * share, loss, tokens / (each * share))
  for i, member in enumerate(part):
    last = folders.Outcome(settings.num_rounds)
    if folders.outcome(folder, member.run) is None:
      sizes = data.population.sizes(member.built.population)
      sizes = {**sizes, 'unit': member.built.task.metrics.unit}
      folders.write(folder, member.run, rounds[i], ended.get(i, last), sizes)
  return done + settings.num_rounds * share


def _begin(
  population: Population, part: Sequence[groups.Member]
) -> tuple[dict[str, np.ndarray], Any, list[Experiment], np.ndarray]:
  """Returns numbers [P], states [P, ...], experiments and their indices [P].

  The experiments are those on different texts; the indices assign one to each
  member. A smaller part is padded with its last member.
  """
  most = len(population.parts[0])
  full = [*part, *[part[-1]] * (most - len(part))]
  builds = list({id(m.built): m.built for m in part}.values())
  place = {id(built): i for i, built in enumerate(builds)}
  kind = np.array([place[id(m.built)] for m in full], np.int32)
  values = {
    f: np.array([groups.value(m.run, f) for m in full], np.float32)
    for f in population.fields
  }
  method = lambda m: m.built.method(population.block_size, conf=m.run.conf)
  states = tree.stack(
    [method(m).init(m.built.round_key, m.built.initial) for m in full]
  )
  return values, states, builds, kind
