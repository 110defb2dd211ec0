"""Templates of fixed strings: `alpaca`, `vicuna`, `plain`."""

from collections.abc import Callable

from fedjax_llm.data import messages as messages_lib
from fedjax_llm.data.chat import Piece, Template


def _fixed(
  name: str,
  user: Callable[[str], str],
  *,
  preamble: str = '',
  reply: str = '',
  gap: str = '',
) -> Template:
  """Returns a template of fixed strings.

  A system message replaces the preamble. `reply` comes before a reply (its
  trailing space is learned with the reply), `gap` between the end token and the
  next turn.
  """

  def pieces(messages, tokenizer):
    del tokenizer  # the end token is an id, the rest is plain text
    messages_lib.check_plain(messages, name)
    start = reply.rstrip(' ')
    context, dialogue = preamble, []
    for i, message in enumerate(messages):
      role, content = message['role'], message['content']
      if role == 'assistant':
        spoken = reply[len(start) :] + content
        learned = bool(content.strip()) and messages_lib.weight(message)
        dialogue += [Piece(context + start), Piece(spoken, learned, end=True)]
        context = gap
      elif role == 'system' and i == 0:
        context = f'{content}\n\n' if content else ''
      else:
        context += user(content)
    return [dialogue] if dialogue else []

  return pieces


def alpaca() -> Template:
  """Returns the instruction template of Stanford Alpaca (Taori et al., 2023).

  >>> roles = ('system', 'user', 'assistant')
  >>> messages = [
  ...   {'role': r, 'content': c} for r, c in zip(roles, ('', 'Hi', 'Ho'))]
  >>> ((prompt, reply),) = alpaca()(messages, None)
  >>> prompt.text.splitlines(), reply.text
  (['### Instruction:', 'Hi', '', '### Response:'], 'Ho')
  """
  return _fixed(
    'alpaca',
    lambda content: f'### Instruction:\n{content}\n\n',
    preamble='Below is an instruction that describes a task. '
    'Write a response that appropriately completes the request.\n\n',
    reply='### Response:\n',
    gap='\n\n',
  )


def vicuna() -> Template:
  """Returns the conversation template of Vicuna v1.1 (Chiang et al., 2023).

  >>> roles = ('system', 'user', 'assistant')
  >>> messages = [
  ...   {'role': r, 'content': c} for r, c in zip(roles, ('', 'Hi', 'Ho'))]
  >>> ((prompt, reply),) = vicuna()(messages, None)
  >>> prompt.text, reply.text
  ('USER: Hi ASSISTANT:', ' Ho')
  """
  return _fixed(
    'vicuna',
    lambda content: f'USER: {content} ',
    preamble='A chat between a curious user and an artificial intelligence '
    'assistant. The assistant gives helpful, detailed, and polite answers to '
    "the user's questions. ",
    reply='ASSISTANT: ',
  )


def plain() -> Template:
  """Returns the template that writes only the messages, each on its own line.

  >>> messages = [{'role': 'user', 'content': 'Hi'},
  ...   {'role': 'assistant', 'content': 'Ho'}]
  >>> ((prompt, reply),) = plain()(messages, None)
  >>> prompt.text.splitlines(), reply.text
  (['Hi'], 'Ho')
  """
  return _fixed(
    'plain', lambda content: f'{content}\n' if content else '', gap='\n'
  )
