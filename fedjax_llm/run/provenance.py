"""The origin of a result: code, packages, config, seed, data and hardware.

`of` returns it as values for JSON; a run keeps it in provenance.json.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

PACKAGE = pathlib.Path(__file__).parents[1]
PACKAGES = (
  *('fedjax_llm', 'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scipy'),
  *('transformers', 'datasets', 'safetensors', 'lm_eval', 'sacrebleu'),
  *('rouge-score',),
)


def of(conf: Mapping[str, Any], **more: Any) -> dict[str, Any]:
  """Returns the origin of what a resolved config computes, now and here.

  Args:
    conf: the resolved config; its digest is in the result, and its seed.
    more: further entries, such as the checksum of the data, the numbers of
      examples and the versions of tasks.

  >>> made = of({'seed': 3, 'num_rounds': 1}, data='ab')
  >>> made['seed'], made['data'], len(made['config'])
  (3, 'ab', 64)
  """
  return {
    'config': digest(conf),
    'seed': conf.get('seed', 0),
    'code': code(),
    'versions': versions(),
    'hardware': hardware(),
    **more,
  }


def started(
  earlier: str | None, done: int, conf: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
  """Returns the content of provenance.json at a start of a run.

  `starts` has the origin of every start after which something had changed, with
  the round after which it began; the last one is that of what is written now.

  Args:
    earlier: the text of the file from the starts before, None without one.
    done: the rounds that are done.
    conf: the resolved config.
    more: further entries of this start: see `of`.

  >>> one = started(None, 0, {'seed': 1})
  >>> [start['round'] for start in one['starts']]
  [0]
  >>> started(json.dumps(one), 2, {'seed': 1}) == one  # nothing has changed
  True
  """
  now = {'round': done, **of(conf, **more)}
  try:
    starts = json.loads(earlier or '{}')['starts']
    starts = [one for one in starts if one['round'] <= done]
  except (ValueError, KeyError, TypeError):  # damaged: it begins again
    starts = []
  plain = json.loads(json.dumps(now, default=str))
  if starts and {**starts[-1], 'round': done} == plain:
    return {'starts': starts}
  return {'starts': [*starts, plain]}


def digest(conf: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of a config as sorted JSON, without where it ran.

  The sections `hosts` and `tracking` do not count.

  >>> digest({'a': 1, 'hosts': {'num': 2}}) == digest({'a': 1})
  True
  """
  kept = {k: v for k, v in conf.items() if k not in ('hosts', 'tracking')}
  text = json.dumps(kept, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code(folder: pathlib.Path = PACKAGE) -> dict[str, Any]:
  """Returns the commit of the code, and whether files differ from it.

  Both are None where the package is in no git repository.
  """

  def git(*words: str) -> str | None:
    try:
      done = subprocess.run(
        ['git', '-C', str(folder), *words],
        capture_output=True,
        text=True,
        timeout=20,
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  # A package that is installed inside of another repository is not its code.
  if not git('ls-files', '--', '__init__.py'):
    return {'commit': None, 'changed': None}
  changes = git('status', '--porcelain', '--untracked-files=no', '--', '.')
  changed = None if changes is None else bool(changes)
  return {'commit': git('rev-parse', 'HEAD'), 'changed': changed}


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that are installed.

  >>> {'python', 'jax', 'numpy'} <= set(versions())
  True
  """
  result = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      result[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return result


def hardware() -> dict[str, Any]:
  """Returns the devices of JAX, and the machine.

  >>> sorted(hardware())[:4]
  ['cores', 'devices', 'machine', 'memory_gb']
  """
  devices = jax.devices()
  kinds = [device.device_kind for device in devices]
  try:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
  except (AttributeError, OSError, ValueError):
    memory = None
  return {
    'platform': devices[0].platform,
    'devices': {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    'processes': jax.process_count(),
    'machine': platform.machine(),
    'system': platform.system(),
    'cores': os.cpu_count(),
    'memory_gb': None if memory is None else round(memory, 1),
  }
