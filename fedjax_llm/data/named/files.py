"""Reads named data sets from the hub, a folder or files."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedjax_llm import reading
from fedjax_llm.data import files
from fedjax_llm.data import hub as datasets_lib
from fedjax_llm.data.named import forms
from fedjax_llm.data.named.spec import Named, fields
from fedjax_llm.data.named.table import find
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

Row = tuple[str, Any]  # its place and its value

# Parts of file names by which splits are recognised.
_SPLITS = ('train', 'test', 'valid', 'dev', 'eval')


def hub(
  dataset: str = 'dolly',
  path: str | Sequence[str] | None = None,
  split: str | None = None,
  client_key: str | Sequence[str] | None = None,
  label_key: str | None = None,
  date_key: str | None = None,
  num_records: int | None = None,
) -> list[Record]:
  """Reads a named data set: `python -m fedjax_llm.data --list` lists them.

  Without `path` it is downloaded from the Hugging Face hub with the library
  `datasets`. `path` is a directory or are files with the same fields (.parquet,
  .csv, .tsv, .json, .jsonl, also .gz); of a directory the files with the split
  in their names are read. `split` is by default the one for training.
  `client_key`, `label_key` and `date_key` name other fields than the natural
  client and label of the entry; several fields make one client of each
  combination, such as `('language', 'user_id')`. `num_records` keeps the first
  records only.

  Raises `Error` for an unknown data set (with the nearest name), where it
  cannot be downloaded (with what to download and where to put it), and for a
  row that does not have its fields.

  >>> import json, pathlib, tempfile
  >>> row = {'instruction': 'Add.', 'context': '', 'response': '4',
  ...        'category': 'closed_qa'}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder, 'dolly.jsonl')
  ...   _ = file.write_text(json.dumps(row))
  ...   (record,) = hub('dolly', path=str(file))
  >>> record.client, record.prompt, record.response
  ('closed_qa', 'Add.', '4')
  """
  spec = find(dataset)
  if num_records is not None and num_records < 1:
    raise Error(f'data.num_records is {num_records}, but must be at least 1.')
  client = client_key or spec.client
  label = label_key or spec.label
  keys = (label, *([client] if isinstance(client, str) else client or ()))
  entries = rows(dataset, spec, path, split or spec.split, keys)
  try:
    records = [
      forms.record(spec, row, where, client=client, label=label, date=date_key)
      for where, row in itertools.islice(entries, num_records)
    ]
  except Error as error:
    if "there is no '" in str(error) and path is not None:
      needed = ', '.join(map(repr, fields(spec)))
      raise Error(f'{error} The data set {dataset} has {needed}.') from error
    raise
  if not records:
    raise Error(f'{path or spec.hub}: this data set is empty.')
  return records


def rows(
  dataset: str,
  spec: Named,
  path: str | Sequence[str] | None,
  split: str,
  keys: Sequence[str | None] = (),
) -> Iterator[Row]:
  """Yields the rows of a named data set with their places.

  Class numbers of the fields `keys` become names where the library `datasets`
  knows them.
  """
  if path is None:
    if spec.hub is None:
      raise Error(
        f'data.path: {dataset} is not on the hub; download it from '
        f'{spec.place}, unpack it and name its file as data.path.'
      )
    try:
      data = datasets_lib.load(
        spec.hub, spec.subset, split, revision=spec.revision
      )
    except Error as error:
      subset = f' (subset {spec.subset})' if spec.subset else ''
      raise Error(
        f'{str(error).rstrip(".")}. Where there is a network, download '
        f'https://huggingface.co/datasets/{spec.hub}{subset} into a folder and '
        'name the folder as data.path.'
      ) from error
    yield from _of(data, keys, f'{spec.hub}[{split}]')
    return
  for file in _files(path, split):
    if os.path.isdir(file):
      yield from _of(datasets_lib.load(file, None, split), keys, file)
      continue
    format = files.format_of(file)
    if format == 'parquet':
      data = datasets_lib.parquet([file], split)
      yield from _of(data, keys, f'{file}[{split}]')
    elif spec.grouped:
      yield from _grouped(file, spec)
    else:
      yield from files.rows(file, format or '')


def _files(path: str | Sequence[str], split: str) -> list[str]:
  """Returns the data files of a path; a saved data set remains a folder."""
  paths = [path] if isinstance(path, str | os.PathLike) else list(path)
  if not paths:
    raise Error(f'data.path is {path!r}; it must name a file or a folder.')
  matching = []
  for entry in paths:
    entry = os.path.expanduser(os.fspath(entry))
    if not os.path.isdir(entry):
      matching += files.matching(entry)
    elif any(
      os.path.exists(os.path.join(entry, name))
      for name in ('state.json', 'dataset_dict.json')
    ):
      matching.append(entry)
    else:
      matching += _within(entry, split)
  for file in matching:
    if not os.path.isdir(file) and not files.format_of(file):
      raise Error(
        f'{file}: cannot tell the format; files end in '
        f'{", ".join(files.FORMATS)}, also with .gz.'
      )
  return matching


def _within(folder: str, split: str) -> list[str]:
  """Returns the files of a split in a folder, or all where none has a split."""
  there = sorted(
    str(file)
    for file in Path(folder).rglob('*')
    if file.is_file() and files.format_of(file.name)
  )
  if not there:
    raise Error(
      f'{folder}: there is no data file in this folder; files end in '
      f'{", ".join(files.FORMATS)}, also with .gz.'
    )
  inside = [os.path.relpath(file, folder).lower() for file in there]
  for names in ([os.path.basename(name) for name in inside], inside):
    if named := [f for f, n in zip(there, names) if split.lower() in n]:
      return named
  if any(part in name for name in inside for part in _SPLITS):
    raise Error(
      f'{folder}: no file of the split {split!r}; there is '
      f'{", ".join(inside[:5])}.'
    )
  return there


def _of(data: Any, keys: Sequence[str | None], where: str) -> Iterator[Row]:
  """Yields the rows of the library `datasets`, with names of classes."""
  named = {
    str(name): feature
    for name, feature in data.features.items()
    if hasattr(feature, 'int2str') and name in keys
  }
  for number, row in datasets_lib.rows(data, where):
    place = f'{where}, row {number}'
    for name, feature in named.items():
      row[name] = datasets_lib.class_name(feature, row[name], place)
    yield place, row


def _grouped(file: str, spec: Named) -> Iterator[Row]:
  """Yields rows of a JSON object {client: list of rows}, with the client."""
  content = reading.read(file)
  for client, held in content.items():
    if not isinstance(held, list):
      raise Error(
        f'{file}: {client!r} holds {reading.short(held)}, but must be the '
        'list of this client.'
      )
    for number, row in enumerate(held):
      where = f'{file}, {client} {number}'
      if not isinstance(row, dict):
        raise Error(f'{where}: this row is no JSON object.')
      yield where, {**row, str(spec.client): client}
