"""Recipes: the named methods, each a short composition of parts.

A method is a function in a module of one of the families (`averaging`, `lora`,
`ranks`, `personal`, `labels`), which says in `NEEDS` what a config of it
changes. The modules are the list of methods: a new one is found by its file.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_llm.recipes.composing import compose as compose
from fedjax_llm.types import FederatedAlgorithm

Recipe = Callable[..., FederatedAlgorithm]


def _found() -> tuple[dict[str, Recipe], dict[str, Mapping[str, Any]]]:
  """Returns the recipes and their needs by name, read from the modules."""
  methods, needs = {}, {}
  for family in pkgutil.iter_modules(__path__):
    if not family.ispkg:
      continue
    package = importlib.import_module(f'{__name__}.{family.name}')
    for module in pkgutil.iter_modules(package.__path__):
      found = importlib.import_module(f'{package.__name__}.{module.name}')
      for name, changes in getattr(found, 'NEEDS', {}).items():
        methods[name], needs[name] = getattr(found, name), changes
  return methods, needs


METHODS, NEEDS = _found()
__all__ = sorted(METHODS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Recipe:
  if name in METHODS:
    return METHODS[name]
  raise AttributeError(f'fedjax_llm.recipes has no {name!r}.')
