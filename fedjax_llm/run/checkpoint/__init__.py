"""Checkpoints of the server: orbax arrays, a JSON of the rest, checksums.

    DIR/round_00000012/state/         the leaves of the state, written by orbax
    DIR/round_00000012/state_1/       those of another writer, a file each
    DIR/round_00000012/meta.json      what else the program wants to know
    DIR/round_00000012/manifest.json  the leaves, and SHA-256 of every file

A checkpoint is written into a directory of another name and renamed when all of
it is on the disk: what is not called round_* never counted and is removed. The
manifest tells whether a checkpoint is still what was written; one that is not
is named and the one before it is used.
"""

from fedjax_llm.run.checkpoint.directory import Checkpointer, Restored, open
from fedjax_llm.run.checkpoint.leaves import Writers

__all__ = ['Checkpointer', 'Restored', 'Writers', 'open']
