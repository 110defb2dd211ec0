"""Where text comes from: each source returns a list of records.

A record is in one of three forms: a prompt with its response, a plain text, or
a chat (a list of messages in the OpenAI form).
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_llm.types import Error

PACKAGED = Path(__file__).parent / 'packaged'

__all__ = ['hf', 'jsonl', 'packaged']

Message = Mapping[str, str]  # {'role': ..., 'content': ...}


class Record(NamedTuple):
  """One text of one client, before any tokenizer has seen it.

  Exactly one form is there: `prompt` with `response`, `text`, or `messages`;
  or `prompt` with `chosen` and `rejected`, or an `image` [H, W, C] with or
  without a text, for tasks that read them. `where` says where it stands
  ('file:line'), for error messages.

  >>> Record(client='ann', prompt='2+2', response='4').text is None
  True
  """

  client: str | None = None
  prompt: str | None = None
  response: str | None = None
  text: str | None = None
  messages: tuple[Message, ...] | None = None
  label: str | None = None
  where: str = ''
  pair: str | None = None  # a second text, beside `text`
  chosen: str | None = None  # the reply that a client prefers
  rejected: str | None = None  # to this one
  image: Any = None  # an array [H, W, C]


class _Keys(NamedTuple):
  """The names of the fields to read, checked to make exactly one form."""

  client: str | None
  prompt: str | None
  response: str | None
  text: str | None
  messages: str | None
  label: str | None
  context: str | None
  pair: str | None


def packaged(dataset: str = 'shakespeare_mini') -> list[Record]:
  """A data set that comes with the package, so that it needs no network.

  `shakespeare_mini`: 2,237 cue and speech pairs of 32 roles, one a play (the
  clients), labelled with one of 6 genres. `packaged/PROVENANCE.md` says where
  it comes from.

  Raises `Error` if there is no such data set (and lists those there are).

  >>> records = packaged('shakespeare_mini')
  >>> len(records), len({r.client for r in records})
  (2237, 32)
  >>> records[0].client, records[0].label
  ('hamlet/HAMLET', 'tragedies')
  """
  there = sorted(p.name.split('.')[0] for p in PACKAGED.glob('*.jsonl.gz'))
  if dataset not in there:
    raise Error(
      f'packaged: there is no data set {dataset!r}; choose from '
      f'{", ".join(there)}.'
    )
  return jsonl(
    str(PACKAGED / f'{dataset}.jsonl.gz'),
    client_key='client',
    prompt_key='instruction',
    response_key='response',
    label_key='genre',
  )


def jsonl(
  path: str | Sequence[str],
  client_key: str | None,
  prompt_key: str | None = None,
  response_key: str | None = None,
  text_key: str | None = None,
  messages_key: str | None = None,
  label_key: str | None = None,
  context_key: str | None = None,
  text_pair_key: str | None = None,
) -> list[Record]:
  """Records from files with one JSON object a line, plain or .gz.

  `path` is a file, a pattern such as `data/*.jsonl`, or a list of those.
  `client_key` names the field with the client (a string or an integer); with
  None the records belong to nobody and only the partitions that need no
  natural client can be used. The text is given by `prompt_key` with
  `response_key`, or by `text_key`, or by `messages_key` (the default,
  'messages': a list of `{"role": ..., "content": ...}`). `context_key` may name
  a field that is appended to the prompt after a blank line where it holds
  something. `label_key` names the field with the class of the text, a string or
  an integer, for label partitions and for classification; `text_pair_key` one
  with a second text beside `text_key`, to be classified together. Blank lines
  are skipped.

  Raises `Error` for a missing or empty file, for a line that is no JSON object,
  and for a field that is missing or of the wrong type.

  >>> import os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'notes.jsonl')
  >>> with open(path, 'w') as f:
  ...   _ = f.write('{"who": "ann", "note": "buy milk"}')
  >>> jsonl(path, client_key='who', text_key='note')[0].text
  'buy milk'
  """
  keys = _keys(
    client_key,
    prompt_key,
    response_key,
    text_key,
    messages_key,
    label_key,
    context_key,
    text_pair_key,
    source='jsonl',
  )
  records = []
  for file in _files(path):
    before = len(records)
    for number, line in enumerate(_lines(file), 1):
      if not line.strip():
        continue
      where = f'{file}:{number}'
      try:
        row = json.loads(line)
      except ValueError:
        raise Error(
          f'{where}: this line is no JSON object: {_short(line.strip())}.'
        ) from None
      records.append(_record(row, keys, where))
    if len(records) == before:
      raise Error(f'{file}: the file is empty; each line is to be a record.')
  return records


def hf(
  path: str | Sequence[str],
  subset: str | None = None,
  split: str = 'train',
  client_key: str | None = None,
  prompt_key: str | None = None,
  response_key: str | None = None,
  text_key: str | None = None,
  messages_key: str | None = None,
  label_key: str | None = None,
  context_key: str | None = None,
  text_pair_key: str | None = None,
) -> list[Record]:
  """Records from anything that the `datasets` library reads.

  `path` is a name on the hub, a directory written by `save_to_disk`, a folder
  of data files, or files (.parquet, .csv, .json, .jsonl, also .gz). Columns are
  named as in `jsonl`; a column of class numbers gives the class names, and -1
  says that there is none.

  Raises `Error` if the data set, its split or a column cannot be had.

  >>> import json, pathlib, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder, 'lines.json')
  ...   _ = file.write_text(json.dumps({'who': 'ann', 'said': 'Hello.'}))
  ...   (record,) = hf(str(file), client_key='who', text_key='said')
  >>> record.client, record.text
  ('ann', 'Hello.')
  """
  keys = _keys(
    client_key,
    prompt_key,
    response_key,
    text_key,
    messages_key,
    label_key,
    context_key,
    text_pair_key,
    source='hf',
  )
  data = _load_hf(path, subset, split)
  classes = {
    key: data.features[key].int2str
    for key in (client_key, label_key)
    if key is not None and hasattr(data.features.get(key), 'int2str')
  }
  name = path if isinstance(path, str) else path[0]
  records = []
  for number, row in enumerate(data):
    row = dict(row)
    for key, to_name in classes.items():
      if isinstance(row[key], int) and row[key] >= 0:
        row[key] = to_name(row[key])
    where = f'{name}[{split}], row {number}'
    # Test sets hide their classes so.
    hidden = label_key in classes and row[label_key] in (-1, None)
    record = _record(row, keys._replace(label=None) if hidden else keys, where)
    records.append(record)
  if not records:
    raise Error(f'{name}: the split {split!r} is empty.')
  return records


# ----------------------------------------------------------------- fields --


def _keys(
  client, prompt, response, text, messages, label, context, pair, *, source
) -> _Keys:
  forms = {
    'prompt_key and response_key': prompt or response,
    'text_key': text,
    'messages_key': messages,
  }
  given = [name for name, is_there in forms.items() if is_there]
  if len(given) > 1:
    raise Error(
      f'{source}: give one form of text, not {" together with ".join(given)}.'
    )
  if bool(prompt) != bool(response):
    raise Error(
      f'{source}: prompt_key and response_key belong together, but they are '
      f'{prompt!r} and {response!r}.'
    )
  if context and not prompt:
    raise Error(
      f'{source}: context_key={context!r} is part of a prompt and needs '
      'prompt_key and response_key.'
    )
  if pair and not text:
    raise Error(
      f'{source}: text_pair_key={pair!r} is a second text and needs text_key.'
    )
  if not given:
    messages = 'messages'
  return _Keys(client, prompt, response, text, messages, label, context, pair)


def _record(row: Any, keys: _Keys, where: str) -> Record:
  if not isinstance(row, dict):
    raise Error(f'{where}: this line is no JSON object: {_short(row)}.')
  client = label = prompt = response = text = messages = pair = None
  if keys.client:
    client = _string(row, keys.client, where, numbers=True)
    if not client:
      raise Error(f'{where}: the client {keys.client!r} is an empty string.')
  if keys.label:
    label = _string(row, keys.label, where, numbers=True)
  if keys.prompt:
    prompt = _string(row, keys.prompt, where)
    response = _string(row, keys.response, where)
    if keys.context and row.get(keys.context) is not None:
      context = _string(row, keys.context, where)
      if context.strip():
        prompt = f'{prompt}\n\n{context}'
  elif keys.text:
    text = _string(row, keys.text, where)
    pair = _string(row, keys.pair, where) if keys.pair else None
  else:
    messages = _messages(row, keys.messages, where)
  return Record(client, prompt, response, text, messages, label, where, pair)


def _value(row: dict, key: str, where: str) -> Any:
  if key not in row:
    names = ', '.join(repr(k) for k in row) or 'no field'
    raise Error(f'{where}: there is no {key!r}; there is {names}.')
  return row[key]


def _string(row: dict, key, where: str, *, numbers: bool = False) -> str:
  value = _value(row, key, where)
  if numbers and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str):
    allowed = 'a string or an integer' if numbers else 'a string'
    raise Error(f'{where}: {key!r} is {_short(value)}, but must be {allowed}.')
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError:
      raise Error(
        f'{where}: {key!r} holds half a character (a lone surrogate): '
        f'{_short(value)}.'
      ) from None
  return value


def _messages(row: dict, key, where: str) -> tuple[Message, ...]:
  value = _value(row, key, where)
  if not isinstance(value, (list, tuple)) or not value:
    raise Error(
      f'{where}: {key!r} is {_short(value)}, but must be a list of messages '
      'with a role and a content.'
    )
  messages = []
  for number, message in enumerate(value):
    place = f'{where}, message {number}'
    if not isinstance(message, dict):
      raise Error(f'{place}: {_short(message)} is no JSON object.')
    messages.append(
      {name: _string(message, name, place) for name in ('role', 'content')}
    )
  return tuple(messages)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


# ------------------------------------------------------------------ files --


def _files(path: str | Sequence[str]) -> list[str]:
  if not path:
    raise Error(f'jsonl: path is {path!r}; it must name a file.')
  patterns = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  files = []
  for pattern in map(os.path.expanduser, patterns):
    if os.path.isdir(pattern):
      raise Error(
        f'{pattern}: this is a directory; name its files, for example '
        f'{os.path.join(pattern, "*.jsonl")}.'
      )
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not found:
      raise Error(f'{pattern}: there is no such file.')
    files += found
  return files


def _lines(file: str) -> Iterator[str]:
  opener = gzip.open if file.endswith('.gz') else open
  try:
    with opener(file, 'rt', encoding='utf-8-sig') as lines:
      yield from lines
  except (EOFError, gzip.BadGzipFile, zlib.error):
    raise Error(f'{file}: the file is no gzip file, or is cut off.') from None
  except UnicodeDecodeError as error:
    raise Error(f'{file}: the file is not UTF-8 text ({error}).') from None
  except OSError as error:
    raise Error(f'{file}: cannot be read ({error.strerror}).') from None


_FORMATS = {'parquet': 'parquet', 'csv': 'csv', 'json': 'json', 'jsonl': 'json'}


def _load_hf(path: str | Sequence[str], subset: str | None, split: str) -> Any:
  try:
    import datasets
  except ImportError:
    raise Error(
      'hf: the package `datasets` is not installed; `pip install datasets`, '
      'or use the source jsonl.'
    ) from None
  if not path:
    raise Error(f'hf: path is {path!r}; it must name a data set.')
  paths = [path] if isinstance(path, str) else list(path)
  paths = [
    os.path.expanduser(p) if p.startswith('~') else p for p in map(str, paths)
  ]
  first = paths[0]
  suffix = first.removesuffix('.gz').rsplit('.', 1)[-1]
  is_file = suffix in _FORMATS
  if is_file or len(paths) > 1:
    missing = [p for p in paths if not glob.glob(p) and not os.path.exists(p)]
    if missing:
      raise Error(f'{missing[0]}: there is no such file.')
    if not is_file:
      raise Error(
        f'{first}: cannot tell the format; files end in '
        f'{", ".join(_FORMATS)}, also with .gz.'
      )
  try:
    if is_file:
      data = datasets.load_dataset(
        _FORMATS[suffix], data_files={split: paths}, split=split
      )
    elif any(
      os.path.exists(os.path.join(first, name))
      for name in ('state.json', 'dataset_dict.json')
    ):
      data = datasets.load_from_disk(first)
      if isinstance(data, datasets.DatasetDict):
        if split not in data:
          raise Error(
            f'{first}: there is no split {split!r}; there is '
            f'{", ".join(map(str, data))}.'
          )
        data = data[split]
    else:
      data = datasets.load_dataset(first, subset, split=split)
  except Error:
    raise
  except Exception as error:  # whatever the library or the network raises
    reason = ' '.join(str(error).split())
    raise Error(
      f'hf: the data set {first!r} (subset {subset!r}, split {split!r}) cannot '
      f'be loaded: {type(error).__name__}: {_cut(reason)}'
    ) from error
  return data


def _cut(reason: str) -> str:
  return reason if len(reason) <= 300 else f'{reason[:297]}...'
