"""Prompts, prefixes and (IA)3 as PEFT directories, against PEFT's own logits.

The golden files are those of tests/golden/make_prompts.py.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_llm import adapters, models, nodes
from fedjax_llm.adapters import peft
from fedjax_llm.models import families
from fedjax_llm.run import tasks, warm
from fedjax_llm.run.experiment import save_adapter
from fedjax_llm.types import Batch, Error

GOLDEN = pathlib.Path(__file__).parent / 'golden'
OF = {
  'prompt_tuning': 'llama',
  'prompt_tuning_gemma': 'gemma',
  'prompt_tuning_gpt2': 'gpt2',
  'prefix_tuning': 'llama',
  'prefix_tuning_gpt2': 'gpt2',
  'prefix_projection': 'llama',
  'p_tuning': 'llama',
  'p_tuning_lstm': 'llama',
  'ia3': 'llama',
  'ia3_gpt2': 'gpt2',
  'ia3_bert': 'bert_classifier',
}
BOTTLENECKS = ('bottleneck_houlsby', 'bottleneck_parallel')


@functools.cache
def loaded(name):
  return models.pretrained(GOLDEN / 'models' / name)


@functools.cache
def network(name):
  model, classifier = loaded(name).model, name.endswith('classifier')

  @jax.jit
  def run(base, params, tokens):
    ones = jnp.ones_like(tokens)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, ones > 0, ones, places)
    hidden = model.hidden(base, params, batch)
    return model.logits(base, params, hidden[:, 0] if classifier else hidden)

  return lambda base, params, tokens: np.asarray(
    run(base, params, jnp.asarray(tokens, jnp.int32))
  )


def golden(name):
  """The adapter of a directory, and the tokens and logits of PEFT."""
  folder = GOLDEN / 'adapters' / name
  values = np.load(folder / 'logits.npz')
  params = warm.load_adapter(folder, loaded(OF[name]))
  return params, values['tokens'], values


def files(folder):
  tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
  return json.loads((folder / peft.CONFIG).read_text()), tensors


def written(folder, params, name):
  task = tasks.classification() if 'classifier' in name else tasks.causal_lm()
  folder.mkdir(parents=True)
  save_adapter(
    *(folder, params, loaded(name), task),
    base_model=f'models/{name}',
    peft_fields={},
  )
  return files(folder)


@pytest.mark.parametrize('name', OF)
def test_the_adapter_of_peft_gives_the_logits_of_peft(name):
  params, tokens, values = golden(name)
  of = OF[name]
  got = network(of)(loaded(of).base, params, tokens)
  want = values['logits']  # of prompt rows too, before those of the text
  if want.ndim == 3:
    want = want[:, -tokens.shape[1] :]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  plain = network(of)(loaded(of).base, {}, tokens)
  assert np.abs(plain - want).max() > 0.3
  if name.startswith('ia3'):
    merged = adapters.merge(loaded(of).base, params)
    got = network(of)(merged, {}, tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', OF)
def test_what_peft_wrote_is_written_again_as_it_was(tmp_path, name):
  params, _, _ = golden(name)
  config, tensors = files(GOLDEN / 'adapters' / name)
  again, ours = written(tmp_path / name, params, OF[name])
  beside = {k for k in ours if k.endswith(('dense.weight', 'dense.bias'))}
  assert set(ours) - beside == set(tensors)  # a pooler is part of our head
  for key, value in tensors.items():
    np.testing.assert_allclose(ours[key], value, rtol=2e-7, atol=0)
  own = {'encoder_hidden_size', 'prefix_projection', 'fan_in_fan_out'}
  own |= {'target_modules', 'feedforward_modules', 'modules_to_save'}
  if config['peft_type'] == 'P_TUNING':  # a prompt without its encoder
    config['peft_type'] = 'PROMPT_TUNING'
  for field, value in config.items():
    if field in again and field not in own:
      assert again[field] == value, field
  if config['peft_type'] == 'IA3':
    inside = again['feedforward_modules']
    assert inside == sorted(n for n in again['target_modules'] if n in inside)
    assert inside and all(n.endswith(('down_proj', 'c_proj', 'dense'))
                          for n in inside)  # fmt: skip


def encoder_of(name):
  """The node that a golden encoder is, from the tensors of torch."""
  values = np.load(GOLDEN / 'adapters' / name / 'logits.npz')
  get = lambda key: jnp.asarray(values[key])
  affine = lambda key: nodes.Affine(get(f'{key}.weight').T, get(f'{key}.bias'))
  if name == 'prefix_projection':
    whole = affine('transform.2')
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], 2, -1), -2, 0)
    last = nodes.Affine(split(whole.kernel), split(whole.bias))
    rows, inner = get('embedding.weight'), affine('transform.0')
    return {'generator': nodes.Projected(rows, inner, last)}
  lstm = []
  for layer in range(2 if 'lstm' in name else 0):
    both = []
    for end in (f'l{layer}', f'l{layer}_reverse'):
      part = lambda kind, end=end: get(f'lstm_head.{kind}_{end}')
      bias = part('bias_ih') + part('bias_hh')
      both.append(
        nodes.Direction(part('weight_ih').T, part('weight_hh').T, bias)
      )
    lstm.append((both[0], both[1]))
  heads = sorted({k for k in values if k.startswith('mlp_head')})
  numbers = sorted({int(key.split('.')[1]) for key in heads})
  mlp = tuple(affine(f'mlp_head.{number}') for number in numbers)
  node = nodes.Encoded(get('embedding.weight'), mlp, tuple(lstm))
  return {'inputs': node}


@pytest.mark.parametrize(
  'name', ['p_tuning', 'p_tuning_lstm', 'prefix_projection']
)
def test_an_encoder_is_written_as_peft_writes_it(tmp_path, name):
  config, tensors = files(GOLDEN / 'adapters' / name)
  again, ours = written(tmp_path / name, encoder_of(name), 'llama')
  np.testing.assert_allclose(
    ours['prompt_embeddings'], tensors['prompt_embeddings'], atol=2e-6
  )
  for field in set(config) & set(again) - {'prefix_projection'}:
    if field != 'encoder_hidden_size' or name != 'prefix_projection':
      assert again[field] == config[field], field


def test_a_shared_module_keeps_what_is_not_scaled(tmp_path):
  ones = jnp.full((2, 32), 2.0)
  params = {'layers': {'self_attn': {'v_proj': {'output': nodes.Scaled(ones)}}}}
  _, tensors = written(tmp_path / 'x', params, 'gpt2')
  value = tensors['base_model.model.transformer.h.1.attn.c_attn.ia3_l'].ravel()
  np.testing.assert_array_equal(value, [1.0] * 64 + [2.0] * 32)


def test_adapters_without_files_say_why(tmp_path):
  rows = jnp.ones((2, 32))
  prompt = {'inputs': nodes.Prompt(rows)}
  prefix = {'self_attn': {'prefix': nodes.Prefix(*[jnp.ones((2, 2, 16))] * 2)}}
  scaled = {'layers': {'mlp': {'up_proj': nodes.Scaled(jnp.ones((2, 48)))}}}
  for params, name, reason in [
    ({**prompt, 'layers': prefix}, 'llama', 'one kind of adapter'),
    (prompt, 'bert_classifier', 'inputs: a bert model is an encoder: PEFT'),
    (scaled, 'llama', 'up_proj: PEFT scales inputs and outputs only'),
  ]:
    config = loaded(name).config
    assert reason in (peft.refusal(params, config) or '')
    with pytest.raises(Error, match=reason):
      written(tmp_path / name / reason[:3].strip(), params, name)
  norms = adapters.norms().init(jax.random.key(0), loaded('llama').base)
  assert 'PEFT has no files for weights' in (peft.refusal(norms) or '')


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('prompt_tuning', {'num_virtual_tokens': 4}, 'num_virtual_tokens=4'),
    ('prompt_tuning', {'num_virtual_tokens': 'x'}, "num_virtual_tokens is 'x'"),
    ('prefix_tuning', {'prompt_embeddings': np.ones((3, 63), np.float32)},
     'no keys and values of 2 layers'),
    ('prompt_tuning', {'other': np.ones(2, np.float32)}, 'has one tensor'),
    ('ia3', {'feedforward_modules': []}, 'contradicts feedforward_modules'),
    ('ia3', {'other': np.ones(2, np.float32)}, "'other' .2. is no part"),
    ('prompt_tuning', {'peft_type': 'CPT'}, "supported is 'LORA' or"),
  ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path, name, changes, message):
  folder = tmp_path / name
  shutil.copytree(GOLDEN / 'adapters' / name, folder)
  config, tensors = files(folder)
  for field, value in changes.items():
    if isinstance(value, np.ndarray):
      tensors[field] = value
    else:
      config[field] = value
  (folder / peft.CONFIG).write_text(json.dumps(config))
  safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
  with pytest.raises(Error, match=message):
    warm.load_adapter(folder, loaded('llama'))


def test_the_names_of_modules_are_those_of_the_model():
  config = loaded('llama').config
  name = families.hf_module_name('layers/mlp/down_proj', 1, config)
  _, tensors = files(GOLDEN / 'adapters' / 'ia3')
  assert f'base_model.model.{name}.ia3_l' in tensors


@pytest.mark.parametrize('name', BOTTLENECKS)
def test_bottlenecks_are_those_of_the_library_adapters(tmp_path, name):
  """Files of its version 1.3.0, by tests/golden/make_bottlenecks.py."""
  of, folder = loaded('bert_classifier'), GOLDEN / 'adapters' / name
  params = warm.load_adapter(folder, of)
  values = np.load(folder / 'logits.npz')
  got = network('bert_classifier')(of.base, params, values['tokens'])
  np.testing.assert_allclose(got, values['logits'], rtol=0, atol=1e-4)
  plain = network('bert_classifier')(of.base, {}, values['tokens'])
  assert np.abs(plain - got).max() > 0.3
  peft.bottlenecks.save(
    tmp_path / name,
    params,
    module_name=lambda p, i: families.hf_module_name(p, i, of.config),
    network=of.config,
    base_model='models/bert_classifier',
  )
  read = safetensors.numpy.load_file
  ours = read(tmp_path / name / 'adapter.safetensors')
  theirs = read(folder / 'adapter.safetensors')
  assert set(ours) == set(theirs)
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value)
  before, after = (
    json.loads((x / 'adapter_config.json').read_text())
    for x in (folder, tmp_path / name)
  )
  for field, value in after['config'].items():
    if field != 'init_weights':
      assert before['config'][field] == value, field
  assert {k: before[k] for k in after if k != 'config'} == {
    k: v for k, v in after.items() if k != 'config'
  }
  again = warm.load_adapter(tmp_path / name, of)
  assert jax.tree.structure(again) == jax.tree.structure(params)


def test_bottlenecks_that_the_library_computes_otherwise_are_refused(tmp_path):
  of = loaded('bert_classifier')
  save = functools.partial(
    peft.bottlenecks.save,
    tmp_path / 'x',
    module_name=lambda p, i: families.hf_module_name(p, i, of.config),
  )
  params = adapters.bottleneck(4).init(jax.random.key(0), of.base)
  with pytest.raises(Error, match='form=houlsby'):
    save(params, network=of.config)
  with pytest.raises(Error, match='a llama model: the files of the library'):
    save(params, network=loaded('llama').config)
  folder = tmp_path / 'y'
  shutil.copytree(GOLDEN / 'adapters' / 'bottleneck_houlsby', folder)
  file = folder / 'adapter_config.json'
  config = json.loads(file.read_text())
  config['config']['original_ln_before'] = True
  file.write_text(json.dumps(config))
  with pytest.raises(Error, match='original_ln_before = True is not supported'):
    warm.load_adapter(folder, of)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize(
  'adapter, of',
  [
    (adapters.soft_prompt(3), 'gemma'),
    (adapters.prefix(3, reparametrised=True, hidden_size=5), 'gpt2'),
    (adapters.p_tuning(3, 'lstm', hidden_size=5), 'llama'),
    (adapters.ia3(modules_to_save='norm'), 'llama'),
    (adapters.soft_prompt(2, modules_to_save='norm'), 'llama'),
  ],
  ids=['soft prompt', 'prefix', 'p-tuning', 'ia3', 'beside a norm'],
)
def test_peft_loads_our_directory_and_computes_our_logits(
  tmp_path, adapter, of
):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  params = adapter.init(jax.random.key(0), loaded(of).base)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  leaves = [x + 0.3 * jnp.float32(rng.normal(size=x.shape)) for x in leaves]
  params = jax.tree.unflatten(tree, leaves)
  written(tmp_path / 'x', params, of)
  model = theirs.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(
      GOLDEN / 'models' / of, dtype=torch.float32
    ),
    tmp_path / 'x',
  ).eval()
  tokens = np.arange(3, 27).reshape(2, 12)
  with torch.no_grad():
    want = model(torch.asarray(tokens)).logits.numpy()[:, -12:]
  got = network(of)(loaded(of).base, params, tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
