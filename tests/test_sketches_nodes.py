"""Sketches of later families inside the network: prompts, adapters, batches.

As in `test_sketches`: a part or two, a real round, a closed form; a comment
names the contract without which the test fails. The closed forms are gradients
of the base's own weights, by backpropagation through plain texts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import B, D, K, T, close

from fedjax_llm import local, nodes, recipes, tree
from fedjax_llm.local.gradients import mean_loss
from fedjax_llm.types import Batch, ImagesWithTexts, LossSum, Pairs

RATE = 0.5
FRONT = np.array([20, 21, 22], np.int32)  # tokens that no text holds


def trained(params, cohort, loss=tiny.loss):
  """One step of SGD: what it added in the mean, and the round's metrics."""
  algorithm = recipes.fed_avg(loss, tiny.sgd(RATE), measure=None)
  state, _, info = tiny.run(algorithm, params, cohort)
  return tiny.moved(state.params, params), info


@functools.partial(jax.jit, static_argnums=3)
def _whole(base, params, batches, loss):
  def one(batch):
    of = lambda base: mean_loss(loss, base, params, params, batch, tiny.KEY)
    return jax.value_and_grad(of, has_aux=True)(base)

  (_, sums), grads = jax.vmap(one)(batches)
  return sums, grads


def by_base(batches, weight, *, base=None, params=None):
  """The token mean of all, and minus RATE times the mean base gradient."""
  base = tiny.base() if base is None else base
  sums, grads = _whole(base, params or {}, batches, tiny.loss)
  step = jax.tree.map(lambda g: -RATE * g, tiny.mean(grads, weight))
  return float(sums.total.sum() / sums.count.sum()), step


def behind(front, batch):
  """Texts behind tokens [..., P] that are not learned."""
  shape = (*batch.tokens.shape[:-1], front.shape[-1])
  num = shape[-1]
  put = lambda new, x: np.concatenate([np.broadcast_to(new, shape), x], -1)
  return Batch(
    tokens=put(front, batch.tokens),
    loss_mask=put(False, batch.loss_mask),
    segments=put(1, batch.segments),
    positions=put(np.arange(num), batch.positions + num),
  )


@pytest.fixture(scope='module')
def world():
  """A cohort, and the round of its texts behind the tokens FRONT."""
  cohort = tiny.cohort(steps=1)
  first = jax.tree.map(lambda x: x[:, 0], cohort.batches)
  return cohort, first, by_base(behind(FRONT, first), cohort.weight)


# ----------------------------------------------------------------- prompts --


def test_a_soft_prompt_learns_as_the_embeddings_of_text_in_front(world):
  """Contract: the place `params['inputs']`; the prompt is what travels."""
  cohort, _, (loss, step) = world
  table = tiny.base()['embed_tokens']['embedding']
  moved, info = trained({'inputs': nodes.Prompt(table[FRONT])}, cohort)
  assert float(info.metrics['local/loss']) == pytest.approx(loss, rel=1e-5)
  close(moved['inputs'].rows, step['embed_tokens']['embedding'][FRONT])
  assert info.bytes_up.sum(1).tolist() == [len(FRONT) * D * 4] * K


def test_a_prefix_learns_as_the_keys_and_values_of_text_in_front(world):
  """Contract: the place 'self_attn/prefix'."""
  cohort, _, (loss, step) = world
  base, decoder = tiny.base(), tiny.loaded().decoder

  def prefix(rows):  # one layer: tokens in front act through these alone
    table = base['embed_tokens']['embedding'].at[FRONT].set(rows)
    one = jnp.ones((1, len(FRONT)), jnp.int32)
    text = Batch(FRONT[None], one > 0, one, jnp.arange(len(FRONT))[None])
    _, cache = decoder.extend(
      {**base, 'embed_tokens': {'embedding': table}},
      {}, text, decoder.empty(1, len(FRONT)), 0,
    )  # fmt: skip
    turn = lambda x: x[:, 0].swapaxes(1, 2)  # [L, S, KV, head_dim]
    flat = lambda x: turn(x).reshape(len(x), len(FRONT), -1)
    return nodes.Prefix(flat(cache.keys), flat(cache.values))

  rows = base['embed_tokens']['embedding'][FRONT]
  node, back = jax.vjp(prefix, rows)
  moved, info = trained({'layers': {'self_attn': {'prefix': node}}}, cohort)
  assert float(info.metrics['local/loss']) == pytest.approx(loss, rel=1e-5)
  moved = jax.tree.map(jnp.float32, moved['layers']['self_attn']['prefix'])
  close(back(moved)[0], step['embed_tokens']['embedding'][FRONT])


# ---------------------------------------------------------------- adapters --


def with_weight(path, change):
  """The base with another kernel, and the function that finds its gradient."""
  *way, last = ['layers', *path.split('/')]
  find = lambda t: functools.reduce(lambda t, k: t[k], way, t)[last]['kernel']
  base = jax.tree.map(lambda x: x, tiny.base())
  module = functools.reduce(lambda t, k: t[k], way, base)
  module[last] = {**module[last], 'kernel': change(find(base))}
  return base, lambda tree: find(tree)[0]


