"""Networks of images: patches, a row of the class, and the common blocks.

    x = [class; patches W + b] + positions        [B, 1 + N, D]
    states = norm(scan(block)(norm? [prompts; x]))

Dosovitskiy et al. 2021, arXiv 2010.11929; DINOv2 (arXiv 2304.07193)
interpolates the positions to pictures of other sizes and scales the outputs of
modules.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters
from fedjax_llm.models.config import Config, Patches
from fedjax_llm.models.network import blocks, layers, transformer
from fedjax_llm.nodes import frozen, protocol
from fedjax_llm.types import Base, Batch, Error, Images, Model, Params

States = Callable[..., Any]


def check(pixels: Any, image: Patches, family: str) -> None:
  """Raises `Error` for pixels [..., H, W, C] that the network cannot read.

  >>> check(np.zeros((2, 8, 8, 3), np.int32), Patches(8, 4), 'vit')
  Traceback (most recent call last):
  fedjax_llm.types.Error: pixels have the dtype int32; uint8 (0 to 255) or a \
float dtype (0 to 1) is needed.
  """
  shape, dtype = jnp.shape(pixels), jnp.result_type(pixels)
  if len(shape) < 3 or shape[-1] != image.channels:
    raise Error(
      f'pixels have the shape {list(shape)}; the {family} model reads [..., H, '
      f'W, {image.channels}].'
    )
  if dtype != jnp.uint8 and not jnp.issubdtype(dtype, jnp.floating):
    raise Error(
      f'pixels have the dtype {dtype}; uint8 (0 to 255) or a float dtype (0 to '
      '1) is needed.'
    )
  sides = tuple(shape[-3:-1])
  if image.resized:
    if any(side < image.patch or side % image.patch for side in sides):
      raise Error(
        f'pixels are {sides[0]} x {sides[1]}; both sides must be multiples of '
        f'the patch size of the {family} model, {image.patch}.'
      )
  elif sides != (image.size, image.size):
    raise Error(
      f'pixels are {sides[0]} x {sides[1]}; the {family} model reads '
      f'{image.size} x {image.size}.'
    )


def normalised(pixels: Any, image: Patches, dtype: Any) -> jax.Array:
  """Returns (x - mean) / std of pixels x in 0..1, channel by channel.

  >>> normalised(np.full((1, 1, 1), 255, np.uint8), \
Patches(1, 1, 1, mean=(0.5,), std=(0.25,)), 'float32').tolist()
  [[[2.0]]]
  """
  x = jnp.asarray(pixels)
  x = x.astype(jnp.float32) / (255 if x.dtype == jnp.uint8 else 1)
  mean, std = (np.asarray(v, np.float32) for v in (image.mean, image.std))
  x = (x - mean) / std
  return x.astype(dtype)


def cut(x: jax.Array, patch: int) -> jax.Array:
  """Cuts pictures [B, H, W, C] into patches [B, N, C * patch * patch].

  A patch's features stand in the order (C, row, column), that of a torch
  convolution's weight.

  >>> cut(jnp.arange(8).reshape(1, 2, 4, 1), 2).tolist()
  [[[0, 1, 4, 5], [2, 3, 6, 7]]]
  """
  b, height, width, channels = x.shape
  rows, columns = height // patch, width // patch
  x = x.reshape(b, rows, patch, columns, patch, channels)
  x = x.transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(b, rows * columns, channels * patch**2)


@functools.cache
def _cubic(size: int, new: int) -> np.ndarray:
  """Returns the matrix [new, size] of torch's cubic interpolation.

  Keys' kernel with a = -0.75, pixel centres aligned, edges repeated.
  """
  a = -0.75
  place = (np.arange(new) + 0.5) * size / new - 0.5
  first = np.floor(place).astype(int)
  matrix = np.zeros((new, size))
  for tap in range(-1, 3):
    far = np.abs(place - (first + tap))
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    wide = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weight = np.where(far <= 1, near, np.where(far < 2, wide, 0))
    at = np.clip(first + tap, 0, size - 1)
    np.add.at(matrix, (np.arange(new), at), weight)
  return matrix.astype(np.float32)


def positions(table: Any, grid: int, rows: int, columns: int) -> jax.Array:
  """Returns positions [1 + rows * columns, D], interpolated where needed.

  Args:
    table: the learned positions [1 + grid * grid, D], that of the class first.
    grid: patches along one side of the table's pictures.
    rows, columns: patches of the pictures at hand.

  >>> positions(jnp.ones((5, 2)), 2, 3, 1).shape
  (4, 2)
  """
  if (rows, columns) == (grid, grid):
    return table
  own = table[1:].reshape(grid, grid, -1).astype(jnp.float32)
  own = jnp.einsum(
    'ri,cj,ijd->rcd', _cubic(grid, rows), _cubic(grid, columns), own
  )
  return jnp.concatenate([table[:1], own.reshape(rows * columns, -1)])


def states(
  config: Config,
  *,
  remat: str = 'none',
  unroll: int = 1,
  compute_dtype: Any = jnp.float32,
  attention: str = 'auto',
) -> States:
  """Returns the function from pixels to states behind the last norm.

  `run(base, params, pixels [B, H, W, C], *, prompts=None, deep=None, record=
  False) -> (states [B, 1 + N, D], statistics)`. The state of the class comes
  first, then those of the patches, row by row.

  `prompts` [P, D] or [B, P, D] are visual prompts: rows in front of every
  picture's, added behind the positions and before the first norm, without a
  state in the result. `deep` [L - 1, P, D] replace their states before every
  layer but the first (VPT-deep, Jia et al. 2022, arXiv 2203.12119). A node at
  `inputs` of the adapter is a prompt as well, and comes first.
  """
  walk = transformer.walker(
    config,
    remat=remat,
    unroll=unroll,
    compute_dtype=compute_dtype,
    attention=attention,
  )
  image = config.image
  assert image is not None

  def norm(base, params, x):
    if not config.embedding_norm:
      return x
    leaf = blocks.child(params, 'embed_norm')
    return layers.norm(
      x, base['embed_norm'], leaf, config.norm, config.norm_eps
    )

  def run(
    base: Base,
    params: Params,
    pixels: Any,
    *,
    prompts: Any = None,
    deep: Any = None,
    record: bool = False,
  ):
    check(pixels, image, config.family)
    num_frozen, params = frozen.unmarked(params)
    base, params = adapters.overlay(base, params)
    adapters.check(base, adapters.gates.without(params), places=protocol.BESIDE)
    x = cut(normalised(pixels, image, compute_dtype), image.patch)
    leaf = lambda name: blocks.child(params, name)
    table = lambda name: layers.changed(
      base[name], leaf(name), 'embedding', 'embedding'
    )
    x = layers.linear(x, base['embed_patches'], leaf('embed_patches'))
    first = table('embed_class').astype(x.dtype)
    first = jnp.broadcast_to(first, (len(x), 1, x.shape[-1]))
    grid = image.size // image.patch
    sides = (side // image.patch for side in pixels.shape[-3:-1])
    places = positions(table('embed_positions'), grid, *sides)
    x = jnp.concatenate([first, x], axis=1) + places.astype(x.dtype)

    front = []
    node = leaf('inputs')
    if hasattr(node, 'choose'):
      raise Error(
        'a prompt pool is chosen from by words; a network of images takes '
        'adapter.name=soft_prompt.'
      )
    if node is not None:
      front.append(node.before(x))
    if prompts is not None:
      wide = (len(x), *jnp.shape(prompts)[-2:])
      front.append(jnp.broadcast_to(prompts, wide).astype(x.dtype))
    num_rows = sum(rows.shape[1] for rows in front)
    x = norm(base, params, jnp.concatenate([*front, x], axis=1))
    rows = None
    if deep is not None:
      rows = _every_layer(x, deep, num_rows, config.num_layers)

    if isinstance(params, dict):
      params = {k: leaf for k, leaf in params.items() if k != 'inputs'}
    if num_frozen:
      params = frozen.marked(params, num_frozen)
    shape = x.shape[:2]
    tokens = np.zeros(shape, np.int32)
    batch = Batch(
      tokens,
      tokens < 1,
      tokens + 1,
      np.broadcast_to(np.arange(shape[1]), shape),
    )
    out, _, statistics = walk(
      base, params, batch, x=x, rows=rows, record=record
    )
    return out[:, num_rows:], statistics

  return run


def _every_layer(x: Any, deep: Any, num_rows: int, num_layers: int) -> Any:
  """Returns the rows in place of the prompts of each layer, [L, B, P, D]."""
  shape = jnp.shape(deep)
  if shape[0] != num_layers - 1 or shape[-2] != num_rows:
    raise Error(
      f'deep prompts have the shape {list(shape)}; [{num_layers - 1}, '
      f'{num_rows}, D] is needed, for {num_layers} layers and {num_rows} '
      'prompts at the input.'
    )
  first = x[:, :num_rows]
  wide = jnp.broadcast_to(
    jnp.expand_dims(deep, 1) if len(shape) == 3 else deep,
    (shape[0], *first.shape),
  )
  return jnp.concatenate([first[None], wide.astype(x.dtype)])


def pixels_of(batch: Any, family: str) -> Any:
  """Returns the pixels of a batch; `Error` for a batch of texts."""
  pixels = getattr(batch, 'pixels', None)
  if pixels is None:
    raise Error(
      f'this batch holds no pictures, and the {family} model reads images: '
      "set task.name='image_classification'."
    )
  return pixels


def build(
  config: Config, *, logits_dtype: Any = jnp.float32, **settings: Any
) -> Model:
  """Returns a network of images as a `Model`, with one state a picture.

  `hidden(base, params, images) -> [B, D]` is the state of the class; of a
  DINOv2 classifier [B, 2 D], followed by the mean of the patches.

  >>> from fedjax_llm import models
  >>> loaded = models.random_vit(labels=('cat', 'dog'))
  >>> picture = Images(np.zeros((2, 8, 8, 3), np.uint8), None, None)
  >>> loaded.model.hidden(loaded.base, {}, picture).shape
  (2, 32)
  """
  run = states(config, **settings)
  image = config.image
  assert image is not None

  def both(base: Base, params: Params, batch: Images, record: bool):
    out, statistics = run(
      base, params, pixels_of(batch, config.family), record=record
    )
    first = out[:, 0]
    if image.with_mean:
      first = jnp.concatenate([first, out[:, 1:].mean(1)], axis=-1)
    return first, statistics

  def hidden(base: Base, params: Params, batch: Any) -> jax.Array:
    return both(base, params, batch, False)[0]

  def with_statistics(base: Base, params: Params, batch: Any):
    out, statistics = both(base, params, batch, True)
    empty = dict.fromkeys(frozen.unmarked(params)[1] or {})
    if 'inputs' not in empty:
      del statistics['inputs']
    return out, {**empty, **statistics}

  def logits(base: Base, params: Params, hidden: jax.Array) -> jax.Array:
    base, params = adapters.overlay(base, frozen.unmarked(params)[1])
    hidden = hidden.astype(settings.get('compute_dtype', jnp.float32))
    return transformer.head(config, base, params, hidden, logits_dtype)

  return Model(hidden, logits, with_statistics)
