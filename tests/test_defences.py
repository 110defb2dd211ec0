"""Rules that trust a root, and rules on products, against dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import adversary, aggregators, clients, tree
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import Error, Masks, Uploads

KEY = jax.random.key(2)
K, D, F, R, L = 7, 9, 8, 2, 2
BAD = np.arange(K) == 3


def close(x, y, atol=2e-4):
  np.testing.assert_allclose(x, y, rtol=2e-4, atol=atol)


# ------------------------------------------------------------------- FLTrust --


def test_fltrust_is_the_algorithm_of_its_paper():
  rng = np.random.default_rng(0)
  u = rng.normal(size=(6, 5)) + 1.0
  u[4] *= -1  # away from the root
  ids = np.array([4, 9, 7, 1, 0, 2])
  sent = Uploads(
    {'a': jnp.float32(u[:, :2]), 'b': jnp.float32(u[:, 2:])},
    *(None, Masks(None, None)),
    jnp.arange(1.0, 7),
    jnp.ones(6, bool),
    ids=ids,
  )
  rule = aggregators.fltrust(root=[9, 7])
  server = (u[1] + u[2]) / 2
  total, trust = np.zeros(5), 0.0
  for k in (0, 3, 4, 5):
    cosine = u[k] @ server / np.linalg.norm(u[k]) / np.linalg.norm(server)
    t = max(0.0, cosine)
    total += t * np.linalg.norm(server) / np.linalg.norm(u[k]) * u[k]
    trust += t
  run = jax.jit(lambda x: rule.aggregate(x, (), None, KEY)[0].delta)
  got = run(sent)
  close(np.concatenate([got['a'], got['b']]), total / trust)
  # However long and however many: no longer than the root's update.
  far = sent._replace(
    update=jax.tree.map(lambda x: x.at[jnp.array([0, 3])].mul(1e6), sent.update)
  )
  assert float(tree.norm(run(far))) <= np.linalg.norm(server) * (1 + 1e-5)
  alone = sent._replace(ids=np.arange(20, 26))
  assert float(tree.norm(run(alone))) == 0.0


def test_the_root_is_in_every_round_and_reports():
  sample = clients.sampling.with_root(
    *(50, 4), root=[7, 3], availability=0.1, dropout=0.5, seed=1
  )
  others = set()
  for number in range(40):
    draw = sample(number)
    there = draw.ids.tolist()
    assert there == sorted(there, key=lambda i: (i < 0, i))
    for client in (3, 7):
      assert draw.reports[there.index(client)]
    others |= set(there) - {3, 7, -1}
  assert len(others) > 15
  with pytest.raises(Error, match=r'root is \(50,\): it holds ids from 0 to'):
    clients.sampling.with_root(50, 4, root=[50])
  with pytest.raises(Error, match='root has 5 clients, and cohort_size is 4'):
    clients.sampling.with_root(50, 4, root=range(5))


# --------------------------------------------------------------- in products --


def factored(attack=0.0, seed=0, spread=0.2):
  """Ends of K clients with one product in other factors, and the server."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  a, b, goal = draw(L, D, R), draw(L, R, F), draw(L, R, F)
  server = {
    'q': LowRank(jnp.float32(a), jnp.float32(b), jnp.full(L, 0.5)),
    'bias': jnp.ones(3),
  }
  ends = []
  for k in range(K):
    turn = np.eye(R) + 0.3 * draw(L, R, R)
    new = b + 0.5 * goal + spread * draw(L, R, F)
    if BAD[k]:
      new = b - attack * goal
    node = LowRank(
      jnp.float32(a @ turn),
      jnp.float32(np.linalg.solve(turn, new)),
      jnp.full(L, 0.5),
    )
    ends.append({'q': node, 'bias': 1 + jnp.float32(0.1 * draw(3))})
  sent = aggregators.received(server, ends)
  return sent._replace(ids=jnp.arange(K)), server, ends


def dense(params):
  a, b, s = (np.asarray(x, np.float64) for x in params['q'][:3])
  return np.concatenate(
    [(s[:, None, None] * a @ b).ravel(), np.float64(params['bias'])]
  )


RULES = {
  'centred_clipping': aggregators.centred_clipping(radius=1.0, iterations=3),
  'fltrust': aggregators.fltrust(root=[0]),
  'foolsgold': aggregators.foolsgold(),
  'geometric_median': aggregators.geometric_median(iterations=40),
  'krum': aggregators.krum(1, num_selected=2),
  'mean': aggregators.mean(),
  'nearest_mixing': aggregators.nearest_mixing(
    aggregators.krum(1), byzantine_fraction=0.2
  ),
  'norm_bounding': aggregators.norm_bounding(bound=1.5),
}


