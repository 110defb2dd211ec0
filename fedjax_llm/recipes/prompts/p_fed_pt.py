"""pFedPT: each client has its own prompt in front of a shared model.

Li et al. 2024, arXiv 2303.08678.
"""

from typing import Any

from fedjax_llm import local, scopes
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import Error, FederatedAlgorithm, Frozen, Loss, Private

# What the config of each method changes.
NEEDS = {
  'p_fed_pt': dict(
    adapter=dict(name='soft_prompt', modules_to_save=('q_proj', 'v_proj')),
    algorithm=dict(prompt_rate=0.1, prompt_epochs=2),
  ),
}

_PROMPT = '^(inputs|generator)/|/prefix/'


def p_fed_pt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  prompt_rate: float = 1.0,
  prompt_epochs: int = 5,
  private: str = _PROMPT,
  **parts: Any,
) -> FederatedAlgorithm:
  """pFedPT: each client has its own prompt in front of a shared model.

      d_k <- d_k - eta_p grad_d F_k(theta, d_k)   over `prompt_epochs` passes,
      theta_k <- local steps on F_k(., d_k),   theta <- sum_k w_k theta_k

  Li et al. 2024, arXiv 2303.08678: the prompt (a frame of pixels there, rows in
  front of a text here) holds what is the client's own. The passes for the
  prompt use plain SGD, as in the authors' code; the shared model is trained by
  the config's optimizer. Shared is whatever the adapter has beside its prompt,
  for example `adapter.modules_to_save`. FedRep (arXiv 2102.07089) with this
  private part trains both with one optimizer.

  Args:
    prompt_rate: eta_p.
    prompt_epochs: passes over the batches of a round.
    private: a pattern on the names of the prompt's leaves.

  Raises:
    Error: a scope in `parts`, fewer than one pass; from `init`, an adapter
      without a prompt or without anything else.

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.nodes import Prompt
  >>> method = p_fed_pt(None, local.optimizer('sgd'))
  >>> params = {'inputs': Prompt(jnp.ones((2, 4))), 'head': jnp.ones(3)}
  >>> method.init_client(params).private['inputs'].rows.shape
  (2, 4)
  """
  refuse('p_fed_pt', 'scope', parts)
  if prompt_epochs < 1:
    raise Error(
      f'algorithm.prompt_epochs is {prompt_epochs}; it must be at least 1.'
    )
  own = scopes.labelled({private: Private, '': Frozen})
  prompt = local.sgd(loss, local.optimizer('sgd', prompt_rate))
  update = local.phases(
    *[Phase(prompt, own)] * prompt_epochs,
    Phase(local.sgd(loss, optimizer), scopes.frozen(private)),
  )
  return compose(update, scope=scopes.private(private), **parts)
