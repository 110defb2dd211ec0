"""Export: what a run made, in the hands of other programs; and generation."""

import contextlib
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adapters, clients, data, export, generate, models
from fedjax_llm.adapters import peft
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import builders, checkpoint, config, rebuild
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Batch

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / 'golden'
RANDOM = {'model.hidden_size': 32, 'model.num_heads': 2}
LLAMA = {
  'model.name': 'pretrained',
  'model.path': str(GOLDEN / 'models' / 'llama'),
}
TOKENS = np.random.default_rng(0).integers(3, 90, (2, 12)).astype(np.int32)


def run(program, arguments):
  """Status, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = program.main([str(x) for x in arguments])
  return status, out.getvalue(), err.getvalue()


def done(program, *arguments):
  status, out, err = run(program, arguments)
  assert status == 0, err
  return out


def refused(program, *arguments):
  """The one sentence that a program says instead."""
  status, _, err = run(program, arguments)
  assert status == 1
  assert err.startswith('error: ') and err.count('\n') == 1
  return err


def exported(folder, to, out, *more):
  return done(export, '--workdir', folder, '--to', to, '--out', out, *more)


def written(folder, fields, *, residual_rank=1, own=None):
  """A workdir as a run leaves it behind at round 3, without the training.

  What training would change is random; `own` is the name of a client that has
  trained. Returns (base, what everybody is served, what `own` is served).
  """
  conf, _ = config.override(
    config.load(str(ROOT / 'configs/tiny.py:smoke')),
    list({'adapter.targets': ('q_proj', 'v_proj'), **fields}.items()),
    SPEC,
  )
  folder.mkdir()
  resolved = config.resolved(conf, SPEC)
  (folder / 'config.json').write_text(json.dumps(resolved))
  build = lambda section, **injected: builders.build(
    conf[section], SPEC.sections[section], **injected
  )
  labels = fields.get('task.labels')
  loaded = build('model', vocab_size=259, eos_ids=(258,), labels=labels)
  adapter = build('adapter')
  algorithm = build(
    'algorithm',
    loss=None,
    model=None,
    optimizer=build('local'),
    num_clients=4,
    profiles=build('profiles', num_clients=4, seed=resolved['seed'])
    if conf.get('profiles')
    else None,
    fold=adapter.fold,
    **({'aggregator': build('aggregator')} if conf.get('aggregator') else {}),
  )
  keys = jax.random.split(jax.random.key(0))
  state = algorithm.init(keys[1], adapter.init(keys[0], loaded.base))
  newcomer = algorithm.init_client(state.params)
  state = state._replace(params=moved(state.params, 1, residual_rank))
  meta = {'data': 'x'}
  if own is not None:
    meta['data'] = data.population.digest(population_of(folder))
  checkpoint.open(folder / 'checkpoints').save(3, state, meta)
  mine = None
  if own is not None:
    store = clients.store.open(folder / 'states', newcomer, at_round=0)
    mine = jax.tree.map(
      lambda x: np.asarray(x) + 1 if x.dtype == jnp.float32 else x, newcomer
    )
    stacked = jax.tree.map(lambda x: np.asarray(x)[None], mine)
    store.scatter([own], [True], stacked)
    store.commit(3)
  served = lambda who: algorithm.personal(state.params, who)
  return loaded, served(None), served(mine)


def moved(params, seed, residual_rank):
  """Random trained leaves, and residuals of a given rank."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)

  def node(x):
    if isinstance(x, adapters.Dense):
      return adapters.Dense(x.value + draw(*x.value.shape))
    if not isinstance(x, LowRank) or x.scale is None:
      return x
    new = x._replace(a=draw(*x.a.shape) / 6, b=draw(*x.b.shape) / 2)
    if x.residual is not None:
      *lead, d, f = x.residual.shape
      more = draw(*lead, d, residual_rank) @ draw(*lead, residual_rank, f)
      new = new._replace(residual=x.residual + more / 10)
    return new

  is_node = lambda x: isinstance(x, LowRank | adapters.Dense)
  return jax.tree.map(node, params, is_leaf=is_node)


