"""Adapters: small trainable changes of a frozen base.

Every builder returns an `Adapter(init, merge, fold)`. A config may use the
names in `__all__`.
"""

from fedjax_llm.adapters import gates as gates
from fedjax_llm.adapters import halves as halves
from fedjax_llm.adapters import picked as picked
from fedjax_llm.adapters import targets as targets
from fedjax_llm.adapters.bottleneck import bottleneck as bottleneck
from fedjax_llm.adapters.c2a import c2a as c2a
from fedjax_llm.adapters.changes import Dense as Dense
from fedjax_llm.adapters.changes import Dora as Dora
from fedjax_llm.adapters.changes import as_low_rank as as_low_rank
from fedjax_llm.adapters.changes import check as check
from fedjax_llm.adapters.changes import fold as fold
from fedjax_llm.adapters.changes import merge as merge
from fedjax_llm.adapters.changes import overlay as overlay
from fedjax_llm.adapters.changes import product as product
from fedjax_llm.adapters.changes import unmerged as unmerged
from fedjax_llm.adapters.dense import beside as beside
from fedjax_llm.adapters.dense import complete as complete
from fedjax_llm.adapters.dense import dense as dense
from fedjax_llm.adapters.generated import compacter as compacter
from fedjax_llm.adapters.generated import feature_gate as feature_gate
from fedjax_llm.adapters.generated import hyper_adapter as hyper_adapter
from fedjax_llm.adapters.low_rank import cores as cores
from fedjax_llm.adapters.low_rank import experts as experts
from fedjax_llm.adapters.low_rank import factorised as factorised
from fedjax_llm.adapters.low_rank import federa as federa
from fedjax_llm.adapters.low_rank import lora as lora
from fedjax_llm.adapters.low_rank import rslora as rslora
from fedjax_llm.adapters.low_rank.cores import lora_xs as lora_xs
from fedjax_llm.adapters.low_rank.cores import ravan as ravan
from fedjax_llm.adapters.low_rank.dora import dora as dora
from fedjax_llm.adapters.low_rank.gram import florg as florg
from fedjax_llm.adapters.low_rank.orthogonal import orthogonal as orthogonal
from fedjax_llm.adapters.low_rank.orthogonal import sfed_lora as sfed_lora
from fedjax_llm.adapters.low_rank.tensor_train import (
  tensor_train as tensor_train,
)
from fedjax_llm.adapters.low_rank.vera import vera as vera
from fedjax_llm.adapters.prompts import context as context
from fedjax_llm.adapters.prompts import domain_context as domain_context
from fedjax_llm.adapters.prompts import feature_attention as feature_attention
from fedjax_llm.adapters.prompts import gated_context as gated_context
from fedjax_llm.adapters.prompts import generated_context as generated_context
from fedjax_llm.adapters.prompts import generated_prompt as generated_prompt
from fedjax_llm.adapters.prompts import grouped_prompt as grouped_prompt
from fedjax_llm.adapters.prompts import growing_pool as growing_pool
from fedjax_llm.adapters.prompts import p_tuning as p_tuning
from fedjax_llm.adapters.prompts import prefix as prefix
from fedjax_llm.adapters.prompts import projected_prompt as projected_prompt
from fedjax_llm.adapters.prompts import prompt_groups as prompt_groups
from fedjax_llm.adapters.prompts import prompt_pool as prompt_pool
from fedjax_llm.adapters.prompts import soft_prompt as soft_prompt
from fedjax_llm.adapters.prompts import visual_pool as visual_pool
from fedjax_llm.adapters.prompts import visual_prompt as visual_prompt
from fedjax_llm.adapters.scaling import ia3 as ia3
from fedjax_llm.adapters.selective import bitfit as bitfit
from fedjax_llm.adapters.selective import heads as heads
from fedjax_llm.adapters.selective import layers as layers
from fedjax_llm.adapters.selective import norms as norms
from fedjax_llm.adapters.swayed import swayed as swayed
from fedjax_llm.adapters.within import within as within

__all__ = [
  'bitfit',
  'bottleneck',
  'c2a',
  'compacter',
  'context',
  'dense',
  'domain_context',
  'dora',
  'factorised',
  'feature_attention',
  'feature_gate',
  'federa',
  'florg',
  'gated_context',
  'generated_context',
  'generated_prompt',
  'growing_pool',
  'grouped_prompt',
  'heads',
  'hyper_adapter',
  'ia3',
  'layers',
  'lora',
  'lora_xs',
  'norms',
  'orthogonal',
  'p_tuning',
  'prefix',
  'projected_prompt',
  'prompt_groups',
  'prompt_pool',
  'ravan',
  'rslora',
  'sfed_lora',
  'soft_prompt',
  'swayed',
  'tensor_train',
  'vera',
  'visual_pool',
  'visual_prompt',
]
