"""Methods on several prompts of a dual encoder: FedMGP and PLAN."""

import functools

import jax
import jax.numpy as jnp
import named_images as toy
import numpy as np
import references_images as ref
from named_images import D, K, P, V
from prompted import IDS, apart, client_key, close, f64, mean, wire

from fedjax_llm import recipes
from fedjax_llm.nodes import PromptGroups

FIRST = jax.tree.map(lambda leaf: leaf[0, 0], toy.cohort().batches)
G = 3


def groups(number=G):
  rng = np.random.default_rng(6)
  draw = lambda *s: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32)
  share = jnp.full(number, 1 / number)
  return PromptGroups(draw(number, P, D), draw(number, P, V), share)


def logits_of(x, rows, visual):
  f = toy.length(toy.pooled(x, visual))
  return toy.SCALE * f @ toy.texts(rows).T


# ------------------------------------------------------------------ FedMGP --


def mgp_loss(x, y, a, diversity):
  rows, visual = a
  each = [toy.nll(logits_of(x, r, v), y) for r, v in zip(rows, visual)]
  texts = np.stack([toy.texts(r) for r in rows])
  images = np.stack([toy.length(toy.pooled(x, v)) for v in visual])
  far = ref.apart(texts).mean() + ref.apart(images).mean()
  return np.mean(each) - diversity * far / 2


@functools.cache
def mgp():
  start = {'scores': groups()}
  settings = dict(num_sent=2, diversity=3.0, temperature=0.2)
  return toy.run(recipes.fed_mgp, start, 2, toy.cohort(), **settings)


def mgp_by_hand(rounds, diversity=3.0):
  start = groups()
  own = [[f64(start.rows), f64(start.visual)] for _ in range(K)]
  sent = [f64(start.rows)[:2], f64(start.visual)[:2]]
  loss = functools.partial(mgp_loss, diversity=diversity)
  order: list = [None] * K
  for t in range(rounds):
    chosen: list = []
    for k in range(K):
      if t:
        for i in range(2):
          for r, g in enumerate(order[k][i]):
            own[k][i][g] = sent[i][r]
      own[k] = toy.trained(loss, k, own[k])
      key = jax.random.fold_in(client_key(IDS[k], t), 2**31 - 1)
      noise = np.asarray(jax.random.gumbel(key, (G,)))
      warm = 0.2 if t else 1e9  # even in the first round
      order[k] = [ref.drawn(x, c, warm, noise, 2) for x, c in zip(own[k], sent)]
      chosen.append([x[o] for x, o in zip(own[k], order[k])])
    sent = [mean([c[i] for c in chosen], np.ones(K)) for i in range(2)]
  return sent, own, order


def test_fed_mgp_equals_a_float64_loop():
  algorithm, seen = mgp()
  sent, own, order = mgp_by_hand(2)
  state, states, info = seen[-1]
  close(state.params['sent'].rows, sent[0], atol=1e-4)
  close(state.params['sent'].visual, sent[1], atol=1e-4)
  assert states.local.rows.tolist() == [o[0] for o in order]
  assert states.local.visual.tolist() == [o[1] for o in order]
  close(states.private['groups'].rows, np.stack([o[0] for o in own]), atol=1e-4)
  size = 2 * P * (D + V) * 4  # of two groups, both ways
  assert info.bytes_up.sum(1).tolist() == [size] * K
  assert info.bytes_down.sum(1).tolist() == [size] * K
  assert [len(wire(states, k)) for k in range(K)] == [size] * K
  # Neighbours: groups that are pulled together; the mean of the first groups.
  once = seen[1][0].params['sent'].rows
  apart(once, mgp_by_hand(1, -1.0)[0][0], by=1e-2)
  apart(sent[0], mean([o[0][:2] for o in own], np.ones(K)), by=1e-2)
  # Served: the own groups with the newest common ones in place.
  mine = jax.tree.map(lambda leaf: leaf[0], states)
  whole = {**state.params, 'groups': groups()._replace(
    rows=mine.private['groups'].rows, visual=mine.private['groups'].visual
  )}  # fmt: skip
  want = own[0][0].copy()
  want[order[0][0]] = sent[0]
  serve = jax.jit(algorithm.personal)
  close(serve(whole, mine)['scores'].rows, want, atol=1e-4)
  new = serve(state.params, algorithm.init_client(state.params))['scores']
  close(new.share, [0.5, 0.5, 0.0])
  close(new.rows[:2], sent[0], atol=1e-4)


def test_a_group_is_a_context_with_a_visual_prompt():
  node = groups()
  got = jax.jit(lambda n, b: n.scores(toy.seen(b, {}, FIRST)))(node, toy.base())
  each = [
    logits_of(FIRST.pixels, r, v)
    for r, v in zip(f64(node.rows), f64(node.visual))
  ]
  close(got, np.mean(each, 0), atol=1e-4)
  # Neighbour: the mean of the rows.
  other = logits_of(
    FIRST.pixels, f64(node.rows).mean(0), f64(node.visual).mean(0)
  )
  apart(got, other, by=1e-2)