def logits(loaded, base, params):
  """[B, T, V] of TOKENS; op by op, where compiling would cost more."""
  ones = np.ones_like(TOKENS)
  places = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
  batch = Batch(TOKENS, ones > 0, ones, places)
  hidden = loaded.model.hidden(base, params, batch)
  return np.asarray(loaded.model.logits(base, params, hidden))


def agree(found, wanted, atol=1e-4):
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found, wanted, rtol=0, atol=atol * scale)


def of_adapter(out):
  """Logits of an exported adapter at the base that it names."""
  named = json.loads((out / peft.CONFIG).read_text())
  loaded = models.pretrained(named['base_model_name_or_path'])
  params = rebuild.load_adapter(out, loaded)
  return logits(loaded, loaded.base, params)


# ------------------------------------------------------------------ shared --


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """FedAvg on a model from files."""
  folder = tmp_path_factory.mktemp('plain') / 'run'
  fields = {**LLAMA, 'adapter.name': 'rslora'}
  loaded, served, _ = written(folder, fields)
  return folder, loaded, served


def test_both_forms_have_the_logits_of_what_was_served(plain, tmp_path):
  folder, loaded, served = plain
  wanted = logits(loaded, loaded.base, served)
  assert np.abs(wanted - logits(loaded, loaded.base, {})).max() > 0.1
  for to in ('peft', 'merged'):
    told = exported(folder, to, tmp_path / to)
    assert 'what everybody is served after round 3' in told
  agree(of_adapter(tmp_path / 'peft'), wanted, 1e-6)
  assert json.loads((tmp_path / 'peft' / peft.CONFIG).read_text())['use_rslora']
  merged = models.pretrained(tmp_path / 'merged')
  agree(logits(merged, merged.base, {}), wanted)
  assert merged.config == loaded.config
  assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_merged_model_has_the_dtype_that_is_asked_for(plain, tmp_path, dtype):
  folder, loaded, served = plain
  exported(folder, 'merged', tmp_path / 'out', '--dtype', dtype)
  merged = models.pretrained(tmp_path / 'out', dtype=dtype)
  written = adapters.merge(loaded.base, served)
  rounded = jax.tree.map(lambda x: jnp.asarray(x, dtype), written)
  for x, y in zip(jax.tree.leaves(merged.base), jax.tree.leaves(rounded)):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == dtype
  out = ['--out', tmp_path / 'peft', '--to', 'peft', '--workdir', folder]
  assert '--dtype is of a merged model' in refused(
    export, *out, '--dtype', dtype
  )


def test_generation_wants_a_model_or_a_run_and_one_of_them(plain):
  folder, loaded, _ = plain
  ask = ['--prompt', 'ab', '--max-new-tokens', 6, '--template', 'plain']
  more = ['--tokenizer', 'bytes', '--model', loaded.directory]
  text = refused(generate, '--workdir', folder, *ask)
  assert 'no tokenizer in this directory' in text
  for arguments, message in (
    ([*more, '--workdir', folder], 'give one of --model DIR and --workdir DIR'),
    ([], 'give one of --model DIR and --workdir DIR'),
    (['--workdir', folder, '--adapter', 'x'], 'has its own adapter'),
    (['--model', 'x', '--client', 'ann'], 'it needs --workdir DIR'),
  ):
    assert message in refused(generate, *ask, *arguments)


def test_a_random_model_and_what_a_run_made_of_it_write_on(tmp_path):
  loaded, served, _ = written(tmp_path / 'run', {})
  ask = ['--prompt', 'ab', '--max-new-tokens', '6', '--template', 'plain']
  out = done(generate, '--workdir', tmp_path / 'run', *ask)
  tokenizer = data.tokenizers.bytes()
  record = data.Record(messages=({'role': 'user', 'content': 'ab'},))
  prompt = data.prompt(record, tokenizer, 'plain')
  for name, params in (('before', {}), ('after', served)):
    (reply,) = models.generate(
      loaded, loaded.base, params, [prompt], max_new_tokens=6, eos_id=258
    )
    assert generate._row(name, tokenizer.decode(reply), 6) in out
  assert 'what everybody is served after round 3' in out


