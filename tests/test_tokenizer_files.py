"""What is read from the files of a tokenizer, and what is refused."""

import json
import pathlib

import pytest

from fedjax_llm.data import tokenizers
from fedjax_llm.types import Error
from tests import tiny_tokenizers

hf = pytest.importorskip('tokenizers')


def edit(folder, name, **fields):
  file = pathlib.Path(folder) / name
  values = json.loads(file.read_text())
  for path, value in fields.items():
    *inner, last = path.split('__')
    node = values
    for part in inner:
      node = node[part]
    node[last] = value
  file.write_text(json.dumps(values))


@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'gpt2', None])
def test_texts_are_split_as_tokenizer_json_says(tmp_path, kind):
  """Also where the class of the model would split them otherwise."""
  digits = hf.pre_tokenizers.Sequence(
    [
      hf.pre_tokenizers.Split(hf.Regex(r'\p{N}{1,3}'), 'isolated'),
      hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  path = tiny_tokenizers.write(tmp_path / 'm', pre=digits)
  file = tmp_path / 'm' / 'tokenizer.json'
  values = json.loads(file.read_text())
  for pair in (('1', '2'), ('12', '3'), ('4', '5')):
    values['model']['merges'].append(list(pair))
    values['model']['vocab'][''.join(pair)] = 260 + len(
      values['model']['vocab']
    )
  values['model']['vocab'] = {
    token: i for i, token in enumerate(values['model']['vocab'])
  }
  for i, token in enumerate(values['added_tokens']):
    token['id'] = len(values['model']['vocab']) + i
  values['normalizer'] = {'type': 'Replace', 'pattern': {'String': 'q'},
                          'content': 'k'}  # fmt: skip
  file.write_text(json.dumps(values))
  if kind is not None:
    (tmp_path / 'm' / 'config.json').write_text(
      json.dumps({'model_type': kind})
    )
  own = hf.Tokenizer.from_file(str(file))
  ours = tokenizers.pretrained(path)
  for text in ('In 2023 there were 12345 of them', ' quick', '<|im_end|>9 é€'):
    assert ours.encode(text) == own.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == own.decode(own.encode(text).ids)


def test_what_begins_a_text_is_found_whatever_it_is_called(tmp_path):
  plain = tokenizers.pretrained(tiny_tokenizers.write(tmp_path / 'plain'))
  assert plain.bos_id is None and tokenizers.start(plain) == []
  path = tiny_tokenizers.write(tmp_path / 'bos', begins=True)
  assert tokenizers.start(tokenizers.pretrained(path)) == [256]
  edit(path, 'tokenizer_config.json', bos_token=None)
  assert tokenizers.start(tokenizers.pretrained(path)) == [256]
  two = [{'SpecialToken': {'id': x, 'type_id': 0}} for x in ('<bos>', '<pad>')]
  edit(
    path,
    'tokenizer.json',
    post_processor__single=[*two, {'Sequence': {'id': 'A', 'type_id': 0}}],
    post_processor__special_tokens={
      x: {'id': x, 'ids': [i], 'tokens': [x]}
      for x, i in (('<bos>', 256), ('<pad>', 259))
    },
  )
  assert tokenizers.start(tokenizers.pretrained(path)) == [256, 259]


CONFIG = 'tokenizer_config.json'


@pytest.mark.parametrize(
  ('file', 'field', 'value', 'message'),
  [
    (CONFIG, 'chat_template', 5, 'chat_template is 5, but must be a string'),
    (CONFIG, 'chat_template', [], "no template called 'default'; it has none"),
    (CONFIG, 'chat_template', {'a': 'b'}, "called 'default'; it has a"),
    (CONFIG, 'chat_template', [{'name': 'x'}], "a 'name' and a 'template'"),
    (CONFIG, 'chat_template', 'x' * 1_000_001, 'of at most 1,000,000 charact'),
    (CONFIG, 'model_max_length', [], 'model_max_length is .., but must be a f'),
    (CONFIG, 'model_max_length', -1, 'must be a finite number above 0'),
    (CONFIG, 'bos_token', 7, 'bos_token is 7, but must be a string'),
    (
      CONFIG,
      'add_bos_token',
      'yes',
      "add_bos_token is 'yes', but must be",
    ),
    (CONFIG, 'padding_side', 'up', "must be one of 'left', 'right' or null"),
    (CONFIG, 'added_tokens_decoder', {'1': 2}, 'added_tokens_decoder is'),
    (CONFIG, 'tokenizer_class', {}, 'tokenizer_class is {}, but must be a str'),
    ('tokenizer.json', 'model__type', 'x', 'cannot be loaded'),
    ('tokenizer.json', 'model__vocab', 3, 'cannot be loaded'),
    ('tokenizer.json', 'added_tokens', 3, 'cannot be loaded'),
  ],
)
def test_a_value_that_no_tokenizer_has_is_named(
  tmp_path, file, field, value, message
):
  path = tiny_tokenizers.write(tmp_path / 'm')
  edit(path, file, **{field: value})
  with pytest.raises(Error, match=message):
    tokenizers.pretrained(path)


def test_a_text_that_cannot_be_split_is_an_error_and_no_traceback(tmp_path):
  path = tiny_tokenizers.write(tmp_path / 'm')
  edit(
    path,
    'tokenizer.json',
    model={'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'x'},
    added_tokens=[],
  )
  edit(path, CONFIG, eos_token='a', bos_token=None, pad_token=None)
  tokenizer = tokenizers.pretrained(path)
  with pytest.raises(Error, match='cannot read or write this: Exception: Word'):
    tokenizer.encode('b')
  with pytest.raises(Error, match='cannot read or write this'):
    tokenizer.whole('b', None, 8)  # type: ignore


@pytest.mark.parametrize('content', [b'[1]', b'{', b'\xff', b'[' * 100_000])
def test_files_that_hold_no_object_are_named(tmp_path, content):
  path = tiny_tokenizers.write(tmp_path / 'm')
  (tmp_path / 'm' / CONFIG).write_bytes(content)
  with pytest.raises(Error, match=CONFIG):
    tokenizers.pretrained(path)


def test_code_that_came_with_a_tokenizer_is_never_run(tmp_path, monkeypatch):
  path = tiny_tokenizers.write(tmp_path / 'm')
  edit(
    path,
    CONFIG,
    auto_map={'AutoTokenizer': [None, 'evil.Tok']},
    tokenizer_class='Tok',
  )
  (tmp_path / 'm' / 'evil.py').write_text(
    f'open({str(tmp_path / "ran")!r}, "w")'
  )
  monkeypatch.setattr('builtins.input', lambda *_: 'y')
  with pytest.raises(Error, match='run Python code that came with it'):
    tokenizers.pretrained(path)
  assert not (tmp_path / 'ran').exists()


def test_numbers_of_added_tokens_are_those_of_the_file(tmp_path):
  path = tiny_tokenizers.write(tmp_path / 'm')
  edit(
    path,
    CONFIG,
    added_tokens_decoder={
      str(i): {'content': text, 'special': True}
      for i, text in enumerate(('<|im_end|>', '<|im_start|>', '<pad>'), 256)
    },
  )
  own = hf.Tokenizer.from_file(str(tmp_path / 'm' / 'tokenizer.json'))
  try:
    tokenizer = tokenizers.pretrained(path)
  except Error as error:
    assert 'the number' in str(error)
  else:
    assert tokenizer.encode('<|im_end|>') == own.encode('<|im_end|>').ids
