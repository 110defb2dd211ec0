"""Methods for clients that have few labels and many texts."""

from typing import Any

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.types import FederatedAlgorithm, Loss, Model


def lp_fl(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  threshold: float = 0.9,
  soft: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """LP-FL: clients train on texts that the global model has labelled for them.

      q_k(x) = the label, or p(. | x; theta) where its maximum is confident,
      theta_k = local steps on  -sum_y q_k(y | x) log p(y | x),
      theta  <- sum_k n_k theta_k / sum_k n_k,   n_k the texts with a q_k

  Jiang et al. 2023, arXiv 2307.13896: soft labels by the global model, a set
  that grows with it, LoRA alone trained and averaged. The paper words its
  classes as a cloze of the language model; here a classifier's head tells
  them. Which texts join in a round is a choice here, the `threshold` of
  `local.pseudo_labelled`. `task.name=classification`; of labelled data
  `population.labelled=0.1` hides the others' labels. While nothing is confident
  it is FedAvg on the labelled texts.

  Args:
    model: hidden states and a classifier's head.
    threshold, soft: see `local.pseudo_labelled`.

  >>> model = Model(lambda base, params, batch: base[batch.tokens],
  ...               lambda base, params, hidden: hidden @ params['w'])
  >>> loss = local.classification(model)
  >>> method = lp_fl(loss, local.optimizer('sgd', 0.5), model=model)
  >>> method.init_client({'w': 1.0})  # clients keep nothing
  ClientState(private=None, local=(), upload=())
  """
  update = local.pseudo_labelled(
    local.sgd(loss, optimizer),
    local.class_logits(model),
    threshold=threshold,
    soft=soft,
  )
  return averaging.compose(update, **parts)