def test_what_a_merged_model_needs_besides_comes_along(plain, tmp_path):
  folder, loaded, _ = plain
  source = tmp_path / 'source'
  shutil.copytree(loaded.directory, source)
  for name in ('tokenizer.json', 'tokenizer_config.json', 'merges.txt'):
    (source / name).write_text('{"model": {"vocab": {"a": 0}}}')
  (source / 'generation_config.json').write_text('{"eos_token_id": [7, 8]}')
  (source / 'pytorch_model.bin').write_text('weights of before')
  copy = tmp_path / 'run'
  shutil.copytree(folder, copy)
  raw = json.loads((copy / 'config.json').read_text())
  raw['model']['path'] = str(source)
  (copy / 'config.json').write_text(json.dumps(raw))
  out = tmp_path / 'out'
  out.mkdir()  # an empty folder is taken
  exported(copy, 'merged', out)
  found = {p.name for p in out.iterdir()}
  assert found == {
    *('config.json', 'model.safetensors', 'generation_config.json'),
    *('tokenizer.json', 'tokenizer_config.json', 'merges.txt'),
  }
  copied = out / 'generation_config.json'
  assert copied.read_text() == '{"eos_token_id": [7, 8]}'


def test_a_finished_run_without_checkpoints_has_its_adapter(plain, tmp_path):
  folder, loaded, served = plain
  copy = tmp_path / 'run'
  copy.mkdir()
  shutil.copy(folder / 'config.json', copy)
  # As a run leaves it whose method wrote into the base.
  node = served['layers']['self_attn']['q_proj']
  rng = np.random.default_rng(5)
  change = np.einsum(
    'ld,lf->ldf', *(rng.normal(size=(2, n)) / 9 for n in node_sides(node))
  ).astype(np.float32)
  whole = {
    'layers': {
      'self_attn': {
        **served['layers']['self_attn'],
        'q_proj': node._replace(residual=jnp.asarray(change)),
      }
    }
  }
  base, bare = adapters.fold(loaded.base, whole)
  models.save(copy / 'base', loaded.config, base)
  peft.save(
    copy / 'adapter',
    bare,
    module_name=lambda path, layer: models.families.hf_module_name(
      path, layer, loaded.config
    ),
    base_model=str(copy / 'base'),
  )
  wanted = logits(loaded, loaded.base, whole)
  for to in ('merged', 'peft'):
    exported(copy, to, tmp_path / to)
  merged = models.pretrained(tmp_path / 'merged')
  agree(logits(merged, merged.base, {}), wanted)
  agree(of_adapter(tmp_path / 'peft'), wanted)  # at the base of before


def node_sides(node):
  return node.a.shape[-2], node.b.shape[-1]


def test_a_classifier_goes_with_its_head_and_its_labels(tmp_path):
  fields = {
    'model.name': 'random_encoder',
    'task.name': 'classification',
    'task.labels': ('sad', 'so', 'glad'),
    'adapter.modules_to_save': ('classifier',),
  }
  folder = tmp_path / 'run'
  loaded, served, _ = written(folder, fields)
  wanted = logits(loaded, loaded.base, served)
  assert np.abs(wanted - logits(loaded, loaded.base, {})).max() > 0.1
  for to in ('peft', 'merged'):
    exported(folder, to, tmp_path / to)
  agree(of_adapter(tmp_path / 'peft'), wanted, 1e-6)
  merged = models.pretrained(tmp_path / 'merged')
  agree(logits(merged, merged.base, {}), wanted)
  assert merged.config.labels == ('sad', 'so', 'glad')
  told = json.loads((tmp_path / 'peft' / 'labels.json').read_text())
  assert told == ['sad', 'so', 'glad']


