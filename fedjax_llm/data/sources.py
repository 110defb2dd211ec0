"""Sources of data: each returns a list of records.

A record is in one of three forms: a prompt with its response, a plain text, or
a chat (a list of messages in the OpenAI form).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_llm import reading
from fedjax_llm.data import files, hub
from fedjax_llm.data import messages as messages_lib
from fedjax_llm.data.messages import Message as Message
from fedjax_llm.reading import short
from fedjax_llm.types import Error

PACKAGED = Path(__file__).parent / 'packaged'

__all__ = ['hf', 'jsonl', 'packaged']


class Record(NamedTuple):
  """One item of one client, before tokenization.

  Exactly one form is set: `prompt` with `response`, `text`, or `messages`, with
  the `tools` that the assistant of a chat may call; or `prompt` with `chosen`
  and `rejected`, or an `image` [H, W, C] with or without a text, for tasks that
  read them. `where` is its place ('file:line'), for error messages.

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
  tools: tuple[Any, ...] | None = None
  date: str | None = None  # when it was written, in a form that sorts by time


class _Keys(NamedTuple):
  """The names of the fields to read, of exactly one form."""

  client: str | None
  prompt: str | None
  response: str | None
  text: str | None
  messages: str | None
  label: str | None
  context: str | None
  pair: str | None
  date: str | None


