"""Nodes that classify images by the names of classes, with a dual encoder.

    params['scores'] = node

A node at this place has a method `scores(towers) -> [B, C]`, which returns the
logits of a batch of images from `Towers`: the features of images and of class
names. A dual encoder without such a node compares images with the names alone.
The encoders are frozen; a node gets the functions and adds what is trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.made import Attended
from fedjax_llm.nodes.transport import partial_plan

_HIGHEST = jax.lax.Precision.HIGHEST


class Pictures(NamedTuple):
  """Features of a batch of images in the space of the texts, not normalised.

  >>> Pictures(jnp.ones((2, 4)), jnp.ones((2, 9, 4))).pooled.shape
  (2, 4)
  """

  pooled: Any  # [B, E], of whole images
  patches: Any = None  # [B, M, E], of M places of each image


class Towers(NamedTuple):
  """A frozen dual encoder at one batch of images and one list of classes.

  `texts(rows)` returns unit features [C, E] of the class names behind context
  rows [P, D], the same for all classes, or [C, P, D], rows for each class;
  `texts(None)` those of the zero-shot classifier. `images(rows)` returns
  `Pictures`, with prompt rows [P, V] of the image tower, or None.
  `local.towers` makes them.

  >>> towers = Towers(lambda rows: jnp.eye(3), None, 100.0)
  >>> towers.texts(None).shape
  (3, 3)
  """

  texts: Callable[[Any], jax.Array]
  images: Callable[[Any], Pictures]
  scale: Any  # [], the factor of cosines


def unit(x: jax.Array) -> jax.Array:
  """Returns x [..., E] divided by its norm, in float32.

  >>> (10 * unit(jnp.array([3.0, 4.0]))).round().tolist()
  [6.0, 8.0]
  """
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def compared(towers: Towers, pooled: Any, texts: Any) -> jax.Array:
  """Returns logits scale * cos(image, text), [B, C].

  `pooled` are features of images [B, E], `texts` unit features [C, E], or
  [B, C, E] where each image has its own.

  >>> towers = Towers(None, None, 10.0)
  >>> compared(towers, jnp.array([[2.0, 0.0]]), jnp.eye(2)).tolist()
  [[10.0, 0.0]]
  """
  own = 'b' if jnp.ndim(texts) == 3 else ''
  return towers.scale * jnp.einsum(
    f'be,{own}ce->bc', unit(pooled), texts, precision=_HIGHEST
  )


def scores(node: Any, towers: Towers) -> jax.Array:
  """Returns the logits of a node, or zero-shot logits for None, [B, C].

  >>> pictures = Pictures(jnp.array([[0.0, 2.0]]))
  >>> towers = Towers(lambda rows: jnp.eye(2), lambda rows: pictures, 10.0)
  >>> scores(None, towers).tolist()
  [[0.0, 10.0]]
  """
  if node is None:
    return compared(towers, towers.images(None).pooled, towers.texts(None))
  return node.scores(towers)


class Context(NamedTuple):
  """Trained rows in front of every class name.

  Zhou et al. 2022, arXiv 2109.01134 (CoOp), with the class name at the end:
  the logits are scale * cos(f(image), t([rows, name_c])).

  >>> pictures = Pictures(jnp.array([[0.0, 2.0]]))
  >>> texts = lambda rows: unit(jnp.eye(2) + rows.sum())
  >>> towers = Towers(texts, lambda rows: pictures, 10.0)
  >>> print(Context(jnp.zeros((3, 4))).scores(towers).round(1))
  [[ 0. 10.]]
  """

  rows: Any  # [P, D], or [C, P, D]

  PLACES = ('scores',)

  def scores(self, towers: Towers) -> jax.Array:
    return compared(towers, towers.images(None).pooled, towers.texts(self.rows))


class Visual(NamedTuple):
  """Trained rows among the patches of every image; class names stay plain.

  Jia et al. 2022, arXiv 2203.12119 (VPT-shallow).

  >>> images = lambda rows: Pictures(jnp.ones((1, 2)) * rows.sum(0))
  >>> towers = Towers(lambda rows: jnp.eye(2), images, 10.0)
  >>> Visual(jnp.array([[3.0, 4.0]])).scores(towers).round().tolist()
  [[6.0, 8.0]]
  """

  rows: Any  # [P, V]

  PLACES = ('scores',)

  def scores(self, towers: Towers) -> jax.Array:
    return compared(towers, towers.images(self.rows).pooled, towers.texts(None))


class Reweighted(NamedTuple):
  """An adapter that weights the features of images.

      a(f) = softmax(tanh(f W1 + b1) W2 + b2),   f' = a(f) * f   elementwise

  Lu et al. 2023, arXiv 2302.13485 (FedCLIP).

  >>> even = Affine(jnp.zeros((2, 2)), jnp.zeros(2))
  >>> pictures = Pictures(jnp.array([[0.0, 2.0]]))
  >>> towers = Towers(lambda rows: jnp.eye(2), lambda rows: pictures, 10.0)
  >>> Reweighted(even, even).scores(towers).tolist()
  [[0.0, 10.0]]
  """

  first: Affine  # W1 [E, E], b1 [E]
  second: Affine  # W2 [E, E], b2 [E]

  PLACES = ('scores',)

  def weighted(self, pooled: Any) -> jax.Array:
    """Returns f' of features f, [B, E]."""
    pooled = pooled.astype(jnp.float32)
    return jax.nn.softmax(self.second(jnp.tanh(self.first(pooled)))) * pooled

  def scores(self, towers: Towers) -> jax.Array:
    pooled = self.weighted(towers.images(None).pooled)
    return compared(towers, pooled, towers.texts(None))


