"""The cache of compiled programs on disk.

`keep` turns it on, so that a second start compiles only small programs.
"""

import os
import pathlib
import platform
import zlib

import jax

from fedjax_llm.types import Error

_FOLDER = 'jax_compilation_cache_dir'


def keep(setting: str | None) -> pathlib.Path | None:
  """Turns the cache on, before anything is compiled, and returns its folder.

  'auto' is `xla/` in the cache folder (FEDJAX_LLM_CACHE, or
  ~/.cache/fedjax_llm) with a part for every kind of machine, since programs for
  one CPU may not run on another. JAX's own settings (JAX_COMPILATION_CACHE_DIR)
  come first. `None` and '' leave it off.

  Raises:
    Error: the folder cannot be made.
  """
  if not setting or getattr(jax.config, _FOLDER):
    return None
  if setting == 'auto':
    cache = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
    folder = pathlib.Path(cache).expanduser() / 'xla' / machine()
  else:
    folder = pathlib.Path(setting).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise Error(
      f'compilation_cache: {folder} cannot be made: {error.strerror}; name '
      'another folder, or none.'
    ) from error
  jax.config.update(_FOLDER, str(folder))
  # Half a second to compile is worth a file.
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  return folder


def machine() -> str:
  """Returns the name of the processor kind and a checksum of its features."""
  kind = platform.machine() or 'unknown'
  try:
    with open('/proc/cpuinfo') as file:
      features = [x for x in file if x.startswith(('model name', 'flags'))][:2]
  except OSError:
    features = [platform.processor()]
  return f'{kind}-{zlib.crc32("".join(features).encode()):08x}'
