"""SGPT against a float64 loop, on a toy classifier."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest

from fedjax_llm import adapters, local, recipes, tree
from fedjax_llm.adapters import peft
from fedjax_llm.nodes import Grouped
from fedjax_llm.types import Error, Model

P, Q, G, RATE, LEAST = 2, 1, 3, 0.5, 3


def start():
  rng = np.random.default_rng(2)
  draw = lambda *s: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32)
  node = Grouped(draw(P, toy.D), draw(G, Q, toy.D), draw(G, toy.D), jnp.ones(G))
  return {'inputs': node, 'out': {'bias': draw(toy.D)}}


def both(base, params, batch):
  """A prompt's rows with weights, so that their order matters."""
  e = base['embed'][batch.tokens]
  node, seen = params['inputs'], {}
  if hasattr(node, 'choose'):
    real = batch.segments > 0
    seen = {'inputs': node.statistics(e, real)}
    node = node.choose(e, real)
  rows = jnp.broadcast_to(node.rows, (len(e), *node.rows.shape[-2:]))
  weights = 1.0 + jnp.arange(rows.shape[1])
  front = jnp.einsum('bpd,p->bd', rows, weights / weights.sum())
  h = jnp.tanh(e + front[:, None]) @ base['mix'] + params['out']['bias']
  return h, seen


MODEL = Model(
  lambda *args: both(*args)[0], lambda base, params, h: h @ base['head'], both
)
LOSS = local.classification(MODEL)


def method(**settings):
  return recipes.sgpt(LOSS, toy.sgd(RATE), least=LEAST, **settings)


@functools.cache
def trained():
  algorithm = method()
  return algorithm, toy.run(algorithm, start())


# --------------------------------------------------------- float64, by hand --


def unit(x):
  return x / np.linalg.norm(x)


def group_of(query, keys, share):
  query = unit(np.maximum(query, 0))
  cost = [(1 - query @ unit(k)) * (s + 5e-4) for k, s in zip(keys, share)]
  best = int(np.argmin(cost))
  return best, query @ unit(keys[best])


def value(x, batch, share, alone):
  base = {name: toy.f64(y) for name, y in toy.base().items()}
  nats, far = [], []
  for tokens, here, label in zip(batch.tokens, batch.segments, batch.label):
    if label < 0:
      continue
    e = base['embed'][tokens]
    rows = x['shared']
    if not alone:
      g, alike = group_of(e[here > 0].mean(0), x['keys'], share)
      rows = np.concatenate([rows, x['groups'][g]])
      far.append(1 - alike)
    weights = 1.0 + np.arange(len(rows))
    front = weights @ rows / weights.sum()
    logits = (np.tanh(e[0] + front) @ base['mix'] + x['bias']) @ base['head']
    nats.append(np.log(np.exp(logits).sum()) - logits[label])
  return np.mean(nats) + (0 if alone else np.mean(far))


def descended(x, names, of, step=1e-6):
  new = dict(x)
  for name in names:
    grads = np.zeros_like(x[name])
    for at in np.ndindex(grads.shape):
      ends = []
      for sign in (1, -1):
        moved = x[name].copy()
        moved[at] += sign * step
        ends.append(of({**x, name: moved}))
      grads[at] = (ends[0] - ends[1]) / (2 * step)
    new[name] = x[name] - RATE * grads
  return new


def reference(rounds=2, m=0.5, km=0.5, balance=True, phased=True):
  node = start()['inputs']
  x = {name: toy.f64(getattr(node, name)) for name in node._fields[:3]}
  x['bias'] = toy.f64(start()['out']['bias'])
  total, w = np.zeros(G), toy.WEIGHT / toy.WEIGHT.sum()
  embed = toy.f64(toy.base()['embed'])
  for _ in range(rounds):
    share = total / total.sum() if balance and total.sum() else np.ones(G)
    ends, counts = [], np.zeros((toy.K, G))
    for k in range(toy.K):
      rows = [
        jax.tree.map(lambda y, k=k, s=s: y[k, s], toy.cohort().batches)
        for s in range(toy.S)
      ]
      for batch in rows:
        for tokens, here in zip(batch.tokens, batch.segments):
          if here.any():
            query = embed[tokens[here > 0]].mean(0)
            counts[k, group_of(query, x['keys'], share)[0]] += 1
      own = x
      for alone in (True, False) if phased else (False,):
        names = ('shared', 'bias') if alone else ('groups', 'keys', 'bias')
        names = names if phased else (*names, 'shared')
        for b in rows:
          own = descended(
            own, names, lambda y, b=b, s=share, a=alone: value(y, b, s, a)
          )
      ends.append(own)
    mean = lambda name, ends=ends: np.einsum(
      'k,k...->...', w, [e[name] for e in ends]
    )
    texts = counts.sum(0)
    ratio = np.where(
      texts > LEAST, counts / np.maximum(texts, 1), np.full((toy.K, 1), 1 / 3)
    )
    keys = np.einsum('kg,kgd->gd', ratio, [e['keys'] for e in ends])
    x = {
      'shared': mean('shared'),
      'bias': mean('bias'),
      'groups': m * x['groups'] + (1 - m) * mean('groups'),
      'keys': km * x['keys'] + (1 - km) * keys,
    }
    total = total + texts
  return x, total


def gap(state, want):
  node = state.params['inputs']._asdict()
  return max(
    np.abs(np.asarray(node[name]) - want[name]).max()
    for name in ('shared', 'groups', 'keys')
  )


def test_two_rounds_equal_a_float64_loop():
  _, seen = trained()
  state, _, info = seen[-1]
  want, total = reference()
  for name in ('shared', 'groups', 'keys'):
    toy.close(getattr(state.params['inputs'], name), want[name])
  toy.close(state.params['out']['bias'], want['bias'])
  np.testing.assert_array_equal(state.aggregator.texts, total)
  np.testing.assert_array_equal(state.params['inputs'].share, np.ones(G))
  other: Any
  for other in (
    {'m': 0.0}, {'km': 0.0}, {'balance': False}, {'phased': False}
  ):  # fmt: skip
    assert gap(state, reference(**other)[0]) > 1e-3, other
  size = 4 * (P * toy.D + G * Q * toy.D + G * toy.D + toy.D + G)
  assert info.bytes_up.sum(1).tolist() == [size] * toy.K


def test_what_cannot_hold_is_refused():
  with pytest.raises(Error, match='sgpt trains a prompt of groups: adapter'):
    method().init(toy.KEY, toy.prompt())
  with pytest.raises(Error, match='key_momentum is -1; it must be from 0 to'):
    method(key_momentum=-1)
  with pytest.raises(Error, match='sgpt brings its own aggregator'):
    method(aggregator=None)
  with pytest.raises(Error, match='size is 0; it must be at least 1'):
    adapters.grouped_prompt(size=0)
  params = {'inputs': start()['inputs']}
  assert 'the prompt of a group depends' in (peft.refusal(params) or '')
  table = {'embed_tokens': {'embedding': jnp.ones((5, toy.D))}}
  reason = adapters.unmerged(table, params) or ''
  assert 'so it cannot be written into a weight' in reason
  wrong = {'inputs': params['inputs']._replace(keys=jnp.ones((G, 9)))}
  with pytest.raises(Error, match=r'inputs/keys is \[3, 9\], that of the mod'):
    adapters.check(table, wrong, places=('inputs',))


def test_a_client_alone_serves_the_nearest_group():
  algorithm, seen = trained()
  served = algorithm.personal(seen[-1][0].params, tree.take(seen[-1][1], 0))
  np.testing.assert_array_equal(served['inputs'].share, np.ones(G))
