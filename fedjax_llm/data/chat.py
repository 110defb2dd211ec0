"""Splits chats in the tokenizer's own template into learned and other text.

`chat` returns a `Template`: a function from messages to dialogues of pieces.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fedjax_llm.data import messages as messages_lib
from fedjax_llm.data.messages import Message
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Error


class Piece(NamedTuple):
  """A part of a text that is learned as a whole or not at all.

  With `end` the end token follows, as an id: the text does not contain it.
  `rewritten` is True for a reply that the template shortened or changed.

  >>> Piece('Hello.', learned=True).end
  False
  """

  text: str
  learned: bool = False
  end: bool = False
  rewritten: bool = False


# (messages, tokenizer) -> dialogues, each a list of pieces that ends in a reply
Template = Callable[[Sequence[Message], Tokenizer], list[list[Piece]]]


def chat() -> Template:
  """Returns the template that uses the tokenizer's own chat template.

  The learned part of a turn begins after the template's generation prompt and
  ends with the marker of the turn's end (`end_mark`), or with the end token if
  the template writes no marker. Later text of the turn is not learned, nor a
  reply with `weight` 0. If the template rewrites earlier turns (some remove old
  reasoning), each reply becomes a dialogue of its own.

  Raises:
    Error: from the returned function, if the tokenizer's template refuses the
      messages, or leaves a message or a field of it out.

  >>> from fedjax_llm.data import tokenizers
  >>> def render(messages, add_generation_prompt):
  ...   text = ''.join(f'<{m["role"]}>{m["content"]}' for m in messages)
  ...   return text + '<assistant>' * add_generation_prompt
  >>> spell = tokenizers.bytes()._replace(chat=render)
  >>> message = {'role': 'user', 'content': 'Hi'}
  >>> ((prompt, reply),) = chat()(
  ...   [message, {'role': 'assistant', 'content': 'Ho'}], spell)
  >>> prompt.text, reply.text
  ('<user>Hi<assistant>', 'Ho')
  """

  def pieces(messages, tokenizer):
    mark = end_mark(tokenizer)
    whole, one_by_one, so_far = [], [], ''
    nested, checked = True, 0
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      before = _render(tokenizer, messages[:i], True)
      after = _render(tokenizer, messages[: i + 1], False)
      if not after.startswith(before):
        raise Error(
          f'the chat template of {tokenizer.name} does not begin a reply with '
          'its own generation prompt; choose alpaca, vicuna or plain.'
        )
      for j in range(checked, i):
        _check_written(tokenizer, messages, j, before)
      _check_fields(tokenizer, messages[: i + 1], i, after)
      checked = i + 1
      reply = _reply(tokenizer, messages, i, before, after, mark)
      one_by_one.append([Piece(before), reply])
      nested = nested and before.startswith(so_far)
      whole += [Piece(before[len(so_far) :]), reply]
      so_far = before + reply.text
    return [whole] if nested and whole else one_by_one

  return pieces


def _reply(tokenizer, messages, i, before, after, mark) -> Piece:
  content = messages[i]['content'].strip()
  spoken = messages_lib.is_spoken(messages[i])
  text = after[len(before) :]
  if mark and mark in text:
    text = text[: text.rindex(mark) + len(mark)]
  else:
    text = text[: len(text) - _header(tokenizer, messages[:i], before, text)]
    text = text.rstrip()
  # If the template writes nothing after the reply, the end token is added.
  end = spoken and text.endswith(content)
  if not content:
    end = spoken and not any(map(text.endswith, tokenizer.special))
  return Piece(
    text,
    learned=spoken and messages_lib.weight(messages[i]),
    end=end,
    rewritten=_squeezed(content) not in _squeezed(text),
  )


def _header(tokenizer, earlier, before: str, text: str) -> int:
  """Returns the length of the next generation prompt at the end of `text`.

  Some templates always write the generation prompt; for the others it is 0.
  """
  if before != _render(tokenizer, earlier, False):
    return 0
  most, size = min(len(before), len(text)), 0
  while size < most and before[-1 - size] == text[-1 - size]:
    size += 1
  return size


def _squeezed(text: str) -> str:
  return ''.join(text.split())


def end_mark(tokenizer: Tokenizer) -> str:
  """Returns the text of the token that ends a reply in the template, or ''.

  >>> from fedjax_llm.data import tokenizers
  >>> def render(messages, add_generation_prompt):
  ...   text = ''.join(f'<{m["role"]}>{m["content"]}</>' for m in messages)
  ...   return text + '<assistant>' * add_generation_prompt
  >>> end_mark(tokenizers.bytes()._replace(chat=render, special={'</>': 7}))
  '</>'
  """
  function = getattr(tokenizer.chat, 'func', tokenizer.chat)  # without tools
  try:
    return _MARKS[function]
  except KeyError:
    mark = _probed(tokenizer._replace(chat=function))
    _MARKS[function] = mark
    return mark


_MARKS: Any = weakref.WeakKeyDictionary()
_QUESTION, _REPLY = 'What is new?', 'Nothing at all.'


def _probed(tokenizer: Tokenizer) -> str:
  probe = [
    {'role': 'user', 'content': _QUESTION},
    {'role': 'assistant', 'content': _REPLY},
  ]
  try:
    after = _render(tokenizer, probe, False)
  except Error:
    return ''  # the error is raised when real messages are rendered
  _, reply, tail = after.rpartition(_REPLY)
  marks = [mark for mark in tokenizer.special if reply and mark in tail]
  return min(marks, key=lambda m: (tail.index(m), -len(m)), default='')


def with_tools(
  tokenizer: Tokenizer, tools: Sequence[Any] | None, messages: Sequence[Message]
) -> Tokenizer:
  """Returns a tokenizer that passes a record's tools to its chat template.

  Raises:
    Error: the template does not write the tools.
  """
  if not tools:
    return tokenizer
  knows = tokenizer._replace(
    chat=functools.partial(tokenizer.chat, tools=list(tools))
  )
  first = next(
    (i for i, m in enumerate(messages) if m['role'] == 'assistant'), 1
  )
  text = _render(knows, messages[:first], True)
  if text == _render(tokenizer, messages[:first], True):
    raise Error(
      f"the chat template of {tokenizer.name} does not write the record's "
      'tools; choose a model whose template does, or leave them out.'
    )
  return knows


# ------------------------------------------------------------------- checks --


def _render(tokenizer, messages, add_generation_prompt: bool) -> str:
  try:
    text = _rendered(tokenizer, messages, add_generation_prompt)
  except Exception as error:  # a template may raise any exception
    reason = str(error)
    if not isinstance(error, Error):
      name = tokenizer.name
      reason = f'the chat template of {name} refuses the messages: {error}'
    if not messages:
      reason = (
        "the chat begins with the assistant's message, before which the "
        f'template needs another one: {reason}'
      )
    raise Error(reason) from error
  if text is None:
    raise Error(
      f'the tokenizer {tokenizer.name} has no chat template; choose the '
      'template alpaca, vicuna or plain.'
    )
  return text


def _rendered(tokenizer, messages, add_generation_prompt: bool) -> str | None:
  parsed = messages_lib.for_template(messages)
  try:
    return tokenizer.chat(parsed, add_generation_prompt)
  except Exception:
    as_written = messages_lib.for_template(messages, parsed=False)
    if as_written == parsed:
      raise
    try:  # some templates expect the arguments of a call as text
      return tokenizer.chat(as_written, add_generation_prompt)
    except Exception:
      pass
    raise


def _check_written(tokenizer, messages, j: int, before: str) -> None:
  """Raises an `Error` if the template leaves message j out."""
  content = messages[j]['content'].strip()
  if content and content not in before and messages[j]['role'] != 'assistant':
    other = {**messages[j], 'content': f'{messages[j]["content"]} and more'}
    if not _matters(tokenizer, messages[: j + 1], j, other):
      raise Error(
        f'message {j}: the chat template of {tokenizer.name} does not write '
        f'this message of the role {messages[j]["role"]!r}.'
      )
  if messages[j]['role'] != 'assistant':  # replies are checked by the caller
    _check_fields(tokenizer, messages[: j + 1], j)


def _check_fields(tokenizer, messages, j: int, text: str | None = None) -> None:
  """Raises an `Error` if the template leaves out a field of message j."""
  for name in messages_lib.extras(messages[j]):
    other = {k: v for k, v in messages[j].items() if k != name}
    if not _matters(tokenizer, messages, j, other, text):
      raise Error(
        f'message {j}: the chat template of {tokenizer.name} does not write '
        f'{name!r}; choose a model whose template does, or leave it out of the '
        'data.'
      )


def _matters(tokenizer, messages, j, other, text: str | None = None) -> bool:
  """Returns True if the text changes when message j is replaced by `other`."""
  changed = [*messages[:j], other, *messages[j + 1 :]]
  try:
    if text is None:
      text = _render(tokenizer, messages, False)
    return _render(tokenizer, changed, False) != text
  except Error:
    return True  # the template reads the message
