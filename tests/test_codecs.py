"""Lossy codecs: bounds, bytes as packed, memories, and their combinations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import aggregators, local, recipes, tree, uploads
from fedjax_llm.run import config
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Cohort, Context, Error, LossSum, Masks
from fedjax_llm.uploads.low_rank import Factors
from fedjax_llm.uploads.quantised import Levels
from fedjax_llm.uploads.sketches import Sketch
from fedjax_llm.uploads.sparse import Sparse, SparseTree

KEY = jax.random.key(3)
HERE = Context(key=KEY, round_key=jax.random.key(4))
WHOLE = Masks(None, None)  # of a single array
SENT = {
  'top_k': uploads.top_k(0.3, memory='error'),
  'top_k of a leaf': uploads.top_k(0.05, 'leaf', 'difference'),
  'sign': uploads.sign(),
  'two bits': uploads.quantised(2),
  'four bits': uploads.quantised(4, 'nearest', memory='error'),
  'eight bits': uploads.quantised(8, scale='norm', memory='difference'),
  'low_rank': uploads.low_rank(1),
  'count_sketch': uploads.count_sketch(0.2, rows=3),
}
BITS = {'sign': 1, 'two bits': 2, 'four bits': 4, 'eight bits': 8}


def made(seed=0):
  """An update whose leaves are masked by columns, by layers, and not at all."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  update = {
    'a': normal(2, 6, 5),
    'b': normal(3, 4, 7).astype(jnp.bfloat16),
    'c': normal(11),
    'untrained': normal(4, 8),
    'frozen': None,
  }
  trained = {
    'a': jnp.array([True, True, False, True, False]),
    'b': jnp.array([True, False, True])[:, None, None],
    'c': None,
    'untrained': jnp.bool_(False),
    'frozen': None,
  }
  return update, Masks(trained, trained)


def send(codec, update, masks=WHOLE, context=HERE):
  """Returns (decoded, message) of a client's first round."""
  message, _ = codec.encode(update, masks, codec.init(update), context)
  return codec.decode(message, update, context), message


# -------------------------------------------------------------------- bytes --


def packed_codes(values, bits):
  """Packs whole numbers from 0 to 2^bits - 1 into bytes."""
  each = np.unpackbits(np.asarray(values, np.uint8)[:, None], axis=1)
  return np.packbits(each[:, 8 - bits :]).tobytes()


def unpacked_codes(data, bits, num):
  each = np.unpackbits(np.frombuffer(data, np.uint8))[: num * bits]
  return each.reshape(num, bits) @ (1 << np.arange(bits)[::-1])


def pack(message, mask, bits: Any = None):
  """Serialises a part of a message, the entries inside the mask alone."""
  if isinstance(message, Levels):
    levels = np.asarray(message.levels)
    chosen = np.broadcast_to(True if mask is None else mask, levels.shape)
    inside = levels[chosen]
    if not inside.size:
      return b''
    most = 2 ** (bits - 1) - 1
    codes = (inside + 1) // 2 if bits == 1 else inside + most
    data = packed_codes(codes, bits)
    again = unpacked_codes(data, bits, inside.size)
    again = 2 * again - 1 if bits == 1 else again - most
    np.testing.assert_array_equal(again, inside)  # nothing else is needed
    assert not levels[~chosen].any()
    return data + np.float32(message.unit).tobytes()
  if isinstance(message, Factors):
    if mask is not None and not np.any(mask):
      return b''
    return b''.join(np.asarray(x).tobytes() for x in message)
  chosen = np.broadcast_to(True if mask is None else mask, message.shape)
  return np.asarray(message)[chosen].tobytes()


