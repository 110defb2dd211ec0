"""Clients tested by a look at their own texts, from the part to a config."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixing import KEY, world

from fedjax_llm import evals, local, recipes, train, tree
from fedjax_llm.adapters.low_rank import multi
from fedjax_llm.evals import views
from fedjax_llm.nodes import Dual, LowRank
from fedjax_llm.run import tasks, viewing
from fedjax_llm.types import Error, Example

__all__ = ['world']  # the fixture
IDS = np.array([5, 9], np.int32)


def looked(view, world, parameters=None):
  """Two clients through a view: 5 owns row 0, 9 owns row 1."""
  loaded, both, batch, own, _ = world
  swapped = Dual(both.personal, both.shared)
  pair = tree.stack([both, swapped])
  if not view.dual:
    pair = tree.stack([both.shared, both.personal])
  some = tree.stack([own, jax.tree.map(lambda x: x[::-1], own)])
  group = (jax.tree.map(lambda x: x[None], batch), np.array([[5, 9, -1]]))
  place = {5: 0, 9: 1}
  look = views.viewing(
    view,
    lambda params, store, ids: tree.take(
      pair, np.array([place[int(i)] for i in ids])
    ),
    lambda ids: tree.take(some, np.array([place[int(i)] for i in ids])),
    own=[group],
  )
  report = look(loaded.base, None, None, IDS, KEY)
  assert report is not None
  return report.clients[f'{view.name}/own']


def alone(loss, world, each):
  """Row k by what `each` [2] says."""
  loaded, _, batch, _, _ = world
  return [
    float(loss(loaded.base, p, batch, KEY).total[k]) for k, p in enumerate(each)
  ]


def test_without_strength_a_mix_is_the_shared_adapter(world):
  loaded, both, *_, loss = world
  view = views.instance_mixed(loss, loaded.model, strength=0.0)
  want = alone(loss, world, [both.shared, both.personal])
  got = looked(view, world)
  np.testing.assert_allclose(got.total, want, rtol=1e-5)


def test_padding_among_a_clients_texts_says_nothing(world):
  loaded, both, batch, own, loss = world
  view = views.instance_mixed(loss, loaded.model)
  padded = jax.tree.map(lambda x: np.concatenate([x, 0 * x[:2]]), own)
  one, other = (
    view.prepare(loaded.base, both, texts, KEY) for texts in (own, padded)
  )
  assert other.valid.tolist() == [True] * 4 + [False] * 2
  weigh = evals.instance_weights(loaded.model)
  np.testing.assert_allclose(
    weigh(loaded.base, one, batch), weigh(loaded.base, other, batch), rtol=1e-5
  )
  plain = evals.Instances(both, one.states)
  np.testing.assert_allclose(
    weigh(loaded.base, plain, batch), weigh(loaded.base, one, batch), rtol=1e-5
  )


def test_a_fusion_tests_what_its_search_found_on_the_clients_texts(world):
  loaded, both, _, own, loss = world
  settings: dict = dict(num_candidates=2, num_generations=2)
  view = views.fused(loss, loaded.model, **settings)
  key = jax.random.fold_in(KEY, 5)
  weights, value = evals.fuse(loss, **settings)(loaded.base, both, own, key)
  mine = multi.blend((both.personal, both.shared), tuple(weights))
  got = view.prepare(loaded.base, both, own, key)
  jax.tree.map(np.testing.assert_array_equal, got, mine)
  sums = loss(loaded.base, got, own, key)
  found = sums.total.sum() / sums.count.sum() + 0.05 * jnp.abs(weights).sum()
  np.testing.assert_allclose(found, value, rtol=1e-4)
  np.testing.assert_allclose(
    looked(view, world).total[0], alone(loss, world, [mine])[0], rtol=1e-4
  )


def test_a_memory_is_of_the_clients_own_texts(world):
  loaded, both, batch, own, loss = world
  view = views.recalled(loss, loaded.model, weight=0.4, neighbours=3)
  memory = evals.remember(loaded.model)(loaded.base, both.shared, own)
  direct = evals.recalling(loaded.model, weight=0.4, neighbours=3)
  want = direct(loaded.base, memory, batch, KEY).total[0]
  np.testing.assert_allclose(looked(view, world).total[0], want, rtol=1e-5)
  without = views.recalled(loss, loaded.model, weight=0.0)
  plain = alone(loss, world, [both.shared, both.personal])
  np.testing.assert_allclose(looked(without, world).total, plain, rtol=1e-5)


def test_two_adapters_are_two_of_one_structure():
  node = LowRank(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.ones(()))
  full = node._replace(residual=jnp.ones((3, 3)))
  assert views.has_two(Dual({'q': full}, {'q': node}))
  assert not views.has_two({'q': node})
  assert not views.has_two(Dual({'q': jnp.ones((3, 3))}, {'q': node}))


# ------------------------------------------------------------------ config --


def said(folder, name, view):
  return [
    *('--config', 'configs/tiny.py:smoke', '--workdir', str(folder)),
    *(f'--config.algorithm.name={name}', '--config.model.hidden_size=16'),
    f'--config.evals.personal.name={view}',
  ]


def test_clients_that_trained_are_tested_with_what_they_keep(world):
  """Through the parts that a config builds, in place of a whole run."""
  loaded, both, batch, own, loss = world
  algorithm = recipes.fed_dpa_t(loss, local.optimizer('sgd', 0.1))
  state = algorithm.init(KEY, both.shared)
  params = state.params._replace(shared=both.shared)
  one = algorithm.init_client(params)
  kept = one._replace(private=tree.like(both, one.private))
  store = SimpleNamespace(
    seen=lambda: np.array([1]), gather=lambda ids: tree.stack([kept] * len(ids))
  )
  texts = [
    [
      Example(row.tokens[row.segments > 0], row.loss_mask[row.segments > 0])
      for row in (jax.tree.map(lambda x, i=i: x[i], own) for i in range(4))
    ]
  ] * 3
  names = ('ann', 'bob', 'cat')
  built = SimpleNamespace(
    task=tasks.Task(lambda *_, **__: loss),
    population=SimpleNamespace(train=texts, heldout=texts, names=names),
    **{'loaded': loaded, 'initial': both.shared, 'labels': None},
    **{'width': batch.tokens.shape[1], 'conf': {'algorithm': {'name': 'it'}}},
    tokenizer=SimpleNamespace(pad_id=0),
  )
  group = (jax.tree.map(lambda x: x[None], batch), np.array([[0, 1, 2]]))
  tests = SimpleNamespace(heldout=[group], common=[])
  section = {'name': 'instance_mixed', 'num_texts': 6}
  look = viewing.viewer(section, built, algorithm, tests, private=True)
  told = look(loaded.base, params, store, KEY)
  assert list(told['evals/instance_mixed/own/clients']) == ['bob']
  view = views.instance_mixed(loss, loaded.model)
  client = view.prepare(loaded.base, both, own, KEY)
  want = view.loss(loaded.base, client, batch, KEY)
  np.testing.assert_allclose(
    told['evals/instance_mixed/own/clients']['bob'],
    want.total[1] / want.count[1],
    rtol=1e-5,
  )


def test_a_fusion_of_one_adapter_is_refused(tmp_path, capsys):
  given = said(tmp_path / 'run', 'fed_avg', 'fused')
  assert train.main(given) == 1
  assert 'fd_lora or ditto, not fed_avg' in capsys.readouterr().err


def test_a_misspelt_view_names_the_nearest(tmp_path, capsys):
  given = said(tmp_path / 'run', 'fed_avg', 'recaled')
  assert train.main(given) != 0
  assert "the nearest is 'recalled'" in capsys.readouterr().err


def test_a_memory_of_labels_is_refused(world):
  loaded, both, _, own, loss = world
  view = views.recalled(loss, loaded.model)
  with pytest.raises(Error, match='remembers tokens'):
    view.prepare(loaded.base, both.shared, own._replace(label=0), KEY)
