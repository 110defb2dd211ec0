"""The server: composes a round and steps on its pseudo-gradient.

Builders return a `FederatedAlgorithm` or a server optimizer.
"""

from fedjax_llm.server.algorithm import fed_opt as fed_opt
from fedjax_llm.server.exchange import exchange as exchange
from fedjax_llm.server.lens import on_part as on_part
from fedjax_llm.server.optimizers import adamw as adamw
from fedjax_llm.server.optimizers import fed_adagrad as fed_adagrad
from fedjax_llm.server.optimizers import fed_adam as fed_adam
from fedjax_llm.server.optimizers import fed_avgm as fed_avgm
from fedjax_llm.server.optimizers import fed_yogi as fed_yogi
from fedjax_llm.server.optimizers import sgd as sgd
from fedjax_llm.server.planning import planned as planned
from fedjax_llm.server.split import Stepper as Stepper
from fedjax_llm.server.split import split as split
from fedjax_llm.server.stages import stages as stages

__all__ = [
  'adamw',
  'fed_adagrad',
  'fed_adam',
  'fed_avgm',
  'fed_yogi',
  'sgd',
]
