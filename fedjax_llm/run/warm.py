"""Starts a run from an adapter that was trained before.

`adapter.path` names a PEFT directory or the workdir of a finished run. `start`
returns parameters that compute the same function at the targets and the rank of
the config: an adapter of a smaller rank fills the first ranks, and the other
ranks start as in a new adapter, with no effect.
"""

import functools
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import models
from fedjax_llm.adapters import peft, picked
from fedjax_llm.models import LoadedModel, families, tenants
from fedjax_llm.models import config as config_lib
from fedjax_llm.nodes import LowRank, is_node
from fedjax_llm.run import builders
from fedjax_llm.types import Error, Params


def startable(builder: builders.Builder) -> builders.Builder:
  """Adds the keyword `path` to a builder of adapters; `start` reads it.

  >>> def build(*, rank=4): return rank
  >>> startable(build)(rank=8, path='runs/a'), builders.fields(startable(build))
  (8, ['rank', 'path'])
  """

  @functools.wraps(builder)
  def built(*, path: str | None = None, **keywords: Any) -> Any:
    return builder(**keywords)

  keyword = inspect.Parameter.KEYWORD_ONLY
  known = builders.parameters(builder)
  known['path'] = inspect.Parameter(
    'path', keyword, default=None, annotation=str | None
  )
  built.__signature__ = inspect.Signature(  # type: ignore
    [x.replace(kind=keyword) for x in known.values()]
  )
  return built


def start(initial: Params, path: str | None, loaded: LoadedModel) -> Params:
  """Returns the parameters that a run starts from.

  Args:
    initial: the result of the adapter's `init`.
    path: a PEFT directory, or the workdir of a finished run; None: `initial`.
    loaded: the base.

  Raises:
    Error: `path` is neither, or its adapter has other weights, another shape or
      a larger rank; the workdir's run changed its base; the adapter of this run
      is of a kind that PEFT directories cannot hold.
  """
  if path is None:
    return initial
  folder = pathlib.Path(path)
  where = f'adapter.path={path}'
  if (folder / 'config.json').is_file():
    if not (folder / 'adapter').is_dir():
      raise Error(
        f'{where}: this run is not finished; write what it has made so far '
        'with python -m fedjax_llm.export --to peft, and name that folder.'
      )
    _check_base(folder / 'base', loaded, where)
    folder = folder / 'adapter'
  trained = load_adapter(folder, loaded)
  if (index := picked.of(initial)) is not None:
    _check_layers(trained, index, where)
    trained = picked.gather(trained, index)
  return fitted(initial, trained, where)


def _check_layers(trained: Params, index: Any, where: str) -> None:
  """Raises `Error` if an adapter changes layers that this run leaves out."""
  for node in jax.tree.leaves(trained.get('layers'), is_leaf=is_node):
    if isinstance(node, LowRank):
      some = jnp.any(node.a != 0, (1, 2)) & jnp.any(node.b != 0, (1, 2))
      more = np.setdiff1d(np.flatnonzero(some), np.asarray(index)).tolist()
      if more:
        raise Error(
          f'{where} changes the layers {more}, which adapter.layers leaves out.'
        )


def _check_base(base: pathlib.Path, loaded: LoadedModel, where: str) -> None:
  """Raises `Error` if the base stored in a run differs from `loaded`."""
  if not base.is_dir():
    return
  other = models.pretrained(base).base
  same = jax.tree.structure(other) == jax.tree.structure(loaded.base)
  pairs = zip(jax.tree.leaves(other), jax.tree.leaves(loaded.base))
  equal = lambda x, y: x.shape == y.shape and bool(jnp.all(x == y))
  if not same or not all(equal(x, y) for x, y in pairs):
    raise Error(
      f'{where}: that run worked on another base, or wrote into it: start from '
      f'model.path={base} as well.'
    )


def fitted(
  initial: Params, trained: Params, where: str, path: tuple[str, ...] = ()
) -> Params:
  """Returns `trained` with the structure of `initial`, as the same function.

  Args:
    initial: the parameters that set the structure, scales and dtypes.
    trained: nested dicts of `LowRank` nodes and of full weights.
    where: the start of error messages.
    path: the place of these nodes in the tree.

  Raises:
    Error: the weights or shapes differ, or the rank is larger.

  >>> node = LowRank(jnp.ones((3, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> old = LowRank(2 * jnp.ones((3, 1)), jnp.ones((1, 3)), jnp.float32(0.5))
  >>> new = fitted({'q': node}, {'q': old}, 'adapter.path=x')['q']
  >>> new.a.tolist()[0], new.b.tolist()
  ([2.0, 1.0], [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
  """
  name = '/'.join(path)
  if isinstance(initial, Mapping) and isinstance(trained, Mapping):
    for key in {**initial, **trained}:
      if key not in trained:
        raise Error(f'{where} has nothing for {"/".join((*path, key))}.')
      if key not in initial:
        raise Error(
          f'{where} changes {"/".join((*path, key))}, which this run leaves as '
          'it is: widen adapter.targets.'
        )
    return {
      key: fitted(initial[key], trained[key], where, (*path, key))
      for key in initial
    }
  if isinstance(initial, LowRank) and isinstance(trained, LowRank):
    return _node(initial, trained, f'{where}: {name}')
  if type(initial) is not type(trained):
    raise Error(
      f'{where} has a {type(trained).__name__} at {name}, where this run has a '
      f'{type(initial).__name__}: choose the adapter that it was made with.'
    )
  leaves, treedef = jax.tree.flatten(initial)
  others = jax.tree.leaves(trained)
  shapes = [np.shape(x) for x in leaves]
  if shapes != [np.shape(x) for x in others]:
    raise Error(f'{where}: {name} has other shapes than in this run.')
  return jax.tree.unflatten(
    treedef, [jnp.asarray(y, x.dtype) for x, y in zip(leaves, others)]
  )


