"""Lists the programs of the package, or runs the one that is named.

    fedjax_llm train --config configs/tiny.py --workdir runs/tiny

`fedjax_llm PROGRAM` and `python -m fedjax_llm PROGRAM` are
`python -m fedjax_llm.PROGRAM`.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Sequence

PROGRAMS = (
  *('train', 'plan', 'export', 'generate', 'evaluate', 'report', 'sweep'),
  *('replay', 'data'),
)


def summary(name: str) -> str:
  """Returns the first line of a program's docstring, without importing it.

  >>> summary('plan').endswith('.')
  True
  """
  spec = importlib.util.find_spec(f'fedjax_llm.{name}')
  assert spec is not None and spec.origin is not None, name
  with open(spec.origin, encoding='utf-8') as file:
    text = ast.get_docstring(ast.parse(file.read())) or ''
  return text.split('\n')[0]


def listing() -> str:
  """Returns one line for each program, and how to ask for help."""
  width = max(map(len, PROGRAMS))
  lines = ['usage: python -m fedjax_llm.PROGRAM [--help]', '']
  lines += [f'  {name:{width}}  {summary(name)}' for name in PROGRAMS]
  lines += ['', 'fedjax_llm PROGRAM, where it is installed, does the same.']
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program that the first word names; returns its exit status.

  >>> main(['trian'])
  1
  """
  words = list(sys.argv[1:] if argv is None else argv)
  if not words or words[0] in ('--help', '-h'):
    print(listing())
    return 0
  name, *rest = words
  if name not in PROGRAMS:
    near = difflib.get_close_matches(name, PROGRAMS, 1, 0.4)
    hint = f'the nearest is {near[0]!r}; ' if near else ''
    known = ', '.join(PROGRAMS)
    message = f'{name!r} is no program ({hint}there are {known}).'
    print(f'error: {message}', file=sys.stderr)
    return 1
  module = importlib.import_module(f'fedjax_llm.{name}')
  if not hasattr(module, 'main'):
    module = importlib.import_module(f'fedjax_llm.{name}.__main__')
  return module.main(rest)


if __name__ == '__main__':
  sys.exit(main())
