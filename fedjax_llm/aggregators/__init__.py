"""Aggregators: rules that combine the clients' updates on the server.

Builders return an `Aggregator` or a `StreamingAggregator`.
"""

from fedjax_llm.aggregators.averaging import as_stack as as_stack
from fedjax_llm.aggregators.averaging import (
  control_variates as control_variates,
)
from fedjax_llm.aggregators.averaging import masked_mean as masked_mean
from fedjax_llm.aggregators.averaging import mean as mean
from fedjax_llm.aggregators.averaging import uniform_mean as uniform_mean
from fedjax_llm.aggregators.by_hand import received as received
from fedjax_llm.aggregators.dual import on_shared as on_shared
from fedjax_llm.aggregators.foolsgold import foolsgold as foolsgold
from fedjax_llm.aggregators.in_products import in_products as in_products
from fedjax_llm.aggregators.lifted import from_rule as from_rule
from fedjax_llm.aggregators.low_rank.bases import fedrot as fedrot
from fedjax_llm.aggregators.low_rank.bases import fedsvd as fedsvd
from fedjax_llm.aggregators.low_rank.bases import flexlora as flexlora
from fedjax_llm.aggregators.low_rank.frames import flora_na as flora_na
from fedjax_llm.aggregators.low_rank.frames import glora as glora
from fedjax_llm.aggregators.low_rank.metrics import measure as measure
from fedjax_llm.aggregators.low_rank.rules import fedex as fedex
from fedjax_llm.aggregators.low_rank.rules import flora as flora
from fedjax_llm.aggregators.low_rank.rules import lora_fair as lora_fair
from fedjax_llm.aggregators.low_rank.rules import norm_weighted as norm_weighted
from fedjax_llm.aggregators.low_rank.rules import replication as replication
from fedjax_llm.aggregators.low_rank.rules import zero_padding as zero_padding
from fedjax_llm.aggregators.low_rank.spectra import fedask as fedask
from fedjax_llm.aggregators.low_rank.spectra import fedmomentum as fedmomentum
from fedjax_llm.aggregators.low_rank.spectra import florist as florist
from fedjax_llm.aggregators.low_rank.spectra import ilora as ilora
from fedjax_llm.aggregators.low_rank.spectra import raflora as raflora
from fedjax_llm.aggregators.mixing import matched_mean as matched_mean
from fedjax_llm.aggregators.premixing import bucketing as bucketing
from fedjax_llm.aggregators.premixing import nearest_mixing as nearest_mixing
from fedjax_llm.aggregators.product_space import (
  product_geometric_median as product_geometric_median,
)
from fedjax_llm.aggregators.product_space import product_krum as product_krum
from fedjax_llm.aggregators.replaying import (
  on_coefficients as on_coefficients,
)
from fedjax_llm.aggregators.replaying import replaying as replaying
from fedjax_llm.aggregators.riders import (
  without_free_riders as without_free_riders,
)
from fedjax_llm.aggregators.robust import krum as krum
from fedjax_llm.aggregators.robust import median as median
from fedjax_llm.aggregators.robust import trimmed_mean as trimmed_mean
from fedjax_llm.aggregators.robust_means import (
  centred_clipping as centred_clipping,
)
from fedjax_llm.aggregators.robust_means import (
  geometric_median as geometric_median,
)
from fedjax_llm.aggregators.robust_means import norm_bounding as norm_bounding
from fedjax_llm.aggregators.robust_pca import fedrpca as fedrpca
from fedjax_llm.aggregators.staleness import all_together as all_together
from fedjax_llm.aggregators.staleness import buffered_mean as buffered_mean
from fedjax_llm.aggregators.staleness import (
  one_after_another as one_after_another,
)
from fedjax_llm.aggregators.trusted import fltrust as fltrust

__all__ = [
  'as_stack',
  'bucketing',
  'all_together',
  'buffered_mean',
  'centred_clipping',
  'control_variates',
  'fedask',
  'fedex',
  'fedmomentum',
  'fedrot',
  'fedrpca',
  'fedsvd',
  'flexlora',
  'flora',
  'flora_na',
  'florist',
  'fltrust',
  'foolsgold',
  'from_rule',
  'geometric_median',
  'glora',
  'ilora',
  'in_products',
  'krum',
  'lora_fair',
  'masked_mean',
  'matched_mean',
  'mean',
  'median',
  'nearest_mixing',
  'norm_bounding',
  'norm_weighted',
  'one_after_another',
  'product_geometric_median',
  'product_krum',
  'raflora',
  'replication',
  'trimmed_mean',
  'uniform_mean',
  'without_free_riders',
  'zero_padding',
]
