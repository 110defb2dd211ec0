"""Command lines of the smaller programs."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from fedjax_llm.types import Error


def parse(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> argparse.Namespace:
  """Returns the parsed command line; raises an `Error` where it is wrong.

  >>> parser = argparse.ArgumentParser(prog='say', allow_abbrev=False)
  >>> _ = parser.add_argument('--to', choices=['ann', 'bob'])
  >>> parse(parser, ['--to', 'ann']).to
  'ann'
  >>> parse(parser, ['--to=eve'])
  Traceback (most recent call last):
  fedjax_llm.types.Error: say: argument --to: invalid choice: 'eve' (choose \
from ann, bob).
  """

  def refuse(message: str) -> NoReturn:
    start, separator, choices = message.partition('(choose from ')
    choices = choices.replace("'", '')  # Python 3.11 quotes them
    raise Error(f'{parser.prog}: {start}{separator}{choices}.')

  parser.error = refuse
  return parser.parse_args(argv)
