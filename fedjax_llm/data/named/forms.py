"""Turns rows of named data sets into records; makes up rows of a schema."""

import datetime
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedjax_llm import reading
from fedjax_llm.data import messages as messages_lib
from fedjax_llm.data.named.spec import (
  Named,
  fields,
  fields_of,
  path_of,
  templates,
)
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

LETTERS = string.ascii_uppercase


def value(row: Mapping[str, Any], field: str, where: str) -> Any:
  """Returns the value at the path of a field; '' behind the end of a list.

  >>> value({'a': {'text': ['yes']}}, 'a[text][0]', 'x:1')
  'yes'

  Raises:
    Error: there is no such field; the message lists those that are there.
  """
  current: Any = row
  for key in path_of(field):
    if isinstance(key, int) and isinstance(current, Sequence):
      current = current[key] if key < len(current) else ''
    elif isinstance(current, Mapping) and key in current:
      current = current[key]
    elif current == '' and current is not row:
      return ''
    else:
      there = current if isinstance(current, Mapping) else {}
      names = ', '.join(map(repr, there)) or reading.short(current)
      raise Error(f'{where}: there is no {field!r}; there is {names}.')
  return current


def words(row: Mapping[str, Any], field: str, where: str) -> str:
  """Returns a field as text: integers are written out, None is empty."""
  content = value(row, field, where)
  if content is None:
    return ''
  if isinstance(content, int) and not isinstance(content, bool):
    return str(content)
  if isinstance(content, datetime.datetime | datetime.date):
    return content.isoformat()
  if not isinstance(content, str):
    raise Error(
      f'{where}: {field!r} is {reading.short(content)}, but must be a string '
      'or an integer.'
    )
  if not reading.is_unicode(content):
    raise Error(
      f'{where}: {field!r} holds half a character (a lone surrogate): '
      f'{reading.short(content)}.'
    )
  return content


def fill(template: str, row: Mapping[str, Any], where: str = 'row') -> str:
  r"""Returns a template with the fields of a row.

  >>> fill('{a}\n\n{b}', {'a': 'Sum up.', 'b': ''})
  'Sum up.'

  Raises:
    Error: a field is missing, or is no string and no integer.
  """
  paragraphs = []
  for paragraph in template.split('\n\n'):
    written, texts = '', []
    for literal, field, _, _ in string.Formatter().parse(paragraph):
      written += literal
      if field:
        texts.append(words(row, field, where))
        written += texts[-1]
    if not texts or any(text.strip() for text in texts):
      paragraphs.append(written)
  return '\n\n'.join(paragraphs)


def record(
  spec: Named,
  row: Any,
  where: str,
  *,
  client: str | Sequence[str] | None = None,
  label: str | None = None,
  date: str | None = None,
) -> Record:
  """Returns the record of one row.

  `client`, `label` and `date` name fields; several fields of the client are
  joined by a slash.

  Raises:
    Error: the row is no object, or does not have the schema of the data set.
  """
  if not isinstance(row, Mapping):
    raise Error(f'{where}: this row is no JSON object: {reading.short(row)}.')
  keys = [client] if isinstance(client, str) else list(client or ())
  made = Record(
    client='/'.join(_name(row, key, where) for key in keys) if keys else None,
    label=_class(spec, row, label, where) if label else None,
    where=where,
    date=words(row, date, where) if date else None,
  )
  if spec.messages:
    content = value(row, spec.messages, where)
    if isinstance(content, Sequence) and not isinstance(content, str):
      content = [_message(entry) for entry in content]
    return made._replace(
      messages=messages_lib.read(content, spec.messages, where)
    )
  if spec.text:
    pair = fill(spec.pair, row, where) if spec.pair else None
    return made._replace(text=fill(spec.text, row, where), pair=pair)
  prompt = fill(spec.prompt or '', row, where)
  if spec.chosen and spec.rejected:
    return made._replace(
      prompt=prompt,
      chosen=fill(spec.chosen, row, where),
      rejected=fill(spec.rejected, row, where),
    )
  if spec.choices:
    options, right = _choices(spec, row, where)
    lines = [f'{LETTERS[i]}. {text}' for i, text in enumerate(options)]
    return made._replace(
      prompt='\n'.join([prompt, *lines, 'Answer:']), response=lines[right]
    )
  response = fill(spec.response or '', row, where)
  if not response.strip() and spec.blank is not None:
    response = spec.blank
  return made._replace(prompt=prompt, response=response)


