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
from fedjax_llm.recipes.experts import fed_amole as fed_amole
from fedjax_llm.recipes.heterogeneous import fed_hm as fed_hm
from fedjax_llm.recipes.heterogeneous import flexlora as flexlora
from fedjax_llm.recipes.heterogeneous import flora as flora
from fedjax_llm.recipes.heterogeneous import hafl as hafl
from fedjax_llm.recipes.heterogeneous import het_lora as het_lora
from fedjax_llm.recipes.heterogeneous import hlora as hlora
from fedjax_llm.recipes.heterogeneous import rbla as rbla
from fedjax_llm.recipes.heterogeneous import (
  replication_padding as replication_padding,
)
from fedjax_llm.recipes.heterogeneous import zero_padding as zero_padding
from fedjax_llm.recipes.homogeneous import fed_it as fed_it
from fedjax_llm.recipes.homogeneous import fed_sa as fed_sa
from fedjax_llm.recipes.homogeneous import fed_svd as fed_svd
from fedjax_llm.recipes.homogeneous import fedex_lora as fedex_lora
from fedjax_llm.recipes.homogeneous import fedrot_lora as fedrot_lora
from fedjax_llm.recipes.homogeneous import ffa_lora as ffa_lora
from fedjax_llm.recipes.homogeneous import flasc as flasc
from fedjax_llm.recipes.homogeneous import lora_a2 as lora_a2
from fedjax_llm.recipes.homogeneous import lora_fair as lora_fair
from fedjax_llm.recipes.homogeneous import rolora as rolora
from fedjax_llm.recipes.labelling import lp_fl as lp_fl
from fedjax_llm.recipes.personal_structure import perfit as perfit
from fedjax_llm.recipes.personalised import ditto as ditto
from fedjax_llm.recipes.personalised import fd_lora as fd_lora
from fedjax_llm.recipes.personalised import fed_dpa_f as fed_dpa_f
from fedjax_llm.recipes.personalised import fed_dpa_t as fed_dpa_t
from fedjax_llm.recipes.personalised import fed_lora as fed_lora
from fedjax_llm.recipes.personalised import fed_rep as fed_rep
from fedjax_llm.recipes.planned import fed_pipe as fed_pipe
from fedjax_llm.recipes.structured import fed_ra as fed_ra
from fedjax_llm.recipes.structured import fed_sb as fed_sb
from fedjax_llm.recipes.structured import fed_tt_plus as fed_tt_plus
from fedjax_llm.recipes.structured import ravan as ravan
from fedjax_llm.recipes.structured import slora as slora

__all__ = [
  'centralised',
  'ditto',
  'fd_lora',
  'fed_adagrad',
  'fed_adam',
  'fed_amole',
  'fed_avg',
  'fed_avgm',
  'fed_dpa_f',
  'fed_dpa_t',
  'fed_hm',
  'fed_it',
  'fed_lora',
  'fed_pipe',
  'fed_prox',
  'fed_ra',
  'fed_rep',
  'fed_sa',
  'fed_sb',
  'fed_svd',
  'fed_tt_plus',
  'fed_yogi',
  'fedex_lora',
  'fedrot_lora',
  'ffa_lora',
  'flasc',
  'flexlora',
  'flora',
  'hafl',
  'het_lora',
  'hlora',
  'local_only',
  'lora_a2',
  'lora_fair',
  'lp_fl',
  'perfit',
  'ravan',
  'rbla',
  'replication_padding',
  'rolora',
  'scaffold',
  'slora',
  'zero_padding',
]
