"""Checks of the JSON files of a workdir, made where the files are read.

Programs compute with these files long after a run has written them. An error
names a file that was changed since and its field.
"""

from collections.abc import Mapping
from typing import Any

from fedjax_llm import reading
from fedjax_llm.types import Error

_SCALARS = ('local/', 'time/', 'uploads/', 'downloads/', 'server/')
_NAMED = ('clients', 'accuracies', 'losses')  # numbers by name
_TESTS = ('loss', 'perplexity', 'accuracy', 'untrained')


def check_record(record: Mapping[str, Any], where: str) -> None:
  """Checks one line of metrics.jsonl.

  Args:
    record: the fields of a round.
    where: the file and its line, for the message.

  Raises:
    Error: a field is not of the kind that a run writes.

  >>> check_record({'round': 1, 'local/loss': 'low'}, 'file:2')
  Traceback (most recent call last):
  fedjax_llm.types.Error: file:2 is damaged: local/loss is 'low', not a number \
or null.
  """
  for field, value in record.items():
    last = field.rpartition('/')[2]
    by_name = field.startswith('evals/') and last in _NAMED
    test = field.startswith('evals/') and (
      last in _TESTS or last.startswith('client_')
    )
    if by_name:
      _mapping(value, f'{where} is damaged: {field}')
      for name, one in value.items():
        _number(one, f'{where} is damaged: {field} of {name}')
    elif test or field.startswith(_SCALARS):
      _number(value, f'{where} is damaged: {field}')
    elif last.endswith('_names'):
      _texts(value, f'{where} is damaged: {field}')
    elif isinstance(value, str):
      _number(value, f'{where} is damaged: {field}')


def check_sizes(content: Mapping[str, Any], file: str) -> None:
  """Checks clients.json: the whole numbers of each client, by name.

  Raises:
    Error: a field is not of the kind that a run writes.

  >>> sizes = {'clients': {'ann': {'examples': 2}}, 'new': {}, 'unit': 'token'}
  >>> check_sizes(sizes, 'x.json')
  """
  for group in content:
    if group == 'unit':  # the name of what the loss counts
      name = content[group]
      if not (isinstance(name, str) and reading.is_unicode(name)):
        value = f'{content[group]!r:.60}'
        raise Error(f'{file} is damaged: unit is {value}, not a name.')
      continue
    _mapping(content[group], f'{file} is damaged: {group}')
    for name, sizes in content[group].items():
      where = f'{file} is damaged: {group} of {name}'
      _mapping(sizes, where)
      for field, value in sizes.items():
        if type(value) is not int or value < 0:
          raise Error(f'{where}: {field} is {value!r:.60}, not a whole number.')
      if group == 'clients' and 'examples' not in sizes:
        raise Error(f'{where} has no examples.')


def check_samples(content: Mapping[str, Any], file: str) -> None:
  """Checks samples.json: a list of samples, each with texts by field.

  Raises:
    Error: a field is not of the kind that a run writes.

  >>> check_samples({'round': 3, 'samples': []}, 'samples.json')
  """
  number, samples = content.get('round', 0), content.get('samples', [])
  if type(number) is not int:
    raise Error(f'{file} is damaged: round is {number!r:.60}, not a number.')
  if not isinstance(samples, list):
    raise Error(f'{file} is damaged: samples is {samples!r:.60}, not a list.')
  for i, sample in enumerate(samples):
    where = f'{file} is damaged: samples[{i}]'
    _mapping(sample, where)
    for field in ('client', 'prompt', 'reply', *sample):
      value = sample.get(field)
      if not isinstance(value, str):
        raise Error(f'{where}: {field} is {value!r:.60}, not a text.')


def _mapping(value: Any, where: str) -> None:
  if not isinstance(value, Mapping):
    raise Error(f'{where} is {value!r:.60}, not an object.')


def _number(value: Any, where: str) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float | None):
    raise Error(f'{where} is {value!r:.60}, not a number or null.')


def _texts(value: Any, where: str) -> None:
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise Error(f'{where} is {value!r:.60}, not a list of texts.')
