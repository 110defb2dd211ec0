"""The audits of `scripts/audit`: claims of privacy against attacks.

Clients are roles of Shakespeare with a dozen texts each, and a secret that each
repeats. Every model trains on a random half of the clients; a client is in half
of the models, so that models with and without it exist (LiRA). The kinds differ
in the rule of the server alone: a mean, or client-level privacy with epsilon.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from trust import cells

import fedjax_llm as fl
from fedjax_llm import data, privacy, tree
from fedjax_llm.adversary import poisoning
from fedjax_llm.evals import audits
from fedjax_llm.privacy import audit
from fedjax_llm.run import evaluators
from fedjax_llm.types import Draw, Example

KINDS: Mapping[str, float | None] = {
  'no privacy': None,
  'epsilon 8': 8.0,
  'epsilon 1': 1.0,
}
CLIP, DELTA = 0.5, 1e-2
TEXTS = 12  # of a client, a third of them held out
SECRETS = {'name': 'canaries', 'num': 1, 'repeats': 4, 'fraction': 1.0}
CANARIES, MADE, ROUNDS = 128, 96, 4  # of the audit in one run
SMALL = 1e-5  # its delta


@functools.cache
def roles() -> Sequence[data.Record]:
  """Returns the first texts of each role, a source of a config."""
  seen: Counter[str] = Counter()
  kept = []
  for record in data.sources.packaged():
    seen[str(record.client)] += 1
    if seen[str(record.client)] <= TEXTS:
      kept.append(record)
  return kept


class Room(NamedTuple):
  """The experiment that all models share, with its texts."""

  built: Any
  train: Any  # the compiled first half of a round
  score: Any  # (params, texts) -> log-likelihoods of the learned tokens


@functools.cache
def room(smoke: bool) -> Room:
  """Returns the room."""
  sections = {
    'data': {'name': 'trust.audits:roles'},
    'poison': SECRETS,
    'population': {
      'template': 'plain',
      'max_length': 64,
      'long_replies': 'cut',
      'max_clients': cells.CLIENTS,
      'min_examples': TEXTS // 2,
      'heldout_fraction': 0.34,
      'new_clients': 0,
    },
  }
  built = cells._built(0, 1, sections, smoke)
  method = built.method()
  assert method.train is not None
  program = jax.jit(audits.tokens(built.loaded.model))
  texts = [x for own in built.owned for x in own]
  collate = built.task.collate(texts, 64, built.tokenizer.pad_id)

  def score(params, some: Sequence[Example]) -> list[np.ndarray]:
    result = []
    for start in range(0, len(some), 32):
      part = list(some[start : start + 32])
      rows = [[x] for x in part] + [[]] * (32 - len(part))
      nats, _ = jax.device_get(program(built.base, params, collate(rows)))
      for row, text in zip(nats, part):
        mask = np.array(text.loss_mask, bool)
        mask[0] = False
        result.append(row[: len(mask)][mask].astype(np.float64))
    return result

  return Room(built, jax.jit(method.train), score)


def halves(models: int) -> np.ndarray:
  """Returns which clients are in which model, [models, clients] bool."""
  rng, rows = np.random.default_rng(11), []
  for _ in range(models // 2):
    one = rng.permutation(cells.CLIENTS) < cells.CLIENTS // 2
    rows += [one, ~one]
  return np.array(rows)


def rule_of(
  epsilon: float | None, clients: int, rounds: int, delta: float = DELTA
) -> Any:
  """Returns the server's rule: all clients take part in all rounds."""
  if epsilon is None:
    return fl.aggregators.uniform_mean()
  return privacy.client_level(
    clip=CLIP, delta=delta, epsilon=epsilon, rate=1.0, num_clients=clients,
    num_rounds=rounds,
  ).rule()  # fmt: skip


def method_of(rule: Any) -> Any:
  """Returns federated averaging by a rule, for its second half."""
  unused: Any = None
  return fl.recipes.fed_avg(
    unused, fl.local.optimizer('sgd', 1.0), aggregator=rule, measure=None
  )


class Trained(NamedTuple):
  """A model, and what its clients sent in the last round."""

  params: Any
  start: Any  # of the last round
  sent: Any  # uploads [K, ...]
  ids: np.ndarray


