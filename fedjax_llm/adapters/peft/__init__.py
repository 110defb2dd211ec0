"""Writes and reads adapters as PEFT directories."""

from fedjax_llm.adapters.peft import bottlenecks as bottlenecks
from fedjax_llm.adapters.peft.directory import CONFIG as CONFIG
from fedjax_llm.adapters.peft.directory import WEIGHTS as WEIGHTS
from fedjax_llm.adapters.peft.directory import kind as kind
from fedjax_llm.adapters.peft.directory import refusal as refusal
from fedjax_llm.adapters.peft.directory import save as save
from fedjax_llm.adapters.peft.loading import load as load
