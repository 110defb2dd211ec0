"""Recipes: the named methods, each a short composition of parts."""

from fedjax_llm.recipes.averaging import compose as compose
from fedjax_llm.recipes.averaging import fed_adagrad as fed_adagrad
from fedjax_llm.recipes.averaging import fed_adam as fed_adam
from fedjax_llm.recipes.averaging import fed_avg as fed_avg
from fedjax_llm.recipes.averaging import fed_avgm as fed_avgm
from fedjax_llm.recipes.averaging import fed_prox as fed_prox
from fedjax_llm.recipes.averaging import fed_yogi as fed_yogi
from fedjax_llm.recipes.averaging import scaffold as scaffold
from fedjax_llm.recipes.baselines import centralised as centralised
from fedjax_llm.recipes.baselines import local_only as local_only

__all__ = [
  'centralised',
  'fed_adagrad',
  'fed_adam',
  'fed_avg',
  'fed_avgm',
  'fed_prox',
  'fed_yogi',
  'local_only',
  'scaffold',
]
