"""Federated GRPO: clients train by rewards of sampled replies.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equations 1 to 3, as the
local training of federated averaging:

    A_i = (r_i - mean_group r) / (std_group r + 1e-4),
    loss = -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + kl k,

see `local.grpo`. The reference of a round is the model that the clients
receive, as in the outer iterations of the paper's algorithm 1.
"""

from typing import Any, Literal

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import compose
from fedjax_llm.types import Error, FederatedAlgorithm

# What the config of each method changes.
NEEDS = {
  'fed_avg_grpo': dict(task=dict(name='grpo', max_new_tokens=4, form=0.1)),
}


def fed_avg_grpo(
  loss: Any,
  optimizer: LocalOptimizer,
  *,
  group_size: int = 8,
  clip: float = 0.2,
  clip_high: float | None = None,
  kl: float = 0.0,
  num_iterations: int = 1,
  scale: Literal['group', 'batch', 'none'] = 'group',
  reduction: Literal['grpo', 'bnpo', 'dr_grpo'] = 'grpo',
  reference: Literal['start', 'base'] = 'start',
  **parts: Any,
) -> FederatedAlgorithm:
  """Federated GRPO: clients train by rewards of sampled replies.

  Shao et al. 2024, arXiv 2402.03300, in each client, and the weighted mean of
  the updates. The settings are those of `local.grpo`.

  Raises:
    Error: a setting out of range; reference='base' with a rule that writes into
      the base, which is then no reference any more.

  >>> fed_avg_grpo(lambda *args: None, local.optimizer('sgd'))
  Traceback (most recent call last):
  fedjax_llm.types.Error: grpo samples replies and scores them: it needs the \
loss of task.name=grpo, without dropout.
  """
  rule = parts.get('aggregator')
  if reference == 'base' and rule is not None and rule.traits.writes_residual:
    raise Error(
      "fed_avg_grpo: reference='base' is the base without an adapter, which "
      "this aggregator changes; take reference='start'."
    )
  update = local.grpo(
    loss,
    optimizer,
    group_size=group_size,
    clip=clip,
    clip_high=clip_high,
    kl=kl,
    num_iterations=num_iterations,
    scale=scale,
    reduction=reduction,
    reference=reference,
  )
  return compose(update, **parts)
