import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm import tree, uploads
from fedjax_llm.types import Context, Error, LowRank, Masks

KEY = jax.random.key(0)  # these codecs draw nothing
HERE = Context(key=KEY)
few = settings(max_examples=15, deadline=None, derandomize=True)

SHAPES = {'a': (2, 5, 3), 'b': (2, 3, 4), 'bias': (4,)}
DTYPES = {'a': np.float32, 'b': jnp.bfloat16, 'bias': np.float32}


def make(seed, num=None):
  """One update, or K of them, with a mask of ranks, of layers, and none."""
  rng = np.random.default_rng(seed)
  lead = () if num is None else (num,)

  def leaf(name):
    return rng.normal(size=lead + SHAPES[name]).astype(DTYPES[name])

  def flip(*shape):
    return rng.random(lead + shape) < 0.6

  def pack(a, b, bias):
    return {'q': LowRank(a, b, None), 'bias': bias, 'frozen': None}

  update = pack(leaf('a'), leaf('b'), leaf('bias'))
  trained = pack(flip(3), flip(2, 1, 1), None)
  held = pack(np.ones_like(trained['q'].a), trained['q'].b, None)
  return update, Masks(held=held, trained=trained)


def masked(update, mask):
  return {
    'q': LowRank(
      np.where(mask['q'].a, update['q'].a, 0),
      np.where(mask['q'].b, update['q'].b, 0),
      None,
    ),
    'bias': update['bias'],
    'frozen': None,
  }


def same(actual, wanted):
  assert jax.tree.structure(actual) == jax.tree.structure(wanted)
  for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
    assert a.dtype == w.dtype
    np.testing.assert_array_equal(a, w)


@few
@given(st.integers(0, 2**31 - 1), st.sampled_from(['trained', 'held']))
def test_identity_delivers_what_the_mask_lets_through_and_counts_it(
  seed, entries
):
  update, masks = make(seed)
  codec = uploads.identity(entries)
  message, state = codec.encode(update, masks, codec.init(update), HERE)
  mask = getattr(masks, entries)
  same(codec.decode(message, update, HERE), masked(update, mask))
  assert state == ()
  counts = codec.num_bytes(message, masks)
  assert counts['frozen'] is None
  for name, count in (('a', counts['q'].a), ('b', counts['q'].b)):
    entry = getattr(mask['q'], name)
    wanted = np.broadcast_to(entry, SHAPES[name]).sum()
    assert count == wanted * np.dtype(DTYPES[name]).itemsize
    assert count.dtype == jnp.int32
  assert counts['bias'] == 4 * 4  # no mask: all of it


def test_a_cohort_of_codecs_is_one_vmap():
  update, masks = make(3, num=6)
  codec = uploads.identity()

  @jax.jit
  @jax.vmap
  def send(update, masks):
    message, _ = codec.encode(update, masks, codec.init(update), HERE)
    return message, codec.num_bytes(message, masks)

  messages, counts = send(update, masks)
  for k in range(6):
    row, one, mask = tree.take((messages, update, masks.trained), k)
    same(row, masked(one, mask))
    assert counts['q'].a[k] == mask['q'].a.sum() * 2 * 5 * 4
  assert counts['bias'].tolist() == [16] * 6


def test_a_download_keeps_what_is_held_but_not_trained():
  params = {'a': jnp.array([1.0, 2.0, 3.0])}
  held = {'a': jnp.array([True, True, False])}
  masks = Masks(held=held, trained={'a': jnp.array([True, False, False])})
  download = uploads.identity('held')
  message, _ = download.encode(params, masks, (), HERE)
  assert message['a'].tolist() == [1.0, 2.0, 0.0]
  assert download.num_bytes(message, masks)['a'] == 8


def test_a_scalar_mask_stands_for_the_whole_leaf():
  leaf, codec = jnp.ones((3, 4), jnp.bfloat16), uploads.identity()
  for flag, wanted in ((True, 24), (False, 0)):
    masks = Masks(None, jnp.bool_(flag))
    message, _ = codec.encode(leaf, masks, (), HERE)
    assert codec.num_bytes(message, masks) == wanted
    assert bool(jnp.any(message != 0)) == flag


def test_from_optax_sends_the_transformed_update():
  update, masks = make(4)
  codec = uploads.from_optax(optax.clip_by_global_norm(0.5))
  message, _ = codec.encode(update, masks, codec.init(update), HERE)
  inside = masked(update, masks.trained)
  flat = np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(inside)]
  )
  factor = 0.5 / np.linalg.norm(flat)
  assert factor < 1
  wanted = jax.tree.map(lambda x: np.asarray(x, np.float64) * factor, inside)
  for m, w in zip(jax.tree.leaves(message), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(np.asarray(m, np.float64), w, rtol=1e-2)
  assert message['q'].b.dtype == jnp.bfloat16
  assert message['frozen'] is None
  same(codec.decode(message, update, HERE), message)


def test_from_optax_carries_its_state_and_sends_nothing_untrained():
  update, mask = jnp.array([1.0, 2.0]), jnp.array([True, True])
  codec = uploads.from_optax(optax.trace(decay=0.5))
  state = codec.init(update)
  first, state = codec.encode(update, Masks(None, mask), state, HERE)
  assert first.tolist() == [1.0, 2.0]
  fewer = Masks(None, jnp.array([True, False]))
  second, _ = codec.encode(update, fewer, state, HERE)
  assert second.tolist() == [1.5, 0.0]  # momentum alone is not sent


def test_from_optax_counts_the_dense_update():
  update, masks = make(5)
  codec = uploads.from_optax(optax.identity())
  counts = codec.num_bytes(update, masks)
  assert (counts['q'].a, counts['q'].b, counts['bias']) == (120, 48, 16)
  assert counts['frozen'] is None
  assert counts['q'].a.dtype == jnp.int32


def test_a_leaf_too_large_for_a_count_is_refused():
  leaf = jax.ShapeDtypeStruct((2**29, 2), jnp.float32)
  for codec in (uploads.identity(), uploads.from_optax(optax.identity())):
    masks = Masks(None, jnp.bool_(True))
    with pytest.raises(Error, match=r'\(536870912, 2\).*4294967296 bytes'):
      jax.eval_shape(codec.num_bytes, leaf, masks)


def test_other_entries_are_refused():
  with pytest.raises(Error, match="entries='all'"):
    uploads.identity('all')
