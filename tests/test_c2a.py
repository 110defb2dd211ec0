"""C2A against a float64 loop, on a toy network with one bottleneck."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest
import references_nodes as references

from fedjax_llm import adapters, local, models, nodes, recipes, tree
from fedjax_llm.adapters import peft
from fedjax_llm.types import Batch, Error, Model

E, R, F, RATE = 2, 3, toy.D, 0.5


@functools.cache
def start():
  kernel = {'kernel': jnp.ones((1, F, F))}
  base = {
    'layers': {'mlp': {'down_proj': kernel}, 'self_attn': {'o_proj': kernel}},
    'classifier': {'kernel': jnp.ones((F, toy.C))},
  }
  node = adapters.c2a(R, E, 2).init(jax.random.key(0), base)['generator']
  rng = np.random.default_rng(0)
  return {
    'generator': jax.tree.map(
      lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), node
    )._replace(labels=node.labels)
  }


def hidden(base, params, batch):
  made = params['generator'].generate()['layers']['mlp']['down_proj']['output']
  one = jax.tree.map(lambda x: x[0], made)
  return one.act_on_texts(
    None, base['embed'][batch.tokens], None, batch.segments > 0
  )


LOSS = local.classification(Model(hidden, lambda b, p, h: h @ b['head']))


def batches():
  """Texts of up to three tokens, the last row of some batches padding."""
  made = toy.batches(toy.K, 1)
  segments = np.array(made.segments)
  segments[:, :, 0, 2:] = 0  # a shorter text
  return made._replace(segments=segments)


@functools.cache
def trained(name='c2a'):
  loss = LOSS
  method = getattr(recipes, name)(loss, toy.sgd(RATE))
  cohort = toy.cohort()._replace(batches=batches())
  state = method.init(toy.KEY, start())
  states = tree.broadcast(method.init_client(state.params), toy.K)
  new, _, info = jax.jit(method.round)(
    state, cohort._replace(states=states), toy.base()
  )
  return new.params['generator'], info


def value(leaves, treedef, labels, batch, transposed):
  """The mean loss of a client's batch in float64."""
  node = jax.tree.unflatten(treedef, leaves)._asdict()
  node['layer'] = node['layer'][0]
  base = jax.tree.map(toy.f64, toy.base())
  states = references.customised(
    **{**node, 'labels': labels},
    y=base['embed'][batch.tokens],
    real=batch.segments > 0,
    transposed=transposed,
  )
  logits = states[:, 0] @ base['head']
  rows = [i for i, c in enumerate(batch.label) if c >= 0]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.mean([log_p[i, batch.label[i]] for i in rows])


def reference(uniform=False, transposed=False, step=1e-6):
  leaves, treedef = jax.tree.flatten(jax.tree.map(toy.f64, start()))
  treedef = jax.tree.structure(start()['generator'])
  total = [np.zeros_like(x) for x in leaves]
  for k in range(toy.K):
    batch = jax.tree.map(lambda x, k=k: x[k, 0], batches())
    labels = np.full(toy.C, 1 / toy.C)
    if not uniform:
      real = batch.label[batch.label >= 0]
      labels = np.bincount(real, minlength=toy.C) / len(real)
    of = functools.partial(
      value, treedef=treedef, labels=labels, batch=batch, transposed=transposed
    )
    for n, leaf in enumerate(leaves):
      for at in np.ndindex(leaf.shape):
        ends = []
        for sign in (1, -1):
          moved = [x.copy() for x in leaves]
          moved[n][at] += sign * step
          ends.append(of(moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        total[n][at] += toy.WEIGHT[k] / toy.WEIGHT.sum() * slope
  ends = [x - RATE * g for x, g in zip(leaves, total)]
  return jax.tree.unflatten(treedef, ends)


def test_a_round_is_the_mean_of_float64_steps():
  node, info = trained()
  want = reference()
  for name, got in zip(node._fields, node):
    if name == 'labels':
      np.testing.assert_array_equal(got, start()['generator'].labels)
      continue
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(getattr(want, name))):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=name)
  near = lambda other: max(
    np.abs(x - y).max()
    for x, y in zip(jax.tree.leaves(node), jax.tree.leaves(other))
  )
  assert near(reference(uniform=True)) > 1e-3  # without the batch's classes
  assert near(reference(transposed=True)) > 1e-3  # up as the transpose of down
  sent = sum(x.size for x in jax.tree.leaves(node)) - toy.C
  assert info.bytes_up.sum(1).tolist() == [4 * sent] * toy.K


@functools.cache
def encoder():
  return models.random_encoder(
    vocab_size=17, hidden_size=8, intermediate_size=8, num_layers=1,
    labels=('a', 'b'),
  )  # fmt: skip


def texts(padding):
  """Two texts, in rows with `padding` more places and one more row."""
  tokens = np.zeros((3, 4 + padding), np.int32)
  tokens[:2, :4] = np.random.default_rng(1).integers(1, 17, (2, 4))
  there = (tokens > 0).astype(np.int32)
  places = np.where(there > 0, np.arange(4 + padding), 0).astype(np.int32)
  return Batch(tokens, np.zeros_like(there, bool), there, places)


def test_padding_changes_nothing_and_a_text_changes_its_neighbour():
  loaded = encoder()
  params = adapters.c2a(2, 3, 2).init(jax.random.key(0), loaded.base)
  params = jax.tree.map(lambda x: x + 0.1, params)
  run = jax.jit(loaded.model.hidden)
  short = run(loaded.base, params, texts(0))
  long = run(loaded.base, params, texts(3))
  np.testing.assert_allclose(long[:2, :4], short[:2], rtol=1e-4, atol=1e-5)
  other = texts(0)
  other.tokens[1, 2] = 1 + other.tokens[1, 2] % 16
  moved = run(loaded.base, params, other)
  assert np.abs(moved[0] - short[0]).max() > 1e-5


def test_what_cannot_hold_is_refused():
  loaded = models.random(vocab_size=17, hidden_size=8, intermediate_size=8)
  with pytest.raises(Error, match='the model has no classifier: set task'):
    adapters.c2a().init(jax.random.key(0), loaded.base)
  headed = {**loaded.base, 'classifier': encoder().base['classifier']}
  params = adapters.c2a(2).init(jax.random.key(0), headed)
  with pytest.raises(Error, match='a Contextual node reads whole texts, so in'):
    loaded.model.hidden(loaded.base, params, texts(0))
  assert 'depends on the texts, and PEFT' in (peft.refusal(params) or '')
  reason = adapters.unmerged(encoder().base, params) or ''
  assert 'so it cannot be written into a weight' in reason
  wrong = nodes.Affine(jnp.ones((9, 8)), jnp.zeros(8))
  bad = {'generator': params['generator']._replace(text=wrong)}
  with pytest.raises(Error, match=r'output/text is \[2, 9, 8\], that of the'):
    encoder().model.hidden(encoder().base, bad, texts(0))
  private = local.optimizer('sgd')._replace(gradient=print)
  with pytest.raises(Error, match='whose histogram is its label'):
    recipes.c2a(LOSS, private)
  method = recipes.c2a(LOSS, local.optimizer('sgd'))
  cohort = toy.cohort()._replace(batches=batches()._replace(label=None))
  with pytest.raises(Error, match='c2a reads labels of texts: set task'):
    jax.eval_shape(
      method.round, method.init(toy.KEY, start()), cohort, toy.base()
    )
