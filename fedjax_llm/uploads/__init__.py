"""Uploads: the coding of messages between clients and server, and their bytes.

Builders return a `Codec`.
"""

from fedjax_llm.uploads.codecs import from_optax as from_optax
from fedjax_llm.uploads.codecs import identity as identity
from fedjax_llm.uploads.codecs import known as known
from fedjax_llm.uploads.seeds import nonzero as nonzero
from fedjax_llm.uploads.seeds import seeded as seeded
from fedjax_llm.uploads.sparse import top_k as top_k

__all__ = ['from_optax', 'identity', 'nonzero', 'seeded', 'top_k']
