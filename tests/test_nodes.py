"""Every kind of node against NumPy, in weights and in networks."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm as fl
from fedjax_llm import adapters, models, nodes, recipes
from fedjax_llm.adapters import peft
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import tenants
from fedjax_llm.models.network import decoding, layers, transformer
from fedjax_llm.models.network.attention import Places, attention
from fedjax_llm.nodes import protocol
from fedjax_llm.types import Batch, Cohort, Error

KEY = jax.random.key(0)
D, F, R = 6, 4, 2
RNG = np.random.default_rng(0)


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


# ----------------------------------------------------------------- weights --

A, B_, P, Q = draw(D, R), draw(R, F), draw(D, 2 * R), draw(2 * R, F)
CORE, GAIN, DELTA = draw(2, R, R), draw(2), draw(D, F)
TRAIN = [draw(1, 3, R), draw(R, 2, R), draw(R, 2, R, seed=1), draw(R, 2, 1)]
W, X, BIAS = draw(D, F, seed=1), draw(5, D), draw(F)


def dora_by_hand(w):
  v = w + 0.5 * np.float64(A) @ B_
  return np.float64(GAIN_OF_F) * v / np.sqrt((v**2).sum(0))


def train_by_hand(w):
  a = np.einsum('aib,bjc->ijc', *map(np.float64, TRAIN[:2])).reshape(D, R)
  b = np.einsum('aib,bjc->aij', *map(np.float64, TRAIN[2:])).reshape(R, F)
  return w + 0.5 * a @ b


def core_by_hand(w):
  parts = [
    GAIN[h]
    * np.float64(P[:, 2 * h : 2 * h + 2])
    @ CORE[h]
    @ Q[2 * h : 2 * h + 2]
    for h in range(2)
  ]
  return w + 0.5 * sum(parts)


GAIN_OF_F = draw(F, seed=2)
HALF = jnp.float32(0.5)
LOW = nodes.LowRank(A, B_, HALF)
# A node, and the weight that it makes of w in float64.
WEIGHTS: dict[str, tuple[Any, Any]] = {
  'array': (DELTA, lambda w: w + DELTA),
  'added': (nodes.Added(DELTA), lambda w: w + DELTA),
  'low_rank': (LOW, lambda w: w + 0.5 * np.float64(A) @ B_),
  'residual': (
    LOW._replace(residual=DELTA),
    lambda w: w + 0.5 * np.float64(A) @ B_ + DELTA,
  ),
  'dora': (nodes.Dora(LOW, GAIN_OF_F), dora_by_hand),
  'core': (nodes.Core(CORE, P, Q, HALF, GAIN), core_by_hand),
  'gram': (
    nodes.Gram(B_, draw(D, F, seed=3), draw(F, F), HALF),
    lambda w: w + 0.5 * np.float64(draw(D, F, seed=3)) @ B_.T @ B_ @ draw(F, F),
  ),
  'tiers': (
    nodes.Tiers(
      LOW,
      nodes.LowRank(jnp.stack([A, -A]), jnp.stack([B_, 3 * B_]), None),
      LOW,
      jnp.array([0.0, 1.0]),
    ),
    lambda w: w + 0.5 * (2 - 3) * np.float64(A) @ B_,
  ),
  'vera': (
    nodes.Vera(GAIN[:R], GAIN_OF_F, A, B_),
    lambda w: w + np.float64(A) * GAIN[:R] @ B_ * GAIN_OF_F,
  ),
  'tensor_train': (nodes.TensorTrain(tuple(TRAIN), HALF), train_by_hand),
  'scaled': (nodes.Scaled(GAIN_OF_F), lambda w: w * GAIN_OF_F),
}


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_node_acts_as_the_weight_that_it_writes(name):
  node, by_hand = WEIGHTS[name]
  base, w = {'q': {'kernel': W, 'bias': BIAS}}, by_hand(np.float64(W))
  want = np.float64(X) @ w + BIAS
  adapters.check(base, {'q': node})
  for leaf in (node, {'kernel': node}):
    got = layers.linear(X, base['q'], leaf)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    merged = adapters.merge(base, {'q': leaf})['q']
    np.testing.assert_allclose(merged['kernel'], w, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged['bias'], BIAS)
    half = layers.linear(X.astype(jnp.bfloat16), base['q'], leaf)
    assert half.dtype == jnp.bfloat16
  # Stacked over layers it is written layer by layer, and folds exactly.
  stack = lambda x: jax.tree.map(lambda y: jnp.stack([y, 2 * y]), x)
  deep, wide = {'q': stack(base['q'])}, {'q': stack(node)}
  adapters.check(deep, wide)
  merged = adapters.merge(deep, wide)
  np.testing.assert_allclose(merged['q']['kernel'][0], w, rtol=1e-5, atol=1e-5)
  folded = adapters.merge(*adapters.fold(deep, wide))
  np.testing.assert_allclose(
    folded['q']['kernel'], merged['q']['kernel'], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_node_of_another_shape_is_refused(name):
  node, _ = WEIGHTS[name]
  base = {'q': {'kernel': jnp.ones((D, F + 1))}}
  want = re.escape(f'its q is {[F] if name == "scaled" else [D, F]}')
  with pytest.raises(
    Error, match=f'the adapter does not fit the model: {want}'
  ):
    adapters.check(base, {'q': node})
  with pytest.raises(Error, match=f'ann is of another base: {want}'):
    tenants.check(base, {'q': node}, 'ann')
  if name not in ('array', 'scaled'):
    with pytest.raises(Error, match='cannot act on scale of norm'):
      adapters.check({'norm': {'scale': jnp.ones(D)}}, {'norm': node})


def test_a_weight_that_is_trained_whole_takes_its_place():
  base = {'q': {'kernel': W, 'bias': BIAS}}
  params = {'q': {'kernel': nodes.Dense(DELTA), 'bias': nodes.Dense(None)}}
  over, rest = adapters.overlay(base, params)
  want = np.float64(X) @ DELTA + BIAS
  np.testing.assert_allclose(
    layers.linear(X, over['q'], rest['q']), want, rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(
    adapters.merge(base, params)['q']['kernel'], DELTA
  )


def test_inputs_and_outputs_of_a_module_are_places():
  base = {'q': {'kernel': W, 'bias': BIAS}}
  into, out = draw(D, seed=5), draw(F, seed=6)
  params = {
    'q': {
      'output': nodes.Scaled(out),
      'input': nodes.Scaled(into),
      'kernel': LOW,
    }
  }
  adapters.check(base, params, places=('input', 'output'))
  w = np.float64(W) + 0.5 * np.float64(A) @ B_
  want = ((np.float64(X) * into) @ w + BIAS) * out
  got = layers.linear(X, base['q'], params['q'])
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  merged = adapters.merge(base, params)['q']
  got = layers.linear(X, merged)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  with pytest.raises(Error, match='it has q/output, but the model has only'):
    adapters.check(base, params)  # a network without such places
  with pytest.raises(Error, match='LowRank node cannot act on output of q'):
    adapters.check(base, {'q': {'output': LOW}}, places=('output',))


@pytest.mark.parametrize('kind', nodes.Activation)
def test_a_bottleneck_is_a_small_network_behind_a_module(kind):
  up, low, high, scale = draw(R, F), draw(R), draw(F), jnp.float32(2)
  node = nodes.Bottleneck(draw(F, R), up, low, high, scale, kind)
  inner = np.float64(X @ W + BIAS)
  f = {
    'identity': lambda x: x,
    'relu': lambda x: np.maximum(x, 0),
    'silu': lambda x: x / (1 + np.exp(-x)),
    'tanh': np.tanh,
    'gelu': lambda x: x * np.vectorize(_normal)(x),
    'gelu_tanh': lambda x: (
      x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    ),
  }[kind.value]
  want = inner + 2 * (f(inner @ node.down + low) @ np.float64(up) + high)
  base, params = {'q': {'kernel': W, 'bias': BIAS}}, {'q': {'output': node}}
  adapters.check(base, params, places=('output',))
  got = layers.linear(X, base['q'], params['q'])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  with pytest.raises(
    Error, match='q/output: a bottleneck adapter is no linear'
  ):
    adapters.merge(base, params)
  with pytest.raises(Error, match=re.escape(f'q/output/up is [{R}, {F}]')):
    wrong = node._replace(down=draw(F, R + 1))
    adapters.check(base, {'q': {'output': wrong}}, places=('output',))


def _normal(x):
  import math

  return (1 + math.erf(x / 2**0.5)) / 2


# ------------------------------------------------------- a node of one's own --


class Diagonal(NamedTuple):
  """A user's node: every output feature times a number."""

  factor: Any  # [L, F]

  def act(self, x, y, weight):
    return y * self.factor

  def write(self, weight):
    return weight * self.factor[..., None, :]

  def check(self, shape, path):
    if self.factor.shape != (*shape[:-2], shape[-1]):
      raise Error(f'{"/".join(path)}: the factor is {self.factor.shape}.')