@pytest.mark.parametrize('name', SENT)
def test_bytes_are_those_of_the_packed_message(name):
  codec, (update, masks) = SENT[name], made()
  _, message = send(codec, update, masks)
  counts = codec.num_bytes(message, masks)
  total = sum(int(x) for x in jax.tree.leaves(counts))
  assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(counts))
  message = getattr(message, 'coded', message)
  if isinstance(message, Sketch):
    data = np.asarray(message.table).tobytes()
  elif isinstance(message, SparseTree):
    data = b''.join(np.asarray(x).tobytes() for x in message.entries)
  else:
    message = getattr(message, 'parts', message)
    data = b''
    for leaf in update:
      if isinstance(message[leaf], Sparse):
        data += b''.join(np.asarray(x).tobytes() for x in message[leaf])
      elif message[leaf] is not None:
        data += pack(message[leaf], masks.trained[leaf], BITS.get(name))
  assert len(data) == total > 0


@pytest.mark.parametrize('name', SENT)
def test_a_codec_keeps_structure_dtypes_and_masks(name):
  codec, (update, masks) = SENT[name], made()
  decoded, _ = send(codec, update, masks)
  shapes = lambda x: jax.tree.map(lambda y: (y.shape, y.dtype), x)
  assert shapes(decoded) == shapes(update)
  if not codec.additive:  # a sum is decoded without the clients' masks
    inside = tree.apply_mask(decoded, masks.trained)
    jax.tree.map(np.testing.assert_array_equal, decoded, inside)
  assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(decoded))
  zeros = tree.zeros_like(update)
  decoded, _ = send(codec, zeros, masks)  # no division by nothing
  jax.tree.map(np.testing.assert_array_equal, decoded, zeros)


# ------------------------------------------------------------------- bounds --


def squared(x):
  return sum(np.sum(np.float64(y) ** 2) for y in jax.tree.leaves(x))


@pytest.mark.parametrize('per', ['tree', 'leaf'])
def test_top_k_shrinks_the_distance_by_its_share(per):
  rng = np.random.default_rng(1)
  update = {'w': jnp.asarray(rng.normal(size=40), jnp.float32)}
  masks = Masks(None, {'w': None})
  for density in (0.1, 0.5, 1.0):
    decoded, _ = send(uploads.top_k(density, per), update, masks)
    rest = squared(tree.sub(update, decoded))
    assert rest <= (1 - density) * squared(update)
  flat = {'w': jnp.ones(40)}  # the bound is attained
  decoded, _ = send(uploads.top_k(0.1, per), flat, masks)
  assert squared(tree.sub(flat, decoded)) == 36


def test_sign_shrinks_the_distance_as_its_norms_say():
  u = np.random.default_rng(2).normal(size=(5, 7)).astype(np.float32)
  decoded, _ = send(uploads.sign('none'), jnp.asarray(u))
  wanted = np.abs(np.float64(u)).mean() * np.where(u < 0, -1, 1)
  np.testing.assert_allclose(decoded, wanted, rtol=1e-6)
  rest = squared(u) - np.abs(np.float64(u)).sum() ** 2 / u.size
  np.testing.assert_allclose(squared(u - decoded), rest, rtol=1e-5)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_nearest_level_is_at_most_half_a_unit_away(bits):
  u = np.random.default_rng(3).normal(size=300).astype(np.float32)
  decoded, message = send(uploads.quantised(bits, 'nearest'), jnp.asarray(u))
  most = 2 ** (bits - 1) - 1
  unit = np.abs(u).max() / most
  wanted = np.round(np.float64(u) / unit) * unit
  np.testing.assert_allclose(decoded, wanted, atol=1e-6)
  assert np.abs(u - decoded).max() <= unit / 2 * 1.0001
  assert np.abs(message.levels).max() == most