@jax.jit
def everything(sent, server):
  """Every rule in products, and on dense changes; one program."""
  flat = lambda p: jnp.concatenate(
    [
      jnp.ravel(p['q'].scale[:, None, None] * p['q'].a @ p['q'].b),
      p['bias'],
    ]
  )
  whole = tree.whole(sent)
  change = jax.vmap(flat)(whole) - flat(server)
  plain = sent._replace(update=change, start=change, masks=Masks(None, None))
  results = {}
  for name, rule in RULES.items():
    one = aggregators.as_stack(rule)
    zero = jnp.zeros(change.shape[1])
    want = one.aggregate(plain, one.init(zero, KEY), zero, KEY)[0].delta
    ours = aggregators.in_products(rule)
    new = ours.aggregate(sent, (), server, KEY)[0]
    got = {
      'q': server['q']._replace(a=new.assign['q'].a, b=new.assign['q'].b),
      'bias': server['bias'] + new.delta['bias'],
    }
    results[name] = (flat(got) - flat(server), want)
  return results


def test_a_rule_in_products_is_that_rule_on_dense_matrices():
  """All clients and the server share columns, so rank R holds each result."""
  sent, server, _ = factored(attack=2.0)
  for name, (got, want) in everything(sent, server).items():
    size = float(jnp.linalg.norm(want))
    assert size > 0.1, name
    gap = float(jnp.linalg.norm(got - want)) / size
    # The start of the geometric median is that of its coordinates.
    assert gap < (1e-2 if name == 'geometric_median' else 2e-3), (name, gap)


def test_the_breakdown_of_rules_in_products():
  bounded = ('fltrust', 'geometric_median', 'krum')
  for size in (1e1, 1e3):
    sent, server, ends = factored(attack=size)
    honest = [dense(e) - dense(server) for e in np.array(ends, object)[~BAD]]
    largest = max(map(np.linalg.norm, honest))
    got = {k: float(jnp.linalg.norm(x)) for k, (x, _) in everything(
      sent, server).items()}  # fmt: skip
    for name in bounded:
      assert got[name] <= 2.5 * largest, (name, size)
    assert got['norm_bounding'] <= 1.5 * 1.01
    assert got['centred_clipping'] <= 3 * 1.01
    assert got['mean'] > size / 10


def test_rules_on_entries_are_not_turned():
  for rule in (
    aggregators.median(),
    aggregators.trimmed_mean(),
    aggregators.bucketing(),
    aggregators.flexlora(),
    aggregators.foolsgold(num_clients=3),
  ):
    assert not rule.traits.rotates
    with pytest.raises(Error, match='in_products needs a rule on lengths'):
      aggregators.in_products(rule)


# --------------------------------------------------------- gradient assembly --


def test_assembled_factors_are_near_and_their_product_is_not():
  sent, server, ends = factored(spread=0.5)
  attack = adversary.assembled(clients=[3])
  got = jax.jit(lambda x: attack(x, KEY))(sent)
  ours = tree.whole(got)['q']
  plain = tree.whole(sent)['q']
  goal = np.mean([dense(e) for e in np.array(ends, object)[~BAD]], 0)
  goal = goal - dense(server)
  for factor in ('a', 'b'):
    x, u = (np.asarray(getattr(n, factor), np.float64) for n in (ours, plain))
    np.testing.assert_array_equal(x[~BAD], u[~BAD])
    centre = u[~BAD].mean(0)
    apart = [np.linalg.norm(row - centre) for row in u[~BAD]]
    assert np.linalg.norm(x[3] - centre) <= np.median(apart) * (1 + 1e-4)
  # The product of the mean factors moves against the honest change.
  served = lambda nodes, rows: np.concatenate(
    [
      (
        0.5
        * np.asarray(nodes.a, np.float64)[rows].mean(0)
        @ np.asarray(nodes.b, np.float64)[rows].mean(0)
      ).ravel(),
      np.ones(3),
    ]
  )
  less = served(ours, np.ones(K, bool)) @ goal
  honest = served(plain, ~BAD) @ goal
  neutral = adversary.free_riders(clients=[3])(sent, KEY)
  lazy = served(tree.whole(neutral)['q'], np.ones(K, bool)) @ goal
  assert less < lazy < honest
  with pytest.raises(Error, match='assembled needs the low-rank factors'):
    attack(sent._replace(update={'w': sent.update['bias']}), KEY)