def tiny(**settings):
  sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24)
  return models.random(**sizes, max_positions=64, **settings)


def texts(lengths, length, seed=0):
  """A row of tokens with texts of these lengths."""
  rng = np.random.default_rng(seed)
  segments = np.zeros((1, length), np.int32)
  positions = np.zeros((1, length), np.int32)
  at = 0
  for i, size in enumerate(lengths):
    segments[0, at : at + size] = i + 1
    positions[0, at : at + size] = np.arange(size)
    at += size
  tokens = rng.integers(1, 32, (1, length)).astype(np.int32)
  return Batch(tokens, (segments > 0) & (positions > 0), segments, positions)


def cut(batch, at):
  return jax.tree.map(lambda x: x[:, at], batch)


def test_a_node_of_ones_own_works_everywhere():
  loaded = tiny()
  batch = texts([9], 12)
  params = {'layers': {'mlp': {'up_proj': Diagonal(1 + draw(2, 24) / 4)}}}
  loss = fl.local.causal_lm(loaded.model)
  merged = adapters.merge(loaded.base, params)
  np.testing.assert_allclose(
    loaded.model.hidden(loaded.base, params, batch),
    loaded.model.hidden(merged, {}, batch),
    rtol=1e-4,
    atol=1e-5,
  )
  algorithm = recipes.fed_avg(loss, fl.local.optimizer('sgd', 0.1))
  state = algorithm.init(KEY, params)
  cohort = Cohort(
    ids=np.arange(2),
    batches=jax.tree.map(lambda x: np.stack([x[None]] * 2), batch),
    weight=np.ones(2, np.float32),
    valid=np.ones(2, bool),
  )
  step, losses = jax.jit(algorithm.round), []
  for _ in range(3):
    state, _, info = step(state, cohort, loaded.base)
    losses.append(float(info.metrics['local/loss']))
  assert losses[2] < losses[1] < losses[0]
  with pytest.raises(
    Error, match='up_proj: a Diagonal node has no form in PEFT'
  ):
    save = functools.partial(
      peft.save, module_name=lambda *_: '', base_model=''
    )
    save('nowhere', params)
  wrong = {'layers': {'mlp': {'up_proj': Diagonal(jnp.ones((2, 5)))}}}
  with pytest.raises(Error, match=r'up_proj/kernel: the factor is \(2, 5\)'):
    loaded.model.hidden(loaded.base, wrong, batch)
  with pytest.raises(Error, match='Diagonal node is no sum of factors'):
    tenants.stack(loaded.base, [params])


