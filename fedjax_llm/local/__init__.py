"""Local updates: what one client does with its batches."""

from fedjax_llm.local.control_variates import scaffold as scaffold
from fedjax_llm.local.dual import forked as forked
from fedjax_llm.local.dual import synced as synced
from fedjax_llm.local.dual import tethered as tethered
from fedjax_llm.local.dual import viewed as viewed
from fedjax_llm.local.importance import important as important
from fedjax_llm.local.importance import reported as reported
from fedjax_llm.local.importance import weight_importance as weight_importance
from fedjax_llm.local.lifted import lifted as lifted
from fedjax_llm.local.losses import causal_lm as causal_lm
from fedjax_llm.local.losses import class_logits as class_logits
from fedjax_llm.local.losses import classification as classification
from fedjax_llm.local.observed import Observed as Observed
from fedjax_llm.local.observed import observed as observed
from fedjax_llm.local.optimizers import LocalOptimizer as LocalOptimizer
from fedjax_llm.local.optimizers import lora_plus as lora_plus
from fedjax_llm.local.optimizers import optimizer as optimizer
from fedjax_llm.local.penalties import frobenius_decay as frobenius_decay
from fedjax_llm.local.personal_masks import pruned as pruned
from fedjax_llm.local.phases import Counted as Counted
from fedjax_llm.local.phases import Phase as Phase
from fedjax_llm.local.phases import counted as counted
from fedjax_llm.local.phases import phases as phases
from fedjax_llm.local.pseudo_labels import pseudo_labelled as pseudo_labelled
from fedjax_llm.local.routing import balanced as balanced
from fedjax_llm.local.routing import embeddings as embeddings
from fedjax_llm.local.routing import routed as routed
from fedjax_llm.local.selection import selected as selected
from fedjax_llm.local.self_pruning import self_pruning as self_pruning
from fedjax_llm.local.sgd import sgd as sgd

__all__ = [
  'Counted',
  'LocalOptimizer',
  'Observed',
  'Phase',
  'balanced',
  'causal_lm',
  'class_logits',
  'classification',
  'counted',
  'embeddings',
  'forked',
  'frobenius_decay',
  'important',
  'lifted',
  'lora_plus',
  'observed',
  'optimizer',
  'phases',
  'pruned',
  'pseudo_labelled',
  'reported',
  'routed',
  'scaffold',
  'selected',
  'self_pruning',
  'sgd',
  'synced',
  'tethered',
  'viewed',
  'weight_importance',
]
