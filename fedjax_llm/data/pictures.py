"""Sources of pictures: records with an image, a class and perhaps a text.

`images` reads an .npz file or a folder, `shapes` draws pictures.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

__all__ = ['images', 'shapes', 'shapes_or_words']

_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def images(
  path: str,
  client_key: str | None = None,
  label_key: str | None = 'label',
  text_key: str | None = None,
  folders: Sequence[str] = ('client', 'label'),
  size: int | None = None,
) -> list[Record]:
  """Reads pictures [H, W, C] with their classes and clients.

  `path` is an .npz file with an array `pixels` [M, H, W, C], uint8 or floats in
  0..1, beside which `client_key`, `label_key` and `text_key` name arrays [M] of
  strings or integers: the client, the class, and a text about the picture. Or
  it is a folder of pictures (.png, .jpg, .webp, .bmp): `folders` names what its
  levels of folders are, so that ('client', 'label') reads
  `path/client/label/file.png`; with `text` as a level its name is the text.
  Reading a folder needs Pillow (`pip install fedjax_llm[images]`); pictures
  become RGB, and with `size` they are scaled to size x size.

  Raises:
    Error: a file that is missing or cannot be read, an array that is missing or
      of a wrong shape or dtype, pictures of different sizes.

  >>> import tempfile
  >>> file = os.path.join(tempfile.mkdtemp(), 'two.npz')
  >>> np.savez(file, pixels=np.zeros((2, 4, 4, 3), np.uint8), label=['a', 'b'],
  ...   domain=['photo', 'sketch'])
  >>> [(r.client, r.label) for r in images(file, client_key='domain')]
  [('photo', 'a'), ('sketch', 'b')]
  """
  where = pathlib.Path(os.path.expanduser(path))
  if where.is_dir():
    records = list(_folder(where, tuple(folders), size))
    if not records:
      raise Error(
        f'data.path: {path} holds no picture below folders of {folders}; they '
        f'end in {", ".join(_ENDINGS)}.'
      )
    return records
  if not where.is_file():
    raise Error(f'data.path: {path} is neither an .npz file nor a folder.')
  if size is not None:
    raise Error(
      f'data.size is {size}, but the pictures of an .npz file keep their size.'
    )
  keys = {'client': client_key, 'label': label_key, 'text': text_key}
  return list(_npz(where, {k: v for k, v in keys.items() if v}))


def _npz(file: pathlib.Path, keys: dict[str, str]) -> Iterator[Record]:
  try:
    with np.load(file, allow_pickle=False) as arrays:
      missing = {'pixels', *keys.values()} - set(arrays.files)
      if missing:
        raise Error(
          f'{file} has no array {min(missing)!r}; it has '
          f'{", ".join(map(repr, sorted(arrays.files)))}.'
        )
      pixels = checked(arrays['pixels'], f'{file}: pixels', 4)
      columns = {name: arrays[key] for name, key in keys.items()}
  except Error:
    raise
  except (ValueError, OSError, KeyError, EOFError) as error:
    raise Error(f'{file} is no readable .npz file ({error}).') from error
  for name, values in columns.items():
    if values.shape != (len(pixels),) or values.dtype.kind not in 'Uiu':
      raise Error(
        f'{file}: {keys[name]!r} is {values.dtype} {list(values.shape)}; '
        f'strings or integers [{len(pixels)}] are needed, one a picture.'
      )
  for i, picture in enumerate(pixels):
    fields: Any = {name: str(values[i]) for name, values in columns.items()}
    yield Record(**fields, image=picture, where=f'{file}[{i}]')


def checked(pixels: Any, where: str, ndim: int = 3) -> np.ndarray:
  """Returns pixels as an array [..., H, W, C], uint8 or float32.

  Raises:
    Error: another number of axes, another dtype, or floats outside 0..1.

  >>> checked(np.zeros((2, 2), np.uint8), 'a.png')
  Traceback (most recent call last):
  fedjax_llm.types.Error: a.png: its shape is [2, 2]; [H, W, C] is needed.
  """
  pixels = np.asarray(pixels)
  if pixels.ndim != ndim:
    axes = ('M, ' if ndim == 4 else '') + 'H, W, C'
    raise Error(
      f'{where}: its shape is {list(pixels.shape)}; [{axes}] is needed.'
    )
  if pixels.dtype == np.uint8:
    return pixels
  if pixels.dtype.kind != 'f':
    raise Error(
      f'{where}: its dtype is {pixels.dtype}; uint8 (0 to 255) or a float '
      'dtype (0 to 1) is needed.'
    )
  pixels = pixels.astype(np.float32)
  low, high = pixels.min(initial=0), pixels.max(initial=0)
  if not (low >= 0 and high <= 1):
    raise Error(
      f'{where}: its values go from {low:g} to {high:g}; floats from 0 to 1 '
      'are needed, or uint8.'
    )
  return pixels


def _folder(
  root: pathlib.Path, folders: tuple[str, ...], size: int | None
) -> Iterator[Record]:
  unknown = [x for x in folders if x not in ('client', 'label', 'text')]
  if unknown or len(set(folders)) != len(folders):
    raise Error(
      f'data.folders is {list(folders)}; its levels are client, label and '
      'text, each at most once.'
    )
  try:
    from PIL import Image
  except ImportError as error:
    raise Error(
      f'{root} is a folder of pictures, which needs Pillow: pip install '
      'fedjax_llm[images].'
    ) from error
  first = None
  for file in sorted(root.glob('/'.join(['*'] * (len(folders) + 1)))):
    if file.suffix.lower() not in _ENDINGS or not file.is_file():
      continue
    try:
      with Image.open(file) as picture:
        picture = picture.convert('RGB')
        if size is not None:
          picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
    except (OSError, ValueError) as error:
      raise Error(f'{file} is no readable picture ({error}).') from error
    first = first or (file, pixels.shape)
    if pixels.shape != first[1]:
      raise Error(
        f'{file} is {pixels.shape[0]} x {pixels.shape[1]}, and {first[0]} is '
        f'{first[1][0]} x {first[1][1]}: set data.size to scale them.'
      )
    names: Any = dict(zip(folders, file.relative_to(root).parts, strict=False))
    yield Record(**names, image=pixels, where=str(file))


STYLES = ('plain', 'inverted', 'tinted', 'noisy')
SHAPES = ('cross', 'disc', 'square', 'stripes')


def shapes(num: int = 240, size: int = 8, seed: int = 0) -> list[Record]:
  """Draws pictures of four shapes in four styles, which are the clients.

  For trying the program without a file: `num` pictures [size, size, 3] of a
  cross, a disc, a square and stripes at random places, with a style as the
  client and the shape as the class.

  Raises:
    Error: a number of pictures below 1, a size below 4.

  >>> records = shapes(num=8)
  >>> sorted({r.client for r in records}), records[0].image.shape
  (['inverted', 'noisy', 'plain', 'tinted'], (8, 8, 3))
  """
  if num < 1 or size < 4:
    raise Error(
      f'shapes: num is {num} and size is {size}; at least 1 and 4 are needed.'
    )
  rng = np.random.default_rng((seed, size))
  grid = np.arange(size)
  records = []
  for i in range(num):
    shape, style = SHAPES[i // 4 % 4], STYLES[i % 4]
    radius = rng.uniform(0.25, 0.4) * size
    y, x = grid - rng.uniform(0.4, 0.6, (2, 1)) * (size - 1)
    y, x = np.abs(y)[:, None], np.abs(x)[None]
    ink = {
      'cross': (np.minimum(x, y) <= size / 8) & (np.maximum(x, y) <= radius),
      'disc': x**2 + y**2 <= radius**2,
      'square': np.maximum(x, y) <= radius,
      'stripes': (grid[:, None] + int(rng.integers(4))) % 4 < 2 + 0 * x,
    }[shape]
    picture = np.where(ink[..., None], 0.9, 0.1) * np.ones(3)
    if style == 'inverted':
      picture = 1 - picture
    elif style == 'tinted':
      picture = picture * rng.uniform(0.3, 1, 3)
    elif style == 'noisy':
      picture = picture + rng.normal(0, 0.1, picture.shape)
    pixels = np.uint8(np.clip(picture, 0, 1) * 255)
    where = f'shapes[{i}]'
    records.append(Record(client=style, label=shape, image=pixels, where=where))
  return records


def shapes_or_words(
  num: int = 240,
  size: int = 8,
  seed: int = 0,
  shows: Sequence[str] = ('both', 'picture', 'text'),
) -> list[Record]:
  """Draws pictures as `shapes`, of which some clients have words instead.

  The texts are of the form 'a tinted disc'; labels are the shapes.

  Args:
    num, size, seed: see `shapes`.
    shows: 'picture', 'text' or 'both', for the styles plain, inverted, tinted
      and noisy in turn, and from the first again.

  Raises:
    Error: another word or none; as `shapes`.

  >>> records = shapes_or_words(num=4)
  >>> [(r.client, r.text, r.image is not None) for r in records[1:3]]
  [('inverted', None, True), ('tinted', 'a tinted cross', False)]
  """
  wrong = [word for word in shows if word not in ('picture', 'text', 'both')]
  if wrong or not shows:
    raise Error(
      f'shapes_or_words: shows is {tuple(shows)}: it holds picture, text or '
      'both.'
    )
  records = []
  for record in shapes(num, size, seed):
    word = shows[STYLES.index(str(record.client)) % len(shows)]
    text = f'a {record.client} {record.label}'
    records.append(
      record._replace(
        image=None if word == 'text' else record.image,
        text=None if word == 'picture' else text,
      )
    )
  return records
