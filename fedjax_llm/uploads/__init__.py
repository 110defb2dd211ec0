"""Uploads: the coding of messages between clients and server, and their bytes.

Builders return a `Codec`.
"""

from fedjax_llm.uploads.codecs import from_optax as from_optax
from fedjax_llm.uploads.codecs import identity as identity
from fedjax_llm.uploads.codecs import known as known
from fedjax_llm.uploads.feedback import remembering as remembering
from fedjax_llm.uploads.low_rank import low_rank as low_rank
from fedjax_llm.uploads.quantised import quantised as quantised
from fedjax_llm.uploads.quantised import sign as sign
from fedjax_llm.uploads.secure import secure_sum as secure_sum
from fedjax_llm.uploads.seeds import nonzero as nonzero
from fedjax_llm.uploads.seeds import seeded as seeded
from fedjax_llm.uploads.sketches import count_sketch as count_sketch
from fedjax_llm.uploads.sparse import top_k as top_k

__all__ = [
  'count_sketch',
  'from_optax',
  'identity',
  'low_rank',
  'nonzero',
  'quantised',
  'secure_sum',
  'seeded',
  'sign',
  'top_k',
]
