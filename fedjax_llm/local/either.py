"""Training on clients that have pictures, texts, or both.

`either` returns a `Loss` of a dual encoder, `of_present` a `LocalUpdate` that
leaves a tower alone whose kind of data a client lacks.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.nodes.scores import unit
from fedjax_llm.types import (
  Base,
  ClientOutput,
  Eithers,
  Error,
  Key,
  LocalUpdate,
  Loss,
  LossSum,
  Params,
)

# The parts of a dual encoder's parameters that only one kind of data trains.
TOWERS = {
  'picture': ('vision', 'visual_projection'),
  'text': ('text', 'text_projection'),
}


def either(dual: Any, tokens: Any, ends: Any, *, per_row: bool = False) -> Loss:
  """Returns the loss of pictures and texts whose classes are texts, a row.

      loss_i = - sum_m log softmax_c(exp(logit_scale) cos(f_m(x_i), t_c))_y_i

  over what row i has: m is its picture (f the image tower), its text (f the
  text tower) or both. It is `zero_shot` classification (Radford et al. 2021,
  arXiv 2103.00020, section 3.1.2) with texts as inputs too. A row counts once
  for each that it has; padding counts nothing.

  Args:
    dual: the towers.
    tokens: the texts of the classes, [C, T].
    ends: the places of their ends, [C].
    per_row: one number a row, [B], instead of their sum.

  >>> from types import SimpleNamespace
  >>> from fedjax_llm.types import Batch
  >>> dual = SimpleNamespace(
  ...   text=lambda base, params, tokens, ends: jnp.eye(2)[tokens[:, 0]],
  ...   image=lambda base, params, pixels: (pixels[:, 0, 0], None),
  ...   scale=lambda base, params: jnp.float32(1))
  >>> none, word = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)
  >>> batch = Eithers(
  ...   jnp.eye(2)[None, :1, None], jnp.array([True]),
  ...   Batch(none, none > 0, none, none), jnp.array([0]))  # no text
  >>> loss = either(dual, jnp.array([[0], [1]]), jnp.zeros(2, int))
  >>> sums = loss(None, {}, batch, None)
  >>> round(float(sums.total), 4), float(sums.count)  # log(1 + 1 / e)
  (0.3133, 1.0)
  """

  def loss(base: Base, params: Params, batch: Eithers, key: Key) -> LossSum:
    del key  # no dropout
    label = jnp.asarray(batch.label)
    classes = unit(dual.text(base, params, tokens, ends=ends))  # [C, P]
    scale = dual.scale(base, params)

    def terms(features: jax.Array, has: Any) -> LossSum:
      real = (label >= 0) & jnp.asarray(has)
      features = jnp.where(real[:, None], features, 1.0)  # else NaN leaks
      logits = (scale * (unit(features) @ classes.T)).astype(jnp.float32)
      own = jnp.take_along_axis(
        logits, jnp.where(real, label, 0)[:, None], axis=-1
      )[:, 0]
      nats = jax.nn.logsumexp(logits, -1) - own
      hit = jnp.sum(logits >= own[:, None], -1) == 1
      return LossSum(
        jnp.where(real, nats, 0.0),
        real.astype(jnp.float32),
        jnp.where(real, hit, False).astype(jnp.float32),
      )

    length = (jnp.asarray(batch.text.segments) > 0).sum(-1)  # [B]
    words = dual.text(
      base, params, batch.text.tokens, ends=jnp.maximum(length - 1, 0)
    )
    sums = terms(words, length > 0)
    if batch.pixels.shape[-1]:  # some example of the run has a picture
      whole = dual.image(base, params, batch.pixels)[0]
      shown = terms(whole, jnp.asarray(batch.pictured) > 0)
      sums = LossSum(*(x + y for x, y in zip(sums, shown)))
    return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))

  return loss


def of_present(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner` on the towers for which a client has data in the round.

  A client without pictures does not change the image tower, and one without
  texts not the text tower, although the names of the classes pass through it:
  the masks of its update are False there, so that it sends nothing of them and
  `masked_mean` averages a tower over those who trained it. Other parameters
  (the scale) are everybody's.

  Raises:
    Error: from the round, other batches or parameters without a tower.

  >>> def run(base, start, state, batches, masks, context):
  ...   return ClientOutput(start, masks)
  >>> ones = jnp.ones((1, 2, 1), jnp.int32)
  >>> from fedjax_llm.types import Batch, Masks
  >>> words = Batch(ones, ones > 0, ones, ones)
  >>> texts = Eithers(None, ones[..., 0] < 0, words, ones[..., 0])
  >>> start = {'text': {'w': jnp.ones(2)}, 'vision': {'w': jnp.ones(2)}}
  >>> yes = jax.tree.map(lambda x: jnp.ones(2, bool), start)
  >>> local = of_present(LocalUpdate(None, run))
  >>> out = local.run(None, start, (), texts, Masks(yes, yes), None)
  >>> jax.tree.map(lambda m: m.any().item(), out.masks.trained)
  {'text': {'w': True}, 'vision': {'w': False}}
  """

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    if not isinstance(batches, Eithers):
      raise Error(
        'clients without pictures or without texts need '
        'task.name=images_or_texts.'
      )
    if not isinstance(start, Mapping) or not {'vision', 'text'} & set(start):
      raise Error(
        'the parameters have neither text nor vision: the adapter trains no '
        'tower of a dual encoder.'
      )
    real = jnp.asarray(batches.label) >= 0
    has = {
      'picture': jnp.any(real & (jnp.asarray(batches.pictured) > 0)),
      'text': jnp.any(real & batches.worded()),
    }
    trained = dict(masks.trained)
    for kind, names in TOWERS.items():
      for name in names:
        if name in trained:
          trained[name] = tree.map_present(
            lambda m, kind=kind: m & has[kind], trained[name]
          )
    own = masks._replace(trained=trained)
    return inner.run(base, start, state, batches, own, context)

  return LocalUpdate(inner.init, run)
