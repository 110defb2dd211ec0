"""Converts some leaves of the base to tensors of a checkpoint, and back."""

from collections.abc import Mapping

import numpy as np

from fedjax_llm.models.config import Config, num_layers
from fedjax_llm.models.families.names import OWN, ours, put, tensors
from fedjax_llm.models.families.tables import Path
from fedjax_llm.types import Error


def to_checkpoint(
  leaves: Mapping[Path, np.ndarray], config: Config
) -> dict[str, np.ndarray]:
  """Returns some leaves of the base as tensors of a checkpoint, by name.

  >>> from fedjax_llm import models
  >>> norm = {('norm', 'scale'): np.ones(64)}
  >>> [*to_checkpoint(norm, models.random().config)]
  ['model.norm.weight']

  Raises:
    Error: a leaf is no weight of the network, or only a part of a tensor.
  """
  if config.family == OWN:
    return {'.'.join(path): np.asarray(leaf) for path, leaf in leaves.items()}
  written: dict[str, np.ndarray] = {}
  known: dict[str, set[Path]] = {}
  for tensor in tensors(config):
    known.setdefault(tensor.name, set()).add(tensor.path)
    if tensor.path in leaves:
      leaf = np.asarray(leaves[tensor.path])
      leaf = leaf if tensor.layer is None else leaf[tensor.layer]
      put(tensor, leaf, written)
  there = {path for paths in known.values() for path in paths}
  for path in leaves:
    if path not in there:
      raise Error(f'{"/".join(path)} is no weight of this network.')
  for name in written:
    if missing := known[name] - leaves.keys():
      raise Error(
        f'{name} also holds {"/".join(min(missing))}, which is missing.'
      )
  return {name: np.asarray(x, order='C') for name, x in written.items()}


def from_checkpoint(
  weights: Mapping[str, np.ndarray], config: Config
) -> dict[Path, np.ndarray]:
  """Returns leaves by path from tensors: the inverse of `to_checkpoint`.

  Raises:
    Error: a tensor is unknown or has a wrong shape, or is missing in some
      layers.
  """
  rows: dict[Path, dict[int | None, np.ndarray]] = {}
  left = set(weights)
  for tensor in tensors(config):
    if tensor.name not in weights:
      continue
    left.discard(tensor.name)
    value = weights[tensor.name]
    if value.shape != tensor.shape:
      raise Error(
        f'{tensor.name} has shape {list(value.shape)}, and the model has '
        f'{list(tensor.shape)}.'
      )
    rows.setdefault(tensor.path, {})[tensor.layer] = ours(tensor, value)
  if left:
    raise Error(f'{min(left)} is no weight of this {config.family} model.')
  leaves = {}
  for path, layers in rows.items():
    if None in layers:
      leaves[path] = layers[None]
      continue
    num = num_layers(config, path)
    missing = [i for i in range(num) if i not in layers]
    if missing:
      raise Error(f'{"/".join(path)} is missing in the layers {missing}.')
    leaves[path] = np.stack([layers[i] for i in range(num)])
  return leaves
