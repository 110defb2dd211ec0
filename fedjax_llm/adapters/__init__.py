"""Adapters: small trainable changes of a frozen base.

The names in `__all__` are those that a config may use.
"""

from fedjax_llm.adapters import targets as targets
from fedjax_llm.adapters.low_rank import federa as federa
from fedjax_llm.adapters.low_rank import fold as fold
from fedjax_llm.adapters.low_rank import lora as lora
from fedjax_llm.adapters.low_rank import merge as merge
from fedjax_llm.adapters.low_rank import product as product
from fedjax_llm.adapters.low_rank import rslora as rslora

__all__ = ['federa', 'lora', 'rslora']