class Transported(NamedTuple):
  """Two contexts, whose features are matched with the patches of an image.

      s_mn = cos(patch m, t_c of context n),   T = partial plan of s,
      logit_c = scale * sum_mn T_mn s_mn

  Li et al. 2024, arXiv 2403.00041 (FedOTP); T has no gradient. See
  `transport.partial_plan`.

  >>> pictures = Pictures(jnp.ones((1, 2)), jnp.array([[[1.0, 0], [0, 1.0]]]))
  >>> texts = lambda rows: unit(jnp.eye(2) + rows.sum())
  >>> towers = Towers(texts, lambda rows: pictures, 10.0)
  >>> zero = jnp.zeros((1, 2))
  >>> node = Transported(zero, zero, 0.5, 0.1)  # half of the mass is moved
  >>> print(node.scores(towers).round(1))
  [[5. 5.]]
  """

  common: Any  # [P, D]
  own: Any  # [P, D]
  mass: Any = 0.8  # []
  temperature: Any = 0.1  # []

  PLACES = ('scores',)
  FROZEN = ('mass', 'temperature')

  def scores(self, towers: Towers) -> jax.Array:
    both = jnp.stack([self.common, self.own])
    texts = jax.vmap(towers.texts)(both)  # [N, C, E]
    patches = unit(towers.images(None).patches)  # [B, M, E]
    cosines = jnp.einsum('bme,nce->bcmn', patches, texts, precision=_HIGHEST)
    still = jax.lax.stop_gradient(cosines)
    plan = jax.lax.stop_gradient(
      partial_plan(still, self.mass, self.temperature)
    )
    return towers.scale * jnp.sum(plan * cosines, (-1, -2))


class Generated(NamedTuple):
  """A context that a network computes from the features of the class names.

  Qiu et al. 2024, arXiv 2310.06123 (FedTPG): `net` attends to t(name_c), so
  that it makes a context for any list of classes, unseen ones too. `classes`
  are the numbers of the classes that count, others than these get no
  probability; None: all.

  >>> from fedjax_llm.adapters.prompts import classes
  >>> adapter, base = classes.generated_context(3, 2), classes.sizes(4, 5, 2)
  >>> rows = lambda: adapter.init(jax.random.key(0), base)['scores'].rows(
  ...   jnp.eye(2))
  >>> jax.eval_shape(rows).shape
  (3, 4)
  """

  net: Attended  # without a context of its own
  classes: Any = None  # [...] int32; a negative number is none

  PLACES = ('scores',)
  FROZEN = ('classes',)

  def present(self, number: int) -> jax.Array | None:
    """Returns True for the classes that count, [C]; None if all do."""
    if self.classes is None:
      return None
    numbers = jnp.arange(number)[:, None]
    return jnp.any(numbers == jnp.ravel(self.classes), -1)

  def rows(self, names: Any) -> jax.Array:
    """Returns the context of classes with the features names [C, E], [P, D]."""
    return self.net.made(names, self.present(len(names)))

  def scores(self, towers: Towers) -> jax.Array:
    names = towers.texts(None)
    texts = towers.texts(self.rows(names))
    logits = compared(towers, towers.images(None).pooled, texts)
    present = self.present(len(names))
    return logits if present is None else jnp.where(present, logits, -1e9)


class Domains(NamedTuple):
  """A context that depends on how much an image is like each client's.

      d = f(image) Q,   w = softmax((d - mean d) / std d / temperature),
      rows_c = meta_c * (1 + sum_k w_k key_k)

  Su et al. 2024, arXiv 2211.07864 (FedAPT). The keys are random and frozen.

  >>> node = Domains(jnp.ones((2, 1, 3)), jnp.eye(2), jnp.ones((2, 1, 3)), 1.0)
  >>> (100 * node.shares(jnp.array([[1.0, 0.0]]))).round().tolist()
  [[80.0, 20.0]]
  """

  meta: Any  # [C, P, D]
  query: Any  # Q [E, N]
  keys: Any  # [N, P, D]
  temperature: Any = 0.01  # []

  PLACES = ('scores',)
  FROZEN = ('keys', 'temperature')

  def shares(self, pooled: Any) -> jax.Array:
    """Returns w for features of images, [B, N]; a variance has N - 1."""
    near = self.nearness(pooled)
    near = near - jnp.mean(near, -1, keepdims=True)
    number = near.shape[-1]
    square = jnp.sum(near**2, -1, keepdims=True) / max(number - 1, 1)
    return jax.nn.softmax(near * jax.lax.rsqrt(square + 1e-12)
                          / self.temperature)  # fmt: skip

  def nearness(self, pooled: Any) -> jax.Array:
    """Returns the logits of the clients, d, [B, N]."""
    return jnp.matmul(
      pooled.astype(jnp.float32), self.query, precision=_HIGHEST
    )

  def of_client(self, client: Any) -> Context:
    """Returns the context of a client's own images."""
    return Context(self.meta * (1 + self.keys[client]))

  def scores(self, towers: Towers) -> jax.Array:
    pooled = towers.images(None).pooled
    mixed = jnp.einsum('bn,npd->bpd', self.shares(pooled), self.keys)
    rows = self.meta * (1 + mixed[:, None])  # [B, C, P, D]
    return compared(towers, pooled, jax.vmap(towers.texts)(rows))
