"""LP-FL: clients train also on texts with labels from the global model.

Jiang et al. 2023, arXiv 2307.13896.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import local
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes.composing import (
  compose,
)
from fedjax_llm.types import (
  Base,
  Batch,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Model,
  Params,
  known,
)

# What the config of each method changes.
NEEDS = {
  # Few labels and many texts: the genre of a speech.
  'lp_fl': dict(
    task=dict(name='classification'),
    partition=dict(name='dirichlet', num_clients=12, alpha=0.3, min_size=10),
    population=dict(labelled=0.25, max_length=32),
    model=dict(name='random_encoder'),
    adapter=dict(
      name='lora',
      rank=4,
      targets=('q_proj', 'v_proj'),
      modules_to_save=('pooler', 'classifier'),
    ),
  ),
}


def lp_fl(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  threshold: float = 0.9,
  soft: bool = True,
  **parts: Any,
) -> FederatedAlgorithm:
  """LP-FL: clients train also on texts with labels from the global model.

      q_k(x) = the label, or p(. | x; theta) where its maximum is confident,
      theta_k = local steps on  -sum_y q_k(y | x) log p(y | x),
      theta  <- sum_k n_k theta_k / sum_k n_k,   n_k the texts with a q_k

  Jiang et al. 2023, arXiv 2307.13896: soft labels by the global model, a set
  that grows with it, LoRA alone trained and averaged. The paper predicts
  classes as a cloze of the language model, this method with a classifier's
  head. The paper does not fix the texts that join in a round: here the
  `threshold` of `pseudo_labelled` selects them. It needs
  `task.name=classification`; `population.labelled=0.1` keeps a tenth of the
  labels and hides the others. While no text is confident it is FedAvg on the
  labelled texts.

  Args:
    model: hidden states and a classifier's head.
    threshold, soft: see `pseudo_labelled`.

  >>> model = Model(lambda base, params, batch: base[batch.tokens],
  ...               lambda base, params, hidden: hidden @ params['w'])
  >>> loss = local.classification(model)
  >>> method = lp_fl(loss, local.optimizer('sgd', 0.5), model=model)
  >>> method.init_client({'w': 1.0})  # clients keep nothing
  ClientState(private=None, local=(), upload=(), seen=())
  """
  update = pseudo_labelled(
    local.sgd(loss, optimizer),
    local.class_logits(model),
    threshold=threshold,
    soft=soft,
  )
  return compose(update, **parts)


def pseudo_labelled(
  inner: LocalUpdate,
  predict: Callable[[Base, Params, Batch], jax.Array],
  *,
  threshold: float = 0.9,
  soft: bool = True,
) -> LocalUpdate:
  """Returns `inner` on labelled texts, and on texts with pseudo-labels.

      q(x) = one-hot(y)        of a text with a label,
      q(x) = p(. | x; start)   without one, where max_y p(y | x; start) is at
                               least `threshold`; others are left out,

  with `start` as the client received it, fixed for the round. The loss gets
  labels [B, classes] (`classification`), so a text counts as one with a label
  and with a pseudo-label. `ClientOutput.weight`, the client's weight, is the
  number of texts trained on. It costs a forward pass over the round's batches.

  Args:
    inner: local training.
    predict: logits [B, classes] (`class_logits`).
    threshold: the least confidence of a text that takes part; 0 takes all.
    soft: False trains on the likeliest class instead of on p.

  Raises:
    Error: a threshold below 0 or above 1; from the round, texts without
      labels of classes.

  >>> from fedjax_llm.types import Context
  >>> def run(base, start, state, batches, masks, context):
  ...   return ClientOutput(batches.label, masks, state)
  >>> logits = lambda base, params, batch: jnp.array([[9.0, 0], [9, 0], [1, 0]])
  >>> tokens = jnp.ones((1, 3, 2), jnp.int32)
  >>> labels = jnp.array([[1, -1, -1]])  # the second is confident
  >>> batches = Batch(tokens, tokens > 1, tokens, tokens, labels)
  >>> local = pseudo_labelled(LocalUpdate(None, run), logits, soft=False)
  >>> out = local.run(None, None, (), batches, None, Context())
  >>> out.update[0].tolist(), int(out.weight)
  ([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], 2)
  """
  if known(threshold) and not 0 <= threshold <= 1:
    raise Error(
      f'pseudo_labelled: threshold={threshold} must be from 0 to 1, a '
      'probability.'
    )

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    if getattr(batches, 'label', None) is None:
      raise Error(
        'pseudo-labels are classes of texts: set task.name=classification.'
      )

    def labels(batch: Batch) -> jax.Array:
      p = jax.nn.softmax(predict(base, start, batch), axis=-1)
      best = jnp.max(p, axis=-1, keepdims=True)
      classes = jnp.arange(p.shape[-1])
      pseudo = p if soft else classes == jnp.argmax(p, -1)[:, None]
      known_class = classes == batch.label[:, None]  # all False at -1
      sure = (batch.label[:, None] < 0) & (best >= threshold)
      q = jnp.where(sure, pseudo, known_class)
      return jnp.where(batch.segments[:, :1] > 0, q, 0).astype(jnp.float32)

    q = jax.lax.map(labels, jax.tree.map(jnp.asarray, batches))
    out = inner.run(
      base, start, state, batches._replace(label=q), masks, context
    )
    number = jnp.sum(jnp.any(q > 0, axis=-1), dtype=jnp.float32)
    return out._replace(weight=number)

  return LocalUpdate(inner.init, run)
