"""Directories with a tokenizer of single bytes, written in no time."""

import json

SPECIAL = ('<bos>', '<|im_start|>', '<|im_end|>', '<pad>')

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder, template=None, *, begins=False, pre=None, **settings):
  """Writes tokenizer.json and tokenizer_config.json; returns the path.

  Tokens 0 to 255 are the bytes, then `SPECIAL`. With `begins` the tokenizer
  puts <bos> in front of a text.
  """
  import tokenizers as hf

  letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate(letters)}
  tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre or hf.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = hf.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIAL))
  if begins:
    tokenizer.post_processor = hf.processors.TemplateProcessing(
      single='<bos> $A', special_tokens=[('<bos>', len(letters))]
    )
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<bos>',
    'eos_token': '<|im_end|>',
    'pad_token': '<pad>',
    **settings,
  }
  if template is not None:
    config['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return str(folder)
