"""Joins a text encoder and an image encoder to a dual encoder."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models.families import OWN
from fedjax_llm.models.files import load
from fedjax_llm.models.files.weights import Place
from fedjax_llm.types import Error

_ARRAYS = (
  *('text_kernel', 'text_bias', 'image_kernel', 'image_bias'),
  'logit_scale',
)


def joined(
  text: str | os.PathLike,
  image: str | os.PathLike,
  projections: str | os.PathLike,
  *,
  labels: Sequence[str] | None = None,
  place: Place | None = None,
  dtype: str = 'float32',
  remat: str = 'none',
  compute_dtype: Any = 'auto',
  attention: str = 'auto',
) -> load.LoadedModel:
  """Returns a dual encoder of two encoders and two projections.

      t = W_t mean(states of the text) + b_t
      v = W_v [state of the class; mean of the patches] + b_v

  For encoders that were trained apart (`scripts/fit_dual_encoder` fits the
  projections). Local features of an image are W_v [class; patch] + b_v, whose
  mean is v. Its modules have names of their own, so adapters are saved under
  these, for this project alone.

  Args:
    text: a Hugging Face directory of an encoder of texts without a head.
    image: one of an encoder of images without a head.
    projections: an .npz file with text_kernel [D, P], text_bias [P],
      image_kernel [2 D, P], image_bias [P] and logit_scale [].
    labels: the names of the classes of a zero-shot classifier.
    place, dtype, remat, compute_dtype, attention: see `pretrained`.

  Raises:
    Error: as `pretrained`; a directory of another kind of network; a file that
      cannot be read, or an array that is missing or of a wrong shape.

  >>> joined('./nowhere', './nowhere', 'x.npz')  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: ./nowhere is neither a directory nor ...
  """
  settings: Any = {'dtype': dtype, 'place': place}
  words = load.pretrained(text, **settings)
  seen = load.pretrained(image, **settings)
  if words.config.causal or words.config.reads_images:
    raise Error(f'model.text: {text} is no encoder of texts.')
  if seen.config.image is None:
    raise Error(f'model.image: {image} is no network of images.')
  for field, one in (('text', words), ('image', seen)):
    if one.config.head != 'none':
      raise Error(f'model.{field}: {one.name} has a head; name one without.')
  arrays = _read(pathlib.Path(projections).expanduser())
  size = arrays['text_kernel'].shape[-1]
  shapes = {
    'text_kernel': (words.config.hidden_size, size),
    'text_bias': (size,),
    'image_kernel': (2 * seen.config.hidden_size, size),
    'image_bias': (size,),
    'logit_scale': (),
  }
  for name, shape in shapes.items():
    if arrays[name].shape != shape:
      raise Error(
        f'model.projections: {projections} has {name} '
        f'{list(arrays[name].shape)}; {list(shape)} is needed.'
      )
  cast = lambda name: jnp.asarray(arrays[name], dtype)
  base = {
    'text': words.base,
    'vision': seen.base,
    'text_projection': {
      'kernel': cast('text_kernel'),
      'bias': cast('text_bias'),
    },
    'visual_projection': {
      'kernel': cast('image_kernel'),
      'bias': cast('image_bias'),
    },
    'logit_scale': {'value': cast('logit_scale')},
  }
  if place is not None:
    for name in ('text_projection', 'visual_projection', 'logit_scale'):
      base[name] = {
        leaf: jax.device_put(x, place((name, leaf), x.shape))
        for leaf, x in base[name].items()
      }
  whole = seen.config.image._replace(with_mean=True)
  config = words.config._replace(
    family=OWN,
    head='dual',
    vision=seen.config._replace(image=whole),
    projection=size,
    projection_bias=True,
    pooling='mean',
    labels=() if labels is None else tuple(labels),
  )
  return load.assemble(
    config,
    base,
    name=f'{words.name}+{seen.name}',
    directory=words.directory,
    remat=remat,
    compute_dtype=compute_dtype,
    attention=attention,
  )


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
  if not file.is_file():
    raise Error(f'model.projections: there is no file {file}.')
  try:
    with np.load(file, allow_pickle=False) as arrays:
      missing = [name for name in _ARRAYS if name not in arrays.files]
      if missing:
        raise Error(f'model.projections: {file} has no array {missing[0]!r}.')
      return {name: arrays[name] for name in _ARRAYS}
  except Error:
    raise
  except (ValueError, OSError, EOFError) as error:
    raise Error(
      f'model.projections: {file} is no readable .npz file ({error}).'
    ) from error
