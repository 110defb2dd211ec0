"""Evaluators of attacks on a model: what a run has leaked, or been taught.

Their builders are named in `evals.evaluators` of a config, such as
`[{'name': 'likelihood'}, {'name': 'membership'}]`. The figures are those of
`evals.audits`, of the parameters that the server serves; where clients keep
parameters of their own, also of each client's model on its own texts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_llm import evals, tree
from fedjax_llm.data import encoding
from fedjax_llm.evals import audits
from fedjax_llm.run import builders, config, poisoned
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import (
  Error,
  Evaluator,
  Example,
  FederatedAlgorithm,
  Loss,
  Model,
  Population,
)

__all__ = ['attack_success', 'exposure', 'extraction', 'membership']


class Scored(NamedTuple):
  """The learned tokens of one text under a model."""

  nats: np.ndarray  # [n] float64, log-likelihoods
  correct: np.ndarray  # [n] bool, greedy decoding writes this token


def membership(
  built: Any,
  algorithm: FederatedAlgorithm,
  model: Model,
  *,
  private: bool = False,
  num_texts: int = 64,
  share: float = 0.2,
  rate: float = 0.01,
) -> Evaluator:
  """Returns the audit of membership: are training texts told from others?

  `num_texts` training texts and as many held-out ones, in turn of the clients,
  are separated by three scores: the mean log-likelihood ('loss'), its gain over
  the base model ('ratio'), and Min-K% of the share `share` ('min_k'). The
  metrics are 'evals/membership/loss_auc', its half interval 'loss_margin', and
  'loss_tpr', the share of members found at the false positive rate `rate`
  (`audits.separation`), and so on; 'evals/membership/personal/...' with the
  model of each client that has trained.

  Raises:
    Error: `num_texts` below 2; a task without texts, no held-out texts.
  """
  _at_least('membership', 'num_texts', num_texts, 2)
  members = _texts('membership', built.owned, num_texts)
  people: Population = built.population
  others = _texts('membership', people.heldout, num_texts)
  if not members or not others:
    raise Error(
      f'membership compares {len(members)} training texts with {len(others)} '
      'held-out ones: population.heldout_fraction must be above 0.'
    )
  score = _scorer(built, model, [x for _, x in [*members, *others]])

  def figures(base, models, name, pairs) -> dict[str, float]:
    """Returns metrics of models, one a group of (owner, text) on both sides."""
    scores: dict[str, list[list[float]]] = {}
    for side in (0, 1):
      for params, sides in zip(models, pairs, strict=True):
        texts = [x for _, x in sides[side]]
        before, now = score(base, {}, texts), score(base, params, texts)
        for old, new in zip(before, now):
          one = {
            'loss': new.nats.mean(),
            'ratio': new.nats.mean() - old.nats.mean(),
            'min_k': audits.min_k(new.nats, share),
          }
          for kind, value in one.items():
            scores.setdefault(kind, [[], []])[side].append(float(value))
    metrics: dict[str, float] = {}
    for kind, (inside, outside) in scores.items():
      result = audits.separation(inside, outside, rate=rate)
      for field, value in result._asdict().items():
        metrics[f'evals/{name}/{kind}_{field}'] = value
    return metrics

  def evaluate(base, params, store, key):
    del key
    served = algorithm.personal(params, None)
    metrics = figures(base, [served], 'membership', [(members, others)])
    ids = store.seen() if private else ()
    own, groups = [], []
    for client in ids:
      sides = tuple([p for p in x if p[0] == client] for x in (members, others))
      if any(sides):
        one = jax.tree.map(jax.numpy.asarray, store.gather([client]))
        own.append(algorithm.personal(params, tree.take(one, 0)))
        groups.append(sides)
    both = all(any(sides[i] for sides in groups) for i in (0, 1))
    if groups and both:
      metrics |= figures(base, own, 'membership/personal', groups)
    return metrics

  return evaluate


def extraction(
  built: Any,
  algorithm: FederatedAlgorithm,
  model: Model,
  *,
  num_texts: int = 64,
  num_tokens: int = 8,
) -> Evaluator:
  """Returns the audit of extraction: training texts that the model completes.

  A text counts if greedy decoding after all but its last `num_tokens` learned
  tokens writes exactly these (k-extractable: Carlini et al. 2023, arXiv
  2202.07646, definition 3.1). 'evals/extraction/trained' is the share of
  training texts, 'evals/extraction/heldout' that of held-out texts, which is
  what the language alone makes predictable; texts with fewer learned tokens are
  left out.

  Raises:
    Error: a number below 1; a task without texts; every text is too short.
  """
  _at_least('extraction', 'num_texts', num_texts, 1)
  _at_least('extraction', 'num_tokens', num_tokens, 1)
  long = lambda own: [x for x in own if _learned(x).sum() >= num_tokens]
  sides = {
    'trained': [long(own) for own in built.owned],
    'heldout': [long(own) for own in built.population.heldout],
  }
  texts = {
    name: [x for _, x in _texts('extraction', side, num_texts)]
    for name, side in sides.items()
  }
  texts = {name: some for name, some in texts.items() if some}
  if 'trained' not in texts:
    raise Error(
      f'extraction: no training text has num_tokens={num_tokens} learned '
      'tokens.'
    )
  score = _scorer(built, model, [x for some in texts.values() for x in some])

  def evaluate(base, params, store, key):
    del store, key
    served = algorithm.personal(params, None)
    return {
      f'evals/extraction/{name}': float(
        np.mean(
          [x.correct[-num_tokens:].all() for x in score(base, served, some)]
        )
      )
      for name, some in texts.items()
    }

  return evaluate


def exposure(
  built: Any,
  algorithm: FederatedAlgorithm,
  model: Model,
  *,
  num_references: int = 255,
) -> Evaluator:
  """Returns the audit of planted secrets: `audits.exposure`, in bits.

  The config plants them with `poison.name=canaries`. 'evals/exposure/mean' and
  'evals/exposure/most' are over all secrets; their bound is log2 of
  `num_references` + 1.

  Raises:
    Error: no secrets are planted; `num_references` below 1.
  """
  _at_least('exposure', 'num_references', num_references, 1)
  poison = _poison('exposure', built, 'planted', 'canaries')
  planted = [x for k in poison.clients.tolist() for x in poison.planted(k)]
  references = poison.others(num_references)
  if not planted:
    raise Error('exposure: no client has a secret: poison.fraction is too low.')
  texts = [_encoded(built, x) for x in [*planted, *references]]
  score = _scorer(built, model, texts)

  def evaluate(base, params, store, key):
    del store, key
    served = algorithm.personal(params, None)
    values = [x.nats.sum() for x in score(base, served, texts)]
    some, rest = values[: len(planted)], values[len(planted) :]
    bits = [audits.exposure(value, rest) for value in some]
    return {
      'evals/exposure/mean': float(np.mean(bits)),
      'evals/exposure/most': float(np.max(bits)),
    }

  return evaluate


def attack_success(
  built: Any,
  algorithm: FederatedAlgorithm,
  loss: Loss,
  *,
  num_texts: int = 64,
) -> Evaluator:
  """Returns the success rate of the backdoor in `poison` of the config.

  'evals/attack/success' is the share of held-out texts whose reply, with the
  trigger in the prompt, begins with the reply that the attack wants, under
  greedy decoding (or whose label is the wanted one); 'evals/attack/unprompted'
  is the share of the same texts without the trigger.

  Raises:
    Error: the config has no `poison` with a trigger; no held-out text can take
      the trigger; `num_texts` below 1.
  """
  _at_least('attack_success', 'num_texts', num_texts, 1)
  poison = _poison('attack_success', built, 'triggered', 'backdoor')
  wanted, plain = [], []
  for record in _heldout_records(built):
    one = poison.triggered(record, built.labels)
    if one is None or len(wanted) == num_texts:
      continue
    whole = built.task.encode(one, _encoding(built)).examples
    # The reply that the attack wants, after the prompt as it was.
    without = _untriggered(record, one)
    clean = built.task.encode(without, _encoding(built)).examples
    if whole and clean:
      wanted.append(whole[-1])
      plain.append(clean[-1])
  if not wanted:
    raise Error('attack_success: no held-out text can take the trigger.')
  program = jax.jit(loss)
  pad = _batches(built, [*wanted, *plain])

  def share(base, params, texts, key) -> float:
    hits = 0
    for batch, num in pad(texts):
      sums = jax.device_get(program(base, params, batch, key))
      right = (sums.count > 0) & (sums.correct == sums.count)
      hits += int(right[:num].sum())
    return hits / len(texts)

  def evaluate(base, params, store, key):
    del store
    served = algorithm.personal(params, None)
    return {
      'evals/attack/success': share(base, served, wanted, key),
      'evals/attack/unprompted': share(base, served, plain, key),
    }

  return evaluate


def _at_least(name: str, field: str, value: int, least: int) -> None:
  if value < least:
    raise Error(f'{name}: {field}={value} must be at least {least}.')


def _learned(example: Any) -> np.ndarray:
  mask = np.asarray(example.loss_mask, bool).copy()
  mask[:1] = False  # nothing comes before the first token
  return mask


def _texts(
  name: str, owned: Sequence[Sequence[Any]], num: int
) -> list[tuple[int, Example]]:
  """Returns `num` texts in turn of their owners, with the owners."""
  first = [x for own in owned for x in own[:1]]
  if not all(isinstance(x, Example) and x.label is None for x in first):
    raise Error(
      f'{name} scores the tokens of texts: it needs task.name=causal_lm.'
    )
  some = [[x for x in own if _learned(x).any()] for own in owned]
  shares = evals.in_turn(some, num)
  return [(k, x) for k, own in enumerate(shares) for x in own]


def _batches(built: Any, examples: Sequence[Any]) -> Callable[..., Any]:
  """Returns a function from texts to (batch, rows), all of one shape."""
  length, size = built.task.length, built.test.batch_size
  width = -(-max(map(length, examples)) // 8) * 8
  collate = built.task.collate(examples, width, built.tokenizer.pad_id)

  def batches(texts):
    for start in range(0, len(texts), size):
      some = list(texts[start : start + size])
      yield collate([[x] for x in some] + [[]] * (size - len(some))), len(some)

  return batches


def _scorer(
  built: Any, model: Model, examples: Sequence[Any]
) -> Callable[..., list[Scored]]:
  """Returns `score(base, params, texts) -> Scored of each`, one program."""
  program = jax.jit(audits.tokens(model))
  batches = _batches(built, examples)

  def score(base, params, texts):
    scores = []
    for at, (batch, num) in enumerate(batches(texts)):
      nats, right = jax.device_get(program(base, params, batch))
      for i in range(num):
        text = texts[at * len(nats) + i]
        mask = _learned(text)
        row = slice(0, len(mask))
        scores.append(
          Scored(nats[i, row][mask].astype(np.float64), right[i, row][mask])
        )
    return scores

  return score


def _poison(name: str, built: Any, field: str, wanted: str) -> Any:
  there = builders.named(built.conf.get('poison'))
  poison = None
  if built.conf.get('poison'):
    poison = poisoned.of(built.conf, len(built.population.names))
  if getattr(poison, field, None) is None:
    raise Error(
      f'{name} needs poison.name={wanted}, and poison.name is {there!r}.'
    )
  return poison


def _encoding(built: Any) -> encoding.Encoding:
  fields = config.resolved(built.conf, SPEC)['population']
  return encoding.Encoding(
    built.tokenizer,
    fields['template'],
    fields['max_length'],
    fields['long_replies'],
    built.labels,
  )


def _encoded(built: Any, record: Any) -> Any:
  examples = built.task.encode(record, _encoding(built)).examples
  if not examples:
    raise Error(
      'exposure: a secret does not fit into population.max_length='
      f'{_encoding(built).max_length}.'
    )
  return examples[0]


def _heldout_records(built: Any) -> list[Any]:
  """Returns the records of which the held-out examples were made."""
  how = _encoding(built)
  heldout = {
    encoding.content(x) for own in built.population.heldout for x in own
  }
  records = builders.build(built.conf['data'], SPEC.sections['data'])
  return [
    record
    for record in records
    if any(
      encoding.content(x) in heldout
      for x in built.task.encode(record, how).examples
    )
  ]


def _untriggered(record: Any, changed: Any) -> Any:
  """Returns a record with its own prompt and the changed one's reply."""
  if record.messages is None:
    return changed._replace(prompt=record.prompt, text=record.text)
  last = len(changed.messages) - 1
  return record._replace(
    messages=(*record.messages[:last], changed.messages[last])
  )