def trained(
  smoke: bool, present: np.ndarray, rule: Any, rounds: int, seed: int
):
  """Returns the `Trained` of one model."""
  built, train, _ = room(smoke)
  method = method_of(rule)
  ids = np.flatnonzero(present).astype(np.int32)
  draw = Draw(ids=ids, reports=np.ones(len(ids), bool))
  state = method.init(jax.random.key(seed), built.initial)
  mean = built.method()
  of_mean = mean.init(state.key, built.initial).aggregator
  states = tree.broadcast(mean.init_client(built.initial), len(ids))
  aggregate = jax.jit(method.aggregate)
  start, sent = state.params, None
  for number in range(rounds):
    cohort = built.make_cohort(draw, number)._replace(states=states)
    start = state.params
    sent, _, _ = train(state._replace(aggregator=of_mean), cohort, built.base)
    state, _ = aggregate(state, sent, built.base)
  return Trained(state.params, start, sent, ids)


def figures(smoke: bool, model: Trained, present: np.ndarray) -> dict[str, Any]:
  """Returns what the attacks on one model reach."""
  built, _, score = room(smoke)
  own = [k for k in range(len(present)) if present[k]]
  inside = [x for k in own for x in built.owned[k]]
  outside = [x for k in own for x in built.population.heldout[k]]
  result: dict[str, Any] = {}
  nats = {
    side: (score(model.params, texts), score(built.initial, texts))
    for side, texts in (('in', inside), ('out', outside))
  }
  values = {
    'loss': lambda new, old: new.mean(),
    'ratio': lambda new, old: new.mean() - old.mean(),
    'Min-K%': lambda new, old: audits.min_k(new),
  }
  for name, value in values.items():
    sides = [list(map(value, *nats[side])) for side in ('in', 'out')]
    result[f'membership, {name}'] = audits.separation(*sides).auc
  # Each client's own adapter, against the global one, on the same texts.
  for name in ('global', 'personal'):
    sides = [[], []]
    for row, k in enumerate(model.ids.tolist()):
      update = tree.take(model.sent.update, row)
      params = model.params if name == 'global' else tree.merge(
        tree.add(tree.like(model.start, update), update), model.start
      )  # fmt: skip
      for side, texts in zip(
        sides, (built.owned[k], built.population.heldout[k])
      ):
        side += [x.mean() for x in score(params, texts)]
    result[f'membership, loss, {name} adapter'] = audits.separation(*sides).auc
  # Greedy decoding is not needed: a text is completed if each of its last
  # tokens is the likeliest one, so its log-likelihood is above -log 2.
  tails = lambda side: np.mean([(x[-4:] > -np.log(2)).all() for x in side])
  result['extraction, texts of members'] = float(tails(nats['in'][0]))
  result['extraction, held-out texts'] = float(tails(nats['out'][0]))
  plant = poisoning.canaries(
    num=1, repeats=4, fraction=1.0, num_clients=cells.CLIENTS
  )
  encoding = data.encoding.Encoding(built.tokenizer, 'plain', 64, 'cut')
  encode = lambda record: built.task.encode(record, encoding).examples[0]
  secrets = [encode(plant.planted(k)[0]) for k in range(cells.CLIENTS)]
  others = [encode(x) for x in plant.others(255)]
  total = lambda texts: [x.sum() for x in score(model.params, texts)]
  rest = total(others)
  bits = [audits.exposure(x, rest) for x in total(secrets)]
  result['exposure, secrets of members, bits'] = float(
    np.mean(np.array(bits)[present])
  )
  result['exposure, secrets of others, bits'] = float(
    np.mean(np.array(bits)[~present])
  )
  every = [x for texts in built.owned for x in texts]
  result['_scores'] = [float(x.mean()) for x in score(model.params, every)]
  return result


