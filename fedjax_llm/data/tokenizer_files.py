"""Reads and checks the files of a pretrained tokenizer."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjax_llm import reading
from fedjax_llm.data import rendering
from fedjax_llm.types import Error

_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')

_TOKEN = reading.optional(
  reading.text(1000), reading.mapped(reading.anything())
)
_TEMPLATE = reading.text(rendering.LIMITS.template)
# The schema of tokenizer_config.json.
_SCHEMA: reading.Schema = {
  **{
    f'{role}_token': _TOKEN
    for role in ('bos', 'eos', 'pad', 'unk', 'sep', 'cls', 'mask')
  },
  **{
    name: reading.optional(reading.boolean())
    for name in (
      *('add_bos_token', 'add_eos_token', 'add_prefix_space'),
      *('clean_up_tokenization_spaces', 'do_lower_case', 'legacy'),
      'split_special_tokens',
    )
  },
  'added_tokens_decoder': reading.optional(
    reading.mapped(reading.mapped(reading.anything()))
  ),
  'auto_map': reading.optional(
    reading.listed(reading.anything()), reading.mapped(reading.anything())
  ),
  'chat_template': reading.optional(
    _TEMPLATE,
    reading.mapped(_TEMPLATE),
    reading.listed(reading.mapped(_TEMPLATE)),
  ),
  'model_max_length': reading.optional(reading.number(above=0)),
  'padding_side': reading.optional(reading.one_of('left', 'right')),
  'tokenizer_class': reading.optional(reading.text(200)),
  'truncation_side': reading.optional(reading.one_of('left', 'right')),
}

# Settings of tokenizer_config.json, and fields of tokenizer.json they change.
_SETTINGS = {
  'add_prefix_space': 'add_prefix_space',
  'do_lower_case': 'lowercase',
  'strip_accents': 'strip_accents',
  'tokenize_chinese_chars': 'handle_chinese_chars',
}


class Loaded(NamedTuple):
  """A tokenizer of transformers with its special tokens and template.

  `guarded(f)` is `f` with exceptions turned into `Error`s that name this
  tokenizer; `render` is its chat template, None if it has none; `begin` are the
  ids that it puts before a text.
  """

  tokenizer: Any
  guarded: Callable[[Callable[..., Any]], Callable[..., Any]]
  render: rendering.Renderer | None
  begin: tuple[int, ...]
  eos_id: int
  pad_id: int
  special: Mapping[str, int]


def load(where: str) -> Loaded:
  """Reads the tokenizer of a directory, or of a name on the hub.

  Raises:
    Error: no directory, no files of a tokenizer, a file that is damaged or has
      invalid values, a tokenizer that needs its own code, or one without an end
      token.
  """
  settings: dict[str, Any] = {}
  if os.path.isdir(where):
    if not any(os.path.exists(os.path.join(where, f)) for f in _FILES):
      raise Error(
        f'{where}: no tokenizer in this directory; it needs one of '
        f'{", ".join(_FILES)}.'
      )
    settings = _checked(pathlib.Path(where))
  elif os.path.isabs(where) or where.startswith('.'):
    raise Error(f'{where}: there is no such directory.')
  guarded = functools.partial(_guarded, where)
  tokenizer = _transformers(where)
  file = _own_file(where)
  if file is not None:
    guarded(_as_its_file)(tokenizer, file, settings)
  eos = tokenizer.eos_token_id
  eos = tokenizer.sep_token_id if eos is None else eos
  if eos is None:
    raise Error(f'{where}: the tokenizer has no end-of-text token (eos_token).')
  pad = tokenizer.pad_token_id
  render = None
  if tokenizer.chat_template:
    render = rendering.renderer(
      guarded(tokenizer.get_chat_template)(),
      tokenizer.special_tokens_map,
      where,
    )
  return Loaded(
    tokenizer=tokenizer,
    guarded=guarded,
    render=render,
    begin=guarded(_begin)(tokenizer),
    eos_id=eos,
    pad_id=eos if pad is None else pad,
    special=guarded(_special)(tokenizer),
  )


def _checked(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the settings of tokenizer_config.json and checks all files."""
  settings: dict[str, Any] = {}
  file = directory / 'tokenizer_config.json'
  if file.is_file():
    settings = reading.read(file, _SCHEMA)
    templates = settings.get('chat_template')
    if isinstance(templates, list):
      names = [template.get('name') for template in templates]
      if not all('template' in template for template in templates):
        raise Error(
          f'{file}: chat_template is a list, and each of its entries must have '
          "a 'name' and a 'template'."
        )
      templates = dict.fromkeys(map(str, names))
    if isinstance(templates, dict) and 'default' not in templates:
      raise Error(
        f"{file}: chat_template has no template called 'default'; it has "
        f'{", ".join(templates) or "none"}.'
      )
  for name in ('special_tokens_map.json', 'added_tokens.json'):
    if (directory / name).is_file():
      reading.read(directory / name)
  for file in directory.glob('chat_template*'):
    limit = rendering.LIMITS.template
    if file.is_file() and file.stat().st_size > 4 * limit:
      raise Error(
        f'{file} is no chat template of at most {limit:,} characters.'
      )
  return settings


