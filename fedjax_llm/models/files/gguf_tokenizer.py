"""Converts the tokenizer of a GGUF file to Hugging Face files."""

from collections.abc import Mapping
from typing import Any

# Regular expression that splits text before the merges for 'llama-bpe', and the
# supported values of `tokenizer.ggml.pre`.
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_PRE_TOKENIZERS = ('gpt-2', 'llama-bpe', 'smollm')

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types


def tokenizer_of(
  fields: Any, config: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Returns the tokenizer, its config, and the generation config."""
  import tokenizers

  get = lambda name, *default: fields.get(f'tokenizer.ggml.{name}', *default)
  if get('model') != 'gpt2':
    raise fields.refuse(
      f'tokenizer.ggml.model {get("model")!r} is not supported; supported is: '
      'gpt2 (byte-level BPE).'
    )
  kind = get('pre', 'default')
  if kind not in _PRE_TOKENIZERS:
    raise fields.refuse(
      f'tokenizer.ggml.pre {kind!r} is not supported; supported are: '
      f'{", ".join(_PRE_TOKENIZERS)}.'
    )
  llama3 = kind == 'llama-bpe'
  tokens, types = get('tokens'), get('token_type')
  if len(tokens) != len(types) or len(tokens) > config['vocab_size']:
    raise fields.refuse(
      f'{len(tokens)} tokens with {len(types)} types do not fit the '
      f'{config["vocab_size"]} rows of the embedding.'
    )
  if len(set(tokens)) != len(tokens):
    raise fields.refuse('tokenizer.ggml.tokens names a token twice.')

  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(' ')) for merge in get('merges')],
      ignore_merges=llama3,
    )
  )
  byte_level = lambda use_regex: tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=bool(get('add_space_prefix', False)), use_regex=use_regex
  )
  if llama3:
    split = tokenizers.pre_tokenizers.Split(
      tokenizers.Regex(_LLAMA3_SPLIT), 'isolated'
    )
    parts = [split, byte_level(False)]
  elif kind == 'smollm':
    parts = [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      byte_level(True),
    ]
  else:
    parts = [byte_level(True)]
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  for token, token_type in zip(tokens, types):
    special = token_type in (_CONTROL, _UNKNOWN)
    if special or token_type == _USER_DEFINED:
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(
        [added]
      )

  names = {
    name: get(f'{key}_token_id', None)
    for name, key in [
      ('bos_token', 'bos'),
      ('eos_token', 'eos'),
      ('pad_token', 'padding'),
      ('unk_token', 'unknown'),
    ]
  }
  ids = {name: i for name, i in names.items() if i is not None}
  _add_ends(
    tokenizer,
    bos=tokens[ids['bos_token']] if get('add_bos_token', llama3) else None,
    eos=tokens[ids['eos_token']] if get('add_eos_token', False) else None,
  )
  tokenizer_config = {
    'add_prefix_space': bool(get('add_space_prefix', False)),
    'clean_up_tokenization_spaces': False,
    'model_max_length': config['max_position_embeddings'],
    # This class loads tokenizer.json unchanged; specific classes rebuild it.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    **{name: tokens[i] for name, i in ids.items()},
  }
  template = fields.get('tokenizer.chat_template', None)
  if template is not None:
    tokenizer_config['chat_template'] = template
  generation = {
    name: config[name]
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')
    if config[name] is not None
  }
  return tokenizer, tokenizer_config, generation


def _add_ends(tokenizer: Any, bos: str | None, eos: str | None) -> None:
  """Makes every encoded text start with `bos` and end with `eos`."""
  import tokenizers

  specials = [t for t in (bos, eos) if t is not None]
  byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
  if not specials:
    tokenizer.post_processor = byte_level
    return
  single = [*([bos] if bos else []), '$A', *([eos] if eos else [])]
  pair = [*single, *(part.replace('$A', '$B') + ':1' for part in single)]
  tokenizer.post_processor = tokenizers.processors.Sequence(
    [
      byte_level,
      tokenizers.processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in specials],
      ),
    ]
  )
