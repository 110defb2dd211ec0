"""Fed-CPrompt: a float64 loop over two tasks, and what it sends."""

import functools

import jax
import jax.numpy as jnp
import named_images as toy
import numpy as np
import pytest
import references_images as ref
from named_images import C, E, K, P, V
from prompted import apart, close, f64, mean, wire

from fedjax_llm import recipes
from fedjax_llm.nodes import GrowingPool
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.types import Error

N, EACH = 4, 2
SETTINGS = dict(rounds_per_task=1, num_tasks=2, pull=2.0, push=5.0, margin=50.0)


def pool():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  head = Affine(draw(E, C), draw(C))
  return GrowingPool(
    draw(N, P, V), draw(N, E), draw(N, E), head, jnp.int32(EACH)
  )


@functools.cache
def history():
  return toy.run(
    recipes.fed_cprompt, {'scores': pool()}, 3, toy.cohort(), **SETTINGS
  )


def features(x, a, active):
  rows, keys, attention = (y[:active] for y in a[:3])
  share = np.exp(attention - attention.max(1, keepdims=True))
  share = share / share.sum(1, keepdims=True)
  looked = toy.pooled(x)[:, None] * share
  near = ref.cosine(looked, keys[None])
  return toy.pooled(x, np.einsum('bn,nqv->bqv', near, rows))


def loss(x, y, a, task, received, before, push=5.0):
  active = (task + 1) * EACH
  f = features(x, a, active)
  far = lambda other, active: ((f - features(x, other, active)) ** 2).sum()
  term = 2.0 * far(received, active)
  if task:
    term = max(0.0, term - push * far(before, task * EACH) + 50.0)
  return toy.nll(f @ a[3] + a[4], y) + term


def one_client(k, start, task, before, **more):
  of = functools.partial(loss, task=task, received=start, before=before, **more)
  new = slice(task * EACH, (task + 1) * EACH)
  now, data = start, toy.cohort().batches
  for s in range(toy.S):
    x, y = toy.step_of(data, k, s)
    end = toy.stepped(functools.partial(of, x, y), now)
    for i in range(3):  # prompts of other tasks stay as they are
      kept = now[i].copy()
      kept[new] = end[i][new]
      end[i] = kept
    now = end
  return now


def served(start, task, before, **more):
  ends = [one_client(k, start, task, before, **more) for k in range(K)]
  return [mean(each) for each in zip(*ends)]


def leaves(state):
  return jax.tree.leaves(state.params['scores'])[:5]


def test_fed_cprompt_equals_a_float64_loop_over_two_tasks():
  _, seen = history()
  start = [f64(x) for x in jax.tree.leaves(pool())[:5]]
  once = served(start, 0, None)
  twice = served(once, 1, once)  # the first round of the second task
  thrice = served(twice, 1, once)
  for t, want in ((1, once), (2, twice), (3, thrice)):
    for x, y in zip(leaves(seen[t][0]), want, strict=True):
      close(x, y, atol=2e-4)
  actives = [int(seen[t][0].params['scores'].active) for t in range(4)]
  assert actives == [EACH, EACH, N, N]
  # Neighbours: prompts that stay; no push from the task before.
  apart(twice[0][EACH:], once[0][EACH:], by=1e-3)
  apart(twice[0], served(once, 1, once, push=0.0)[0], by=1e-3)


def test_clients_send_the_prompts_of_the_task_and_get_the_pool_before():
  _, seen = history()
  one = 4 * (P * V + 2 * E)
  head = 4 * C * (E + 1)
  for t in (1, 2, 3):
    _, states, info = seen[t]
    assert info.bytes_up.sum(1).tolist() == [EACH * one + head] * K
    assert [len(wire(states, k)) for k in range(K)] == [EACH * one + head] * K
    both = 2 * (N * one + head) + 4  # `active` comes with the pool before
    assert info.bytes_down.sum(1).tolist() == [both] * K


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (dict(rounds_per_task=0), 'algorithm.rounds_per_task is 0'),
    (dict(num_tasks=3), 'algorithm.num_tasks is 3, which does not divide'),
  ],
)
def test_wrong_settings_are_refused(settings, text):
  with pytest.raises(Error, match=text):
    algorithm = recipes.fed_cprompt(toy.LOSS, toy.sgd(), **settings)
    algorithm.init(jax.random.key(0), {'scores': pool()})