def test_a_linear_bottleneck_is_a_change_of_the_weight_before_it(world):
  """Contract: the place 'output'; a constant of a node is no leaf."""
  cohort, first, _ = world
  rng = np.random.default_rng(3)
  down, up = (rng.normal(size=s).astype(np.float32) * 0.3
              for s in ((1, D, 2), (1, 2, D)))  # fmt: skip
  node = nodes.Bottleneck(down, up, activation=nodes.Activation.IDENTITY)
  params = {'layers': {'mlp': {'down_proj': {'output': node}}}}
  moved, info = trained(params, cohort)
  base, of = with_weight('mlp/down_proj', lambda w: w + w @ down @ up)
  loss, step = by_base(first, cohort.weight, base=base)
  assert float(info.metrics['local/loss']) == pytest.approx(loss, rel=1e-5)
  w, s = of(tiny.base()), of(step)
  moved = moved['layers']['mlp']['down_proj']['output']
  close(moved.up[0], np.asarray(w @ down[0]).T @ s)
  close(moved.down[0], np.asarray(w).T @ s @ up[0].T)


def test_scaled_keys_are_a_weight_with_scaled_columns(world):
  """(IA)3. Contract: a node at 'kernel' acts as the weight that it writes."""
  cohort, first, _ = world
  width = tiny.base()['layers']['self_attn']['k_proj']['kernel'].shape[-1]
  scale = np.linspace(0.5, 2, width, dtype=np.float32)[None]
  node = nodes.Scaled(scale)
  params = {'layers': {'self_attn': {'k_proj': {'kernel': node}}}}
  moved, info = trained(params, cohort)
  base, of = with_weight('self_attn/k_proj', node.write)
  loss, step = by_base(first, cohort.weight, base=base)
  assert float(info.metrics['local/loss']) == pytest.approx(loss, rel=1e-5)
  want = (np.asarray(of(tiny.base())) * of(step)).sum(0)
  close(moved['layers']['self_attn']['k_proj']['kernel'].scale[0], want)


# ------------------------------------------------------------------ images --


class Frame(NamedTuple):
  """A prompt of its own for every row of a batch: a node of a user."""

  rows: Any  # [B, P, D]

  PLACES = ('inputs',)

  def length(self) -> int:
    return self.rows.shape[-2]

  def before(self, x):
    return self.rows.astype(x.dtype)

  def check(self, shape, path):
    assert self.rows.shape[-1:] == shape


def seeing(base, params, batch, key):
  """Patches are projected to rows in front of the text about them."""
  patches = batch.pixels.reshape(batch.pixels.shape[0], len(FRONT), -1)
  frame = Frame(patches @ params['projection'])
  return tiny.loss(base, {'inputs': frame}, batch.text, key)


def test_a_picture_of_tokens_is_text_in_front(world):
  """Contract: `ImagesWithTexts` in a cohort; nodes of one's own at 'inputs'."""
  cohort, first, _ = world
  words = np.random.default_rng(4).integers(20, 29, (K, 1, B, len(FRONT)))
  pixels = np.eye(9, dtype=np.float32)[words - 20][..., None, :, :]
  pictures = ImagesWithTexts(pixels, cohort.batches)  # of [H, W, C] = [1, 3, 9]
  table = tiny.base()['embed_tokens']['embedding']
  moved, info = trained(
    {'projection': table[20:]}, cohort._replace(batches=pictures), seeing
  )
  front = words[:, 0].astype(np.int32)
  loss, step = by_base(behind(front, first), cohort.weight)
  assert float(info.metrics['local/loss']) == pytest.approx(loss, rel=1e-5)
  close(moved['projection'], step['embed_tokens']['embedding'][20:])
  useful = cohort.batches.segments.sum() / (K * B * T)
  assert float(info.metrics['clients/useful_tokens']) == pytest.approx(useful)


# ------------------------------------------------------------- preferences --


def preferred(base, params, batch, key, beta=0.7):
  """DPO (Rafailov et al. 2023, equation 7): a term of the loss a pair."""
  nats = local.causal_lm(tiny.loaded().model, per_row=True)
  gain = lambda side, before: -nats(base, params, side, key).total - before
  margin = gain(batch.chosen, batch.reference_chosen)
  margin -= gain(batch.rejected, batch.reference_rejected)
  total = jnp.sum(jax.nn.softplus(-beta * margin))
  return LossSum(total, jnp.float32(margin.size), jnp.sum(margin > 0.0))


def test_a_preference_moves_along_the_difference_of_two_texts(world):
  """Contract: `Pairs` in a cohort, references included; the unit is a pair."""
  cohort, params = world[0], tiny.lora()
  rng = np.random.default_rng(5)
  before = rng.normal(size=(2, K, 1, B)).astype(np.float32) - 12
  sides = cohort.batches, tiny.texts(K, 1, B, seed=6)
  moved, info = trained(
    params, cohort._replace(batches=Pairs(*sides, *before)), preferred
  )
  gain, g = [], []
  for side, reference in zip(sides, before):
    rows = jax.tree.map(lambda x: x.reshape(K * B, 1, T), side)
    count = rows.loss_mask[:, 0, 1:].sum(-1)
    mean = _nats(params, rows) / count
    of = tiny.gradients(params, tiny.floats(params), rows)
    g.append(jax.vmap(tree.scale)(of, -count))
    gain.append(-mean * count - reference.ravel())
  margin = gain[0] - gain[1]
  each = np.repeat(cohort.weight, B) / cohort.weight.sum() / B
  factor = RATE * 0.7 * each / (1 + np.exp(0.7 * margin))
  want = tree.weighted_sum(tree.sub(*g), jnp.float32(factor))
  close(moved, want, rtol=1e-3)
  nats = np.log1p(np.exp(-0.7 * margin)).mean()
  assert float(info.metrics['local/loss']) == pytest.approx(nats, rel=1e-4)
  assert info.metrics['local/tokens'] == K * B


@jax.jit
def _nats(params, rows):
  of = lambda row: tiny.loss(tiny.base(), params, row, None).total
  return jax.vmap(of)(rows)
