"""PFPT's summary of sets of prompt rows against a float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prompted as toy
import pytest
import scipy.optimize

from fedjax_llm import recipes, server
from fedjax_llm.recipes.prompts import pfpt
from fedjax_llm.types import Error

H, SWEEPS, RATE = 3, 3, 0.05
KEY = jax.random.key(3)
VALID = np.array([True, False, True])


@functools.cache
def rows():
  """Sets of two clients that agree about one row, and one that is away."""
  made = np.random.default_rng(4).normal(size=(3, toy.P, toy.D))
  made[2, 1] = made[0, 0] + 0.05
  return made.astype(np.float32)


@functools.cache
def summary(hidden, sweeps, rate):
  of = lambda rows, valid: pfpt.summary(rows, valid, KEY, hidden, sweeps, rate)
  return jax.jit(of)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def unpacked(x, shapes):
  parts, at = [], 0
  for shape in shapes:
    size = int(np.prod(shape))
    parts.append(x[at : at + size].reshape(shape))
    at += size
  return parts


def worth(parts, mine, taken, prior):
  """The value of each choice of a client's rows, [P, G], a loop."""
  theta, *w = parts
  table = np.zeros((len(mine), len(theta)))
  for i, centre in enumerate(theta):
    s = sigmoid(np.maximum(centre @ w[0] + w[1], 0) @ w[2] + w[3])
    (q,) = sigmoid(np.maximum(centre @ w[4] + w[5], 0) @ w[6] + w[7])
    for j, row in enumerate(mine):
      normal = -0.5 * ((row - centre) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
      table[j, i] = normal.sum()
      if prior:
        table[j, i] += np.log(q if i in taken else 1 - q)
  return table


def reference(valid=VALID, prior=True, votes=True):
  taken, networks = pfpt.begun(KEY, jnp.asarray(valid), rows(), H)
  taken = [list(map(int, row)) for row in taken]
  leaves = [
    toy.f64(rows()).reshape(-1, toy.D),
    *map(toy.f64, jax.tree.leaves(networks)),
  ]
  shapes = [x.shape for x in leaves]
  x = np.concatenate([leaf.ravel() for leaf in leaves])
  m, v, count = np.zeros_like(x), np.zeros_like(x), 0
  for _ in range(SWEEPS):
    for t in np.flatnonzero(valid):
      mine = toy.f64(rows()[t])

      def value(x, mine=mine, t=t):
        table = worth(unpacked(x, shapes), mine, taken[t], prior)
        return sum(table[j, i] for j, i in enumerate(taken[t]))

      grads = np.zeros_like(x)
      for n in range(len(x)):
        step = np.zeros_like(x)
        step[n] = 1e-5
        grads[n] = (value(x + step) - value(x - step)) / 2e-5
      table = worth(unpacked(x, shapes), mine, taken[t], prior)
      table[:, ~np.repeat(valid, toy.P)] = -1e9
      count += 1
      m, v = 0.9 * m - 0.1 * grads, 0.999 * v + 0.001 * grads**2
      hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
      x = x - RATE * hat[0] / (np.sqrt(hat[1]) + 1e-8)
      taken[t] = list(scipy.optimize.linear_sum_assignment(-table)[1])
  theta = unpacked(x, shapes)[0]
  number = np.zeros(len(theta))
  for t in np.flatnonzero(valid):
    number[taken[t]] += 1
  best = np.argsort(-number if votes else number, kind='stable')[: toy.P]
  return theta[np.sort(best)], number


def test_a_summary_equals_a_float64_loop():
  got = summary(H, SWEEPS, RATE)(rows(), jnp.asarray(VALID))
  want, number = reference()
  assert number.max() == 2 and (number > 0).sum() == 3  # one row is shared
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert np.abs(got - reference(votes=False)[0]).max() > 1e-2
  assert np.abs(got - reference(prior=False)[0]).max() > 1e-3
  mean = np.average(rows(), axis=0, weights=VALID.astype(float))
  assert np.abs(got - mean).max() > 1e-2  # FedPrompt


def test_a_client_that_did_not_report_changes_nothing():
  got = summary(H, SWEEPS, RATE)(rows(), jnp.asarray(VALID))
  other = rows().copy()
  other[1] = 7.0
  again = summary(H, SWEEPS, RATE)(other, jnp.asarray(VALID))
  np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-6)


def test_a_round_serves_the_summary_of_the_clients_ends():
  algorithm = recipes.pfpt(toy.LOSS, toy.sgd(0.5), hidden=H, sweeps=SWEEPS)
  (first, _, _), (state, _, info) = toy.run(algorithm, toy.prompt(), 1)
  assert algorithm.train is not None
  uploads, _, _ = jax.jit(algorithm.train)(first, toy.cohort(), toy.base())
  ends = uploads.start['inputs'].rows + uploads.update['inputs'].rows
  key = jax.random.split(jax.random.fold_in(toy.KEY, 0))[1]
  want = pfpt.summary(ends, uploads.valid, key, H, SWEEPS, 1e-3)
  toy.close(state.params['inputs'].rows, want)
  assert info.bytes_up.sum(1).tolist() == [4 * toy.P * toy.D] * toy.K


def test_what_cannot_hold_is_refused():
  plain = toy.sgd()
  with pytest.raises(Error, match='pfpt summarises soft prompts: adapter'):
    recipes.pfpt(toy.LOSS, plain).init(KEY, toy.factors())
  with pytest.raises(Error, match=r'server_rate is 0; it must be above 0'):
    recipes.pfpt(toy.LOSS, plain, server_rate=0)
  with pytest.raises(Error, match='pfpt brings its own aggregator'):
    recipes.pfpt(toy.LOSS, plain, aggregator=None)
  with pytest.raises(Error, match='must keep no moments: use server'):
    recipes.pfpt(toy.LOSS, plain, server=server.fed_adam(0.1))