def _node(initial: LowRank, trained: LowRank, where: str) -> LowRank:
  rank, old = initial.a.shape[-1], trained.a.shape[-1]
  outer = lambda node: (*node.a.shape[:-1], *node.b.shape[-1:])
  if outer(initial) != outer(trained):
    raise Error(
      f'{where} changes a weight of shape {outer(trained)}, here it is '
      f'{outer(initial)}.'
    )
  if old > rank:
    raise Error(f'{where} has rank {old}, above adapter.rank={rank}.')
  if old < rank and bool(jnp.any(initial.b[..., old:, :])):
    raise Error(
      f'{where} has rank {old} and adapter.rank is {rank}: an adapter that '
      'starts with factors other than zero starts from its own rank only.'
    )
  ratio = jnp.asarray(trained.scale / initial.scale)[..., None, None]
  # A layer that the adapter leaves out starts as in a new one, not from zeros,
  # where nothing has a gradient.
  absent = ~jnp.any(trained.a != 0, (-1, -2), keepdims=True)
  first = jnp.where(absent, initial.a[..., :old], trained.a)
  a = initial.a.at[..., :old].set(first.astype(initial.a.dtype))
  b = initial.b.at[..., :old, :].set(
    (trained.b * ratio).astype(initial.b.dtype)
  )
  return initial._replace(a=a, b=b)


_EMBEDDING = ('embed_tokens', 'embedding')


def _saved_whole(
  tensors: Mapping[str, np.ndarray], loaded: LoadedModel
) -> Mapping[tuple[str, ...], np.ndarray]:
  """Returns the full weights that an adapter saves, by path in the base."""
  leaves = families.from_checkpoint(tensors, loaded.config)
  if loaded.config.tied and _EMBEDDING in leaves:
    raise Error(
      f'it saves the embedding whole ({min(tensors)}), which is also the '
      'output head of this model (tie_word_embeddings): PEFT changes the '
      'embedding alone, which a tied model cannot do.'
    )
  return leaves


def _is_of_base(tensors: Mapping[str, np.ndarray], loaded: LoadedModel) -> bool:
  """Returns True if the tensors are the base's own embedding or output head."""
  again = families.copies(loaded.config)
  named = {t.path: t.name for t in families.tensors(loaded.config)}
  table = {again.get(name, name): value for name, value in tensors.items()}
  if not set(table) <= {
    named.get(path) for path in (_EMBEDDING, ('lm_head', 'kernel'))
  }:
    return False
  for path, value in families.from_checkpoint(table, loaded.config).items():
    leaf: Any = loaded.base
    for name in path:
      leaf = leaf[name]
    if not np.array_equal(
      np.asarray(leaf, np.float32), np.asarray(value, np.float32)
    ):
      raise Error(
        f'{min(tensors)} beside the adapter differs from the base, but '
        'modules_to_save does not name it.'
      )
  return True


def load_adapter(directory: pathlib.Path, loaded: LoadedModel) -> Params:
  """Returns the adapter in a PEFT directory as parameters for this model.

  Raises:
    Error: the directory holds no adapter, or one that does not fit the model.
  """
  if not directory.is_dir():
    raise Error(f'{directory}: there is no such directory.')
  if not (directory / peft.CONFIG).is_file():
    raise Error(
      f'{directory} has no {peft.CONFIG}, so it is no adapter directory.'
    )
  if (directory / peft.bottlenecks.WEIGHTS).is_file():
    params = peft.bottlenecks.load(
      directory,
      path_of=lambda name: families.our_paths(name, loaded.config),
      network=loaded.config,
    )
    tenants.check(loaded.base, params, str(directory))
    return params
  params = peft.load(
    directory,
    path_of=lambda name: families.our_paths(name, loaded.config),
    fused=lambda path: families.fused_rows(loaded.config, path),
    from_tensors=lambda tensors: _saved_whole(tensors, loaded),
    of_base=lambda tensors: _is_of_base(tensors, loaded),
    num_layers=functools.partial(config_lib.num_layers, loaded.config)
    if loaded.dual is not None
    else loaded.config.num_layers,
    network=loaded.config,
  )
  tenants.check(loaded.base, params, str(directory))
  return params
