"""fedjax_llm: federated fine-tuning of large language models in JAX.

    data -> clients -> local -> uploads -> aggregators -> server -> evals

Seven rooms in the order in which data flows; `models` and `adapters` are the
tools that `local` and `evals` hold, `recipes` names combinations, and `types`
holds the contracts (read it first).
"""

from fedjax_llm import _early as _early  # signals while the rest is imported
from fedjax_llm import adapters as adapters
from fedjax_llm import adversary as adversary
from fedjax_llm import aggregators as aggregators
from fedjax_llm import batching as batching
from fedjax_llm import clients as clients
from fedjax_llm import data as data
from fedjax_llm import evals as evals
from fedjax_llm import linalg as linalg
from fedjax_llm import local as local
from fedjax_llm import models as models
from fedjax_llm import nodes as nodes
from fedjax_llm import privacy as privacy
from fedjax_llm import recipes as recipes
from fedjax_llm import scopes as scopes
from fedjax_llm import server as server
from fedjax_llm import tree as tree
from fedjax_llm import types as types
from fedjax_llm import uploads as uploads
from fedjax_llm.types import Error as Error

__version__ = '0.2.0'