def test_nodes_say_why_peft_has_no_files_for_them():
  save = functools.partial(peft.save, module_name=lambda *_: '', base_model='')
  for leaf, reason in [
    (nodes.Scaled(GAIN_OF_F), r'q: PEFT scales inputs and outputs only'),
    (nodes.Bottleneck(A, B_), 'q: PEFT has no bottleneck'),
    (nodes.Experts(LOW, LOW, A, None), 'q: which experts act depends'),
  ]:
    with pytest.raises(Error, match=reason):
      save('nowhere', {'q': leaf})


# ----------------------------------------------------------------- prompts --

ROWS = 3  # of a prompt


def network(encoder=False, attention='blocked', **changes):
  """A tiny model with its base; what differs between families is set here."""
  if encoder:
    loaded = models.random_encoder(
      vocab_size=32, hidden_size=16, intermediate_size=24, attention=attention
    )
    return jitted(loaded.model), loaded.decoder, loaded.base
  config = tiny().config._replace(**changes)
  base = config_lib.init(config, jax.random.key(1))
  model = transformer.build(config, attention=attention)
  return jitted(model), decoding.decoder(config), base


def jitted(model):
  parts = model._asdict().items()
  return model._replace(**{name: jax.jit(f) for name, f in parts if f})


NETWORKS = {
  'llama': {},
  'xla': {'attention': 'xla'},
  'windows': {'windows': (4, 0)},
  'one window': {'windows': (4, 4)},
  'learned': {
    'num_learned_positions': 64,
    'embedding_norm': True,
    'embedding_scale': 3.0,
    'norm': 'layer',
  },
  'encoder': {'encoder': True},
}


def prompted(base):
  """Tokens, and the soft prompt that is their rows of the table."""
  tokens = np.array([[5, 9, 2]])
  return tokens, nodes.Prompt(base['embed_tokens']['embedding'][tokens[0]])