@pytest.mark.parametrize('scale', ['max', 'norm'])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_stochastic_levels_are_unbiased_and_keep_the_variance_bounds(
  bits, scale
):
  num, draws = 32, 4000
  u = np.random.default_rng(4).normal(size=num).astype(np.float32)
  codec = uploads.quantised(bits, 'stochastic', scale)
  one = lambda key: send(codec, jnp.asarray(u), context=Context(key=key))[0]
  got = np.float64(jax.jit(jax.vmap(one))(jax.random.split(KEY, draws)))
  most = 2 ** (bits - 1) - 1
  size = np.abs(u).max() if scale == 'max' else np.linalg.norm(u)
  unit = np.float64(size) / most
  up = np.abs(u) / unit % 1
  spread = unit * np.sqrt(up * (1 - up))  # of each entry, exactly
  gap = np.abs(got.mean(0) - u)
  assert (gap <= 5 * spread / np.sqrt(draws) + 1e-5 * size).all()
  variance = ((got - u) ** 2).sum(1).mean()
  np.testing.assert_allclose(variance, (spread**2).sum(), rtol=0.05)
  assert variance <= num * unit**2 / 4 * 1.05
  if scale == 'norm':  # QSGD, lemma 3.1
    factor = min(num / most**2, np.sqrt(num) / most)
    assert variance <= factor * squared(u)
  nearest, _ = send(uploads.quantised(bits, 'nearest', scale), jnp.asarray(u))
  assert np.abs(nearest - u).max() > gap.max()  # which is biased


# ----------------------------------------------------------------- memories --

EXACT = {
  'top_k': functools.partial(uploads.top_k, 0.25),
  'top_k of a leaf': functools.partial(uploads.top_k, 0.25, 'leaf'),
  'sign': uploads.sign,
  'two bits': functools.partial(uploads.quantised, 2, 'nearest'),
  'low_rank': functools.partial(uploads.low_rank, 1),
}


def rounds(codec, num=4):
  """Sums of updates and of what the server decodes, and the last state.

  Values are whole numbers and masks hold powers of two: sums do not round.
  """
  rng = np.random.default_rng(5)
  state, told, got = codec.init({'w': jnp.zeros((4, 4))}), 0, 0
  for t in range(num):
    mask = jnp.array([True, True, t % 2 == 0, t % 2 == 0])
    update = {'w': jnp.asarray(rng.integers(-8, 9, (4, 4)), jnp.float32)}
    masks = Masks(None, {'w': mask})
    message, state = codec.encode(update, masks, state, HERE)
    told += np.float64(tree.apply_mask(update, masks.trained)['w'])
    got += np.float64(codec.decode(message, update, HERE)['w'])
  return told, got, state


@pytest.mark.parametrize('name', EXACT)
def test_sent_and_left_error_are_all_updates(name):
  told, got, state = rounds(EXACT[name](memory='error'))
  tolerance = 1e-4 if name == 'low_rank' else 0
  left = np.float64(state.memory['w'])
  np.testing.assert_allclose(got + left, told, atol=tolerance, rtol=0)
  assert np.abs(left).max() > 0.5
  _, lost, _ = rounds(EXACT[name](memory='none'))
  assert np.abs(lost - got).max() > 0.5


def test_differences_add_up_to_a_constant_update():
  update = jnp.array([5.0, -1.0, 3.0, 2.0])
  codec = uploads.top_k(0.25, memory='difference')
  state, got = codec.init(update), []
  for _ in range(4):
    message, state = codec.encode(update, WHOLE, state, HERE)
    got.append(codec.decode(message, update, HERE).tolist())
    np.testing.assert_array_equal(state.memory, got[-1])
  assert got[0] == [5, 0, 0, 0] and got[1] == [5, 0, 3, 0]
  assert got[3] == update.tolist()


def test_a_memory_needs_the_update_of_a_single_client():
  with pytest.raises(Error, match='this codec decodes the sum: use memory='):
    uploads.remembering(uploads.count_sketch(), 'error')


# --------------------------------------------------------- sketches, factors --


