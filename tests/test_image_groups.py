"""Methods on several prompts of a dual encoder: FedMGP and PLAN."""

import functools

import jax
import jax.numpy as jnp
import named_images as toy
import numpy as np
import pytest
import references_images as ref
from named_images import D, K, N, P, V
from prompted import IDS, apart, client_key, close, f64, log_softmax, mean, wire

from fedjax_llm import recipes
from fedjax_llm.nodes import PromptGroups
from fedjax_llm.recipes.images import fed_plan
from fedjax_llm.types import Error

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


# -------------------------------------------------------------------- PLAN --

STRENGTH = 0.7


@functools.cache
def plan():
  start = {'scores': groups(1)}
  settings = dict(num_clients=N, num_heads=1, strength=STRENGTH)
  return toy.run(recipes.fed_plan, start, 3, toy.cohort(), **settings)


def near_a_reference(x, y, a, reference, held=STRENGTH):
  logits = logits_of(x, *a)
  wanted = np.exp(log_softmax(reference(x)))
  far = -(wanted * log_softmax(logits)).sum(-1).mean()
  return toy.nll(logits, y) + held * far


def zero_shot(x):
  return toy.logits(x, toy.texts())


def global_prompts(bank, flat):
  """Both aggregators on the prompts of clients, in the order of their ids."""
  half, order = len(flat) // 2, np.argsort(IDS)
  stack = lambda i: np.stack([bank[k][i] for k in order])
  return [
    ref.mixed(stack(i), flat[half * i :][:half], 1).mean(0) for i in range(2)
  ]


def plan_by_hand(first, flat):
  """Rounds 0 to 2: the clients' prompts, the aggregators, prompts again."""
  near = functools.partial(near_a_reference, reference=zero_shot)
  bank = [toy.trained(near, k, first) for k in range(K)]

  def of_mixers(x, y, a):
    return toy.nll(logits_of(x, *global_prompts(bank, a)), y)

  ends = [toy.trained(of_mixers, k, flat) for k in range(K)]
  flat = [mean(each, np.ones(K)) for each in zip(*ends, strict=True)]
  both = global_prompts(bank, flat)
  near = functools.partial(
    near_a_reference, reference=lambda x: logits_of(x, *both)
  )
  return bank, flat, both, [toy.trained(near, k, bank[k]) for k in range(K)]


def test_plan_equals_a_float64_loop():
  algorithm, seen = plan()
  first = [f64(groups(1).rows)[0], f64(groups(1).visual)[0]]
  start = [f64(x) for x in jax.tree.leaves(seen[0][0].params['mixers'])]
  bank, flat, both, last = plan_by_hand(first, start)
  at = np.array(IDS)
  once, twice, thrice = (seen[t][0].params for t in (1, 2, 3))
  close(once['prompts'].rows[at], np.stack([b[0] for b in bank]), atol=1e-4)
  close(once['prompts'].visual[at], np.stack([b[1] for b in bank]), atol=1e-4)
  others = np.setdiff1d(np.arange(N), at)
  assert not np.asarray(once['prompts'].rows)[others].any()
  for got, want in zip(jax.tree.leaves(twice['mixers']), flat, strict=True):
    close(got, want, atol=1e-4)
  close(twice['prompts'].rows, once['prompts'].rows, atol=0)
  close(thrice['prompts'].rows[at], np.stack([b[0] for b in last]), atol=1e-4)
  served = jax.jit(algorithm.personal, static_argnums=1)(twice, None)['scores']
  close(served.rows[0], both[0], atol=1e-4)
  close(served.visual[0], both[1], atol=1e-4)
  # Neighbours: the mean of the prompts; a client without the reference.
  apart(both[0], np.mean([b[0] for b in bank], 0), by=1e-2)
  alone = functools.partial(near_a_reference, reference=zero_shot, held=0)
  apart(toy.trained(alone, 0, first)[0], bank[0][0], by=1e-2)


def test_plan_sends_prompts_and_aggregators_in_turn():
  _, seen = plan()
  own = P * (D + V) * 4
  mixers = 4 * sum(x.size for x in jax.tree.leaves(seen[0][0].params['mixers']))
  for t in (1, 2, 3):
    want = own if t % 2 else mixers
    _, states, info = seen[t]
    assert info.bytes_up.sum(1).tolist() == [want] * K
    assert info.bytes_down.sum(1).tolist() == [N * own + mixers] * K
    assert [len(wire(states, k)) for k in range(K)] == [want] * K


def test_attention_of_prompts_has_heads_and_leaves_clients_out():
  mixer = fed_plan._mixer(jax.random.key(2), D)
  x = groups(4).rows
  here = jnp.array([True, False, True, True])
  got = jax.jit(fed_plan.among, static_argnums=3)(mixer, x, here, 2)
  parts = [f64(leaf) for leaf in jax.tree.leaves(mixer)]
  want = ref.mixed(f64(x)[np.array(here)], parts, 2)
  close(np.asarray(got)[np.array(here)], want, atol=1e-4)
  apart(want, ref.mixed(f64(x)[np.array(here)], parts, 1), by=1e-3)


# -------------------------------------------------------------- both of them --


@pytest.mark.parametrize(
  ('name', 'settings', 'text'),
  [
    ('fed_mgp', dict(num_sent=0), 'algorithm.num_sent is 0'),
    ('fed_mgp', dict(num_sent=4), 'at most the 3 groups of the adapter'),
    ('fed_mgp', dict(temperature=0.0), 'algorithm.temperature is 0.0'),
    ('fed_plan', dict(num_clients=2, num_heads=1), 'adapter.groups is 3'),
    (
      'fed_plan',
      dict(num_clients=2, num_heads=3),
      'num_heads is 3',
    ),
  ],
)
def test_wrong_settings_are_refused(name, settings, text):
  number = 1 if settings.get('num_heads') == 3 else G
  with pytest.raises(Error, match=text):
    algorithm = getattr(recipes, name)(toy.LOSS, toy.sgd(), **settings)
    algorithm.init(jax.random.key(0), {'scores': groups(number)})
