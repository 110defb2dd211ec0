"""Reads rows of data files: JSON lines, JSON, CSV and TSV, plain or gzipped.

Values are not converted: every field of a CSV file is a string.
"""

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from fedjax_llm import reading
from fedjax_llm.types import Error

Row = tuple[str, Any]  # its place ('file:line') and its value

# The formats by file ending, in lower case and without .gz.
FORMATS = {
  'csv': 'csv',
  'json': 'json',
  'jsonl': 'jsonl',
  'ndjson': 'jsonl',
  'parquet': 'parquet',
  'tsv': 'tsv',
}


def format_of(file: str) -> str | None:
  """Returns the format by the ending of a name, None if it is unknown.

  >>> format_of('rows.JSONL.GZ'), format_of('rows.tsv'), format_of('rows')
  ('jsonl', 'tsv', None)
  """
  name = os.path.basename(file).lower().removesuffix('.gz')
  return FORMATS.get(name.rpartition('.')[2]) if '.' in name else None


def matching(path: str | Sequence[str]) -> list[str]:
  """Returns the files that match paths and patterns.

  Raises:
    Error: a path is empty, a folder, or matches no file.
  """
  if not path:
    raise Error(f'data.path is {path!r}; it must name a file.')
  patterns = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  files = []
  for pattern in patterns:
    if not isinstance(pattern, str | os.PathLike) or '\0' in str(pattern):
      raise Error(f'data.path is {pattern!r}; it must name a file.')
    pattern = os.path.expanduser(os.fspath(pattern))
    if os.path.isdir(pattern):
      raise Error(
        f'{pattern}: this is a directory; name its files, for example '
        f'{os.path.join(pattern, "*.jsonl")}.'
      )
    hits = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not hits:
      raise Error(
        f'{pattern}: there is no such file.{reading.fetched_by(pattern)}'
      )
    files += hits
  return files


def rows(file: str, format: str) -> Iterator[Row]:
  """Yields the rows of a file.

  Raises:
    Error: the file cannot be read, is no UTF-8 text, is damaged, or has no row;
      the message names the file and the line.

  >>> import tempfile, pathlib
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder, 'ids.csv')
  ...   _ = file.write_text('who,text\\n001,NA\\n')
  ...   [value for _, value in rows(str(file), 'csv')]
  [{'who': '001', 'text': 'NA'}]
  """
  if format == 'jsonl':
    entries = _json_lines(file)
  elif format == 'json':
    entries = _json(file)
  else:
    entries = _table(file, '\t' if format == 'tsv' else ',')
  empty = True
  for row in entries:
    empty = False
    yield row
  if empty:
    raise Error(f'{file}: the file is empty; it must hold records.')


def _json_lines(file: str) -> Iterator[Row]:
  for number, line in enumerate(_lines(file), 1):
    if line.strip():
      where = f'{file}:{number}'
      yield where, _object(line, where, file)


def _object(line: str, where: str, file: str) -> Any:
  try:
    return json.loads(line)
  except RecursionError:
    raise Error(f'{where}: this line is nested too deeply.') from None
  except ValueError as error:
    known = format_of(file)
    hint = ''
    if known not in (None, 'jsonl', 'json'):
      hint = f' The file is named as {known}, which data.name=hf reads.'
    raise Error(
      f'{where}: this line is no JSON object: {reading.short(line.strip())} '
      f'cannot be parsed ({_reason(error)}).{hint}'
    ) from None


def _reason(error: ValueError) -> str:
  if isinstance(error, json.JSONDecodeError):
    return f'{error.msg[:1].lower()}{error.msg[1:]}, character {error.pos}'
  return str(error)


def _json(file: str) -> Iterator[Row]:
  """Yields the entries of a JSON list, or JSON values one after the other."""
  text = ''.join(_lines(file))
  first = text.lstrip()[:1]
  if first != '[':
    try:
      json.loads(text.lstrip().partition('\n')[0])
    except RecursionError:
      pass
    except ValueError:
      if first == '{':  # one record over several lines
        yield f'{file}, record 0', reading.parse(text, file)
        return
    yield from _json_lines(file)
    return
  values = reading.parse(text, file)
  for number, value in enumerate(values):
    yield f'{file}, record {number}', value


def _table(file: str, delimiter: str) -> Iterator[Row]:
  csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
  lines = csv.reader(_lines(file, newline=''), delimiter=delimiter, strict=True)
  names: list[str] | None = None
  where = file
  try:
    while True:
      where = f'{file}:{lines.line_num + 1}'
      values = next(lines, None)
      if values is None:
        return
      if not values:
        continue
      if names is None:
        names = values
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
          raise Error(f'{where}: the column {twice[0]!r} is there twice.')
        continue
      if len(values) != len(names):
        raise Error(
          f'{where}: this row has {len(values)} values, and the file has '
          f'{len(names)} columns.'
        )
      yield where, dict(zip(names, values, strict=True))
  except csv.Error as error:
    raise Error(f'{where}: this row is damaged ({error}).') from None


def _lines(file: str, newline: str | None = None) -> Iterator[str]:
  try:
    with open(file, 'rb') as raw:
      packed = file.lower().endswith('.gz') or raw.peek(2)[:2] == b'\x1f\x8b'
      content: Any = gzip.GzipFile(fileobj=raw) if packed else raw
      yield from io.TextIOWrapper(
        content, encoding='utf-8-sig', newline=newline
      )
  except (EOFError, gzip.BadGzipFile, zlib.error):
    raise Error(f'{file}: the file is no gzip file, or is cut off.') from None
  except UnicodeDecodeError as error:
    raise Error(f'{file}: the file is not UTF-8 text ({error}).') from None
  except OSError as error:
    raise Error(f'{file}: cannot be read ({error.strerror}).') from None
