"""Reads and checks the messages of chats in data files.

A message has a role, a content and further fields for the chat template
(reasoning, tool calls, a name). Lists in the ShareGPT form ({"from", "value"})
are read as well. A field that cannot be passed on raises an `Error` that names
it.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm import reading
from fedjax_llm.types import Error

# {'role': ..., 'content': ..., and further fields}
Message = Mapping[str, Any]

# The role of each 'from' in the ShareGPT form.
_SPEAKERS = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'system': 'system',
  'tool': 'tool',
  'observation': 'tool',
}
# Names of the reasoning of a reply in data sets and templates.
_REASONING = ('reasoning_content', 'thinking', 'reasoning')
# Whether a message is learned: 0 or 1.
WEIGHT = 'weight'
# Fields that only link a tool's result to its call.
_BOOKKEEPING = ('tool_call_id', 'id')


def read(value: Any, key: str, where: str) -> tuple[Message, ...]:
  """Reads the messages of a record's field.

  Contents are strings; parts of a content, {"type": "text", "text": ...}, are
  joined. Fields that are null are left out.

  Raises:
    Error: a field is wrong; the message names it, the record and the chat
      message.

  >>> read([{'from': 'human', 'value': 'Hi'}], 'conversations', 'x.jsonl:1')
  ({'role': 'user', 'content': 'Hi'},)
  """
  if isinstance(value, str):  # tables hold lists as their JSON text
    with contextlib.suppress(ValueError, RecursionError):
      value = json.loads(value)
  if not isinstance(value, list | tuple) or not value:
    raise Error(
      f'{where}: {key!r} is {reading.short(value)}, but must be a list of '
      'messages with a role and a content.'
    )
  return tuple(
    _message(message, f'{where}, message {number}')
    for number, message in enumerate(value)
  )


def _message(message: Any, where: str) -> Message:
  if not isinstance(message, Mapping):
    raise Error(f'{where}: {reading.short(message)} is no JSON object.')
  message = {k: v for k, v in message.items() if v is not None} | {
    # A required field that is null is kept, for the error below.
    k: None
    for k in ('role', 'content')
    if k in message and message[k] is None
  }
  if 'role' not in message and 'from' in message:
    message = _share_gpt(message, where)
  calls = message.get('tool_calls')
  role = message.get('role')
  if 'role' not in message:
    raise Error(f"{where}: there is no 'role'; there is {_names(message)}.")
  if not isinstance(role, str) or not reading.is_unicode(role):
    raise Error(
      f"{where}: 'role' is {reading.short(role)}, but must be a string."
    )
  speaks = [name for name in (*_REASONING, 'tool_calls') if message.get(name)]
  if 'content' not in message and not speaks:
    raise Error(f"{where}: there is no 'content'; there is {_names(message)}.")
  content = message.get('content')
  if content is None and speaks:
    content = ''
  rest = {k: v for k, v in message.items() if k not in ('role', 'content')}
  if calls is not None:
    rest['tool_calls'] = _calls(calls, where)
  if WEIGHT in rest:
    _check_weight(rest[WEIGHT], role, where)
  _check_texts(rest, where)
  return {'role': role, 'content': _content(content, where), **rest}


def _share_gpt(message: dict[str, Any], where: str) -> dict[str, Any]:
  speaker = message['from']
  if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
    raise Error(
      f"{where}: 'from' is {reading.short(speaker)}, but must be one of "
      f'{", ".join(_SPEAKERS)}.'
    )
  if 'value' not in message:
    raise Error(f"{where}: there is no 'value'; there is {_names(message)}.")
  rest = {k: v for k, v in message.items() if k not in ('from', 'value')}
  role = _SPEAKERS[speaker.lower()]
  return {'role': role, 'content': message['value'], **rest}


def _content(content: Any, where: str) -> str:
  if isinstance(content, list | tuple):
    content = ''.join(
      _part(part, f'{where}, part {number}')
      for number, part in enumerate(content)
    )
  if not isinstance(content, str):
    raise Error(
      f"{where}: 'content' is {reading.short(content)}, but must be a string "
      'or a list of text parts.'
    )
  if not reading.is_unicode(content):
    raise Error(
      f"{where}: 'content' holds half a character (a lone surrogate): "
      f'{reading.short(content)}.'
    )
  return content


def _part(part: Any, where: str) -> str:
  if isinstance(part, str):
    return part
  if not isinstance(part, Mapping):
    raise Error(f'{where}: {reading.short(part)} is no part of a content.')
  kind = part.get('type', 'text')
  if kind not in ('text', 'input_text', 'output_text'):
    raise Error(
      f'{where}: a part of the type {reading.short(kind)} cannot be learned '
      "from; only parts of the type 'text' are read."
    )
  if not isinstance(part.get('text'), str):
    raise Error(
      f"{where}: 'text' is {reading.short(part.get('text'))}, but must be a "
      'string.'
    )
  return part['text']


def _calls(calls: Any, where: str) -> list[Any]:
  """Returns the tool calls as a list of dicts; a JSON text is parsed."""
  if isinstance(calls, str):
    calls = reading.parse(calls, f'{where}: tool_calls')
  if not isinstance(calls, list | tuple) or not all(
    isinstance(call, Mapping) for call in calls
  ):
    raise Error(
      f"{where}: 'tool_calls' is {reading.short(calls)}, but must be a list of "
      'objects.'
    )
  return [dict(call) for call in calls]


def _check_weight(weight: Any, role: str, where: str) -> None:
  if isinstance(weight, bool) or weight not in (0, 1):
    raise Error(
      f'{where}: {WEIGHT!r} is {reading.short(weight)}, but must be 0 (not '
      'learned) or 1.'
    )
  if role != 'assistant' and weight:
    raise Error(
      f"{where}: {WEIGHT!r} is 1, but only messages of the role 'assistant' "
      'are learned.'
    )


def _check_texts(value: Any, where: str) -> None:
  """Raises an `Error` for lone surrogates and values that JSON cannot hold."""
  try:
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    raise Error(
      f'{where}: {", ".join(map(repr, value))} holds half a character (a lone '
      'surrogate).'
    ) from None
  except (TypeError, ValueError, RecursionError) as error:
    raise Error(
      f'{where}: {", ".join(map(repr, value))} cannot be passed on ({error}).'
    ) from None


def _names(message: Mapping[str, Any]) -> str:
  return ', '.join(repr(name) for name in message) or 'no field'


def tools(value: Any, where: str) -> tuple[Any, ...] | None:
  """Reads the tools of a record, which its assistant may call.

  Raises:
    Error: the value is no list of JSON objects.

  >>> tools('[{"name": "clock"}]', 'x.jsonl:1')
  ({'name': 'clock'},)
  """
  if isinstance(value, str) and value.strip():
    value = reading.parse(value, f"{where}: 'tools'")
  if not value:
    return None
  if not isinstance(value, list | tuple) or not all(
    isinstance(tool, Mapping) for tool in value
  ):
    raise Error(
      f"{where}: 'tools' is {reading.short(value)}, but must be a list of "
      'objects.'
    )
  _check_texts({'tools': value}, where)
  return tuple(value)


# ------------------------------------------------------------ to templates --


def weight(message: Message) -> bool:
  """Returns True if a message may be learned: its weight is not 0."""
  return bool(message.get(WEIGHT, 1))


def is_spoken(message: Message) -> bool:
  """Returns True for a reply with a text, a reasoning or a tool call."""
  return bool(message['content'].strip()) or any(
    message.get(name) for name in (*_REASONING, 'tool_calls')
  )


def extras(message: Message) -> list[str]:
  """Returns the fields of a message that a template must write."""
  apart = ('role', 'content', WEIGHT, *_BOOKKEEPING)
  if message['role'] in ('tool', 'function'):
    apart = (*apart, 'name')
  return [
    name
    for name, value in message.items()
    if name not in apart and value not in ('', [], {})
  ]


def for_template(
  messages: Sequence[Message], *, parsed: bool = True
) -> list[dict[str, Any]]:
  """Returns the messages in the form that chat templates expect.

  The reasoning is repeated under each of its usual names. With `parsed`,
  arguments of calls that are JSON texts of objects become those objects, which
  most templates format themselves.

  >>> call = {'function': {'name': 'clock', 'arguments': '{"zone": 2}'}}
  >>> reply = {'role': 'assistant', 'content': '', 'tool_calls': [call]}
  >>> for_template([reply])[0]['tool_calls'][0]['function']['arguments']
  {'zone': 2}
  """
  result = []
  for message in messages:
    message = {k: v for k, v in message.items() if k != WEIGHT}
    reasoning = next((message[k] for k in _REASONING if message.get(k)), None)
    if reasoning is not None:
      message = dict.fromkeys(_REASONING[:2], reasoning) | message
    if parsed and message.get('tool_calls'):
      calls = message['tool_calls'] or ()
      message['tool_calls'] = [_parsed(call) for call in calls]
    result.append(message)
  return result


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
  call = {k: v for k, v in call.items() if v is not None}
  function = call.get('function')
  if isinstance(function, Mapping):
    return {**call, 'function': _parsed(function)}
  if isinstance(call.get('arguments'), str):
    try:
      arguments = json.loads(call['arguments'])
    except (ValueError, RecursionError):
      return call
    if isinstance(arguments, dict):
      return {**call, 'arguments': arguments}
  return call


def check_plain(
  messages: Sequence[Message], template: str, where: str = ''
) -> None:
  """Raises an `Error` for messages that a fixed template cannot write.

  >>> check_plain([{'role': 'tool', 'content': '7'}], 'alpaca')
  Traceback (most recent call last):
  fedjax_llm.types.Error: message 0: the template alpaca does not know the \
role 'tool'; it knows user, assistant, and system in the first message.
  """
  for number, message in enumerate(messages):
    place = f'{where}message {number}'
    role = message['role']
    if role not in ('user', 'assistant') and (role, number) != ('system', 0):
      raise Error(
        f'{place}: the template {template} does not know the role {role!r}'
        f'{" here" if role == "system" else ""}; it knows user, assistant, and '
        'system in the first message.'
      )
    if names := extras(message):
      raise Error(
        f'{place}: the template {template} does not write '
        f'{", ".join(map(repr, names))}; choose a chat template that does, or '
        'leave it out of the data.'
      )