def test_a_quantised_base_is_merged_as_it_computes(tmp_path):
  pytest.importorskip('qwix')
  folder = tmp_path / 'run'
  loaded, served, _ = written(folder, {**LLAMA, 'model.quantisation': 'int8'})
  exported(folder, 'merged', tmp_path / 'out')
  merged = models.pretrained(tmp_path / 'out')
  wanted = logits(loaded, loaded.base, served)
  agree(logits(merged, merged.base, {}), wanted)
  whole = models.pretrained(LLAMA['model.path'])
  assert np.abs(logits(whole, whole.base, served) - wanted).max() > 1e-3


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
def test_transformers_and_peft_load_what_is_written(plain, tmp_path):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  folder, loaded, served = plain
  wanted = logits(loaded, loaded.base, served)
  for to in ('peft', 'merged'):
    exported(folder, to, tmp_path / to)
  load = transformers.AutoModelForCausalLM.from_pretrained
  with torch.no_grad():
    adapted = theirs.PeftModel.from_pretrained(
      load(loaded.directory, dtype=torch.float32), tmp_path / 'peft'
    )
    merged = load(tmp_path / 'merged', dtype=torch.float32)
    for model in (adapted, merged):
      found = model.eval()(torch.asarray(TOKENS, dtype=torch.int64)).logits
      agree(found.numpy(), wanted)


# ---------------------------------------------------------- a changed base --


def test_a_changed_base_is_merged_or_told_by_the_rank_it_needs(tmp_path):
  """FedEx-LoRA: rank 3 of the factors, and 1 of what they missed."""
  folder = tmp_path / 'run'
  fields = {**LLAMA, 'algorithm.name': 'fedex_lora', 'adapter.rank': 3}
  loaded, served, _ = written(folder, fields)
  wanted = logits(loaded, *adapters.fold(loaded.base, served))
  for to in ('merged', 'peft'):
    told = exported(folder, to, tmp_path / to)
  assert 'a PEFT adapter of rank 4' in told and 'loses' not in told
  merged = models.pretrained(tmp_path / 'merged')
  agree(logits(merged, merged.base, {}), wanted)
  agree(of_adapter(tmp_path / 'peft'), wanted)


def test_a_start_on_the_base_needs_twice_its_rank(tmp_path):
  """FeDeRA takes its start out of the base, and that is low-rank as well."""
  folder = tmp_path / 'run'
  fields = {**LLAMA, 'adapter.name': 'federa', 'adapter.rank': 2}
  loaded, served, _ = written(folder, fields, residual_rank=0)
  told = exported(folder, 'peft', tmp_path / 'x')
  assert 'of rank 4' in told
  agree(of_adapter(tmp_path / 'x'), logits(loaded, loaded.base, served))


def test_what_no_small_adapter_can_tell_is_refused_or_rounded(tmp_path):
  folder, out = tmp_path / 'run', tmp_path / 'out'
  fields = {**RANDOM, 'algorithm.name': 'flora'}
  loaded, served, _ = written(folder, fields, residual_rank=9)
  command = ('--workdir', folder, '--to', 'peft', '--out', out)
  told = refused(export, *command)
  assert 'needs rank 13; use --to merged, or --rank R' in told
  assert not out.exists()
  told = done(export, *command, '--rank', 6)
  assert 'of rank 6' in told and 'loses' in told
  loaded_again = models.pretrained(out / 'base')
  found = rebuild.load_adapter(out, loaded_again)
  for path, node in export.low_rank(served):
    nearest = dict(export.low_rank(found))[path]
    change = np.asarray(adapters.product(node), np.float64)
    u, s, v = np.linalg.svd(change, full_matrices=False)
    best = (u[..., :6] * s[..., None, :6]) @ v[..., :6, :]
    agree(np.asarray(adapters.product(nearest)), best)
  exported(folder, 'peft', tmp_path / 'whole', '--rank', 13)
  agree(of_adapter(tmp_path / 'whole'), logits(loaded, loaded.base, served))