def packaged(dataset: str = 'shakespeare_mini') -> list[Record]:
  """Reads a data set of the package, which needs no network.

  `shakespeare_mini`: 2,237 cue and speech pairs of 32 roles, one for each play
  (the clients), labelled with one of 6 genres. `packaged/PROVENANCE.md` names
  its source.

  Raises `Error` for an unknown data set; the message lists the known ones.

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
  date_key: str | None = None,
) -> list[Record]:
  """Reads records from files with one JSON object per line, plain or .gz.

  `path` is a file, a pattern such as `data/*.jsonl`, or a list of those.
  `client_key` names the field with the client (a string or an integer); with
  None the records have no client, and only partitions other than `natural` can
  be used. The text is that of `prompt_key` with `response_key`, of `text_key`,
  or of `messages_key` (the default, 'messages': a list of
  `{"role": ..., "content": ...}`, or of ShareGPT's
  `{"from": ..., "value": ...}`). A message may have more fields (reasoning,
  tool calls, a `weight` of 0 or 1), and its record a list `tools`; they are
  passed to the chat template. `context_key` may name a field that is appended
  to the prompt after a blank line if it is not empty. `label_key` names the
  field with the class of the text, a string or an integer, for label partitions
  and for classification; `text_pair_key` a field with a second text to be
  classified together with that of `text_key`; `date_key` a field with a date
  that sorts by time, or a number, for `time_drift`. Blank lines are skipped.

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
    date_key,
    source='jsonl',
  )
  return [
    _record(row, keys, where)
    for file in files.matching(path)
    for where, row in files.rows(file, 'jsonl')
  ]


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
  date_key: str | None = None,
) -> list[Record]:
  """Reads records from any data set of the `datasets` library.

  `path` is a name on the hub, a directory written by `save_to_disk`, a folder
  of data files, or files (.parquet, .csv, .tsv, .json, .jsonl, also .gz, which
  are read here line by line). The keys are those of `jsonl`; every field of a
  CSV file is read as a string; a column of class numbers is read as class
  names, with -1 for no class.

  Raises `Error` if the data set, its split or a column is missing or cannot be
  read.

  >>> import json, pathlib, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder, 'lines.json')
  ...   _ = file.write_text(json.dumps({'who': 'ann', 'line': 'Hello.'}))
  ...   (record,) = hf(str(file), client_key='who', text_key='line')
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
    date_key,
    source='hf',
  )
  paths = _paths(path)
  if all(files.format_of(p) for p in paths) and not os.path.isdir(paths[0]):
    records = []
    for file in files.matching(paths):
      format = files.format_of(file) or ''
      if format == 'parquet':
        data = hub.parquet([file], split)
        records += _records(data, keys, f'{file}[{split}]')
      else:
        records += [
          _record(row, keys, where) for where, row in files.rows(file, format)
        ]
    return records
  if len(paths) > 1 or os.path.isfile(paths[0]):
    unknown = next(p for p in paths if not files.format_of(p))
    if not os.path.exists(unknown):
      raise Error(f'{unknown}: there is no such file.')
    raise Error(
      f'{unknown}: cannot tell the format; files end in '
      f'{", ".join(files.FORMATS)}, also with .gz.'
    )
  data = hub.load(paths[0], subset, split, [key for key in keys if key])
  return _records(data, keys, f'{paths[0]}[{split}]')


def _paths(path: str | Sequence[str]) -> list[str]:
  if not path:
    raise Error(f'hf: path is {path!r}; it must name a data set.')
  paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  return [
    os.path.expanduser(p) if p.startswith('~') else p for p in map(str, paths)
  ]


def _records(data: Any, keys: '_Keys', name: str) -> list[Record]:
  """Reads records from a data set of the `datasets` library."""
  classes = {
    key: data.features[key]
    for key in (keys.client, keys.label)
    if key is not None and hasattr(data.features.get(key), 'int2str')
  }
  records = []
  for number, row in hub.rows(data, name):
    where = f'{name}, row {number}'
    # Test sets hide their classes as -1 or null.
    hidden = keys.label in classes and row[keys.label] in (-1, None)
    for key, feature in classes.items():
      row[key] = hub.class_name(feature, row[key], where)
    record = _record(row, keys._replace(label=None) if hidden else keys, where)
    records.append(record)
  if not records:
    raise Error(f'{name}: this data set is empty.')
  return records


# ----------------------------------------------------------------- fields --


def _keys(
  client,
  prompt,
  response,
  text,
  messages,
  label,
  context,
  pair,
  date=None,
  *,
  source,
) -> _Keys:
  forms = {
    'prompt_key and response_key': prompt or response,
    'text_key': text,
    'messages_key': messages,
  }
  chosen = [name for name, is_set in forms.items() if is_set]
  if len(chosen) > 1:
    raise Error(
      f'{source}: give one form of text, not {" together with ".join(chosen)}.'
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
  if not chosen:
    messages = 'messages'
  return _Keys(
    client, prompt, response, text, messages, label, context, pair, date
  )


def _record(row: Any, keys: _Keys, where: str) -> Record:
  if not isinstance(row, dict):
    raise Error(f'{where}: this line is no JSON object: {short(row)}.')
  client = label = prompt = response = text = messages = pair = tools = None
  if keys.client:
    client = text_of(row, keys.client, where, numbers=True)
    if not client:
      raise Error(f'{where}: the client {keys.client!r} is an empty string.')
  if keys.label:
    label = text_of(row, keys.label, where, numbers=True)
  if keys.prompt:
    prompt = text_of(row, keys.prompt, where)
    response = text_of(row, keys.response, where)
    if keys.context and row.get(keys.context) is not None:
      context = text_of(row, keys.context, where)
      if context.strip():
        prompt = f'{prompt}\n\n{context}'
  elif keys.text:
    text = text_of(row, keys.text, where)
    pair = text_of(row, keys.pair, where) if keys.pair else None
  else:
    key = keys.messages or ''
    messages = messages_lib.read(field_of(row, key, where), key, where)
    tools = messages_lib.tools(row.get('tools'), where)
  date = text_of(row, keys.date, where, numbers=True) if keys.date else None
  return Record(
    *(client, prompt, response, text, messages, label, where, pair),
    tools=tools,
    date=date,
  )


def field_of(row: dict, key: str, where: str) -> Any:
  """Returns a field of a row; an `Error` that lists its fields without it."""
  if key not in row:
    names = ', '.join(repr(k) for k in row) or 'no field'
    raise Error(f'{where}: there is no {key!r}; there is {names}.')
  return row[key]


def text_of(row: dict, key, where: str, *, numbers: bool = False) -> str:
  """Returns a field of a row that is a text, or with `numbers` an integer."""
  value = field_of(row, key, where)
  if numbers and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str):
    allowed = 'a string or an integer' if numbers else 'a string'
    raise Error(f'{where}: {key!r} is {short(value)}, but must be {allowed}.')
  if not reading.is_unicode(value):
    raise Error(
      f'{where}: {key!r} holds half a character (a lone surrogate): '
      f'{short(value)}.'
    )
  return value
