"""Prints the programs of the package, a line each, from their docstrings.

python -m fedjax_llm
"""

import ast
import importlib.util
import sys

PROGRAMS = ('train', 'plan', 'export', 'generate', 'report', 'sweep', 'replay')


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
  return '\n'.join(lines)


if __name__ == '__main__':
  print(listing())
  sys.exit(0)
