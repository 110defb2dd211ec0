"""Shared set-up: a CPU, and programs that compile fast rather than run fast."""

import os

# Programs and references that tests use or run; with --doctest-modules every
# file would be imported.
collect_ignore = ['golden', 'multihost.py', 'sharded.py', 'toy.py']
collect_ignore_glob = ['references*.py']

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
# Test programs are tiny: most of their time would go into optimising them.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
)
