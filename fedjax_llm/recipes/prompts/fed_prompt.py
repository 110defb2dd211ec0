"""FedPrompt, FedPF and federated P-tuning: federated averaging of prompts.

Zhao et al. 2023, arXiv 2208.12268; Zhang et al. 2023, Findings of ACL,
"FedPETuning"; Liu et al. 2021, arXiv 2103.10385 (the generator).
"""

from typing import Any

from fedjax_llm import nodes, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes.encoded import Encoded, Projected
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import only
from fedjax_llm.types import FederatedAlgorithm, Loss, Params

# What the config of each method changes.
NEEDS = {
  'fed_prompt': dict(adapter=dict(name='soft_prompt')),
  'fed_pf': dict(adapter=dict(name='prefix')),
  'fed_p_tuning': dict(adapter=dict(name='p_tuning', hidden_size=16)),
}


def fed_prompt(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedPrompt: clients train the rows of a soft prompt, the server averages.

      P <- sum_k w_k P_k,   P_k = local steps on the loss of [P; text]

  Zhao et al. 2023, arXiv 2208.12268. A client sends P D numbers, all that is
  trained; other modules are trained if the adapter has some (such as a
  classifier's head). Prompts want a larger rate than weights: 10 to 1000 times
  that of LoRA in the papers. With clients of several languages it is the
  multilingual FedPrompt.

  Raises:
    Error: from `init`, an adapter without a soft prompt.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import local
  >>> method = fed_prompt(None, local.optimizer('sgd'))
  >>> method.init(None, {'w': jnp.ones(2)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_prompt trains a soft prompt: adapter.name=soft_\
prompt.
  """
  return _of('fed_prompt', _soft, 'soft_prompt', loss, optimizer, parts)


def fed_pf(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """FedPF: clients train keys and values in front of every layer's.

      (K_l, V_l) <- sum_k w_k (K_l, V_l)_k   for every layer l

  The prefix baseline of Zhang et al. 2023, "FedPETuning", Findings of ACL, with
  the prefix of Li and Liang 2021, arXiv 2101.00190; with
  `adapter.reparametrised=True` the layers that compute it are trained.

  Raises:
    Error: from `init`, an adapter without a prefix.

  >>> from fedjax_llm import local
  >>> method = fed_pf(None, local.optimizer('sgd'))
  >>> method.init(None, {'inputs': nodes.Prompt(1.0)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_pf trains a prefix: adapter.name=prefix.
  """
  return _of('fed_pf', _prefix, 'prefix', loss, optimizer, parts)


def fed_p_tuning(
  loss: Loss, optimizer: LocalOptimizer, **parts: Any
) -> FederatedAlgorithm:
  """Federated P-tuning: clients train a network that computes a prompt.

      prompt = g(rows; phi),   (rows, phi) <- sum_k w_k (rows, phi)_k

  Federated averaging of P-tuning, Liu et al. 2021, arXiv 2103.10385, a baseline
  of papers on federated prompts. The mean of networks is not the network of the
  mean prompt, and a client sends the network too; it need not be served.

  Raises:
    Error: from `init`, an adapter without such a network.

  >>> from fedjax_llm import local
  >>> method = fed_p_tuning(None, local.optimizer('sgd'))
  >>> method.init(None, {'inputs': nodes.Prompt(1.0)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_p_tuning trains a prompt's network: \
adapter.name=p_tuning.
  """
  return _of('fed_p_tuning', _encoded, 'p_tuning', loss, optimizer, parts)


def _of(name, accepts, adapter, loss, optimizer, parts) -> FederatedAlgorithm:
  inner = parts.pop('scope', None) or scopes.everything()
  kind = {
    'soft_prompt': 'a soft prompt',
    'prefix': 'a prefix',
    'p_tuning': "a prompt's network",
  }[adapter]
  hint = f'trains {kind}: adapter.name={adapter}.'
  scope = only(name, inner, accepts, hint)
  return fed_avg(loss, optimizer, scope=scope, **parts)


def _child(params: Params, *path: str) -> Any:
  for name in path:
    params = params.get(name) if isinstance(params, dict) else None
  return params


def _soft(params: Params) -> bool:
  return isinstance(_child(params, 'inputs'), nodes.Prompt)


def _encoded(params: Params) -> bool:
  return isinstance(_child(params, 'inputs'), Encoded)


def _prefix(params: Params) -> bool:
  own = _child(params, 'layers', 'self_attn', 'prefix')
  return isinstance(own, nodes.Prefix) or isinstance(
    _child(params, 'generator'), Projected
  )
