"""Adapters of low-rank factors: every builder returns an `Adapter`."""

from fedjax_llm.adapters.low_rank.lora import factorised as factorised
from fedjax_llm.adapters.low_rank.lora import federa as federa
from fedjax_llm.adapters.low_rank.lora import lora as lora
from fedjax_llm.adapters.low_rank.lora import rslora as rslora
