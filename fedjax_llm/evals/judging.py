"""A language model as a judge of two replies, behind an endpoint of its own.

The endpoint speaks the OpenAI form of chat completions. There is no default:
without one nothing is sent anywhere.
"""

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from fedjax_llm.types import Error

Ask = Callable[[str], str]


class _Stays(urllib.request.HTTPRedirectHandler):
  """Follows no redirect: the key would go with it to another host."""

  def redirect_request(self, *args: Any) -> None:
    del args


_OPENER = urllib.request.build_opener(_Stays)

QUESTION = (
  'Two assistants have replied to the same message. Which reply is better: '
  'more correct, more helpful and no longer than it needs to be?\n\n'
  '[message]\n{message}\n\n[reply A]\n{first}\n\n[reply B]\n{second}\n\n'
  'End with one line: "Better: A", "Better: B" or "Better: tie".'
)


def endpoint(
  url: str, model: str, *, key: str = '', timeout: float = 60.0
) -> Ask:
  """Returns a function that sends a message and returns the reply's text.

  Args:
    url: of the API, such as 'http://localhost:8000/v1'; '/chat/completions' is
      added.
    model: the name of the model there.
    key: is sent as a bearer token where it is not ''.
    timeout: seconds of one request.

  Raises:
    Error: a `url` without http; from the function, a request that fails, a
      redirect (the key would follow it) or an answer of another form.

  >>> endpoint('localhost:8000', 'm')
  Traceback (most recent call last):
  fedjax_llm.types.Error: url is 'localhost:8000'; it must begin with http:// \
or https://.
  """
  if not url.startswith(('http://', 'https://')):
    raise Error(f'url is {url!r}; it must begin with http:// or https://.')
  address = f'{url.rstrip("/")}/chat/completions'

  def ask(message: str) -> str:
    body: dict[str, Any] = {
      'model': model,
      'temperature': 0,
      'messages': [{'role': 'user', 'content': message}],
    }
    headers = {'Content-Type': 'application/json'}
    if key:
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(
      address, json.dumps(body).encode(), headers, method='POST'
    )
    try:
      with _OPENER.open(request, timeout=timeout) as answer:
        text = json.load(answer)['choices'][0]['message']['content']
    except (
      *(OSError, http.client.HTTPException),  # no reply, or half of one
      *(ValueError, KeyError, IndexError, TypeError),
    ) as error:
      raise Error(f'{address} gave no reply: {error!r}.') from error
    if not isinstance(text, str):
      raise Error(f'{address} gave no reply: its content is {text!r}.')
    return text

  return ask


def verdict(text: str) -> str | None:
  """Returns 'A', 'B' or 'tie' from the last verdict of a text, None without.

  >>> verdict('I compare them. Better: B'), verdict('Better: tie.')
  ('B', 'tie')
  >>> verdict('Neither.')
  """
  hits = re.findall(r'better:\s*\W*(a|b|tie)\b', text, re.IGNORECASE)
  if not hits:
    return None
  return 'tie' if hits[-1].lower() == 'tie' else hits[-1].upper()


def compared(ask: Ask, message: str, mine: str, other: str) -> float | None:
  """Returns 1 if `mine` is better, 0 if `other` is, 0.5 for a tie.

  Both orders are asked, since judges favour a place; where the two verdicts
  differ it is a tie (Zheng et al. 2023, arXiv 2306.05685, section 3.4). None
  where a reply of the judge has no verdict.

  Raises:
    Error: from `ask`.

  >>> compared(lambda message: 'Better: A', 'Hi', 'Ho', 'He')  # its place only
  0.5
  """
  scores = []
  for first, second, win in ((mine, other, 'A'), (other, mine, 'B')):
    said = verdict(
      ask(QUESTION.format(message=message, first=first, second=second))
    )
    if said is None:
      return None
    scores.append(0.5 if said == 'tie' else float(said == win))
  return scores[0] if scores[0] == scores[1] else 0.5