def _transformers(where: str) -> Any:
  # Hides the library's advice on import to install an unneeded framework.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    from transformers import AutoTokenizer
  except ImportError:
    raise Error(
      'the package `transformers` is not installed; `pip install '
      'transformers`, or use the tokenizer bytes.'
    ) from None
  try:
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
  except BaseException as error:  # library and network raise many types
    if not _is_failure(error):
      raise
    if 'trust_remote_code' in str(error):
      raise Error(
        f'the tokenizer {where!r} wants to run Python code that came with it '
        '(auto_map), which is never done here; it needs a tokenizer.json and a '
        'tokenizer_class of transformers.'
      ) from error
    raise Error(
      f'the tokenizer {where!r} cannot be loaded: {_reason(error)}'
    ) from error


def _guarded(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a function: its exceptions become `Error`s that name `where`."""

  @functools.wraps(function)
  def call(*args, **kwargs):
    try:
      return function(*args, **kwargs)
    except BaseException as error:
      if isinstance(error, Error) or not _is_failure(error):
        raise
      raise Error(
        f'the tokenizer {where!r} cannot read or write this: {_reason(error)}'
      ) from error

  return call


def _is_failure(error: BaseException) -> bool:
  # A panic of the tokenizers library is no Exception.
  return isinstance(error, Exception) or (
    type(error).__name__ == 'PanicException'
  )


def _reason(error: BaseException) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def _own_file(where: str) -> str | None:
  """Returns the path of tokenizer.json, None if there is none."""
  if os.path.isdir(where):
    file = os.path.join(where, 'tokenizer.json')
    return file if os.path.isfile(file) else None
  from transformers.utils import cached_file

  try:
    return cached_file(where, 'tokenizer.json')
  except Exception:  # the hub has no such file, or cannot be reached
    return None


def _as_its_file(
  tokenizer: Any, file: str, settings: Mapping[str, Any]
) -> None:
  """Makes a tokenizer split texts as its tokenizer.json defines.

  transformers rebuilds some tokenizers from their class, with the parts of the
  class instead of those of the file.

  Raises:
    Error: transformers gives a token another number than the file.
  """
  if not tokenizer.is_fast:
    return
  import tokenizers

  own = tokenizers.Tokenizer.from_file(file)
  made = tokenizer.backend_tokenizer
  for part in ('normalizer', 'pre_tokenizer', 'decoder', 'model'):
    if _state(getattr(own, part), settings) != _state(
      getattr(made, part), settings
    ):
      setattr(made, part, getattr(own, part))
  for number, token in own.get_added_tokens_decoder().items():
    if made.token_to_id(token.content) != number:
      raise Error(
        f'{file} gives the token {token.content!r} the number {number}, but '
        f'transformers reads it as {made.token_to_id(token.content)}.'
      )


def _state(part: Any, settings: Mapping[str, Any]) -> Any:
  """Returns the state of a tokenizer's part without fields of `settings`."""
  if part is None:
    return None
  state = part.__getstate__()
  if len(state) > 10_000:  # a vocabulary
    return state
  apart = {field for name, field in _SETTINGS.items() if name in settings}

  def without(value):
    if isinstance(value, dict):
      return {k: without(v) for k, v in value.items() if k not in apart}
    return [without(v) for v in value] if isinstance(value, list) else value

  return without(json.loads(state))


def _begin(tokenizer: Any) -> tuple[int, ...]:
  """Returns the ids that the tokenizer puts before a text by itself."""
  whole = tokenizer.encode('a', verbose=False)
  alone = tokenizer.encode('a', add_special_tokens=False, verbose=False)
  if tokenizer.cls_token_id is not None and tokenizer.cls_token_id in whole:
    # An encoder frames its texts (`whole`); a decoder may begin them with bos.
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and whole[:1] == [bos] else ()
  for lead in range(len(whole) - len(alone) + 1):
    if whole[lead : lead + len(alone)] == alone:
      return tuple(whole[:lead])
  return ()


def _special(tokenizer: Any) -> dict[str, int]:
  """Returns the ids of the special and added tokens by their texts."""
  special = dict(tokenizer.get_added_vocab())
  for text in tokenizer.all_special_tokens:
    special[text] = tokenizer.convert_tokens_to_ids(text)
  return {text: number for text, number in special.items() if text.strip()}
