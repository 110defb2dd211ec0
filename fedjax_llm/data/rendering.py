"""Renders chat templates of models in a child process.

A template is a program that came with a model. It runs in Jinja's sandbox; the
sandbox limits neither time nor memory, so it runs in a child process that ends
if a rendering computes for too long or needs too much memory.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedjax_llm.types import Error

_CHILD = pathlib.Path(__file__).with_name('rendering_child.py')


class Limits(NamedTuple):
  """The limits of a chat template and of one rendering.

  >>> Limits().template
  1000000
  """

  template: int = 1_000_000  # characters
  seconds: float = 5.0  # of computing time for one rendering
  memory: int = 2**30  # bytes of the process
  characters: int = 10_000_000  # of the result of one rendering


LIMITS = Limits()

Renderer = Callable[..., str]


def renderer(
  template: str,
  special: Mapping[str, str],
  name: str,
  limits: Limits | None = None,
) -> Renderer:
  """Returns a function that renders a template: (messages, add, tools) -> text.

  The child process is started by the first rendering and ends with the
  function. Dates are always 26 July 2024.

  Args:
    template: Jinja source.
    special: texts of the special tokens by their names in templates.
    name: of the tokenizer, for error messages.
    limits: of time, memory and lengths; by default `LIMITS`.

  Raises:
    Error: the template is too long; from the returned function, the template
      raises or exceeds the limits.

  >>> source = '{{ bos_token }}{{ messages[0].content }}'
  >>> render = renderer(source, {'bos_token': '<s>'}, 'tiny')
  >>> render([{'role': 'user', 'content': 'Hi'}], True)
  '<s>Hi'
  """
  limits = limits or LIMITS
  if len(template) > limits.template:
    raise Error(
      f'the chat template of {name} has {len(template):,} characters; at most '
      f'{limits.template:,} are read.'
    )
  lock = threading.Lock()
  running: dict[int, subprocess.Popen[str]] = {}  # by process: forks have none

  def start() -> subprocess.Popen[str]:
    child = subprocess.Popen(
      [sys.executable, '-P', str(_CHILD)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      encoding='utf-8',
      start_new_session=True,  # Ctrl-C interrupts the parent only
    )
    settings = {
      'template': template,
      'special': dict(special),
      'seconds': limits.seconds,
      'memory': limits.memory,
      'characters': limits.characters,
    }
    running[os.getpid()] = child
    _write(child, settings)
    return child

  def render(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
  ) -> str:
    with lock:
      child = running.get(os.getpid()) or start()
      request = {
        'messages': [dict(message) for message in messages],
        'add_generation_prompt': add_generation_prompt,
        'tools': list(tools) if tools else None,
        'documents': None,
      }
      try:
        _write(child, request)
        line = _read(child, 20 * limits.seconds)
      except (
        BaseException
      ):  # an unread answer would be taken for that of the next request
        _end(running)
        raise
      if not line:
        _end(running)
        raise Error(
          f'the chat template of {name} did not come to an end within '
          f'{limits.seconds:g} seconds of computing and '
          f'{limits.memory / 2**20:,.0f} MiB.'
        )
    answer = json.loads(line)
    if 'error' in answer:
      raise Error(
        f'the chat template of {name} refuses the messages: '
        f'{" ".join(answer["error"].split())[:300]}'
      )
    return answer['text']

  weakref.finalize(render, _end, running)
  return render


def _write(child: subprocess.Popen[str], value: Any) -> None:
  try:
    assert child.stdin is not None
    child.stdin.write(json.dumps(value) + '\n')
    child.stdin.flush()
  except BrokenPipeError:
    pass  # it has ended: `_read` returns ''


def _read(child: subprocess.Popen[str], seconds: float) -> str:
  """Returns the child's next line; '' if it ended or was killed on time-out."""
  assert child.stdout is not None
  # The child's own limit counts computing time only, not waiting.
  timer = threading.Timer(seconds, child.kill)
  timer.daemon = True
  timer.start()
  try:
    return child.stdout.readline()
  finally:
    timer.cancel()


def _end(running: dict[int, subprocess.Popen[str]]) -> None:
  child = running.pop(os.getpid(), None)
  if child is None:
    return
  child.kill()
  for pipe in (child.stdin, child.stdout):
    try:
      if pipe is not None:
        pipe.close()
    except OSError:
      pass
  child.wait()
