"""The loss of images that are classified by names of classes.

`towers` turns a dual encoder and the tokens of class names into the function of
features that `nodes.scores` reads, and `by_names` returns the `Loss`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.nodes import scores
from fedjax_llm.nodes.scores import Pictures, Towers
from fedjax_llm.types import Base, Error, Key, Loss, LossSum, Params

# (base, params, batch) -> the features of one batch and of all classes.
Seen = Callable[[Base, Params, Any], Towers]


@dataclasses.dataclass(frozen=True, eq=False)
class ByNames:
  """A `Loss`, and the features that it compares.

  `loss(base, params, batch, key) -> LossSum`, which is also its call;
  `towers(base, params, batch) -> nodes.Towers`. Methods with terms of their own
  build them from the towers.

  >>> ByNames(lambda *batch: LossSum(1.0, 1.0, 0.0), None)(0, {}, 0, 0).total
  1.0
  """

  loss: Loss
  towers: Seen

  def __call__(self, base: Base, params: Params, batch: Any, key: Key):
    return self.loss(base, params, batch, key)


def towers(
  dual: Any,
  tokens: Any,
  ends: Any,
  plain: Any = None,
  plain_ends: Any = None,
) -> Seen:
  """Returns the features of a dual encoder for a list of classes.

  Context rows stand behind the first token of a class name, the beginning of a
  text. The encoder is called without the class rows' axis of clients, so under
  `vmap` over contexts each product with the base is one matmul.

  Args:
    dual: the encoder (`models.network.dual.Dual`).
    tokens: class names as texts, [C, T] int32, padded behind their ends.
    ends: the place of the end-of-text token of each, [C].
    plain: texts without context for the zero-shot classifier, [C, U], such as
      'a photo of a cat'; by default `tokens`.
    plain_ends: their ends, [C].

  >>> from types import SimpleNamespace
  >>> dual = SimpleNamespace(
  ...   embed=lambda base, params, tokens: jnp.ones((*tokens.shape, 2)),
  ...   text=lambda base, params, tokens=None, embedded=None, ends=None: (
  ...     embedded.sum(1)),
  ...   scale=lambda base, params: 10.0)
  >>> see = towers(dual, jnp.ones((3, 4), jnp.int32), jnp.array([3, 3, 2]))
  >>> see(None, {}, None).texts(jnp.ones((5, 2))).shape
  (3, 2)
  """
  tokens, ends = jnp.asarray(tokens), jnp.asarray(ends)
  if plain is None:
    plain, plain_ends = tokens, ends

  def seen(base: Base, params: Params, batch: Any) -> Towers:
    inner = without_scores(params)
    embed = lambda: dual.embed(base, inner, tokens)  # [C, T, D]

    def texts(rows):
      if rows is None:
        return scores.unit(dual.text(base, inner, plain, ends=plain_ends))
      names = embed()
      wide = (len(tokens), *rows.shape[-2:])
      rows = jnp.broadcast_to(rows.astype(names.dtype), wide)
      whole = jnp.concatenate([names[:, :1], rows, names[:, 1:]], axis=1)
      return scores.unit(
        dual.text(base, inner, embedded=whole, ends=ends + wide[1])
      )

    def images(rows=None):
      return Pictures(*dual.image(base, inner, batch.pixels, prompts=rows))

    return Towers(texts, images, dual.scale(base, inner))

  return seen


def by_names(
  seen: Seen, *, plain: Loss | None = None, per_row: bool = False
) -> ByNames:
  """Returns cross-entropy of the class of each image, by the names of classes.

      -log softmax(logits)_y,   logits = `scores(params.get('scores'), towers)`

  Rows that are padding or have no label (-1) count for nothing.

  Args:
    seen: the features of a batch (`towers`).
    plain: the loss for parameters without a node at 'scores'; by default that
      of the zero-shot classifier.
    per_row: one number a row, [B], instead of their sum.

  Returns:
    A `Loss` with sums in nats and counts in labels.

  >>> even = lambda base, params, batch: Towers(
  ...   lambda rows: jnp.ones((4, 2)), lambda rows: Pictures(jnp.ones((2, 2))),
  ...   1.0)
  >>> from fedjax_llm.types import Images
  >>> batch = Images(None, jnp.array([3, -1]), jnp.array([True, True]))
  >>> sums = by_names(even)(None, {}, batch, None)
  >>> round(float(sums.total), 4), float(sums.count)  # log 4, one label
  (1.3863, 1.0)
  """

  def loss(base: Base, params: Params, batch: Any, key: Key) -> LossSum:
    node = params.get('scores') if isinstance(params, Mapping) else None
    if node is None and plain is not None:
      return plain(base, params, batch, key)
    logits = scores.scores(node, seen(base, params, batch))
    return summed(logits, batch, per_row=per_row)

  return ByNames(loss, seen)


def summed(logits: jax.Array, batch: Any, *, per_row: bool = False) -> LossSum:
  """Returns the cross-entropy of logits [B, C] of a batch of labelled images.

  >>> from fedjax_llm.types import Images
  >>> batch = Images(None, jnp.array([1]), jnp.array([True]))
  >>> float(summed(jnp.array([[0.0, 1.0]]), batch).correct)
  1.0
  """
  real = known_rows(batch)
  logits = jnp.where(real[:, None], logits, 0.0)  # else NaN leaks backwards
  target = jnp.where(real, batch.label, 0)
  picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
  nats = jnp.where(real, jax.nn.logsumexp(logits, -1) - picked, 0.0)
  # A hit if no other logit is as large: arg max is not vectorised on a CPU.
  hit = (jnp.sum(logits >= picked[:, None], -1) == 1) & real
  count = real.astype(jnp.float32)
  sums = LossSum(nats, count, hit.astype(jnp.float32))
  return sums if per_row else LossSum(*(jnp.sum(x) for x in sums))


def known_rows(batch: Any) -> jax.Array:
  """Returns True for rows with an image and a label, [B].

  >>> from fedjax_llm.types import Images
  >>> batch = Images(None, jnp.array([1, -1]), jnp.array([True, True]))
  >>> known_rows(batch).tolist()
  [True, False]
  """
  return (jnp.asarray(batch.label) >= 0) & (jnp.asarray(batch.present) > 0)


def without_scores(params: Params) -> Params:
  """Returns the parameters of the towers alone.

  >>> without_scores({'scores': 1, 'text': 2})
  {'text': 2}
  """
  if not isinstance(params, Mapping):
    return params
  return {name: x for name, x in params.items() if name != 'scores'}


def needed(name: str, loss: Any) -> Any:
  """Returns the towers of a method's loss; None for no loss at all.

  Raises:
    Error: the loss is not of images and names of classes.

  >>> needed('fed_clip', lambda *batch: None)
  Traceback (most recent call last):
  fedjax_llm.types.Error: fed_clip compares images with names of classes in a \
loss of its own: it needs task.name=zero_shot, without micro batches.
  """
  seen = getattr(loss, 'towers', None)
  if seen is None and loss is not None:
    raise Error(
      f'{name} compares images with names of classes in a loss of its own: it '
      'needs task.name=zero_shot, without micro batches.'
    )
  return seen
