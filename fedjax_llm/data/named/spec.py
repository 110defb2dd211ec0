"""The form of a named data set: where it is, its fields, its natural clients.

A template is a text with fields in braces: `'{instruction}\\n\\n{input}'`.
`{answers[text][0]}` goes into a field that holds a mapping or a list. Blank
lines separate paragraphs; a paragraph whose fields are all empty is left out.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The templates of which one form is made, in the order of `Named`.
_TEMPLATES = ('prompt', 'response', 'text', 'pair', 'chosen', 'rejected')


class Named(NamedTuple):
  """A data set that a config names, of exactly one form of text.

  The form is `prompt` with `response`; `prompt` with `choices` and `answer`;
  `prompt` with `chosen` and `rejected`; `text`, perhaps with `pair`; or
  `messages`.

  >>> notes = Named('Notes', 'lab/notes', 'mit', 'https://a.b', '2026-11-28',
  ...               text='{note}', client='author')
  >>> fields(notes)
  ('author', 'note')
  """

  title: str  # what it is, in one line
  hub: str | None  # its name on the Hugging Face hub
  licence: str | None  # None: the source does not say
  source: str  # the public address from which the fields were read
  read: str  # the date of reading
  prompt: str | None = None  # a template
  response: str | None = None  # a template
  text: str | None = None  # a template
  pair: str | None = None  # a template of a second text
  messages: str | None = None  # the field with a list of messages
  chosen: str | None = None  # a template of the preferred reply
  rejected: str | None = None  # a template of the other reply
  choices: tuple[str, ...] | str = ()  # templates, or a field with a list
  choice: str | None = None  # the key of a choice's text in that list
  answer: str | None = None  # the field with the number of the right choice
  first: int = 0  # the number of the first choice
  blank: str | None = None  # the response where the template gives none
  label: str | None = None  # the field with the class
  classes: tuple[str, ...] = ()  # names of the class numbers 0, 1, ...
  client: str | None = None  # the field with the natural client
  others: tuple[str, ...] = ()  # further fields that can be clients or labels
  subset: str | None = None
  split: str = 'train'  # the split for training
  sizes: Mapping[str, int] = {}  # rows by split, as far as the source says
  revision: str | None = None  # a commit of the hub; None: the newest
  grouped: bool = False  # one JSON object {client: list of rows}
  place: str | None = None  # where to download what is not on the hub


def fields_of(template: str) -> list[str]:
  """Returns the names of the fields in a template, each with its path.

  >>> fields_of('{question} {answers[text][0]}')
  ['question', 'answers[text][0]']
  """
  return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def path_of(field: str) -> tuple[str | int, ...]:
  """Splits the path of a field into keys and numbers.

  >>> path_of('answers[text][0]')
  ('answers', 'text', 0)
  """
  keys = re.findall(r'[^\[\]]+', field)
  return (keys[0], *(int(k) if k.isdigit() else k for k in keys[1:]))


def templates(spec: Named) -> list[str]:
  """Returns all templates of a data set."""
  written = [getattr(spec, name) for name in _TEMPLATES]
  if not isinstance(spec.choices, str):
    written += spec.choices
  return [template for template in written if template]


def fields(spec: Named) -> tuple[str, ...]:
  """Returns the fields that a row must have, the clients' first.

  The client of a grouped file is the key of its list, not a field.
  """
  names = [] if spec.grouped else [spec.client]
  names += [path_of(f)[0] for t in templates(spec) for f in fields_of(t)]
  names += [spec.messages, spec.answer, spec.label]
  if isinstance(spec.choices, str):
    names.append(spec.choices)
  return tuple(dict.fromkeys(str(name) for name in names if name))


def form(spec: Named) -> str:
  """Returns the form of a data set's records, in words.

  >>> form(Named('', None, None, '', '', prompt='{a}', response='{b}'))
  'prompt and response'
  """
  if spec.messages:
    return 'chat'
  if spec.chosen:
    return 'prompt with a preferred and another reply'
  if spec.choices:
    return 'multiple choice'
  if spec.prompt:
    return 'prompt and response'
  return 'two texts' if spec.pair else 'text'


def faults(spec: Named) -> Sequence[str]:
  """Returns what is wrong with a data set's entry, nothing for a right one."""
  forms: dict[str, Any] = {
    'response': spec.response,
    'choices': spec.choices,
    'chosen': spec.chosen,
    'text': spec.text,
    'messages': spec.messages,
  }
  set_forms = [name for name, value in forms.items() if value]
  wrong = []
  if len(set_forms) != 1:
    wrong.append(f'one form is needed, not {set_forms}')
  needs_prompt = set_forms[:1] in (['response'], ['choices'], ['chosen'])
  if bool(spec.prompt) != needs_prompt:
    wrong.append('a prompt belongs to a response, choices or replies')
  if bool(spec.chosen) != bool(spec.rejected):
    wrong.append('chosen and rejected belong together')
  if bool(spec.choices) != bool(spec.answer):
    wrong.append('choices and answer belong together')
  if not spec.source.startswith('https://'):
    wrong.append('the source is no address')
  if not re.fullmatch(r'\d{4}-\d\d-\d\d', spec.read):
    wrong.append('the day of reading is no date')
  if not (spec.hub or spec.place):
    wrong.append('neither hub nor place is named')
  return wrong
