"""What the trends share: clients, programs, held-out loss.

Everything that a run draws (which roles take part, held-out texts, batches,
initial factors) follows from its seed, so two methods of one seed are a pair.
Numbers that are swept (rates, noise, ranks, local steps) are arguments of the
compiled round: a method is compiled once for all its settings and seeds.
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
TUNING = 1_000  # a seed that is in no result

# (numbers of a setting) -> the algorithm; the numbers may be traced.
Make = Callable[[Mapping[str, Any]], FederatedAlgorithm]


class Bench(NamedTuple):
  """The base that all start from, and the size of a trial."""

  model: fl.models.LoadedModel
  smoke: bool
  say: Callable[[str], None]

  @property
  def base(self) -> Any:
    return self.model.base

  def loss(self) -> Any:
    return fl.local.causal_lm(self.model.model, chunk_size=4096)

  def adapter(self, seed: int, rank: int, alpha: float = 16.0) -> Params:
    """LoRA on every matrix of the layers."""
    make = fl.adapters.lora(rank=rank, alpha=alpha, targets='all-linear')
    return make.init(jax.random.key(seed), self.base)


def bench(smoke: bool = False, say: Callable[[str], None] = print) -> Bench:
  return Bench(bases.pretrained(smoke, say), smoke, say)


# ------------------------------------------------------------------ clients --


@functools.cache
def people(
  seed: int, num_clients: int, partition: str = 'natural'
) -> Population:
  """Roles of Shakespeare drawn by the seed: cues and speeches as plain text."""
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
  """Everybody takes part in every round, and all count the same."""
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
  """The first local steps only: the rest becomes padding, which costs nothing.

  The shapes stay, so one program serves any number of steps.
  """

  def cut(x):
    x = x.copy()
    x[:, steps:] = 0
    return x

  return cohort._replace(batches=jax.tree.map(cut, cohort.batches))


# ----------------------------------------------------------------- programs --


class Program(NamedTuple):
  """A method compiled once.

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
  """The server's state, the clients' states and the metrics of each round."""
  numbers = {k: jnp.float32(v) for k, v in numbers.items()}
  state, states = method.init(numbers, seed, params)
  told = []
  for number in range(rounds):
    cohort = cohort_of(number)._replace(states=states)
    state, states, metrics = method.round(numbers, state, cohort, base)
    told.append(jax.device_get(metrics))
  return state, states, told


def tester(bench: Bench) -> Callable[[Params | None, Population], float]:
  """Nats a byte on the held-out texts of those who train."""
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
    found = evaluate(base, {}, groups, jax.random.key(0))
    return found.metrics['evals/heldout/loss']

  return test


def tuned(
  run: Callable[[float, int], float], rates: Sequence[float]
) -> tuple[float, dict[str, float]]:
  """The rate with the least held-out loss on the roles of the tuning seed."""
  found = {rate: run(rate, TUNING) for rate in rates}
  clean = {r: v if np.isfinite(v) else np.inf for r, v in found.items()}
  return min(clean, key=clean.__getitem__), {
    f'{r:g}': v for r, v in found.items()
  }
