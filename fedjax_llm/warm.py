"""A start from an adapter that was trained before.

`adapter.path` names a PEFT directory, or the workdir of a finished run. What it
computes is what the run starts from, at the targets and the rank that the
config says: an adapter of a smaller rank fills the first ranks, and the others
begin as they always do, with no effect.
"""

import functools
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import builders, models
from fedjax_llm.adapters import peft
from fedjax_llm.models import LoadedModel, families, tenants
from fedjax_llm.types import Error, LowRank, Params


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
    initial: what the adapter's `init` gives.
    path: a PEFT directory, or the workdir of a finished run; None: `initial`.
    loaded: the base.

  Raises:
    Error: it is neither, or of other weights, another shape or a larger rank;
      the workdir's run changed its base; the adapter of this run is of a kind
      that no PEFT directory tells.
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
  return fitted(initial, load_adapter(folder, loaded), where)


def _check_base(base: pathlib.Path, loaded: LoadedModel, where: str) -> None:
  """Raises `Error` if a run's own base is another one than this."""
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
  initial: Params, found: Params, where: str, path: tuple[str, ...] = ()
) -> Params:
  """An adapter in the place of another one, of the same function as before.

  Args:
    initial: the parameters whose structure, scales and dtypes are kept.
    found: nested dicts of low-rank nodes, and weights that are whole.
    where: begins the messages.
    path: where in the tree this is.

  Raises:
    Error: they are of other weights or shapes, or the rank is larger.

  >>> node = LowRank(jnp.ones((3, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> old = LowRank(2 * jnp.ones((3, 1)), jnp.ones((1, 3)), jnp.float32(0.5))
  >>> new = fitted({'q': node}, {'q': old}, 'adapter.path=x')['q']
  >>> new.a.tolist()[0], new.b.tolist()
  ([2.0, 1.0], [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
  """
  name = '/'.join(path)
  if isinstance(initial, Mapping) and isinstance(found, Mapping):
    for key in {**initial, **found}:
      if key not in found:
        raise Error(f'{where} has nothing for {"/".join((*path, key))}.')
      if key not in initial:
        raise Error(
          f'{where} changes {"/".join((*path, key))}, which this run leaves as '
          'it is: widen adapter.targets.'
        )
    return {
      key: fitted(initial[key], found[key], where, (*path, key))
      for key in initial
    }
  if isinstance(initial, LowRank) and isinstance(found, LowRank):
    return _node(initial, found, f'{where}: {name}')
  if type(initial) is not type(found):
    raise Error(
      f'{where} has a {type(found).__name__} at {name}, where this run has a '
      f'{type(initial).__name__}: choose the adapter that it was made with.'
    )
  leaves, treedef = jax.tree.flatten(initial)
  others = jax.tree.leaves(found)
  shapes = [np.shape(x) for x in leaves]
  if shapes != [np.shape(x) for x in others]:
    raise Error(f'{where}: {name} has other shapes than in this run.')
  return jax.tree.unflatten(
    treedef, [jnp.asarray(y, x.dtype) for x, y in zip(leaves, others)]
  )


def _node(initial: LowRank, found: LowRank, where: str) -> LowRank:
  rank, old = initial.a.shape[-1], found.a.shape[-1]
  outer = lambda node: (*node.a.shape[:-1], *node.b.shape[-1:])
  if outer(initial) != outer(found):
    raise Error(
      f'{where} changes a weight of shape {outer(found)}, here it is '
      f'{outer(initial)}.'
    )
  if old > rank:
    raise Error(f'{where} has rank {old}, above adapter.rank={rank}.')
  if old < rank and bool(jnp.any(initial.b[..., old:, :])):
    raise Error(
      f'{where} has rank {old} and adapter.rank is {rank}: an adapter that '
      'starts with factors other than zero starts from its own rank only.'
    )
  ratio = jnp.asarray(found.scale / initial.scale)[..., None, None]
  a = initial.a.at[..., :old].set(found.a.astype(initial.a.dtype))
  b = initial.b.at[..., :old, :].set((found.b * ratio).astype(initial.b.dtype))
  return initial._replace(a=a, b=b)


_EMBEDDING = ('embed_tokens', 'embedding')


def _saved_whole(
  tensors: Mapping[str, np.ndarray], loaded: LoadedModel
) -> Mapping[tuple[str, ...], np.ndarray]:
  """Leaves of what an adapter saves whole, where that means the same here."""
  leaves = families.from_checkpoint(tensors, loaded.config)
  if loaded.config.tied and _EMBEDDING in leaves:
    raise Error(
      f'it saves the embedding whole ({min(tensors)}), which is also the '
      'output head of this model (tie_word_embeddings): PEFT changes the '
      'embedding alone, which a tied model cannot do.'
    )
  return leaves


def _is_of_base(tensors: Mapping[str, np.ndarray], loaded: LoadedModel) -> bool:
  """Whether these are an embedding or an output head as the base has them."""
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
        f'{min(tensors)} beside the adapter differs from the base, which '
        'modules_to_save does not say.'
      )
  return True


def load_adapter(directory: pathlib.Path, loaded: LoadedModel) -> Params:
  """Reads a PEFT directory as an adapter of this model.

  Raises:
    Error: there is no adapter, or it does not fit the model.
  """
  if not directory.is_dir():
    raise Error(f'{directory}: there is no such directory.')
  if not (directory / peft.CONFIG).is_file():
    raise Error(
      f'{directory} has no {peft.CONFIG}, so it is no adapter directory.'
    )
  params = peft.load(
    directory,
    path_of=lambda name: families.our_paths(name, loaded.config),
    fused=lambda path: families.fused_rows(loaded.config, path),
    from_tensors=lambda found: _saved_whole(found, loaded),
    of_base=lambda found: _is_of_base(found, loaded),
    num_layers=loaded.config.num_layers,
  )
  tenants.check(loaded.base, params, str(directory))
  return params