@pytest.mark.parametrize('name', NETWORKS)
def test_a_soft_prompt_is_text_in_front(name):
  model, _, base = network(**NETWORKS[name])
  tokens, prompt = prompted(base)
  batch = texts([9], 12)
  got = model.hidden(base, {'inputs': prompt}, batch)
  assert got.shape == (1, 12, 16)
  whole = texts([9 + ROWS], 12 + ROWS)
  whole = whole._replace(tokens=np.concatenate([tokens, batch.tokens], 1))
  want = model.hidden(base, {}, whole)[:, ROWS:]
  np.testing.assert_allclose(got[:, :9], want[:, :9], rtol=1e-4, atol=2e-5)
  plain = model.hidden(base, {}, batch)
  assert jnp.abs(got - plain)[:, :9].max() > 0.1


def prefixed(model, decoder, base):
  """The prefix that is the keys and values of a soft prompt."""
  _, prompt = prompted(base)
  cache = decoder.begin(base, {'inputs': prompt}, 1, 8)
  turn = lambda x: x[:, 0].swapaxes(1, 2)  # [L, S, KV, head_dim]
  flat = lambda x: turn(x)[:, :ROWS].reshape(len(x), ROWS, -1)
  keys, values = flat(cache.keys), flat(cache.values)
  return {'layers': {'self_attn': {'prefix': nodes.Prefix(keys, values)}}}


@pytest.mark.parametrize('name', ['llama', 'windows', 'learned'])
def test_a_prefix_is_the_keys_and_values_of_text_in_front(name):
  model, decoder, base = network(**NETWORKS[name])
  _, prompt = prompted(base)
  params, batch = prefixed(model, decoder, base), texts([9], 12)
  want = model.hidden(base, {'inputs': prompt}, batch)[:, :9]
  got = model.hidden(base, params, batch)[:, :9]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('way', ['blocked', 'xla'])