@pytest.mark.parametrize('estimate', ['mean', 'median'])
def test_a_count_sketch_is_unbiased(estimate):
  u = jnp.asarray(np.random.default_rng(6).normal(size=20), jnp.float32)
  codec, draws = uploads.count_sketch(0.5, 3, estimate), 4000
  one = lambda key: send(codec, u, context=Context(round_key=key))[0]
  got = np.float64(jax.jit(jax.vmap(one))(jax.random.split(KEY, draws)))
  spread = got.std(0)
  assert (np.abs(got.mean(0) - u) <= 5 * spread / np.sqrt(draws)).all()
  if estimate == 'mean':  # 4 columns, 3 rows
    wanted = (squared(u) - np.float64(u) ** 2) / 4 / 3
    np.testing.assert_allclose(spread**2, wanted, rtol=0.15)


def test_sketches_add_up():
  codec, (x, masks), (y, _) = uploads.count_sketch(0.5), made(1), made(2)
  encoded = lambda u: codec.encode(u, masks, (), HERE)[0]
  both = tree.add(x, y)
  got = codec.decode(tree.add(encoded(x), encoded(y)), both, HERE)
  wanted = codec.decode(encoded(both), both, HERE)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(np.float32(g), np.float32(w), atol=0.05)


def test_low_rank_is_exact_from_the_true_rank_on():
  rng = np.random.default_rng(7)
  product = lambda r: jnp.asarray(
    rng.normal(size=(2, 9, r)) @ rng.normal(size=(2, r, 8)), jnp.float32
  )
  codec, one, two = uploads.low_rank(2, 'none'), product(1), product(2)
  state, encode = codec.init(one), jax.jit(codec.encode)
  for update in (one, two, 0 * two, one, two):  # the basis never gets stuck
    message, state = encode(update, WHOLE, state, HERE)
    got = codec.decode(message, update, HERE)
    np.testing.assert_allclose(got, update, atol=2e-4)
  full = product(5)
  got, _ = send(codec, full)
  rest = squared(full - got)
  assert rest > 1  # a projection:
  np.testing.assert_allclose(rest, squared(full) - squared(got), rtol=1e-4)


def test_a_warm_start_approaches_the_best_factors():
  u = jnp.asarray(np.random.default_rng(8).normal(size=(9, 8)), jnp.float32)
  codec = uploads.low_rank(1, 'none')
  state, rest, encode = codec.init(u), [], jax.jit(codec.encode)
  for _ in range(40):
    message, state = encode(u, WHOLE, state, HERE)
    rest.append(squared(u - codec.decode(message, u, HERE)))
  best = (np.linalg.svd(np.float64(u))[1][1:] ** 2).sum()
  assert rest[0] > best * 1.02
  np.testing.assert_allclose(rest[-1], best, rtol=1e-3)


# ------------------------------------------------------------- combinations --


def loss(base, params, batch, key):
  del base, key
  return LossSum(jnp.sum((params['w'] - batch) ** 2), *jnp.float32([1, 0]))


def trained(num=60, rate=0.1, **parts):
  """The distance to the best parameters, of the best, before and after."""
  rng = np.random.default_rng(9)
  goals = jnp.asarray(rng.normal(size=(4, 1, 6, 5)) + 2, jnp.float32)  # [K, S]
  method = recipes.fed_avg(loss, local.optimizer('sgd', rate), **parts)
  state = method.init(KEY, {'w': jnp.zeros((6, 5))})
  new = tree.broadcast(method.init_client(state.params), 4)
  ones = jnp.ones(4)
  cohort = Cohort(jnp.arange(4), goals, ones, ones > 0, states=new)

  def body(carry, _):
    state, states = carry
    state, states, info = method.round(state, cohort._replace(states=states))
    return (state, states), info.bytes_down

  run = jax.jit(lambda *c: jax.lax.scan(body, c, length=num))
  (state, _), down = run(state, new)
  best = goals.mean((0, 1))
  far = np.linalg.norm(state.params['w'] - best) / np.linalg.norm(best)
  return far, int(down[0].sum())


