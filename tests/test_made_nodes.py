"""Prompts and bottlenecks of few or shared parameters, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_nodes as references

import fedjax_llm as fl
from fedjax_llm import adapters, models, nodes, recipes
from fedjax_llm.adapters import peft
from fedjax_llm.nodes import protocol
from fedjax_llm.types import Batch, Cohort, Error

KEY = jax.random.key(0)
D, L, V = 16, 2, 32


@functools.cache
def loaded(**settings):
  return models.random(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=24,
    max_positions=64,
    **settings,
  )


def encoder(labels=None):
  return models.random_encoder(
    vocab_size=V, hidden_size=D, intermediate_size=24, labels=labels
  )


@functools.cache
def network():
  return jax.jit(loaded().model.hidden)


def batch(lengths=(9,), length=12, rows=1, seed=0):
  rng = np.random.default_rng(seed)
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  at = 0
  for i, size in enumerate(lengths):
    segments[:, at : at + size] = i + 1
    positions[:, at : at + size] = np.arange(size)
    at += size
  tokens = rng.integers(1, V, (rows, length)).astype(np.int32)
  return Batch(tokens, (segments > 0) & (positions > 0), segments, positions)


def moved(tree, seed=0, size=0.5):
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  move = lambda x: x + size * jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return jax.tree.unflatten(
    treedef,
    [move(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves],
  )


def wide(x):
  return np.asarray(x, np.float64)


# --------------------------------------------------------------- identities --

AS_BASE = {
  'houlsby': adapters.bottleneck(3, 'houlsby'),
  'parallel': adapters.bottleneck(3, 'parallel', scale=4.0),
  'hyper': adapters.hyper_adapter(3, 5),
  'compacter': adapters.compacter(4, num=2),
  'ia3': adapters.ia3(),
  'norms': adapters.norms(),
  'heads': adapters.heads(),
  'layers': adapters.layers([-1]),
}


@pytest.mark.parametrize('name', AS_BASE)
def test_an_adapter_starts_as_the_base_and_moves_away(name):
  params = AS_BASE[name].init(KEY, loaded().base)
  text = batch()

  @jax.jit
  def logits(params):
    hidden = loaded().model.hidden(loaded().base, params, text)
    return loaded().model.logits(loaded().base, params, hidden)

  hidden = network()(loaded().base, {}, text)
  plain = loaded().model.logits(loaded().base, {}, hidden)
  np.testing.assert_allclose(logits(params), plain, rtol=1e-5, atol=1e-5)
  far = moved(params)
  assert jnp.abs(logits(far) - plain).max() > 0.02
  if adapters.unmerged(loaded().base, far) is None:
    merged = adapters.merge(loaded().base, far)
    hidden = network()(merged, {}, text)
    got = loaded().model.logits(merged, {}, hidden)
    np.testing.assert_allclose(got, logits(far), rtol=1e-4, atol=1e-4)
  else:
    assert name in ('houlsby', 'parallel', 'hyper', 'compacter')


def test_biases_of_a_model_that_has_some():
  base = encoder(labels=('a', 'b')).base
  params = adapters.bitfit().init(KEY, base)
  names = fl.scopes.leaf_paths(params)
  assert all(name.endswith('bias/value') for name in names)
  assert 'layers/self_attn/q_proj/bias/value' in names
  assert 'classifier/bias/value' in names
  beside = adapters.bitfit('classifier').init(KEY, base)
  assert 'classifier/kernel/value' in fl.scopes.leaf_paths(beside)
  over, rest = adapters.overlay(base, moved(params))
  np.testing.assert_array_equal(
    over['classifier']['bias'], moved(params)['classifier']['bias'].value
  )
  assert jax.tree.leaves(rest) == []
  with pytest.raises(Error, match='the model has no biases, so'):
    adapters.bitfit().init(KEY, loaded().base)


def test_a_chosen_layer_changes_alone_and_only_it_is_sent():
  params = adapters.layers([1], modules_to_save='norm').init(KEY, loaded().base)
  far = adapters.merge(loaded().base, moved(params))
  q = lambda base: base['layers']['self_attn']['q_proj']['kernel']
  np.testing.assert_array_equal(q(far)[0], q(loaded().base)[0])
  assert jnp.abs(q(far)[1] - q(loaded().base)[1]).max() > 0.1
  labels = fl.scopes.everything().labels(params)
  node = labels['layers']['self_attn']['q_proj']['kernel']
  values = (node.delta.value, node.layers.value, node.like.value)
  assert values == ('shared', 'frozen', 'frozen')
  for which, reason in [
    ([2], 'names the layer 2; the model has the layers 0 to 1'),
    ([1, -1], r'names a layer twice: \[1, -1\]'),
  ]:
    with pytest.raises(Error, match=reason):
      adapters.layers(which).init(KEY, loaded().base)
  with pytest.raises(Error, match='which is empty'):
    adapters.layers([])


# --------------------------------------------------------------- references --


@pytest.mark.parametrize('kind', ['mlp', 'lstm'])
def test_the_encoder_of_p_tuning_is_a_loop_over_places(kind):
  adapter = adapters.p_tuning(3, kind, hidden_size=5)
  node = moved(adapter.init(KEY, loaded().base)['inputs'])
  want = references.encoded(*jax.tree.map(wide, node))
  np.testing.assert_allclose(node.plain().rows, want, rtol=1e-4, atol=1e-5)


def test_the_layers_of_a_prefix_are_two_products():
  adapter = adapters.prefix(3, reparametrised=True, hidden_size=5)
  node = moved(adapter.init(KEY, loaded().base)['generator'])
  keys, values = references.projected(*jax.tree.map(wide, node))
  prefix = node.generate()['layers']['self_attn']['prefix']
  np.testing.assert_allclose(prefix.keys, keys, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(prefix.values, values, rtol=1e-5, atol=1e-5)


def test_a_low_dimensional_prompt_moves_in_its_subspace():
  node = adapters.projected_prompt(3, 7).init(KEY, loaded().base)['inputs']
  assert not jnp.any(node.z)
  np.testing.assert_array_equal(node.plain().rows, node.start)
  assert float(node.basis.std() * 7**0.5) == pytest.approx(1, abs=0.15)
  far = node._replace(z=jnp.arange(7.0))
  want = wide(node.start) + (np.arange(7.0) @ wide(node.basis)).reshape(3, D)
  np.testing.assert_allclose(far.plain().rows, want, rtol=1e-5, atol=1e-5)
  labels = fl.scopes.everything().labels(node)
  assert [x.value for x in labels] == ['shared', 'frozen', 'frozen']


def test_queries_attend_to_classes_and_to_the_client():
  rows = jax.random.normal(jax.random.key(5), (5, D))
  adapter = adapters.generated_prompt(
    3, heads=2, expansion=2, num_client_rows=2, context=rows
  )
  node = moved(adapter.init(KEY, loaded().base)['inputs'], size=0.2)
  want = references.attended(**jax.tree.map(wide, node)._asdict())
  np.testing.assert_allclose(node.plain().rows, want, rtol=1e-4, atol=1e-4)
  turned = node._replace(context=node.context[::-1])  # a set of classes
  np.testing.assert_allclose(turned.plain().rows, want, rtol=1e-4, atol=1e-4)
  other = node._replace(context=node.context[:-1])
  assert jnp.abs(other.plain().rows - want).max() > 1e-3
  labels = fl.scopes.everything().labels(node)
  assert (labels.context.value, labels.client.value) == ('frozen', 'shared')
  with pytest.raises(Error, match='heads is 3, which does not divide the 16'):
    adapters.generated_prompt(3, heads=3).init(KEY, loaded().base)
  with pytest.raises(Error, match='a generated prompt needs a context'):
    adapters.generated_prompt(3).init(KEY, loaded().base)


def test_a_hypernetwork_makes_the_bottleneck_of_each_layer():
  node = moved(adapters.hyper_adapter(3, 5).init(KEY, loaded().base))
  node = node['generator']
  made = node.generate()['layers']['mlp']['down_proj']['output']
  for layer in range(L):
    e = wide(node.client) + wide(node.layer[layer])
    for got, weights in ((made.down, node.down), (made.up, node.up)):
      want = sum(e[i] * wide(weights[i]) for i in range(5))
      np.testing.assert_allclose(got[layer], want, rtol=1e-4, atol=1e-5)


def test_compacter_sums_kronecker_products():
  params = moved(adapters.compacter(4, num=2, rank=3).init(KEY, loaded().base))
  node = params['generator']
  made = node.generate()['layers']
  for place, module in (('mlp', 'down_proj'), ('self_attn', 'o_proj')):
    bottleneck = made[place][module]['output']
    pair = zip((bottleneck.down, bottleneck.up), node.places[place])
    for got, factored in pair:
      for layer in range(L):
        want = references.kronecker(
          wide(node.rule), wide(factored.s[layer]), wide(factored.t[layer])
        )
        np.testing.assert_allclose(got[layer], want, rtol=1e-4, atol=1e-4)
  count = sum(x.size for x in jax.tree.leaves(params))
  whole = adapters.bottleneck(4, 'houlsby').init(KEY, loaded().base)
  assert count < sum(x.size for x in jax.tree.leaves(whole))
  with pytest.raises(Error, match='num is 3, which does not divide'):
    adapters.compacter(4, num=3).init(KEY, loaded().base)


def test_a_gate_is_a_softmax_over_features():
  params = moved(adapters.feature_gate(3).init(KEY, loaded().base))
  node = params['layers']['mlp']['down_proj']['output']
  one = jax.tree.map(lambda x: x[1], node)
  y = np.random.default_rng(1).normal(size=(4, D)).astype(np.float32)
  want = references.gated(wide(y), *jax.tree.map(wide, one))
  np.testing.assert_allclose(one.act(None, y), want, rtol=1e-4, atol=1e-5)
  adapters.check(loaded().base, params, places=('output',))
  wrong = node._replace(inner=node.inner._replace(kernel=jnp.ones((L, 5, 3))))
  with pytest.raises(Error, match=r'output/inner is \[2, 5, 3\]'):
    tree = {'layers': {'mlp': {'down_proj': {'output': wrong}}}}
    adapters.check(loaded().base, tree, places=('output',))
  with pytest.raises(Error, match='a gate depends on the features'):
    adapters.merge(loaded().base, params)


def test_a_parallel_bottleneck_reads_the_inputs_of_the_perceptron():
  adapter = adapters.bottleneck(3, 'parallel', scale=4.0)
  params = moved(adapter.init(KEY, loaded().base))
  node = jax.tree.map(lambda x: x[0], params['layers']['mlp']['parallel'])
  from fedjax_llm.models.network import layers

  weights = jax.tree.map(lambda x: x[0], loaded().base['layers']['mlp'])
  x = np.random.default_rng(1).normal(size=(1, 3, D)).astype(np.float32)
  plain = layers.mlp(x, weights, {}, 'silu')
  got = layers.mlp(x, weights, {'parallel': node}, 'silu')
  of = jax.tree.map(wide, node.bottleneck)
  inner = np.maximum(wide(x) @ of.down + of.down_bias, 0)
  want = wide(plain) + float(of.scale) * (inner @ of.up + of.up_bias)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------- pool --


def pooled(top=2, seed=0):
  params = adapters.prompt_pool(2, size=5, top=top).init(KEY, loaded().base)
  node = moved(params['inputs'], seed)
  return {'inputs': node._replace(top=jnp.zeros(top))}


def test_each_text_takes_the_prompts_with_the_nearest_keys():
  params, texts = pooled(), batch(rows=3)
  texts = texts._replace(loss_mask=texts.positions > 5)
  table = wide(loaded().base['embed_tokens']['embedding'])
  node = params['inputs']
  both = loaded().model.hidden_with_statistics
  assert both is not None
  hidden, statistics = both(loaded().base, params, texts)
  chosen, distances = [], []
  for row in range(3):
    index, alike = references.nearest(
      table[texts.tokens[row, :6]], wide(node.keys), 2
    )
    chosen.append(index)
    distances.append(1 - alike)
    rows = node.rows[np.asarray(index)].reshape(4, D)
    text = jax.tree.map(lambda x, row=row: x[row : row + 1], texts)
    want = network()(loaded().base, {'inputs': nodes.Prompt(rows)}, text)
    np.testing.assert_allclose(
      hidden[row, :9], want[0, :9], rtol=1e-4, atol=1e-5
    )
  assert len({tuple(index) for index in chosen}) > 1
  choice = statistics['inputs']
  assert float(choice.distance) == pytest.approx(np.mean(distances), rel=1e-4)
  counts = np.bincount(np.ravel(chosen), minlength=5)
  np.testing.assert_array_equal(choice.counts, counts)


def test_no_state_of_a_causal_model_knows_a_token_that_comes_after_it():
  params, texts = pooled(), batch(rows=3)
  texts = texts._replace(loss_mask=texts.positions > 5)
  model = loaded().model.hidden
  run = jax.jit(lambda tokens: model(
    loaded().base, params, texts._replace(tokens=tokens)))  # fmt: skip
  hidden = run(texts.tokens)
  for place in (6, 8):  # of the reply
    other = np.where(np.arange(12) >= place, V - 1, texts.tokens)
    same = run(other)[:, :place]
    np.testing.assert_allclose(same, hidden[:, :place], rtol=1e-5, atol=1e-6)
  asked = np.where(np.arange(12) == 5, V - 1, texts.tokens)  # the question
  assert np.abs(run(asked)[:, :5] - hidden[:, :5]).max() > 1e-3


def test_a_pool_reads_one_text_a_row_and_has_no_files():
  params = pooled()
  with pytest.raises(Error, match='A pool of prompts is chosen from by the'):
    loaded().model.hidden(loaded().base, params, batch((5, 4)))
  assert 'depends on the text' in (peft.refusal(params) or '')
  with pytest.raises(Error, match='its inputs takes 9 of 5 prompts'):
    wrong = {'inputs': params['inputs']._replace(top=jnp.zeros(9))}
    adapters.check(loaded().base, wrong, places=protocol.BESIDE)
  with pytest.raises(Error, match='top is 6, above the 5 prompts'):
    adapters.prompt_pool(size=5, top=6)
  with pytest.raises(Error, match='which a cache begins before'):
    loaded().decoder.begin(loaded().base, params, 1, 8)


def test_a_request_chooses_its_prompts_once():
  params, requests = pooled(), [[1, 2, 3], [7, 9]]
  say = functools.partial(
    models.generate, base=loaded().base, params=params, max_new_tokens=4
  )
  replies = say(loaded(), prompts=requests)
  assert replies == say(loaded().model, prompts=requests)
  node = params['inputs']
  table = wide(loaded().base['embed_tokens']['embedding'])
  index, _ = references.nearest(table[requests[0]], wide(node.keys), 2)
  rows = nodes.Prompt(node.rows[np.asarray(index)].reshape(4, D))
  alone = models.generate(
    loaded(), loaded().base, {'inputs': rows}, requests, max_new_tokens=4
  )
  assert alone[0] == replies[0]


# ---------------------------------------------------------------- protocol --


def test_a_generator_and_its_refusals():
  base = loaded().base
  made = adapters.hyper_adapter(3, 5).init(KEY, base)
  taken = adapters.bottleneck(3).init(KEY, base)
  with pytest.raises(
    Error, match='makes a node at layers/mlp/down_proj/output'
  ):
    protocol.plain({**made, **taken})
  with pytest.raises(Error, match='a Prompt node cannot act as the generator'):
    protocol.plain({'generator': nodes.Prompt(jnp.ones((2, D)))})
  inputs = adapters.soft_prompt(2).init(KEY, base)
  both = protocol.plain({**made, **inputs})
  assert sorted(both) == ['inputs', 'layers']
  assert protocol.plain(inputs) is inputs


@pytest.mark.parametrize(
  'name, wrong, reason',
  [
    ('soft_prompt', {'length': 0}, 'adapter.length is 0; it must be'),
    ('soft_prompt', {'init': 'zeros'}, "adapter.init is 'zeros'"),
    ('soft_prompt', {'init': 'text'}, 'a text is needed'),
    ('soft_prompt', {'text': 'x'}, 'a text is needed'),
    ('prefix', {'hidden_size': 3}, 'set adapter.reparametrised'),
    ('p_tuning', {'encoder': 'gru'}, "encoder is 'gru'; it must be mlp"),
    ('bottleneck', {'form': 'x'}, 'it must be one of: houlsby'),
    ('bottleneck', {'activation': 'x'}, 'it must be one of: ident'),
    ('compacter', {'form': 'x'}, 'it must be houlsby or pfeiffer'),
  ],
)
def test_a_wrong_argument_is_named(name, wrong, reason):
  with pytest.raises(Error, match=reason):
    getattr(adapters, name)(**wrong)


def test_a_text_is_repeated_or_cut():
  tokenizer = fl.data.tokenizers.bytes()
  big = models.random(vocab_size=259, hidden_size=D)
  table = big.base['embed_tokens']['embedding']
  for length, ids in ((5, [97, 98, 99, 97, 98]), (2, [97, 98])):
    adapter = adapters.soft_prompt(
      length, init='text', text='abc', tokenizer=tokenizer
    )
    got = adapter.init(KEY, big.base)['inputs'].rows
    np.testing.assert_array_equal(got, table[np.asarray(ids)])
  drawn = adapters.soft_prompt(4, 'vocabulary').init(KEY, big.base)
  rows = np.asarray(drawn['inputs'].rows)
  assert all((np.asarray(table) == row).all(1).any() for row in rows)
  flat = adapters.soft_prompt(400).init(KEY, big.base)['inputs'].rows
  assert float(jnp.abs(flat).max()) == pytest.approx(0.5, abs=0.01)
  with pytest.raises(Error, match='needs the tokenizer of the model'):
    adapters.soft_prompt(2, init='text', text='a').init(KEY, big.base)


# ------------------------------------------------------------------- rounds --


def test_32_prompt_clients_cost_one_program_with_unbatched_products():
  """Reads the HLO: products with matrices of the base have no batch axis."""
  import re

  K = 32
  params = adapters.p_tuning(2, hidden_size=3).init(KEY, loaded().base)
  loss = fl.local.causal_lm(loaded().model)
  algorithm = recipes.fed_avg(loss, fl.local.optimizer('sgd', 0.1))
  state = algorithm.init(KEY, params)
  texts = [batch((5,), 6, seed=k) for k in range(K)]
  cohort = Cohort(
    ids=np.arange(K),
    batches=jax.tree.map(lambda *x: np.stack(x)[:, None], *texts),
    weight=np.ones(K, np.float32),
    valid=np.ones(K, bool),
  )
  step = jax.jit(algorithm.round).lower(state, cohort, loaded().base).compile()
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(loaded().base)
    if path[-1].key == 'kernel'
  }
  text, shapes, products = step.as_text() or '', {}, 0
  for name, dims in re.findall(r'(%[\w.-]+) = f32\[([\d,]+)\]', text):
    shapes[name] = tuple(int(n) for n in dims.split(',') if n != '1')
  for line in text.splitlines():
    if ' dot(' in line:
      names = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
      if any(tuple(sorted(shapes.get(n, ()))) in kernels for n in names):
        products += 1
        assert not re.search(r'lhs_batch_dims=\{\d', line), line
  assert products >= 7  # matrices of a layer
  start = state.params
  losses = []
  for _ in range(3):  # the same program
    state, _, info = step(state, cohort, loaded().base)
    losses.append(float(info.metrics['local/loss']))
  assert losses[2] < losses[0]
  trained = sum(
    x.size
    for x, label in zip(
      jax.tree.leaves(start),
      jax.tree.leaves(fl.scopes.everything().labels(start)),
    )
    if label.value == 'shared'
  )
  assert info.bytes_up.sum(1).tolist() == [4 * trained] * K