@pytest.mark.parametrize('window', [None, 3])
@pytest.mark.parametrize('ahead', [ROWS, 0])
def test_keys_in_front_against_a_loop(way, window, ahead):
  """Packed texts, blocks shorter than the rows, keys with and without rows."""
  length, heads, width, front = 21, 4, 8, ROWS
  rows = length + front - ahead
  q, k, v = (draw(1, n, h, width) for n, h in [(rows, heads), (24, 2), (24, 2)])
  text = np.concatenate([[0] * front, [1] * 9, [2] * 10, [0] * 2])
  at = np.concatenate([np.arange(s) for s in (front, 9, 10, 2)])
  at[front:] += front
  keys = Places(at[None].astype(np.int32), text[None].astype(np.int32))
  queries = Places(*(x[:, 24 - rows :] for x in keys))
  got = attention(
    *(q, k, v, queries, keys),
    window=window,
    implementation=way,
    block=8,
    shared=front,
    ahead=ahead,
  )
  for t in range(rows):
    mine = 24 - rows + t
    if text[mine] == 0 and mine >= front:
      continue  # padding
    seen = ((text == text[mine]) & (text > 0)) | (np.arange(24) < front)
    seen &= at <= at[mine]
    seen &= at[mine] - at < (window or 99)
    for h in range(heads):
      scores = np.float64(k[0, seen, h // 2]) @ q[0, t, h] / width**0.5
      weights = np.exp(scores - scores.max())
      want = weights / weights.sum() @ v[0, seen, h // 2]
      np.testing.assert_allclose(got[0, t, h], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['xla', 'windows'])
def test_packed_texts_share_the_rows_of_a_prompt(name):
  model, decoder, base = network(**NETWORKS[name])
  packed = texts([7, 4], 12)
  first = cut(packed, slice(0, 7))
  second = cut(packed, slice(7, 11))
  second = second._replace(segments=np.ones((1, 4), np.int32))
  both = {'inputs': prompted(base)[1], **prefixed(model, decoder, base)}
  for names in (['inputs'], ['inputs', 'layers']):
    params = {n: both[n] for n in names}
    got = model.hidden(base, params, packed)
    for part, at in ((first, slice(0, 7)), (second, slice(7, 11))):
      alone = model.hidden(base, params, part)
      np.testing.assert_allclose(got[:, at], alone, rtol=1e-4, atol=2e-5)


def test_prompts_that_do_not_fit_are_refused():
  model, base = tiny().model, tiny().base
  batch = texts([9], 12)
  say = lambda params, batch=batch: model.hidden(base, params, batch)
  with pytest.raises(Error, match='A prompt of 60 rows in front of 12 tokens'):
    say({'inputs': nodes.Prompt(jnp.ones((60, 16)))})
  with pytest.raises(
    Error, match=r'its inputs is \[2, 15\], that of the model'
  ):
    say({'inputs': nodes.Prompt(jnp.ones((2, 15)))})
  prefix = lambda *shape: {
    'layers': {'self_attn': {'prefix': nodes.Prefix(*[jnp.ones(shape)] * 2)}}
  }
  with pytest.raises(Error, match=r'prefix/keys is \[2, 3, 10\]'):
    say(prefix(2, 3, 10))
  with pytest.raises(Error, match='LowRank node cannot act on inputs'):
    say({'inputs': LOW})
  for node in (prefix(2, 3, 8), {'inputs': nodes.Prompt(jnp.ones((2, 16)))}):
    with pytest.raises(Error, match='so it cannot be written into a weight'):
      adapters.merge(base, node)
  own = models.own(lambda w, x: x @ w['q']['kernel'], {'q': {'kernel': W}})
  with pytest.raises(Error, match='it has inputs, but the model has only q'):
    own.bind(own.base, {'inputs': nodes.Prompt(jnp.ones((2, D)))})
  bare = own.model(lambda net, batch: net(batch))
  assert bare.hidden_with_statistics is None


def test_an_encoder_with_a_prompt_reads_one_text_a_row():
  loaded = models.random_encoder(vocab_size=32, hidden_size=16)
  params = {'inputs': nodes.Prompt(draw(2, 16))}
  packed = texts([5, 4], 9)
  prefix = adapters.prefix(2).init(jax.random.key(0), loaded.base)
  for node in (params, prefix):
    with pytest.raises(Error, match='so a row holds one text; set packing'):
      loaded.model.hidden(loaded.base, node, packed)
  two = jax.tree.map(lambda *x: jnp.concatenate(x), packed, texts([9], 9))
  # Inside of a program nobody knows the values.
  got = jax.jit(loaded.model.hidden)(loaded.base, params, two)
  assert jnp.isnan(got[0]).all() and not jnp.isnan(got[1]).any()


# -------------------------------------------------------------- generation --


@pytest.mark.parametrize('kind', ['prompt', 'prefix', 'both'])
def test_a_cache_holds_the_prompt(kind):
  loaded = tiny(seed=3)
  rows = {'inputs': nodes.Prompt(draw(ROWS, 16))}
  keys, values = draw(2, 2, 8), draw(2, 2, 8, seed=1)
  front = {'self_attn': {'prefix': nodes.Prefix(keys, values)}}
  deep = {'layers': {**front, 'mlp': {'down_proj': {'output': _behind(16)}}}}
  params = {'prompt': rows, 'prefix': deep, 'both': {**rows, **deep}}[kind]
  prompts = [[1, 2, 3, 4], [7], [3, 3]]
  say = functools.partial(
    models.generate, base=loaded.base, prompts=prompts, max_new_tokens=6
  )
  replies = say(loaded, params=params)
  assert replies == say(loaded.model, params=params)  # which has no cache
  assert replies != say(loaded, params={})
  with pytest.raises(
    Error, match=r'new tokens are \d+ tokens behind \d prompt'
  ):
    say(loaded, params=params, max_new_tokens=59)
  # The states are those of the text read at once.
  batch = texts([8], 8)
  cache = loaded.decoder.begin(loaded.base, params, 1, 8)
  parts = []
  for at in (slice(0, 5), slice(5, 8)):
    part = cut(batch, at)
    out, cache = loaded.decoder.extend(
      loaded.base, params, part, cache, at.start
    )
    parts.append(out)
  want = loaded.model.hidden(loaded.base, params, batch)
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), want, rtol=1e-4, atol=2e-5
  )


def _behind(width, seed=0):
  one = lambda *shape: 0.3 * draw(2, *shape, seed=seed)
  return nodes.Bottleneck(one(width, R), one(R, width), one(R))


# ---------------------------------------------------------------- training --


@functools.cache
def trained():
  """A round of four clients who train every kind of node in a network."""
  loaded = tiny()
  lora = adapters.lora(R, targets=['q_proj', 'v_proj'])
  inner = lora.init(KEY, loaded.base)['layers']['self_attn']
  inner['o_proj'] = {'output': _behind(16)}
  inner['k_proj'] = {'output': nodes.Scaled(jnp.ones((2, 8)))}
  inner['prefix'] = nodes.Prefix(draw(2, 2, 8), draw(2, 2, 8, seed=1))
  mlp = {
    'down_proj': {
      'input': nodes.Scaled(jnp.ones((2, 24))),
      'output': _behind(16, seed=1),
    }
  }
  params = {
    'inputs': nodes.Prompt(draw(ROWS, 16)),
    'layers': {'self_attn': inner, 'mlp': mlp},
  }
  batch = jax.tree.map(
    lambda *x: np.stack(x)[:, None], *(texts([7, 4], 12, k) for k in range(4))
  )
  cohort = Cohort(
    ids=np.arange(4),
    batches=batch,
    weight=np.ones(4, np.float32),
    valid=np.ones(4, bool),
  )
  algorithm = recipes.fed_avg(
    fl.local.causal_lm(loaded.model), fl.local.optimizer('sgd', 0.1)
  )
  state = algorithm.init(KEY, params)
  step = jax.jit(algorithm.round).lower(state, cohort, loaded.base).compile()
  return loaded, state, cohort, step


def test_nodes_in_a_network_are_trained():
  loaded, state, cohort, step = trained()
  start, losses = state.params, []
  for _ in range(4):
    state, _, info = step(state, cohort, loaded.base)
    losses.append(float(info.metrics['local/loss']))
  assert losses[-1] < losses[0]
  paths = jax.tree_util.tree_leaves_with_path(start)
  for (path, old), new in zip(paths, jax.tree.leaves(state.params)):
    name = jax.tree_util.keystr(path)
    frozen = name.endswith(("q_proj'].scale", "v_proj'].scale"))  # of LoRA
    assert bool(jnp.any(old != new)) != frozen, name


def test_clients_with_prompts_meet_the_base_in_one_matmul():
  loaded, _, _, step = trained()
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(loaded.base)
    if path[-1].key == 'kernel'
  }
  text, shapes, found = step.as_text() or '', {}, 0
  for name, dims in re.findall(r'(%[\w.-]+) = f32\[([\d,]+)\]', text):
    shapes[name] = tuple(int(n) for n in dims.split(',') if n != '1')
  for line in text.splitlines():
    if ' dot(' in line:
      names = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
      if any(tuple(sorted(shapes.get(n, ()))) in kernels for n in names):
        found += 1
        assert not re.search(r'lhs_batch_dims=\{\d', line), line
  assert found >= 7  # matrices of a layer