# ----------------------------------------------------------------- private --


def test_a_client_is_exported_with_what_it_keeps(tmp_path):
  folder = tmp_path / 'run'
  loaded, served, own = written(
    folder, {**RANDOM, 'algorithm.name': 'fed_sa'}, own=1
  )
  names = population_of(folder).names
  outs = {}
  for client in (None, names[1], names[0]):
    outs[client] = tmp_path / f'out-{names.index(client) if client else "all"}'
    more = ['--client', client] if client else []
    told = exported(folder, 'peft', outs[client], *more)
    if client is None:
      assert 'Only what clients share is here' in told
      assert 'what everybody is served' in told
    else:
      assert f'client {client} after round 3' in told
      never = 'no round has trained this client yet' in told
      assert never == (client == names[0])
  agree(of_adapter(outs[None]), logits(loaded, loaded.base, served), 1e-6)
  agree(of_adapter(outs[names[1]]), logits(loaded, loaded.base, own), 1e-6)
  # Never trained: the shared part, and the private one of the start (zero).
  agree(of_adapter(outs[names[0]]), logits(loaded, loaded.base, {}), 1e-6)
  told = refused(
    export,
    *('--workdir', folder, '--to', 'peft', '--out', tmp_path / 'x'),
    *('--client', names[0][:-2]),
  )
  assert 'is none of the 4 clients' in told and names[0] in told


def population_of(folder):
  conf = json.loads((folder / 'config.json').read_text())
  build = lambda section, **injected: builders.build(
    conf[section], SPEC.sections[section], **injected
  )
  return build(
    'population',
    records=build('data'),
    tokenizer=data.tokenizers.bytes(),
    partition=build('partition'),
    labels=None,
    seed=conf['seed'],
  )


# ----------------------------------------------------------------- mistakes --


def test_mistakes_are_one_sentence(tmp_path):
  folder = tmp_path / 'run'
  written(folder, RANDOM)
  empty, file = tmp_path / 'empty', tmp_path / 'file'
  empty.mkdir()
  file.write_text('')
  unfinished = tmp_path / 'unfinished'
  unfinished.mkdir()
  shutil.copy(folder / 'config.json', unfinished)
  damaged = tmp_path / 'damaged'
  damaged.mkdir()
  (damaged / 'config.json').write_text('{')
  several = shutil.copytree(folder, tmp_path / 'several')
  content = json.loads((folder / 'config.json').read_text())
  content['algorithm'] = {'name': 'fed_mkt'}  # its clients have own models
  (several / 'config.json').write_text(json.dumps(content))
  for arguments, words in [
    ((tmp_path / 'no', 'peft', 'x'), 'is no folder'),
    ((file, 'peft', 'x'), 'is no folder'),
    ((empty, 'peft', 'x'), 'holds no run'),
    ((damaged, 'peft', 'x'), 'is damaged'),
    ((unfinished, 'peft', 'x'), 'no checkpoint yet'),
    ((folder, 'gguf', 'x'), "'gguf' (choose from peft, merged)"),
    ((folder, 'peft', folder), 'exists and is not empty'),
    ((folder, 'peft', file), 'exists and is not empty'),
    ((folder, 'merged', 'x', '--rank', 2), '--rank is of an adapter'),
    ((folder, 'peft', 'x', '--rank', 0), 'at least 1'),
    ((folder, 'peft', 'x', '--client', 'a'), 'keeps nothing of its clients'),
    ((several, 'peft', 'x', '--client', 'a'), 'of fed_mkt stay in the states'),
  ]:  # fmt: skip
    workdir, to, out, *more = arguments
    told = refused(
      export,
      *('--workdir', workdir, '--to', to, '--out', tmp_path / out, *more),
    )
    assert words in told
    assert not (tmp_path / 'x').exists()
