"""Methods in stages: borders, what begins anew, and a run that is resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toy

from fedjax_llm import local, recipes, server, train
from fedjax_llm.types import Error

KEY = jax.random.key(0)


def stage(rate, **more):
  return recipes.compose(local.sgd(toy.loss, toy.sgd(rate)), **more)


def history(algorithm, num_rounds):
  state = algorithm.init(KEY, toy.params())
  one, step = algorithm.init_client(state.params), jax.jit(algorithm.round)
  states = jax.tree.map(lambda x: jnp.stack([x] * 4), one)
  found = [state]
  for _ in range(num_rounds):
    cohort = toy.cohort(num_clients=4, states=states)
    state, states, _ = step(state, cohort, toy.base())
    found.append(state)
  return found


def test_each_stage_is_its_algorithm_from_where_the_last_one_ended():
  half = lambda params: jax.tree.map(lambda x: x / 2, params)
  adam = stage(0.05, server=server.fed_adam(learning_rate=0.01))
  both = server.stages((stage(0.1), 2), (adam, None), between=[half])
  found = history(both, 4)
  assert [int(x.aggregator.stage) for x in found] == [0, 0, 1, 1, 1]
  first = history(stage(0.1), 2)
  toy.close(found[1].params, first[1].params)
  toy.close(found[2].params, half(first[2].params))
  # The second alone, from there: with moments as new, and the round's number.
  state = adam.init(KEY, half(first[2].params))._replace(round=first[2].round)
  newcomer = adam.init_client(state.params)
  cohort = toy.cohort(
    num_clients=4, states=jax.tree.map(lambda x: jnp.stack([x] * 4), newcomer)
  )
  for number in (3, 4):
    state, _, _ = jax.jit(adam.round)(state, cohort, toy.base())
    toy.close(found[number].params, state.params)


@pytest.mark.parametrize(
  ('rounds', 'message'),
  [
    ((2,), 'there must be two or more, not 1'),
    ((None, 3), 'a stage of rounds=None must have at least 1'),
    ((0, None), 'a stage of rounds=0 must have at least 1'),
  ],
)
def test_stages_without_end_are_refused(rounds, message):
  with pytest.raises(Error, match=message):
    server.stages(*((stage(0.1), number) for number in rounds))


def test_a_run_resumes_across_the_border_bit_for_bit(tmp_path):
  data = runs.texts(tmp_path / 'texts.jsonl')
  fields = {
    'algorithm__name': 'fed_dpa_f',
    'algorithm__federated_rounds': 2,
    'local__learning_rate': 0.5,
    **{'evals__every': 1, 'evals__common': 0},
  }
  argv = lambda name, number: runs.arguments(
    data, tmp_path / name, num_rounds=number, **fields
  )
  runs.done(train, argv('whole', 4))
  for number in (1, 2, 3, 4):  # each process knows only the folder
    runs.done(train, argv('resumed', number))
  whole, resumed = (runs.outcome(tmp_path / x) for x in ('whole', 'resumed'))
  assert whole == resumed
  # First what is shared changes, then what clients keep.
  told = runs.records(tmp_path / 'whole')
  shared = np.diff([x['evals/heldout/loss'] for x in told])
  assert [x != 0 for x in shared] == [True, True, False, False]
  own = np.diff([x['evals/personal/own/client_mean'] for x in told[2:]])
  assert len(own) == 2 and own.all()
