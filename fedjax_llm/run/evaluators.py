"""Evaluators: the evaluations that a config lists in `evals.evaluators`.

A builder returns an `Evaluator`: `(base, params, store, key) -> metrics`, where
`params` are the server's parameters, `store` has the clients' states
(`gather(ids) -> ClientState`, `seen() -> ids`) and metrics are numbers, or
numbers by client, named 'evals/...'. A user's builder is named by its import
path. It gets those of these keywords that its signature names:

    built        the run, an `experiment.Experiment`
    algorithm    its `FederatedAlgorithm`; `personal(params, None)` is served
    tests        its held-out examples, an `experiment.Tests`
    private      True if clients keep private parameters
    loss, model  the task's loss with sums for each row, [B]; the network
    together     the shared program of `likelihood`, or None
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedjax_llm import evals
from fedjax_llm.run import (
  auditing,
  benchmarks,
  builders,
  client_models,
  inverting,
  newcomers,
  viewing,
)
from fedjax_llm.types import Error, Evaluator, FederatedAlgorithm, Loss

# The keywords that the program fills in.
INJECTED = (
  *('built', 'algorithm', 'tests', 'private', 'loss', 'model', 'together'),
)


def likelihood(
  loss: Loss,
  built: Any,
  algorithm: FederatedAlgorithm,
  tests: Any,
  *,
  private: bool = False,
  together: Callable[..., Any] | None = None,
) -> Evaluator:
  """Returns the evaluator of held-out likelihood and accuracy: `evals.loop`."""
  people = built.population
  return evals.loop(
    loss,
    algorithm,
    heldout=tests.heldout,
    new=tests.new,
    common=tests.common,
    together=together,
    names=people.names,
    new_names=people.new_names,
    has_private=private,
    labelled=built.task.metrics.accuracies,
  )


def by_stage(
  loss: Loss,
  built: Any,
  algorithm: FederatedAlgorithm,
  *,
  private: bool = False,
  together: Callable[..., Any] | None = None,
) -> Evaluator:
  """Returns the evaluator of each stage of a run: `evals.continual`.

  Runs with a section `stages` have it without listing it.
  """
  stages, limit = built.stages, built.test.per_client
  if stages is None:
    raise Error(
      'evals.evaluators: by_stage evaluates the stages of a run: it needs the '
      'section stages.'
    )
  heldout = stages.heldout(built.population)
  texts = [[one[:limit] for one in own] for own in heldout]
  total = len(stages.names)
  together_by = [[x for own in texts for x in own[j]] for j in range(total)]
  apart_by = [one for own in texts for one in own] if private else []
  return evals.continual.by_stage(
    loss,
    algorithm,
    groups=built.rows(together_by),
    names=stages.names,
    owned=built.rows(apart_by) if private else (),
    together=together,
  )


def _through(name: str) -> Callable[..., Evaluator]:
  """Returns the builder of a view's evaluator, with the view's keywords."""

  def build(built, algorithm, tests, private, **keywords):
    section = {k: v for k, v in keywords.items() if k not in INJECTED}
    return viewing.viewer(
      *({'name': name, **section}, built, algorithm, tests), private=private
    )

  build.__name__ = name
  return builders.onward(build, getattr(evals.views, name))


# The names that a config may list.
EVALUATORS: Mapping[str, Callable[..., Evaluator]] = {
  'likelihood': likelihood,
  'by_stage': by_stage,
  **{name: _through(name) for name in evals.views.__all__},
  **builders.names(benchmarks),
  **builders.names(auditing),
  **builders.names(inverting),
  **builders.names(newcomers),
  'client_models': client_models.personal,
}


def with_implied(
  sections: Sequence[Mapping[str, Any]],
  personal: Mapping[str, Any] | None,
  has_stages: bool,
) -> list[Mapping[str, Any]]:
  """Returns a config's evaluators and those that other fields ask for.

  Args:
    sections: `evals.evaluators`.
    personal: `evals.personal`.
    has_stages: True for a run with the section `stages`, which has `by_stage`
      once, whether it is listed or not.

  >>> with_implied([{'name': 'likelihood'}], None, True)
  [{'name': 'likelihood'}, {'name': 'by_stage'}]
  >>> with_implied([{'name': 'by_stage'}], None, True)
  [{'name': 'by_stage'}]
  """
  every = [*sections] if personal is None else [*sections, personal]
  listed = any(builders.named(one) == 'by_stage' for one in every)
  return [*every, {'name': 'by_stage'}] if has_stages and not listed else every


def check(sections: Sequence[Mapping[str, Any]]) -> None:
  """Checks the list of a config against the signatures of its builders.

  Raises:
    Error: an entry is no section, or its builder refuses a field.

  >>> check([{'name': 'likelihoods'}])
  Traceback (most recent call last):
  fedjax_llm.types.Error: evals.evaluators[0].name: there is no 'likelihoods' \
(the nearest is 'likelihood'; there are likelihood, by_stage, fused, \
instance_mixed, recalled, choices, classes, code, consistent, demonstrated, \
generated, judged, needle, retrieved, attack_success, exposure, extraction, \
membership, inversion, newcomers, client_models); one's own is named \
'package.module:function'.
  """
  for i, section in enumerate(sections):
    field = f'evals.evaluators[{i}]'
    if not isinstance(section, Mapping):
      raise Error(f'{field} must be dict(name=...), not {section!r}.')
    builder = builders.resolve_builder(
      field, section.get('name'), EVALUATORS, f'{field}.name'
    )
    keywords = builders.keywords_of(section, EVALUATORS)
    builders.check(
      keywords, builder, INJECTED, lambda name, field=field: f'{field}.{name}'
    )


def build(
  sections: Sequence[Mapping[str, Any]], **injected: Any
) -> Callable[..., dict[str, Any]]:
  """Returns the evaluator of all that a config lists, in its order.

  Raises:
    Error: from the evaluation, the name of a metric without 'evals/'.

  >>> mine = lambda: lambda base, params, store, key: {'evals/mine': params}
  >>> build([{'name': mine}])(None, 0.5, None, None)
  {'evals/mine': 0.5}
  """
  each = [builders.build(one, EVALUATORS, **injected) for one in sections]

  def examine(base, params, store, key) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for i, evaluate in enumerate(each):
      values = evaluate(base, params, store, key)
      for name in values:
        if not name.startswith('evals/'):
          raise Error(
            f'evals.evaluators[{i}] returns the metric {name!r}; names of its '
            "metrics must begin with 'evals/'."
          )
      metrics |= values
    return metrics

  return examine
