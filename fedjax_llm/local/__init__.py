"""Local updates: training of one client on its batches.

Builders return a `LocalUpdate`, a `Loss` or a `LocalOptimizer`.
"""

from fedjax_llm.local import rewards as rewards
from fedjax_llm.local import watermark as watermark
from fedjax_llm.local.class_names import ByNames as ByNames
from fedjax_llm.local.class_names import by_names as by_names
from fedjax_llm.local.class_names import towers as towers
from fedjax_llm.local.contrast import contrastive as contrastive
from fedjax_llm.local.contrast import zero_shot as zero_shot
from fedjax_llm.local.dropout import dropout as dropout
from fedjax_llm.local.dual import viewed as viewed
from fedjax_llm.local.grpo import Sampled as Sampled
from fedjax_llm.local.grpo import grpo as grpo
from fedjax_llm.local.importance import reported as reported
from fedjax_llm.local.importance import weight_importance as weight_importance
from fedjax_llm.local.losses import causal_lm as causal_lm
from fedjax_llm.local.losses import class_logits as class_logits
from fedjax_llm.local.losses import classification as classification
from fedjax_llm.local.observed import Observed as Observed
from fedjax_llm.local.observed import observed as observed
from fedjax_llm.local.observed import on_model as on_model
from fedjax_llm.local.optimizers import LocalOptimizer as LocalOptimizer
from fedjax_llm.local.optimizers import lora_plus as lora_plus
from fedjax_llm.local.optimizers import optimizer as optimizer
from fedjax_llm.local.phases import Counted as Counted
from fedjax_llm.local.phases import Phase as Phase
from fedjax_llm.local.phases import counted as counted
from fedjax_llm.local.phases import phases as phases
from fedjax_llm.local.preference import dpo as dpo
from fedjax_llm.local.preference import ipo as ipo
from fedjax_llm.local.preference import kto as kto
from fedjax_llm.local.preference import orpo as orpo
from fedjax_llm.local.preference import preference as preference
from fedjax_llm.local.preference import simpo as simpo
from fedjax_llm.local.reward_models import bradley_terry as bradley_terry
from fedjax_llm.local.reward_models import reward_of as reward_of
from fedjax_llm.local.routing import balanced as balanced
from fedjax_llm.local.routing import embeddings as embeddings
from fedjax_llm.local.routing import routed as routed
from fedjax_llm.local.seeded import in_basis as in_basis
from fedjax_llm.local.sgd import sgd as sgd
from fedjax_llm.local.sparing import frozen_below as frozen_below
from fedjax_llm.local.sparing import micro_batches as micro_batches
from fedjax_llm.local.zeroth_order import along as along
from fedjax_llm.local.zeroth_order import (
  forward_difference as forward_difference,
)
from fedjax_llm.local.zeroth_order import forward_mode as forward_mode
from fedjax_llm.local.zeroth_order import one_point as one_point
from fedjax_llm.local.zeroth_order import two_point as two_point

__all__ = [
  'ByNames',
  'Counted',
  'LocalOptimizer',
  'Observed',
  'Phase',
  'Sampled',
  'along',
  'balanced',
  'bradley_terry',
  'by_names',
  'causal_lm',
  'class_logits',
  'classification',
  'contrastive',
  'counted',
  'dpo',
  'dropout',
  'embeddings',
  'forward_difference',
  'forward_mode',
  'frozen_below',
  'grpo',
  'in_basis',
  'ipo',
  'kto',
  'lora_plus',
  'micro_batches',
  'observed',
  'on_model',
  'one_point',
  'optimizer',
  'orpo',
  'phases',
  'preference',
  'reported',
  'reward_of',
  'rewards',
  'routed',
  'sgd',
  'simpo',
  'towers',
  'two_point',
  'viewed',
  'watermark',
  'weight_importance',
  'zero_shot',
]