LEARNS: dict[str, Any] = {
  'top_k': dict(upload=uploads.top_k(0.2, memory='error')),
  'sign': dict(upload=uploads.sign()),
  'both ways': dict(upload=uploads.quantised(4), download=uploads.quantised(8)),
}


@pytest.mark.parametrize('name', LEARNS)
def test_compressed_clients_learn(name):
  far, down = trained(**LEARNS[name])
  assert far < 0.1
  # 30 bytes and a scale, or 30 float32, for each of 4 clients.
  assert down == 4 * (34 if name == 'both ways' else 120)


REFUSED = {
  'a sum': (dict(download=uploads.count_sketch()), 'a download has no sum'),
  'a memory': (dict(download=uploads.sign()), 'a memory from round to round'),
  'factors': (
    dict(download=uploads.low_rank(memory='none')),
    'a memory from round to round',
  ),
  'a residual': (
    dict(
      download=uploads.quantised(8),
      aggregator=aggregators.fedex(),
      fold=lambda base, params: (base, params),
    ),
    'its downloads must be without loss',
  ),
  'a sketch under a median': (
    dict(upload=uploads.count_sketch(), aggregator=aggregators.median()),
    'sees no single client',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_makes_no_sense_is_refused(name):
  parts, sentence = REFUSED[name]
  with pytest.raises(Error, match=sentence) as error:
    recipes.fed_avg(loss, local.optimizer('sgd'), **parts)
  assert str(error.value).endswith('.')


@pytest.mark.parametrize(
  'name', ['flora', 'florist', 'decomfl', 'fed_kseed_pro', 'flasc']
)
def test_methods_with_a_download_of_their_own_refuse_another(name):
  with pytest.raises(Error, match='brings its own download'):
    getattr(recipes, name)(
      loss,
      local.optimizer('sgd'),
      fold=lambda base, params: (base, params),
      download=uploads.quantised(),
    )


@pytest.mark.parametrize(
  'build, sentence',
  [
    (lambda: uploads.quantised(3), 'quantised: bits=3 is none of 2, 4, 8.'),
    (
      lambda: uploads.quantised(rounding='up'),
      "quantised: rounding='up' is neither 'nearest' nor 'stochastic'.",
    ),
    (
      lambda: uploads.quantised(scale='l1'),
      "quantised: scale='l1' is neither 'max' nor 'norm'.",
    ),
    (
      lambda: uploads.sign('all'),
      "sign: memory='all' is none of 'none', 'error', 'difference'.",
    ),
    (lambda: uploads.low_rank(0), 'low_rank: rank=0 must be at least 1.'),
    (
      lambda: uploads.count_sketch(0.0),
      'count_sketch: density=0.0 must be in (0, 1].',
    ),
    (
      lambda: uploads.count_sketch(rows=0),
      'count_sketch: rows=0 must be at least 1.',
    ),
    (
      lambda: uploads.count_sketch(estimate='mode'),
      "count_sketch: estimate='mode' is neither 'median' nor 'mean'.",
    ),
  ],
)
def test_settings_out_of_range_are_one_sentence(build, sentence):
  with pytest.raises(Error) as error:
    build()
  assert str(error.value) == sentence


def test_configs_name_codecs_both_ways():
  argv = ['--config', 'configs/tiny.py', '--workdir', 'none']
  conf = config.parse(
    [
      *argv,
      '--config.upload.name=sign',
      '--config.upload.memory=difference',
      '--config.download.name=quantised',
      '--config.download.bits=4',
    ],
    SPEC,
  ).config
  resolved = config.resolved(conf, SPEC)
  assert resolved['upload'] == {'name': 'sign', 'memory': 'difference'}
  assert resolved['download'] == {
    'name': 'quantised',
    'bits': 4,
    'rounding': 'stochastic',
    'scale': 'max',
    'memory': 'none',
  }
