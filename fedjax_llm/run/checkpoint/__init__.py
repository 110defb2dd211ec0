"""Checkpoints of the server: orbax arrays, a JSON of the rest, checksums.

    DIR/round_00000012/state/         the leaves of the state, written by orbax
    DIR/round_00000012/state_1/       the leaves of another writer, a file each
    DIR/round_00000012/meta.json      other values of the program, as JSON
    DIR/round_00000012/manifest.json  the leaves, and SHA-256 of every file

A checkpoint is written into a directory of another name and renamed to round_*
when all of it is on the disk; directories of other names are incomplete and are
removed. The manifest shows whether a checkpoint was changed since; a damaged
one is named in a notice, and the one before it is used.
"""

from fedjax_llm.run.checkpoint.directory import Checkpointer, Restored, open
from fedjax_llm.run.checkpoint.leaves import Writers

__all__ = ['Checkpointer', 'Restored', 'Writers', 'open']
