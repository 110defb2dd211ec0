"""The bytes of the tokens of a Hugging Face tokenizer.

`of` undoes the three ways in which vocabularies are written.
"""

import re
from collections.abc import Sequence
from typing import Any


def of(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
  """Returns the bytes that each token stands for, of a fast tokenizer.

  Byte-level vocabularies (GPT-2, Llama 3) write a byte as a character,
  WordPiece (BERT) marks tokens inside of a word by '##', SentencePiece (Llama
  2) writes a space as U+2581 and single bytes as <0x0A>.

  >>> class Words:
  ...   def convert_ids_to_tokens(self, ids):
  ...     return [['\\u2581to', '<0x0A>', 'be'][i] for i in ids]
  >>> of(Words(), [0, 1, 2])
  [b' to', b'\\n', b'be']
  """
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  kind = type(getattr(backend, 'decoder', None)).__name__
  read = {'ByteLevel': _byte_level, 'WordPiece': _word_piece}.get(kind, _plain)
  # Ids beyond the vocabulary have no token.
  return [read(x or '') for x in tokenizer.convert_ids_to_tokens(list(ids))]


def _alphabet() -> dict[str, int]:
  """Returns the byte of each character of a byte-level vocabulary.

  Printable characters of Latin-1 stand for themselves, the other bytes in turn
  for those from U+0100 on.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
  return {chr(byte): byte for byte in plain} | shifted


_BYTES = _alphabet()


def _byte_level(token: str) -> bytes:
  if any(letter not in _BYTES for letter in token):
    return token.encode()  # an added token
  return bytes(_BYTES[letter] for letter in token)


def _word_piece(token: str) -> bytes:
  return token[2:].encode() if token.startswith('##') else f' {token}'.encode()


def _plain(token: str) -> bytes:
  if re.fullmatch(r'<0x[0-9A-F]{2}>', token):
    return bytes([int(token[3:5], 16)])
  return token.replace('\u2581', ' ').encode()
