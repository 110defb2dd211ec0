"""The tokens that end a reply, and who is told of them."""

import json
import shutil

import pytest

from fedjax_llm import data, ends, models
from fedjax_llm.types import Error
from tests import tiny_tokenizers

BYTES = data.tokenizers.bytes()


@pytest.fixture
def loaded(tmp_path):
  made = models.random(vocab_size=260, eos_ids=(9,), num_layers=1)
  return made._replace(directory=tmp_path)


@pytest.mark.parametrize(
  ('named', 'more'), [(None, []), (7, [7]), ([7, 8], [7, 8])]
)
def test_model_tokenizer_and_generation_end_a_reply(loaded, named, more):
  (loaded.directory / ends.GENERATION).write_text(
    json.dumps({'eos_token_id': named})
  )
  assert ends.ends(loaded, BYTES) == (*more, 9, 258)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[', 'is not valid JSON'),
    ('3', 'holds 3, but must hold a JSON object'),
    ('{"eos_token_id": "x"}', "eos_token_id is 'x', but must be an integer"),
    ('{"eos_token_id": [-1]}', 'eos_token_id is .-1., but must be an integer'),
    ('{"eos_token_id": true}', 'eos_token_id is True, but must be an integer'),
  ],
)
def test_a_damaged_generation_config_is_named(loaded, content, message):
  (loaded.directory / ends.GENERATION).write_text(content)
  with pytest.raises(Error, match=f'{ends.GENERATION}.*{message}'):
    ends.ends(loaded, BYTES)


def test_the_mark_of_a_chat_template_ends_the_replies_of_chats(
  loaded, tmp_path
):
  template = tiny_tokenizers.CHATML.replace('<|im_end|>', '<pad>')
  path = tiny_tokenizers.write(tmp_path / 'tokenizer', template)
  tokenizer = data.tokenizers.pretrained(path)
  assert ends.ends(loaded, tokenizer) == (9, 258)
  assert ends.ends(loaded, tokenizer, 'alpaca') == (9, 258)
  assert ends.ends(loaded, tokenizer, 'chat') == (9, 258, 259)


def test_other_tools_are_told_what_ends_a_reply(loaded, tmp_path):
  template = tiny_tokenizers.CHATML.replace('<|im_end|>', '<pad>')
  path = tiny_tokenizers.write(tmp_path / 'tokenizer', template)
  tokenizer = data.tokenizers.pretrained(path)
  own = loaded.directory / ends.GENERATION
  own.write_text('{"eos_token_id": 9, "top_p": 0.5}')
  out = tmp_path / 'out'
  out.mkdir()
  ends.hand_on(out, loaded, tokenizer, 'chat')
  written = json.loads((out / ends.GENERATION).read_text())
  assert written == {'eos_token_id': [9, 258, 259], 'top_p': 0.5}
  # Nothing has to be told where the model's own file names them all.
  shutil.move(out / ends.GENERATION, own)
  ends.hand_on(out, loaded, tokenizer, 'chat')
  assert not list(out.iterdir())
