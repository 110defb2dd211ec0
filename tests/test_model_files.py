"""config.json and weights of others: values in range, files as they are."""

import json
import pathlib
import shutil

import pytest

from fedjax_llm import data, models
from fedjax_llm.models import families
from fedjax_llm.models.files import gguf
from fedjax_llm.types import Error

MODELS = pathlib.Path(__file__).parent / 'golden' / 'models'
NAN = float('nan')


def copy(name, tmp_path, **fields):
  """A folder with the config of this model and nothing else."""
  folder = tmp_path / 'm'
  folder.mkdir()
  config = json.loads((MODELS / name / 'config.json').read_text())
  for field, value in fields.items():
    node, (*inner, last) = config, field.split('__')
    for part in inner:
      node = node[part]
    node[last] = value
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize('name', sorted(p.name for p in MODELS.iterdir()))
def test_every_supported_config_follows_the_schema(name):
  assert families.read_config(MODELS / name).num_layers >= 1


@pytest.mark.parametrize(
  ('name', 'field', 'value', 'allowed'),
  [
    ('llama', 'rms_norm_eps', NAN, 'a finite number from 0 to 1'),
    ('llama', 'rms_norm_eps', -1, 'a finite number from 0 to 1'),
    ('bert_classifier', 'layer_norm_eps', 'x', 'a finite number from 0'),
    ('gpt2', 'layer_norm_epsilon', None, 'a finite number from 0'),
    ('llama', 'rope_parameters__rope_theta', -1.0, 'a finite number above 0'),
    ('llama', 'rope_parameters__rope_theta', 0, 'a finite number above 0'),
    ('llama', 'rope_parameters__rope_theta', 10**400, 'a finite number above'),
    ('llama', 'rope_parameters__rope_type', [], 'a string'),
    ('llama', 'rope_parameters', 5, 'an object'),
    ('llama_yarn', 'rope_parameters__factor', NAN, 'a finite number above 0'),
    ('gemma3', 'rope_parameters__full_attention', 3, 'an object'),
    ('phi3_longrope', 'rope_parameters__long_factor', [0, 1, 2], 'a list'),
    ('phi3_longrope', 'rope_parameters__partial_rotary_factor', 2, 'a finite'),
    ('qwen2_windows', 'sliding_window', -1, 'an integer from 0'),
    ('qwen2_windows', 'layer_types', [1, 2], 'a list'),
    ('gemma2', 'attn_logit_softcapping', NAN, 'a finite number above 0'),
    ('gemma2', 'final_logit_softcapping', -2, 'a finite number above 0'),
    ('gemma2', 'query_pre_attn_scalar', 0, 'a finite number above 0'),
    ('llama', 'architectures', 3, 'a list'),
    ('llama', 'model_type', [], 'a string'),
    ('llama', 'num_key_value_heads', 0, 'an integer from 1'),
    ('llama', 'num_attention_heads', 0, 'an integer from 1'),
    ('llama', 'num_attention_heads', 4.0, 'an integer from 1'),
    ('llama', 'num_hidden_layers', 10**9, 'an integer from 1 to 10000'),
    ('llama', 'vocab_size', '97', 'an integer from 1'),
    ('llama', 'hidden_size', True, 'an integer from 1'),
    ('llama', 'head_dim', -8, 'an integer from 1'),
    ('gpt2', 'n_layer', 0, 'an integer from 1'),
    ('gpt2', 'n_positions', None, 'an integer from 1'),
    ('llama', 'eos_token_id', 'x', 'an integer'),
    ('llama', 'eos_token_id', [2, None], 'an integer'),
    ('llama', 'hidden_act', 7, 'a string'),
    ('llama', 'tie_word_embeddings', 'no', 'true or false'),
    ('bert_classifier', 'id2label', ['a'], 'an object'),
    ('smollm3', 'no_rope_layers', [2, 0], 'a list'),
  ],
)
def test_a_value_outside_its_range_is_named(
  tmp_path, name, field, value, allowed
):
  folder = copy(name, tmp_path, **{field: value})
  with pytest.raises(Error, match=rf'must be .*{allowed}') as caught:
    families.read_config(folder)
  text = str(caught.value)
  assert text.startswith(f'{folder}/config.json: ')
  assert field.split('__')[0] in text
  assert field.split('__')[-1] in text or isinstance(value, int)


@pytest.mark.parametrize('content', [b'{', b'[]', b'\xff', b'[' * 100_000])
def test_a_config_that_is_no_object_is_named(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(Error, match=r'config\.json'):
    families.read_config(tmp_path)


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path):
  (tmp_path / 'adapter_config.json').write_text('{}')
  with pytest.raises(Error, match='It is an adapter of PEFT: name the model'):
    models.pretrained(tmp_path)
  (tmp_path / 'adapter_config.json').unlink()
  (tmp_path / 'x.gguf').touch()
  with pytest.raises(Error, match=r'It holds x\.gguf: fedjax_llm\.models\.ggu'):
    models.pretrained(tmp_path)


def test_a_pointer_to_weights_is_no_weights(tmp_path):
  folder = copy('llama', tmp_path)
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
  (folder / 'model.safetensors').write_text(pointer)
  with pytest.raises(Error, match=r'model\.safetensors is a Git LFS pointer'):
    models.pretrained(folder)


def test_an_index_names_files_of_its_own_folder(tmp_path):
  folder = copy('llama', tmp_path)
  shutil.copy(MODELS / 'llama' / 'model.safetensors', tmp_path)
  index = folder / 'model.safetensors.index.json'
  index.write_text('{"weight_map": {"x": "../model.safetensors"}}')
  with pytest.raises(Error, match='which is no file beside it'):
    models.pretrained(folder)


def test_parts_of_a_gguf_model_are_to_be_joined(tmp_path):
  with pytest.raises(Error, match='is part 2 of 3 of a model: join the parts'):
    gguf.convert(tmp_path / 'x-00002-of-00003.gguf', tmp_path)


def test_what_a_script_fetches_is_said_with_its_name(tmp_path):
  with pytest.raises(Error, match='scripts/fetch_smollm2 fetches it'):
    models.pretrained(tmp_path / 'SmolLM2-135M-Instruct')
  with pytest.raises(Error, match='scripts/fetch_chitchat fetches it'):
    data.jsonl(str(tmp_path / 'chitchat.jsonl.gz'), None, text_key='x')
