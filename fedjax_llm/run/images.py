"""Tasks of images: classes of a head, classes that are texts, contrast.

image_classification    a ViT or DINOv2 with a classifier
zero_shot               a CLIP, whose classes are texts
contrastive             a CLIP, on images with their texts
images_or_texts         a CLIP, on clients that may have only one of the two
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_llm import data, local
from fedjax_llm.data import collate, encoding, pictures
from fedjax_llm.data.sources import Record
from fedjax_llm.local.either import either
from fedjax_llm.models import LoadedModel
from fedjax_llm.run import tasks
from fedjax_llm.types import (
  Either,
  Error,
  Example,
  Image,
  ImageWithText,
  Loss,
)

__all__ = [
  'contrastive',
  'image_classification',
  'images_or_texts',
  'zero_shot',
]

TEMPLATE = 'a photo of a {}.'
NAME = '{}.'  # behind a trained context


class Texts(NamedTuple):
  """The texts of C classes: tokens [C, T] int32, places of their ends [C]."""

  tokens: np.ndarray
  ends: np.ndarray


def class_texts(
  tokenizer: data.tokenizers.Tokenizer,
  names: Sequence[str],
  template: str = TEMPLATE,
  max_length: int = 77,
) -> Texts:
  """Returns the texts of classes, tokenized and padded to one length.

  Args:
    tokenizer: of the model.
    names: the names of the classes.
    template: '{}' stands for the name.
    max_length: the most tokens that the model reads.

  Raises:
    Error: a template without '{}', a name that is empty or doubled, a text that
      is too long, a tokenizer that marks no ends of texts.

  >>> texts = class_texts(data.bytes(), ['cat', 'mouse'], '{}')
  >>> texts.tokens.shape, texts.ends.tolist()
  ((2, 7), [4, 6])
  """
  if template.count('{}') != 1:
    raise Error(
      f'task.template is {template!r}; it must hold {{}} once, for the name of '
      'a class.'
    )
  if not names:
    raise Error('task.labels is empty: zero-shot classes need names.')
  doubled = [x for i, x in enumerate(names) if x in names[:i]]
  if doubled:
    raise Error(f'task.labels names the class {doubled[0]!r} twice.')
  if not all(name.strip() for name in names):
    raise Error(f'task.labels is {list(names)}; a class has an empty name.')
  if tokenizer.whole is None:
    raise Error(
      f'the tokenizer {tokenizer.name} marks no ends of texts, which a dual '
      'encoder reads.'
    )
  rows = []
  for name in names:
    text = template.replace('{}', name.replace('_', ' '))
    whole = tokenizer.whole(text, None, max_length)
    if whole.is_cut:
      raise Error(
        f'the text of the class {name!r}, {text!r}, is longer than the '
        f'{max_length} tokens that the model reads.'
      )
    rows.append(whole.tokens)
  tokens = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, np.int32)
  for row, own in zip(tokens, rows, strict=True):
    row[: len(own)] = own
  return Texts(tokens, np.asarray([len(own) - 1 for own in rows], np.int32))


def texts_of(loaded: LoadedModel, template: str = TEMPLATE) -> Texts:
  """Returns the texts of a dual encoder's classes, `Config.labels`.

  >>> from fedjax_llm import models
  >>> texts_of(models.random_clip(labels=('a', 'b')), '{}').ends.tolist()
  [2, 2]
  """
  tokenizer = data.tokenizers.bytes()
  if loaded.directory is not None:
    tokenizer = data.tokenizers.pretrained(str(loaded.directory))
  config = loaded.config
  return class_texts(tokenizer, config.labels, template, config.max_positions)


def _classes(labels: Sequence[str] | None):
  def classes(records: Sequence[Record]) -> tuple[str, ...]:
    if labels is None:
      return tasks.label_names(records)
    names = tuple(map(str, labels))
    doubled = [x for i, x in enumerate(names) if x in names[:i]]
    if doubled:
      raise Error(f'task.labels names the class {doubled[0]!r} twice.')
    return names

  return classes


def _pixels(record: Record) -> np.ndarray:
  where = record.where or 'record'
  if record.image is None:
    raise Error(
      f'{where}: this record has no image, which task.name needs: take '
      'data.name=images, or a task of texts.'
    )
  return pictures.checked(record.image, where)


def _encode(record: Record, how: encoding.Encoding) -> data.Encoded:
  pixels, names = _pixels(record), list(how.labels or ())
  if record.label not in names:
    raise Error(
      f'{record.where or "record"}: the label {record.label!r} is not one of '
      f'task.labels, {", ".join(map(repr, names))}.'
    )
  return data.Encoded([Image(pixels, names.index(record.label))])


def _example(length: int, vocab_size: int, *, config: Any) -> Image:
  del length, vocab_size  # of texts
  return Image(_blank(config), 0)


def _blank(config: Any) -> np.ndarray:
  image = (config.vision or config).image
  return np.zeros((image.size, image.size, image.channels), np.uint8)


def image_classification(labels: Sequence[str] | None = None) -> tasks.Task:
  """Returns the task of one class an image, of a network with a classifier.

  Args:
    labels: the classes, in the order of a trained head; by default those of the
      records, sorted.

  Raises:
    Error: from `check`, a network of texts or without a classifier; from
      `encode`, a record without an image or with another class.

  >>> image_classification(['cat', 'dog']).metrics.unit
  'image'
  """

  def check(loaded: LoadedModel) -> None:
    _check_image(loaded, 'image_classification')
    if loaded.config.head != 'classifier':
      raise Error(
        f'{loaded.name} ({loaded.config.family}) has no classifier, which '
        'task.name=image_classification trains; task.name=zero_shot classifies '
        'by texts.'
      )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.classification(loaded.model, per_row=per_row)

  return tasks.Task(
    loss,
    encode=_encode,
    collate=collate.images,
    metrics=tasks.Measures('image', accuracies=True),
    labels=_classes(labels),
    check=check,
    example=_example,
    head=('classifier',),
    peft_type=None,
  )


def zero_shot(
  labels: Sequence[str] | None = None, template: str = TEMPLATE
) -> tasks.Task:
  """Returns the task of one class an image, where classes are texts.

  The loss is that of `local.classification` on `local.zero_shot`. The texts of
  the classes are tokenized once; their features are computed in every step, by
  a text tower that may have an adapter too. Adapters with a node at 'scores'
  (`adapters.context`) classify by the names with what they train instead.

  Args:
    labels: the names of the classes; by default those of the records, sorted.
      '_' in a name is read as a space.
    template: the text of a class, with '{}' for its name.

  Raises:
    Error: a template without '{}'; from `check`, a network that is no dual
      encoder; from `encode`, as `image_classification`.

  >>> zero_shot(template='a drawing of a {}').metrics.accuracies
  True
  """
  if template.count('{}') != 1:
    raise Error(
      f'task.template is {template!r}; it must hold {{}} once, for the name of '
      'a class.'
    )

  def check(loaded: LoadedModel) -> None:
    _check_dual(loaded, 'zero_shot')
    texts_of(loaded, template)

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    texts, names = texts_of(loaded, template), texts_of(loaded, NAME)
    model = local.zero_shot(loaded.dual, texts.tokens, texts.ends)
    seen = local.towers(loaded.dual, *names, *texts)
    plain = local.classification(model, per_row=per_row)
    return local.by_names(seen, plain=plain, per_row=per_row)

  return tasks.Task(
    loss,
    encode=_encode,
    collate=collate.images,
    metrics=tasks.Measures('image', accuracies=True),
    labels=_classes(labels),
    check=check,
    example=_example,
    peft_type=None,
  )


def contrastive(template: str = '{}') -> tasks.Task:
  """Returns the task of images with texts, `local.contrastive` on a CLIP.

  The accuracy is the share of images whose own text is the nearest one of their
  batch. A record's text is its `text`, or its label where it has none.

  Args:
    template: the text of a record, with '{}' for its own.

  Raises:
    Error: as `zero_shot`; from `encode`, a record without a text and a label.

  >>> contrastive().metrics.unit
  'image'
  """
  if template.count('{}') != 1:
    raise Error(
      f'task.template is {template!r}; it must hold {{}} once, for the text of '
      'a record.'
    )

  def check(loaded: LoadedModel) -> None:
    _check_dual(loaded, 'contrastive')

  def encode(record: Record, how: encoding.Encoding) -> data.Encoded:
    text = record.text if record.text is not None else record.label
    where = record.where or 'record'
    if text is None:
      raise Error(f'{where}: task.name=contrastive needs a text or a label.')
    if how.tokenizer.whole is None:
      raise Error(
        f'the tokenizer {how.tokenizer.name} marks no ends of texts, which a '
        'dual encoder reads.'
      )
    words = how.tokenizer.whole(
      template.replace('{}', text), None, how.max_length
    )
    tokens = np.asarray(words.tokens, np.int32)
    example = Example(tokens, np.arange(len(tokens)) > 0)
    return data.Encoded(
      [ImageWithText(_pixels(record), example)], texts_cut=int(words.is_cut)
    )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return local.contrastive(loaded.dual, per_row=per_row)

  def example(length: int, vocab_size: int, *, config: Any) -> ImageWithText:
    tokens = (np.arange(length) * 7919 % vocab_size).astype(np.int32)
    text = Example(tokens, np.arange(length) > 0)
    return ImageWithText(_blank(config), text)

  return tasks.Task(
    loss,
    encode=encode,
    collate=collate.images_with_texts,
    metrics=tasks.Measures('image', accuracies=True),
    check=check,
    example=example,
    peft_type=None,
  )


def images_or_texts(
  labels: Sequence[str] | None = None, template: str = TEMPLATE
) -> tasks.Task:
  """Returns the task of classes of pictures and of texts, `local.either`.

  A record has an image, a text or both, and a label; the classes are texts.
  `fedjax_llm.recipes.images.towers:by_tower` trains only the towers that a
  client has data for.

  Args:
    labels: the names of the classes; by default those of the records, sorted.
    template: the text of a class, with '{}' for its name.

  Raises:
    Error: as `zero_shot`; from `encode`, a record without an image and a text,
      or with another class.

  >>> images_or_texts().metrics.accuracies
  True
  """
  shot = zero_shot(labels, template)

  def check(loaded: LoadedModel) -> None:
    _check_dual(loaded, 'images_or_texts')
    texts_of(loaded, template)

  def encode(record: Record, how: encoding.Encoding) -> data.Encoded:
    where, names = record.where or 'record', list(how.labels or ())
    if record.image is None and record.text is None:
      raise Error(
        f'{where}: task.name=images_or_texts needs an image or a text.'
      )
    if record.label not in names:
      raise Error(
        f'{where}: the label {record.label!r} is not one of task.labels, '
        f'{", ".join(map(repr, names))}.'
      )
    pixels = None if record.image is None else _pixels(record)
    text, cut = None, False
    if record.text is not None:
      if how.tokenizer.whole is None:
        raise Error(
          f'the tokenizer {how.tokenizer.name} marks no ends of texts, which a '
          'dual encoder reads.'
        )
      words = how.tokenizer.whole(record.text, None, how.max_length)
      tokens, cut = np.asarray(words.tokens, np.int32), words.is_cut
      text = Example(tokens, np.zeros(len(tokens), bool))
    return data.Encoded(
      [Either(pixels, text, names.index(record.label))], texts_cut=int(cut)
    )

  def loss(loaded: LoadedModel, *, per_row: bool = False) -> Loss:
    return either(loaded.dual, *texts_of(loaded, template), per_row=per_row)

  def example(length: int, vocab_size: int, *, config: Any) -> Either:
    tokens = (np.arange(length) * 7919 % vocab_size).astype(np.int32)
    text = Example(tokens, np.zeros(length, bool))
    return Either(_blank(config), text, 0)

  return shot._replace(
    encode=encode,
    collate=collate.either,
    check=check,
    loss=loss,
    example=example,
  )


def _check_image(loaded: LoadedModel, task: str) -> None:
  config = loaded.config
  if config.image is None and config.vision is None:
    raise Error(
      f'{loaded.name} reads texts ({config.family}), and task.name={task} is '
      'of images: take a ViT, DINOv2 or CLIP, or model.name=random_vit or '
      'random_clip.'
    )


def _check_dual(loaded: LoadedModel, task: str) -> None:
  _check_image(loaded, task)
  if loaded.dual is None:
    raise Error(
      f'{loaded.name} ({loaded.config.family}) has no text tower, which '
      f'task.name={task} needs: take a CLIP, or model.name=random_clip.'
    )
