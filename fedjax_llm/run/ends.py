"""The tokens that end a reply: of the model, its tokenizer and its template.

`ends` returns their ids, and `hand_on` writes them for other tools.
"""

import json
import pathlib
from typing import Any

from fedjax_llm import reading
from fedjax_llm.data import chat
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.models import LoadedModel

GENERATION = 'generation_config.json'

_IDS = reading.integer(0)
_SCHEMA = {'eos_token_id': reading.optional(_IDS, reading.listed(_IDS))}


def ends(
  loaded: LoadedModel, tokenizer: Tokenizer, template: Any = None
) -> tuple[int, ...]:
  """Returns the ids of all tokens that end a reply, sorted.

  These are the end tokens of the tokenizer, of config.json and of
  generation_config.json; and, for replies in the tokenizer's own chat template,
  the token with which the template ends a turn.

  Args:
    loaded: the model.
    tokenizer: its tokenizer.
    template: the template of the replies, as in `data.text.encode`.

  Raises:
    Error: generation_config.json is damaged.

  >>> from fedjax_llm import data, models
  >>> loaded = models.random(vocab_size=259, eos_ids=(7,))
  >>> ends(loaded, data.tokenizers.bytes())
  (7, 258)
  """
  ids = {tokenizer.eos_id, *loaded.config.eos_ids}
  ids |= set(_generation(loaded.directory))
  mark = chat.end_mark(tokenizer) if template == 'chat' else ''
  if mark:
    ids.add(tokenizer.special[mark])
  return tuple(sorted(ids))


def _generation(directory: pathlib.Path | None) -> list[int]:
  file = None if directory is None else directory / GENERATION
  if file is None or not file.is_file():
    return []
  ids = reading.read(file, _SCHEMA).get('eos_token_id')
  return [] if ids is None else ids if isinstance(ids, list) else [ids]


def hand_on(
  folder: pathlib.Path, loaded: LoadedModel, tokenizer: Tokenizer, template: Any
) -> None:
  """Writes generation_config.json, so that other tools end replies alike.

  The other fields of the model's own file are kept; nothing is written where
  the model's files name all of these tokens already.
  """
  ids = ends(loaded, tokenizer, template)
  if set(ids) <= set(_generation(loaded.directory) or loaded.config.eos_ids):
    return
  values: dict[str, Any] = {}
  own = None if loaded.directory is None else loaded.directory / GENERATION
  if own is not None and own.is_file():
    values = reading.read(own, _SCHEMA)
  values['eos_token_id'] = ids[0] if len(ids) == 1 else list(ids)
  text = json.dumps(values, indent=2)
  (folder / GENERATION).write_text(f'{text}\n', encoding='utf-8')
