"""Modules trained whole beside low-rank factors: merged, averaged, in PEFT."""

import functools
import inspect
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedjax_llm import adapters, aggregators, models, recipes, scopes, tree
from fedjax_llm.adapters import Dense, peft
from fedjax_llm.models import families
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Batch, Error, StreamingAggregator, Uploads

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CLASSIFIERS = ('bert_classifier', 'roberta_classifier', 'distilbert_classifier')
KEY = jax.random.key(0)
HEAD = ('pooler', 'classifier')


@pytest.fixture(scope='module')
def encoder():
  return models.random_encoder(labels=('sad', 'glad'), vocab_size=40)


def texts(tokens, **fields):
  one = np.ones(tokens.shape, np.int32)
  places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return Batch(tokens, one > 0, one, places, **fields)


def answers(loaded, params, tokens, base=None):
  base = loaded.base if base is None else base
  return np.asarray(_answers(base, params, np.asarray(tokens), loaded.model))


@functools.partial(jax.jit, static_argnums=3)
def _answers(base, params, tokens, model):
  hidden = model.hidden(base, params, texts(tokens))
  return model.logits(base, params, hidden[:, 0])


def moved(params, seed=0, by=0.5):
  """Every leaf but the scales, changed at random."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    still = getattr(path[-1], 'name', '') == 'scale'
    noise = 0 if still else by * rng.normal(size=x.shape)
    return (x + noise).astype(jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, params)


# ------------------------------------------------------------------- whole --


def test_a_head_starts_as_the_base_and_takes_its_place(encoder):
  tokens = np.arange(12).reshape(2, 6)
  adapter = adapters.lora(rank=2, modules_to_save=HEAD)
  params = adapter.init(KEY, encoder.base)
  plain = answers(encoder, {}, tokens)
  np.testing.assert_allclose(answers(encoder, params, tokens), plain, rtol=1e-6)
  # Another head altogether: nothing of the base's is left in it.
  params = moved(params)
  other = answers(encoder, params, tokens)
  hollow = {**encoder.base, **{n: _nan(encoder.base[n]) for n in HEAD}}
  np.testing.assert_array_equal(answers(encoder, params, tokens, hollow), other)
  merged = adapter.merge(encoder.base, params)
  np.testing.assert_allclose(
    answers(encoder, {}, tokens, merged), other, rtol=1e-4, atol=1e-5
  )
  assert np.abs(other - plain).max() > 0.1


def _nan(module):
  return jax.tree.map(lambda x: x * np.nan, module)


def test_merge_writes_all_that_a_model_reads(encoder):
  """Added arrays too: the forward pass and the merged weights agree."""
  tokens = np.arange(12).reshape(2, 6)
  rng = np.random.default_rng(0)
  like = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32)
  base = encoder.base
  params = {
    'embed_norm': {'bias': like(base['embed_norm']['bias'])},
    'pooler': like(base['pooler']['kernel']),
    'classifier': {'bias': Dense(like(base['classifier']['bias']))},
  }
  found = answers(encoder, {}, tokens, adapters.merge(base, params))
  expected = answers(encoder, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert np.abs(expected - answers(encoder, {}, tokens)).max() > 0.1
  folded, rest = adapters.fold(base, params)  # no residual: nothing moves
  assert jax.tree.structure(rest) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, folded, base)


def test_federa_keeps_its_start_with_a_head(encoder):
  adapter = adapters.federa(rank=2, modules_to_save='classifier')
  params = adapter.init(KEY, encoder.base)
  base, bare = adapter.fold(encoder.base, params)
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_allclose(
    answers(encoder, bare, tokens, base),
    answers(encoder, {}, tokens),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(modules_to_save='clasifier'), r'matches no module.*classifier'),
    (dict(modules_to_save='('), 'no regular expression'),
    (dict(targets='pooler', modules_to_save=HEAD), 'pooler is low-rank'),
  ],
)
def test_modules_that_cannot_be_saved_are_refused(encoder, settings, message):
  with pytest.raises(Error, match=message):
    adapters.lora(rank=2, **settings).init(KEY, encoder.base)


def test_tied_embeddings_are_no_module_to_save():
  tied = models.random(tied=True)
  adapter = adapters.lora(modules_to_save='embed_tokens')
  with pytest.raises(Error, match='embed_tokens is also the output head'):
    adapter.init(KEY, tied.base)
  untied = models.random()
  adapter.init(KEY, untied.base)


def test_a_leaf_without_its_weight_is_refused(encoder):
  for params in (
    {'clasifier': {'bias': Dense(jnp.ones(2))}},
    {'classifier': {'bias': Dense(jnp.ones(3))}},
  ):
    with pytest.raises(Error, match=r'clas+ifier/bias'):
      answers(encoder, params, np.ones((1, 4), int))


# --------------------------------------------------------------- federated --


def toy_params():
  kernel = jax.random.normal(jax.random.key(1), (toy.D, toy.F))
  return {**toy.params(), 'classifier': {'kernel': Dense(kernel)}}


def toy_loss(base, params, batch, key):
  kernel = params['classifier']['kernel'].value
  return toy.loss(base + kernel, params, batch, key)


def fold(base, params):
  return toy.fold(base, params)


REQUIRED = {'krum': dict(num_byzantine=1)}
# Their head is not the weighted mean, by what they are.
OWN_WEIGHTS = {
  *('uniform_mean', 'median', 'trimmed_mean', 'krum', 'norm_weighted'),
  *('bucketing', 'centred_clipping', 'foolsgold', 'geometric_median'),
  *('nearest_mixing', 'norm_bounding', 'product_krum'),
  'product_geometric_median',
  'fedrpca',
  *('fltrust', 'in_products', 'one_after_another', 'all_together'),
}


def rules():
  for name in aggregators.__all__:
    builder = getattr(aggregators, name)
    needs = [
      p
      for p in inspect.signature(builder).parameters.values()
      if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    if name in REQUIRED or not needs:
      yield name, builder(**REQUIRED.get(name, {}))


@pytest.fixture(scope='module')
def uploads():
  params, num = toy_params(), 6
  start = tree.broadcast(params, num)
  labels = scopes.everything().labels(params)
  masks = tree.full_masks(params, labels)
  update = tree.like(moved(start), tree.broadcast(masks.trained, num))
  update = tree.sub(update, start)
  return Uploads(
    update=update,
    start=start,
    masks=tree.broadcast(masks, num),
    weight=jnp.array([1.0, 2.0, 3.0, 2.0, 1.0, 1.0]),
    valid=jnp.array([True, True, False, True, True, True]),
    ids=jnp.arange(num),
  )


def test_every_aggregator_takes_a_head(uploads):
  params = toy_params()
  change = np.asarray(uploads.update['classifier']['kernel'].value)
  weight = np.where(uploads.valid, uploads.weight, 0)

  @jax.jit  # one program for all of them
  def heads(uploads):
    found = {}
    for name, rule in rules():
      state = rule.init(params, KEY)
      if isinstance(rule, StreamingAggregator):
        sums = rule.accumulate(rule.zero(params), uploads, state, params)
        outcome, _ = rule.finalize(sums, state, params, KEY)
      else:
        outcome, _ = rule.aggregate(uploads, state, params, KEY)
      found[name] = outcome.delta['classifier']['kernel'].value
    return found

  seen = set()
  for name, head in heads(uploads).items():
    assert head.shape == (toy.D, toy.F), name
    assert np.isfinite(head).all(), name
    assert np.abs(head).max() > 0, name
    if name in ('buffered_mean', 'fedex'):  # all clients count the same there
      share = np.asarray(uploads.valid) / 5
    else:
      share = weight / weight.sum()
    if name not in OWN_WEIGHTS and 'num_clients' not in name:
      expected = np.tensordot(share, change, 1)
      np.testing.assert_allclose(head, expected, atol=1e-5, err_msg=name)
    seen.add(name)
  assert seen >= {'mean', 'median', 'fedex', 'flora', 'flexlora', 'fedrot'}


def test_every_recipe_trains_and_serves_a_head():
  cohort = toy.cohort(num_clients=4)._replace(
    profiles=np.array([1, 2, 2, 1], np.int32)
  )
  same = ('fed_prox', 'fed_avgm', 'fed_adagrad', 'fed_yogi', 'fed_it')
  # On parameters that are not two factors: they refuse these.
  others = ('fed_amole', 'fed_pipe', 'fed_ra', 'fed_tt_plus')
  others += ('fedlease', 'hilora')
  families = ('averaging', 'lora', 'ranks', 'personal')
  for name in recipes.__all__:
    family = recipes.METHODS[name].__module__.split('.')[-2]
    if family not in families or 'adapter' in recipes.NEEDS[name]:
      continue
    if name in (*same, *others):
      continue
    builder = getattr(recipes, name)
    needs = inspect.signature(builder).parameters
    extra = {'num_clients': 9} if 'num_clients' in needs else {}
    algorithm = builder(toy_loss, toy.sgd(), fold=fold, **extra)

    def whole(params, algorithm=algorithm):
      state = algorithm.init(KEY, params)
      one = algorithm.init_client(state.params)
      states = tree.broadcast(one, 4)
      new, kept, _ = algorithm.round(
        state, cohort._replace(states=states), toy.base()
      )
      return algorithm.personal(new.params, tree.take(kept, 0))

    served = jax.eval_shape(whole, toy_params())
    assert served['classifier']['kernel'].value.shape == (toy.D, toy.F), name


def test_private_heads_stay_and_shared_ones_travel():
  """FedSA with its classifier kept: only the factors a go up."""
  algorithm = recipes.fed_sa(toy_loss, toy.sgd(), private='/b$|classifier')
  params = toy_params()
  state = algorithm.init(KEY, params)
  one = algorithm.init_client(params)
  assert one.private['classifier']['kernel'].value.shape == (toy.D, toy.F)
  cohort = toy.cohort(states=tree.broadcast(one, 5))
  new, kept, told = jax.jit(algorithm.round)(state, cohort, toy.base())
  np.testing.assert_array_equal(
    new.params['classifier']['kernel'].value,
    params['classifier']['kernel'].value,
  )
  mine = kept.private['classifier']['kernel'].value
  assert (np.abs(np.diff(mine, axis=0)).max((1, 2)) > 0).all()
  assert told.bytes_up.sum() == 5 * 4 * toy.D * toy.R


# -------------------------------------------------------------------- peft --


def naming(config) -> tuple[dict[str, Any], dict[str, Any]]:
  saving = dict(
    module_name=lambda p, i: families.hf_module_name(p, i, config, part=True),
    to_tensors=lambda leaves: families.to_checkpoint(leaves, config),
    task_type='SEQ_CLS',
  )
  loading = dict(
    path_of=lambda name: families.our_paths(name, config),
    from_tensors=lambda w: families.from_checkpoint(w, config),
  )
  return saving, loading


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_an_adapter_with_a_head_made_by_peft_gives_its_logits(tmp_path, name):
  loaded = models.pretrained(GOLDEN / 'models' / name)
  saving, loading = naming(loaded.config)
  theirs = GOLDEN / 'adapters' / name
  params = peft.load(theirs, **loading)
  golden = np.load(theirs / 'logits.npz')
  found = answers(loaded, params, golden['tokens'])
  scale = np.abs(golden['logits']).max()
  np.testing.assert_allclose(found, golden['logits'], atol=1e-5 * scale)
  # Written again it is the same, bit by bit, under the same names.
  peft.save(tmp_path / 'x', params, base_model='m', **saving)
  a, b = (_tensors(d) for d in (theirs, tmp_path / 'x'))
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)
  again = peft.load(tmp_path / 'x', template=params, **loading)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def _tensors(directory):
  import safetensors.numpy

  return safetensors.numpy.load_file(directory / peft.WEIGHTS)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_peft_loads_our_head_and_computes_our_logits(tmp_path, name):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  loaded = models.pretrained(GOLDEN / 'models' / name)
  saving, _ = naming(loaded.config)
  adapter = adapters.lora(rank=2, modules_to_save=HEAD)
  params = moved(adapter.init(KEY, loaded.base))
  base_model = str(GOLDEN / 'models' / name)
  peft.save(tmp_path / 'x', params, base_model=base_model, **saving)
  model = theirs.PeftModel.from_pretrained(
    transformers.AutoModelForSequenceClassification.from_pretrained(
      base_model, dtype=torch.float32
    ),
    tmp_path / 'x',
  ).eval()
  tokens = np.arange(3, 23).reshape(2, 10)
  with torch.no_grad():
    expected = model(torch.asarray(tokens)).logits.numpy()
  found = answers(loaded, params, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_head_that_was_not_trained_goes_along_whole(encoder, tmp_path):
  saving, loading = naming(encoder.config)
  params = adapters.lora(rank=2).init(KEY, encoder.base)
  full = adapters.complete(params, encoder.base, HEAD)
  peft.save(tmp_path / 'x', full, base_model='m', **saving)
  again = peft.load(tmp_path / 'x', **loading)
  kernel = again['classifier']['kernel'].value
  np.testing.assert_array_equal(kernel, encoder.base['classifier']['kernel'])
  config = json.loads((tmp_path / 'x' / peft.CONFIG).read_text())
  assert config['modules_to_save'] == ['bert.pooler.dense', 'classifier']
  assert config['task_type'] == 'SEQ_CLS'
  with pytest.raises(Error, match='pooler is part of the head'):
    adapters.complete({'pooler': LowRank(1, 2, 3)}, encoder.base, HEAD)


def test_norms_of_the_layers_come_back_bit_by_bit(tmp_path):
  loaded = models.random()
  saving, loading = naming(loaded.config)
  adapter = adapters.lora(rank=2, modules_to_save=('layers/.*norm', 'norm'))
  params = moved(adapter.init(KEY, loaded.base))
  assert params['layers']['input_layernorm']['scale'].value.shape == (2, 64)
  peft.save(tmp_path / 'x', params, base_model='m', **saving)
  again = peft.load(tmp_path / 'x', template=params, **loading)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_saved_modules_that_do_not_fit_are_told(tmp_path, encoder):
  saving, loading = naming(encoder.config)
  params = moved(
    adapters.lora(rank=2, modules_to_save=HEAD).init(KEY, encoder.base)
  )
  out = tmp_path / 'x'
  peft.save(out, params, base_model='m', **saving)
  bare = {k: v for k, v in params.items() if k == 'layers'}
  with pytest.raises(Error, match='also saves classifier/bias'):
    peft.load(out, template=bare, **loading)
  with pytest.raises(Error, match='does not save pooler'):
    some = {k: v for k, v in params.items() if k != 'pooler'}
    peft.save(tmp_path / 'y', some, base_model='m', **saving)
    peft.load(tmp_path / 'y', template=params, **loading)
  three = models.random_encoder(labels=('a', 'b', 'c'), vocab_size=40)
  with pytest.raises(Error, match=r'classifier.* has shape \[2'):
    peft.load(out, **naming(three.config)[1])
  with pytest.raises(Error, match='`from_tensors` does not say'):
    peft.load(out, path_of=loading['path_of'])
  with pytest.raises(Error, match='`to_tensors` does not say'):
    peft.save(out, params, base_model='m', module_name=saving['module_name'])
  # A tensor that the config does not name is no part of it.
  shutil.copytree(out, tmp_path / 'z')
  file = tmp_path / 'z' / peft.CONFIG
  config = json.loads(file.read_text())
  file.write_text(json.dumps({**config, 'modules_to_save': ['score']}))
  with pytest.raises(Error, match='is no part of a plain LoRA'):
    peft.load(tmp_path / 'z', **loading)
