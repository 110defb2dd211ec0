"""Local updates: what one client does with its batches."""

from fedjax_llm.local.control_variates import scaffold as scaffold
from fedjax_llm.local.losses import causal_lm as causal_lm
from fedjax_llm.local.optimizers import LocalOptimizer as LocalOptimizer
from fedjax_llm.local.optimizers import optimizer as optimizer
from fedjax_llm.local.selection import selected as selected
from fedjax_llm.local.self_pruning import self_pruning as self_pruning
from fedjax_llm.local.sgd import sgd as sgd

__all__ = [
  'LocalOptimizer',
  'causal_lm',
  'optimizer',
  'scaffold',
  'selected',
  'self_pruning',
  'sgd',
]
