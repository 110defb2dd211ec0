"""The table of named data sets, made of the files of the domains."""

import difflib
from collections.abc import Mapping

from fedjax_llm.data.named import (
  classic,
  code,
  finance,
  general,
  law,
  mathematics,
  medicine,
  natural,
  preferences,
)
from fedjax_llm.data.named.spec import Named
from fedjax_llm.types import Error

# The data sets by domain.
DOMAINS: Mapping[str, Mapping[str, Named]] = {
  'general': general.SETS,
  'finance': finance.SETS,
  'medicine': medicine.SETS,
  'code': code.SETS,
  'mathematics': mathematics.SETS,
  'law': law.SETS,
  'natural clients': natural.SETS,
  'methods': classic.SETS,
  'preferences': preferences.SETS,
}
TABLE: Mapping[str, Named] = {
  name: spec for sets in DOMAINS.values() for name, spec in sets.items()
}


def find(name: str) -> Named:
  """Returns the entry of a named data set.

  >>> find('dolly').hub
  'databricks/databricks-dolly-15k'
  >>> find('dollie')
  Traceback (most recent call last):
  fedjax_llm.types.Error: data.dataset: there is no data set 'dollie'; the \
nearest is 'dolly'; `python -m fedjax_llm.data --list` lists all.

  Raises:
    Error: there is no such data set.
  """
  if name in TABLE:
    return TABLE[name]
  near = difflib.get_close_matches(str(name), TABLE, 1, 0.4)
  hint = f'the nearest is {near[0]!r}; ' if near else ''
  raise Error(
    f'data.dataset: there is no data set {name!r}; {hint}'
    '`python -m fedjax_llm.data --list` lists all.'
  )