def test_statistics_have_the_tree_of_the_adapter():
  loaded = tiny()
  params = adapters.lora(R, targets=['q_proj', 'up_proj']).init(
    KEY, loaded.base
  )
  wide = adapters.experts.pooled(KEY, params, 3)
  wide['layers']['mlp'] = params['layers']['mlp']
  wide = {**wide, 'inputs': nodes.Prompt(draw(ROWS, 16))}
  batch = texts([9], 12)
  give = loaded.model.hidden_with_statistics
  assert give is not None
  hidden, statistics = give(loaded.base, wide, batch)
  np.testing.assert_array_equal(
    hidden, loaded.model.hidden(loaded.base, wide, batch)
  )
  routing = statistics['layers']['self_attn']['q_proj']
  assert isinstance(routing, nodes.Routing)
  assert routing.count.tolist() == [9, 9]  # neither padding nor prompt rows
  assert statistics['inputs'] is None
  assert statistics['layers']['mlp'] == {'up_proj': None}
  _, nothing = give(loaded.base, {}, batch)
  assert jax.tree.leaves(nothing) == []


def test_a_leaf_is_a_node_by_its_methods():
  assert protocol.is_node(LOW) and protocol.is_node(nodes.Dense(1))
  assert protocol.is_node(Diagonal(1)) and protocol.is_node(nodes.Prompt(1))
  assert not any(map(protocol.is_node, (None, W, {}, (1, 2), np.ones(2))))


def test_a_loss_with_statistics_is_compiled_as_any_other():
  loaded, batch = tiny(), texts([9], 12)
  loss = fl.local.causal_lm(loaded.model)
  assert isinstance(loss, fl.local.Observed) and loss.with_statistics
  sums = jax.jit(loss)(loaded.base, {}, batch, KEY)
  both, statistics = jax.jit(loss.with_statistics)(loaded.base, {}, batch, KEY)
  np.testing.assert_allclose(sums.total, both.total, rtol=1e-6)
  assert float(sums.count) == 8 and jax.tree.leaves(statistics) == []
