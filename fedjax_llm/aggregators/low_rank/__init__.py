"""Aggregators of low-rank factors, and the algebra that they share."""

from fedjax_llm.aggregators.low_rank.algebra import check_split as check_split
from fedjax_llm.aggregators.low_rank.algebra import dense as dense
from fedjax_llm.aggregators.low_rank.algebra import dot as dot
from fedjax_llm.aggregators.low_rank.algebra import (
  effective_rank as effective_rank,
)
from fedjax_llm.aggregators.low_rank.algebra import fro_norm as fro_norm
from fedjax_llm.aggregators.low_rank.algebra import is_node as is_node
from fedjax_llm.aggregators.low_rank.algebra import join as join
from fedjax_llm.aggregators.low_rank.algebra import mean as mean
from fedjax_llm.aggregators.low_rank.algebra import residual as residual
from fedjax_llm.aggregators.low_rank.algebra import ridge as ridge
from fedjax_llm.aggregators.low_rank.algebra import stack as stack
from fedjax_llm.aggregators.low_rank.algebra import svd as svd
from fedjax_llm.aggregators.low_rank.algebra import svd_round as svd_round
