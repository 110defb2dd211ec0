"""Shared parts of the trends: clients, compiled programs, held-out loss.

All random choices of a run (roles, held-out texts, batches, initial factors)
are drawn from its seed, so two methods with one seed are a pair. Numbers that
are swept (rates, noise, ranks, local steps) are arguments of the compiled
round: a method is compiled once for all its settings and seeds.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import base as bases

import fedjax_llm as fl
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Cohort, FederatedAlgorithm, Params, Population

WIDTH = 64  # bytes of a row
TUNING = 1_000  # a seed for tuning, used in no result

# (numbers of a setting) -> the algorithm; the numbers may be traced.
Make = Callable[[Mapping[str, Any]], FederatedAlgorithm]


class Bench(NamedTuple):
  """The base model of all runs, and whether this is a small test run."""

  model: fl.models.LoadedModel
  smoke: bool
  say: Callable[[str], None]

  @property
  def base(self) -> Any:
    return self.model.base

  def loss(self) -> Any:
    return fl.local.causal_lm(self.model.model, chunk_size=4096)

  def adapter(self, seed: int, rank: int, alpha: float = 16.0) -> Params:
    """Draws LoRA factors for every matrix of the layers."""
    make = fl.adapters.lora(rank=rank, alpha=alpha, targets='all-linear')
    return make.init(jax.random.key(seed), self.base)


def bench(smoke: bool = False, say: Callable[[str], None] = print) -> Bench:
  return Bench(bases.pretrained(smoke, say), smoke, say)


# ------------------------------------------------------------------ clients --


@functools.cache
def people(
  seed: int, num_clients: int, partition: str = 'natural'
) -> Population:
  """Draws roles of Shakespeare by seed, with cues and speeches as text."""
  records = [
    Record(client=r.client, text=f'{r.prompt}\n{r.response}')
    for r in fl.data.sources.packaged()
  ]
  build = functools.partial(
    fl.data.population.build,
    tokenizer=fl.data.tokenizers.bytes(),
    max_length=WIDTH,
    seed=seed,
  )
  chosen = build(records, max_clients=num_clients)
  if partition == 'natural':
    return chosen
  ours = [r for r in records if r.client in chosen.names]
  return build(ours, partition=fl.data.partition.iid(num_clients))


def assembler(
  people: Population, seed: int, *, steps: int, rows: int = 1, profiles=None
) -> Callable[[int], Cohort]:
  """Returns a function from rounds to cohorts: all clients, equal weights."""
  make = fl.clients.cohorts.cohorts(
    people.train,
    num_steps=steps,
    batch_size=rows,
    max_length=WIDTH,
    packing=True,
    weight_by='uniform',
    seed=seed,
    profiles=profiles,
  )
  draw = fl.clients.sampling.full(len(people.names))
  return lambda round: make(draw(round), round)


def shortened(cohort: Cohort, steps: int) -> Cohort:
  """Keeps the first local steps; the others become padding.

  The shapes do not change, so one program serves any number of steps.
  """

  def cut(x):
    x = x.copy()
    x[:, steps:] = 0
    return x

  return cohort._replace(batches=jax.tree.map(cut, cohort.batches))


# ----------------------------------------------------------------- programs --


class Program(NamedTuple):
  """The compiled functions of a method.

  `init(numbers, seed, params) -> (state, states [K])`;
  `round(numbers, state, cohort, base) -> (state, states, metrics)`.
  """

  init: Callable[..., Any]
  round: Callable[..., Any]


def program(make: Make, num_clients: int) -> Program:
  def init(numbers, seed, params):
    algorithm = make(numbers)
    state = algorithm.init(jax.random.key(seed), params)
    newcomer = algorithm.init_client(state.params)
    return state, fl.tree.broadcast(newcomer, num_clients)

  @jax.jit
  def round(numbers, state, cohort, base):
    return make(numbers).round(state, cohort, base)

  return Program(init, round)


def adamw(rate: Any) -> Any:
  return fl.local.optimizer('adamw', rate, weight_decay=0.0)


def train(
  method: Program,
  numbers: Mapping[str, Any],
  params: Params,
  cohort_of: Callable[[int], Cohort],
  base: Any,
  *,
  rounds: int,
  seed: int,
) -> tuple[Any, Any, list[dict[str, Any]]]:
  """Trains; returns the server's state, client states and rounds' metrics."""
  numbers = {k: jnp.float32(v) for k, v in numbers.items()}
  state, states = method.init(numbers, seed, params)
  records = []
  for number in range(rounds):
    cohort = cohort_of(number)._replace(states=states)
    state, states, metrics = method.round(numbers, state, cohort, base)
    records.append(jax.device_get(metrics))
  return state, states, records


def tester(bench: Bench) -> Callable[[Params | None, Population], float]:
  """Returns a function for the loss on training clients' held-out texts.

  In nats a byte.
  """
  loss = fl.local.causal_lm(bench.model.model, chunk_size=4096, per_row=True)
  evaluate = fl.evals.likelihood(loss)
  merge = jax.jit(fl.adapters.merge)

  def test(params, people):
    texts = (
      [own[:2] for own in people.heldout] if bench.smoke else people.heldout
    )
    rows = fl.clients.cohorts.rows(texts, batch_size=16, max_length=WIDTH)
    groups = [(group.batches, group.owners) for group in rows]
    base = bench.base if params is None else merge(bench.base, params)
    report = evaluate(base, {}, groups, jax.random.key(0))
    return report.metrics['evals/heldout/loss']

  return test


def tuned(
  run: Callable[[float, int], float], rates: Sequence[float]
) -> tuple[float, dict[str, float]]:
  """Returns the best rate for the tuning seed, and the loss of each rate."""
  losses = {rate: run(rate, TUNING) for rate in rates}
  clean = {r: v if np.isfinite(v) else np.inf for r, v in losses.items()}
  return min(clean, key=clean.__getitem__), {
    f'{r:g}': v for r, v in losses.items()
  }
