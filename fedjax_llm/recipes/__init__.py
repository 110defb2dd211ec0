"""Recipes: the named methods, each a short composition of parts.

A method is a function in a module of one of the families, which are folders
(`averaging`, `lora`, ...), and returns a `FederatedAlgorithm`. The module's
`NEEDS` holds the settings that a config of the method changes. The list of
methods is read from the modules, so a new file adds its methods.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_llm.recipes.composing import compose as compose
from fedjax_llm.types import FederatedAlgorithm

Recipe = Callable[..., FederatedAlgorithm]


def _read_modules() -> tuple[dict[str, Recipe], dict[str, Mapping[str, Any]]]:
  """Returns the recipes and their needs by name, read from the modules."""
  methods, needs = {}, {}
  for family in pkgutil.iter_modules(__path__):
    if not family.ispkg:
      continue
    package = importlib.import_module(f'{__name__}.{family.name}')
    for module in pkgutil.iter_modules(package.__path__):
      source = importlib.import_module(f'{package.__name__}.{module.name}')
      for name, changes in getattr(source, 'NEEDS', {}).items():
        methods[name], needs[name] = getattr(source, name), changes
  return methods, needs


METHODS, NEEDS = _read_modules()
__all__ = sorted(METHODS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Recipe:
  if name in METHODS:
    return METHODS[name]
  raise AttributeError(f'fedjax_llm.recipes has no {name!r}.')
