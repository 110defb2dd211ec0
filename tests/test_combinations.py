"""Parts of any method under those of any other: shapes and refusals."""

import itertools
import random

import jax
import numpy as np
import pytest
import toy
from test_contracts import carry

from fedjax_llm import (
  aggregators,
  local,
  recipes,
  scopes,
  server,
)
from fedjax_llm.clients import cohorts, sampling
from fedjax_llm.recipes.lora.lora_a2 import selected
from fedjax_llm.recipes.ranks.hafl import important
from fedjax_llm.recipes.ranks.het_lora import self_pruning
from fedjax_llm.types import Error, Example

KEY = jax.random.key(0)
K = 4
RANKS = np.array([2, 1, 1, 2], np.int32)

# ------------------------------------------------------------ combinations --

LOCALS = {
  'sgd': lambda: local.sgd(toy.loss, toy.sgd()),
  'prox': lambda: local.sgd(toy.loss, toy.sgd(), prox=0.1),
  'kept': lambda: local.sgd(toy.loss, adam(), keep_optimizer=True),
  'selected': lambda: selected(local.sgd(toy.loss, toy.sgd()), budget=1),
  'important': lambda: important(local.sgd(toy.loss, toy.sgd()), toy.loss),
  'self_pruning': lambda: self_pruning(toy.loss, toy.sgd()),
  'phases': lambda: local.phases(
    local.Phase(local.sgd(toy.loss, toy.sgd()), scopes.frozen('/a$')),
    local.Phase(local.sgd(toy.loss, toy.sgd()), scopes.frozen('/b$')),
  ),
}
RULES = {
  name: getattr(aggregators, name)
  for name in aggregators.__all__
  if name not in ('as_stack', 'control_variates', 'from_rule')
}
# Rules that mean entries, whatever they are of.
BY_ENTRY = ('krum', 'masked_mean', 'mean', 'median', 'trimmed_mean')
BY_ENTRY += ('fedrpca', 'matched_mean', 'uniform_mean')
BY_ENTRY += ('bucketing', 'centred_clipping', 'foolsgold', 'geometric_median')
BY_ENTRY += ('nearest_mixing', 'norm_bounding', 'product_krum')
SERVERS = {name: getattr(server, name) for name in server.__all__}
SCOPES = {
  'everything': scopes.everything,
  'ranks': scopes.ranks,
  'alternating': lambda: scopes.alternating('/b$', '/a$'),
  'private': lambda: scopes.private('/b$'),
}


def adam():
  return local.optimizer('adam', 0.1)


def rule(name):
  return RULES[name](**({'num_byzantine': 0} if name == 'krum' else {}))


def sampled(num):
  every = itertools.product(LOCALS, RULES, SERVERS, SCOPES)
  return random.Random(7).sample(list(every), num)


def refusal(aggregator, optimizer, scope):
  """Why a combination makes no sense; None if it does."""
  if rule(aggregator).traits.changes_basis and optimizer != 'sgd':
    return 'must keep no moments'
  if scope == 'private' and aggregator not in BY_ENTRY:
    return 'needs whole factors'
  return None


def test_any_aggregator_goes_with_any_local_update_server_and_scope():
  """Sampled; a pair that makes no sense says why when it is built."""
  reasons = set()
  for update, aggregator, optimizer, scope in sampled(25):

    def built(parts=(update, aggregator, optimizer, scope)):
      update, aggregator, optimizer, scope = parts
      algorithm = recipes.compose(
        LOCALS[update](),
        aggregator=rule(aggregator),
        server=SERVERS[optimizer](),
        scope=SCOPES[scope](),
        fold=toy.fold,
      )
      cohort = toy.cohort(num_clients=K)._replace(profiles=RANKS)
      carry(algorithm, toy.params(), cohort)

    why = refusal(aggregator, optimizer, scope)
    reasons.add(why)
    if why is None:
      built()
    else:
      with pytest.raises(Error, match=why):
        built()
  assert len(reasons) == 3


@pytest.mark.parametrize('name', ['fed_adam', 'fed_prox'])
def test_every_rule_goes_with_fedadam_and_fedprox(name):
  for each in RULES:
    built = rule(each)
    more = {'aggregator': built, 'fold': toy.fold}
    if name == 'fed_adam' and built.traits.changes_basis:
      with pytest.raises(Error, match='must keep no moments'):
        recipes.fed_adam(toy.loss, toy.sgd(), **more)
      continue
    algorithm = getattr(recipes, name)(toy.loss, toy.sgd(), **more)
    carry(algorithm, toy.params(), toy.cohort(num_clients=K))


def test_every_sampler_draws_what_every_method_takes():
  text = Example(np.arange(3, dtype=np.int32), np.ones(3, bool))
  build = cohorts.cohorts(
    [[text]] * 9, num_steps=2, batch_size=1, max_length=4, profiles=np.arange(9)
  )
  found = []
  for name in sampling.__all__:
    draw = {
      'uniform': lambda: sampling.uniform(9, K),
      'by_size': lambda: sampling.by_size(9, K, sizes=[1] * 9),
      'cyclic': lambda: sampling.cyclic(9, K),
      'full': lambda: sampling.full(9),
      'poisson': lambda: sampling.poisson(9, K),
      'rotating': lambda: sampling.rotating(9, K),
      'with_root': lambda: sampling.with_root(9, K, root=[2]),
    }[name]()
    cohort = build(draw(3), 3)
    one = jax.tree.map(lambda x: (x.shape[1:], x.dtype), cohort)
    found.append(one)
  assert all(one == found[0] for one in found)


# --------------------------------------------------------------- refusals --


def test_a_mask_of_ranks_on_a_frozen_factor_is_refused():
  for factor in 'ab':
    scope = scopes.ranks(scopes.frozen(f'/{factor}$'))
    algorithm = recipes.fed_avg(toy.loss, toy.sgd(), scope=scope)
    with pytest.raises(Error, match=f'q/{factor} is frozen'):
      algorithm.init(KEY, toy.params())


def test_moments_of_a_basis_that_changes_are_refused():
  with pytest.raises(Error, match='must keep no moments'):
    recipes.fed_avg(
      toy.loss,
      toy.sgd(),
      aggregator=aggregators.flexlora(),
      server=server.fed_adam(),
    )
