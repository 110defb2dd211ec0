"""The process that renders a chat template: see `rendering`.

Run as a file, not imported: it reads JSON objects from its input, one a line,
the first with the template and the special tokens, each other one with the
messages of one rendering, and answers each with a JSON object on a line. A
rendering that computes for longer than `seconds` ends the process; its memory
is limited by the system.
"""

import datetime
import json
import sys

# A template that prints the date would make two runs of one config differ.
_TODAY = datetime.datetime(2024, 7, 26)


def limit_memory(num_bytes):
  """Limits the memory of this process, if the system supports it."""
  try:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
  except (ImportError, ValueError, OSError):
    pass


def limit_time(seconds):
  """Ends the process after `seconds` of computing; 0 removes the limit."""
  try:
    import signal

    # The signal's default action ends the process without running Python code.
    signal.setitimer(signal.ITIMER_PROF, seconds)
  except (ImportError, AttributeError, ValueError):
    pass


def environment():
  """Returns the Jinja sandbox with the functions that chat templates use."""
  import jinja2
  from jinja2.ext import Extension, loopcontrols
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(Extension):
    """The block `{% generation %}`, which marks replies and changes no text."""

    tags = {'generation'}  # noqa: RUF012 (a name of the library)

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=0):
    return json.dumps(
      x,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=bool(sort_keys),
    )

  room = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, loopcontrols],
  )
  room.filters['tojson'] = tojson
  room.globals['raise_exception'] = raise_exception
  room.globals['strftime_now'] = _TODAY.strftime
  return room


def main():
  answer = lambda value: print(json.dumps(value), flush=True)
  settings = json.loads(sys.stdin.readline())
  limit_memory(settings['memory'])
  template = None
  for line in sys.stdin:
    request = json.loads(line)
    limit_time(settings['seconds'])
    try:
      if template is None:
        template = environment().from_string(settings['template'])
      text = template.render(**{**settings['special'], **request})
      if len(text) > settings['characters']:
        raise ValueError(f'it writes {len(text):,} characters')
      answer({'text': text})
    except MemoryError:
      answer({'error': 'it needs too much memory'})
    except Exception as error:  # a template may raise any exception
      answer({'error': f'{error or type(error).__name__}'[:2000]})
    finally:
      limit_time(0)


if __name__ == '__main__':
  main()