def _message(entry: Any) -> Any:
  """Returns a message without the notes that a data set adds to it."""
  if not isinstance(entry, Mapping):
    return entry
  kept = ('role', 'content', 'from', 'value')
  return {key: entry[key] for key in kept if key in entry}


def _name(row: Mapping[str, Any], key: str, where: str) -> str:
  name = words(row, key, where)
  if not name:
    raise Error(f'{where}: the client {key!r} is an empty string.')
  return name


def _class(
  spec: Named, row: Mapping[str, Any], key: str, where: str
) -> str | None:
  """Returns the name of a row's class, None where test rows hide it as -1."""
  number = value(row, key, where)
  if number in (-1, None):
    return None
  integer = isinstance(number, int) and not isinstance(number, bool)
  if integer and spec.classes and key == spec.label:
    if not 0 <= number < len(spec.classes):
      raise Error(
        f'{where}: {key!r} is {number}, but the classes are 0 to '
        f'{len(spec.classes) - 1}.'
      )
    return spec.classes[number]
  return words(row, key, where)


def _choices(
  spec: Named, row: Mapping[str, Any], where: str
) -> tuple[list[str], int]:
  """Returns the texts of the choices and the place of the right one."""
  if isinstance(spec.choices, str):
    listed = value(row, spec.choices, where)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
      raise Error(
        f'{where}: {spec.choices!r} is {reading.short(listed)}, but must be a '
        'list of choices.'
      )
    options = [
      words(entry, spec.choice, where) if spec.choice else str(entry)
      for entry in listed
    ]
  else:
    options = [fill(template, row, where) for template in spec.choices]
  answer = words(row, spec.answer or '', where)
  right = -1
  if answer.lstrip('-').isdigit():
    right = int(answer) - spec.first
  elif len(answer) == 1:
    right = LETTERS.find(answer.upper())
  if not 0 <= right < min(len(options), len(LETTERS)):
    raise Error(
      f'{where}: {spec.answer!r} is {answer!r}, which is none of the '
      f'{len(options)} choices.'
    )
  return options, right


def made_up(spec: Named, num_rows: int) -> Iterator[dict[str, Any]]:
  """Yields rows with the schema of a data set and meaningless content.

  Tests and examples use them where the data set itself cannot be downloaded.

  >>> notes = Named('', None, None, '', '', text='{note}', client='author')
  >>> next(made_up(notes, 1))
  {'author': 'author 0', 'note': 'note 0'}
  """
  for number in range(num_rows):
    row: dict[str, Any] = {}
    for name in (*fields(spec), *spec.others):
      row[name] = f'{name} {number}'
    for template in templates(spec):
      for field in fields_of(template):
        _put(row, path_of(field), f'{field} {number}')
    if spec.client and not spec.grouped:
      row[spec.client] = f'{spec.client} {number % 3}'
    if spec.label:
      known = len(spec.classes)
      row[spec.label] = number % known if known else f'class {number % 3}'
      if spec.label == spec.client:
        row[spec.label] = f'{spec.label} {number % 3}'
    if isinstance(spec.choices, str):
      texts = [f'choice {letter}' for letter in 'abcd']
      row[spec.choices] = (
        [{spec.choice: text} for text in texts] if spec.choice else texts
      )
    if spec.answer:
      row[spec.answer] = spec.first + number % 4
    if spec.messages:
      row[spec.messages] = [
        {'role': 'user', 'content': f'question {number}'},
        {'role': 'assistant', 'content': f'reply {number}'},
      ]
    yield row


def _put(row: Any, path: Sequence[str | int], content: str) -> None:
  """Writes a value at a path, with lists and mappings on the way."""
  for place, key in enumerate(path):
    last = place == len(path) - 1
    follows = None if last else path[place + 1]
    empty: Any = content if last else [] if isinstance(follows, int) else {}
    if isinstance(key, int):
      row.extend({} for _ in range(key + 1 - len(row)))
      if last or not row[key]:
        row[key] = empty
    elif last or not isinstance(row.get(key), list | dict):
      row[key] = empty
    row = row[key]
