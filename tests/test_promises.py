"""What a rule promises and what is refused; what all clients are sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import aggregators, recipes, server, tree, uploads
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  Cohort,
  Error,
  LocalUpdate,
  LossSum,
  Traits,
)

# ------------------------------------------------------ promises and errors --


def built(rule=None, **parts):
  parts.setdefault('measure', None)
  return recipes.fed_avg(tiny.loss, tiny.sgd(), aggregator=rule, **parts)


def promising(**traits):
  return aggregators.mean()._replace(traits=Traits(**traits))


def additive():
  return uploads.identity()._replace(additive=True)


def lying(uploads, key):
  return uploads


# What each trait is for: a combination, and why it is refused.
TRAITS = {
  'linear': (
    dict(rule=promising(), upload=additive()),
    'sees no single client',
  ),
  'changes_basis': (
    dict(rule=promising(changes_basis=True), server=server.fed_adam()),
    'the server optimizer must keep no moments',
  ),
  'writes_residual': (
    dict(rule=promising(writes_residual=True)),
    'so it needs fold',
  ),
}
REFUSED = {
  **TRAITS,
  'block_size': (dict(block_size=0), 'block_size is 0; it must be at least 1.'),
  'widths': (
    dict(widths=(8, 0)),
    r'widths are \(8, 0\); each must be at least 1.',
  ),
  'history': (dict(history=0), 'history is 0; it must be at least 1.'),
  'a residual of one version': (
    dict(
      rule=promising(writes_residual=True),
      fold=lambda base, params: (base, params),
      history=2,
    ),
    'it needs history=1, and no clients that started earlier.',
  ),
  'an adversary in blocks': (
    dict(adversary=lying, block_size=1),
    'an adversary sees the whole stack of uploads: leave block_size out.',
  ),
  'an adversary of a sum': (
    dict(adversary=lying, upload=additive()),
    'an adversary acts on single uploads, and this upload is decoded after the '
    'sum: use another upload.',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_makes_no_sense_together_is_one_sentence(name):
  parts, sentence = REFUSED[name]
  parts = {'rule': aggregators.mean(), **parts}
  with pytest.raises(Error, match=sentence) as error:
    built(**parts)
  assert str(error.value).endswith('.') and '. ' not in str(error.value)


def test_every_trait_is_enforced():
  # `always` is: a round of nobody, below; `private` is: test_privacy.py,
  # test_methods_that_pass_the_rule_by_are_refused; `rotates` is:
  # test_defences.py, test_rules_on_entries_are_not_turned.
  assert {*TRAITS, 'always', 'private', 'rotates'} == set(Traits._fields)


@pytest.mark.parametrize('always', [True, False])
def test_a_round_of_nobody_changes_something_where_the_rule_acts_always(always):
  one = lambda uploads, state, params, key: (
    Aggregate(tree.scale(params, 0 * state) | {'w': jnp.ones(2)}),
    state + 1,
  )
  rule = Aggregator(lambda *_: jnp.float32(0), one, Traits(always=always))
  loss = lambda base, p, x, key: LossSum(jnp.sum(p['w'] * x), *jnp.ones(2))
  algorithm = recipes.fed_avg(loss, tiny.sgd(), aggregator=rule)
  state = algorithm.init(tiny.KEY, {'w': jnp.zeros(2)})
  ones = jnp.ones((2, 1))
  nobody = Cohort(jnp.array([-1, -1]), ones, ones[:, 0], jnp.zeros(2, bool))
  state, _, _ = jax.jit(algorithm.round)(state, nobody)
  assert state.params['w'].tolist() == [float(always)] * 2
  assert float(state.aggregator) == float(always)
  assert int(state.round) == 1


def test_linear_rules_see_the_sum_alone():
  """For each rule that says so, messages may be added before decoding."""
  params, cohort = tiny.lora(), tiny.cohort()
  cohort = cohort._replace(valid=np.array([True, True, False]))
  linear = 0
  for name in aggregators.__all__:
    if name in ('as_stack', 'control_variates', 'from_rule', 'krum'):
      continue  # they take a rule or numbers, and are not linear
    rule = getattr(aggregators, name)()
    if not rule.traits.linear:
      continue
    linear += 1
    state, _, _ = tiny.run(built(rule), params, cohort)
    same, _, _ = tiny.run(built(rule, upload=additive()), params, cohort)
    tiny.close(same.params, state.params, 1e-5)
  assert linear


# -------------------------------------------------------------------- news --


def test_news_of_a_rule_reach_the_clients_of_the_next_round():
  """A client's update is what it hears; the rule then doubles the news."""

  def run(base, start, state, batches, masks, context):
    update = {'w': context.news['step'] * jnp.ones(3)}
    return ClientOutput(update, masks, metrics={'heard': context.news['step']})

  rule = aggregators.as_stack(aggregators.mean())

  def aggregate(uploads, state, params, key):
    return rule.aggregate(uploads, (), params, key)[0], 2 * state

  loud = rule._replace(
    init=lambda params, key: jnp.float32(5),
    aggregate=aggregate,
    broadcast=lambda state: {'step': state, 'hint': jnp.zeros(2, jnp.int8)},
  )
  algorithm = recipes.compose(LocalUpdate(lambda _: (), run), aggregator=loud)
  state = algorithm.init(tiny.KEY, {'w': jnp.zeros(3)})
  ones = jnp.ones((2, 1))
  ids = jnp.array([8, -1])
  cohort = Cohort(ids, ones, ones[:, 0], ids >= 0)
  step, values = jax.jit(algorithm.round), []
  for _ in range(3):
    state, _, info = step(state, cohort)
    values.append(float(info.metrics['local/heard']))
    # Three float32 of parameters; one of news, with two bytes.
    assert info.bytes_down.sum(1).tolist() == [3 * 4 + 4 + 2, 0]
  assert values == [5, 10, 20]
  assert state.params['w'].tolist() == [35] * 3
