"""Reads rows of data sets with the `datasets` library."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from fedjax_llm.types import Error


def library() -> Any:
  """Returns the package `datasets`; raises `Error` if it is not installed."""
  try:
    import datasets
  except ImportError:
    raise Error(
      'hf: the package `datasets` is not installed; `pip install datasets`, '
      'or use the source jsonl.'
    ) from None
  return datasets


def parquet(files: list[str], split: str) -> Any:
  """Returns the data set of some parquet files."""
  datasets = library()
  try:
    return datasets.load_dataset(
      'parquet', data_files={split: files}, split=split
    )
  except Exception as error:  # the library raises many types
    raise _refused(files[0], None, split, error) from error


def load(
  name: str,
  subset: str | None,
  split: str,
  columns: Sequence[str] = (),
  revision: str | None = None,
) -> Any:
  """Loads a data set by directory (`save_to_disk`), folder or hub name.

  The `columns` of CSV files are always read as strings. `revision` is a commit
  of the hub.

  Raises:
    Error: the data set cannot be loaded, or has no such split.
  """
  datasets = library()
  try:
    if any(
      os.path.exists(os.path.join(name, file))
      for file in ('state.json', 'dataset_dict.json')
    ):
      data = datasets.load_from_disk(name)
      if not isinstance(data, datasets.DatasetDict):
        return data
      if split not in data:
        raise Error(
          f'{name}: there is no split {split!r}; there is '
          f'{", ".join(map(str, data))}.'
        )
      return data[split]
    settings: dict[str, Any] = {'revision': revision} if revision else {}
    builder = datasets.load_dataset_builder(name, subset, **settings)
    if any(kind.__name__ == 'Csv' for kind in type(builder).__mro__):
      settings['converters'] = dict.fromkeys(columns, str)
      settings['keep_default_na'] = False
    return datasets.load_dataset(name, subset, split=split, **settings)
  except Error:
    raise
  except Exception as error:  # library and network raise many types
    raise _refused(name, subset, split, error) from error


def rows(data: Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the rows of a data set with their numbers.

  Raises:
    Error: a row cannot be read, for example because a text is no UTF-8.
  """
  number, entries = 0, iter(data)
  while True:
    try:
      row = next(entries, None)
    except Exception as error:  # Arrow and the library raise many types
      raise Error(
        f'{where}, at row {number} or behind: it cannot be read: '
        f'{_reason(error)}'
      ) from error
    if row is None:
      return
    yield number, dict(row)
    number += 1


def class_name(feature: Any, value: Any, where: str) -> Any:
  """Returns the name of a class number; other values are returned unchanged.

  Raises:
    Error: no class has this number.
  """
  if isinstance(value, bool) or not isinstance(value, int) or value < 0:
    return value
  try:
    return feature.int2str(value)
  except Exception as error:
    raise Error(
      f'{where}: the class number {value} has no name; there are '
      f'{feature.num_classes} classes.'
    ) from error


def _refused(
  name: str, subset: str | None, split: str, error: BaseException
) -> Error:
  return Error(
    f'hf: the data set {name!r} (subset {subset!r}, split {split!r}) cannot '
    f'be loaded: {_reason(error)}'
  )


def _reason(error: BaseException) -> str:
  """Returns the type and text of the innermost cause of an exception."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = f'{type(error).__name__}: {" ".join(str(error).split())}'
  return text if len(text) <= 300 else f'{text[:297]}...'