def lira(scores: np.ndarray, present: np.ndarray, owner: np.ndarray):
  """Returns the area under the curve of LiRA, one a model.

  Args:
    scores: [models, texts].
    present: [models, clients] bool.
    owner: [texts], the client of each text.
  """
  there = present[:, owner]
  # What a model gains on all texts says nothing about single ones.
  scores = scores - scores.mean(1, keepdims=True)
  result = []
  for target in range(len(scores)):
    rest = np.arange(len(scores)) != target
    values = [
      audits.lira(
        scores[target, i],
        scores[rest, i][there[rest, i]],
        scores[rest, i][~there[rest, i]],
        floor=0.02,
      )
      for i in range(scores.shape[1])
    ]
    inside = there[target]
    values = np.array(values)
    result.append(audits.separation(values[inside], values[~inside]).auc)
  return result


def owners(smoke: bool) -> np.ndarray:
  """Returns the client of each training text."""
  owned = room(smoke).built.owned
  return np.repeat(np.arange(len(owned)), [len(own) for own in owned])


def inversion(smoke: bool) -> dict[str, float]:
  """Returns the tokens recovered from one gradient, before any training."""
  built = room(smoke).built
  examine = evaluators.build(
    [{'name': 'inversion', 'num_texts': 8, 'num_tokens': 4}],
    built=built,
    algorithm=built.method(),
    loss=built.task.loss(built.loaded, per_row=True),
  )
  values = examine(built.base, built.initial, None, built.round_key)
  return {name.split('/')[-1]: value for name, value in values.items()}


def one_run(
  smoke: bool, epsilon: float | None, seed: int
) -> tuple[audit.Guesses, float]:
  """Audits a claim in one run; returns the guesses and their lower bound.

  Beside ten roles that train, each of 128 canaries takes part by a coin, with
  an update of the clip norm in a random direction of its own in every round.
  The auditor sees the sums of all rounds. Without epsilon the noise is left
  out, and nothing else.
  """
  built, train, _ = room(smoke)
  clients = 10 + CANARIES
  rule = rule_of(epsilon, clients, ROUNDS, SMALL)
  if epsilon is None:
    rule = privacy.noisy_mean(CLIP, 0.0, float(clients))
  method = method_of(rule)
  state = method.init(jax.random.key(seed + 7700), built.initial)
  mean = built.method()
  of_mean = mean.init(state.key, built.initial).aggregator
  ids = np.arange(10, dtype=np.int32)
  draw = Draw(ids=ids, reports=np.ones(10, bool))
  states = tree.broadcast(mean.init_client(built.initial), 10)
  coins = np.random.default_rng((seed, 5)).random(CANARIES) < 0.5

  def directions(like):
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed + 4000), len(leaves))
    drawn = [
      jax.random.normal(k, (CANARIES, *x.shape)) for k, x in zip(keys, leaves)
    ]
    stack = jax.tree.unflatten(treedef, drawn)
    size = jax.vmap(tree.norm)(stack)
    return jax.tree.map(
      lambda x: CLIP * x / size.reshape(-1, *[1] * (x.ndim - 1)), stack
    )

  @jax.jit
  def step(state, sent):
    canary = directions(tree.take(sent.update, 0))
    join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)])
    sent = sent._replace(
      update=jax.tree.map(join, sent.update, canary),
      weight=jnp.concatenate([sent.weight, jnp.ones(CANARIES)]),
      valid=jnp.concatenate([sent.valid, jnp.asarray(coins)]),
      ids=jnp.concatenate([sent.ids, 100 + jnp.arange(CANARIES)]),
      masks=jax.tree.map(
        lambda m: jnp.concatenate([m, jnp.repeat(m[:1], CANARIES, 0)]),
        sent.masks,
      ),
    )
    new, _ = method.aggregate(state, sent, built.base)
    change = jax.tree.map(
      lambda n, o, _: n - o,
      tree.like(new.params, canary), tree.like(state.params, canary), canary,
    )  # fmt: skip
    dots = jax.tree.map(
      lambda c, x: jnp.tensordot(c, x, x.ndim), canary, change
    )
    return new, sum(jax.tree.leaves(dots))

  total = np.zeros(CANARIES)
  for number in range(ROUNDS):
    cohort = built.make_cohort(draw, number)._replace(states=states)
    sent, _, _ = train(state._replace(aggregator=of_mean), cohort, built.base)
    state, dots = step(state, sent)
    total += np.asarray(dots, np.float64)
  guesses = audit.guesses(total, coins, MADE)
  return guesses, audit.epsilon_lower_bound(guesses, delta=SMALL)
