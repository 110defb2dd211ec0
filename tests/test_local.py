"""Local updates: optimizers by name, masks, errors a user can make."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_llm import local, tree
from fedjax_llm.clients import scopes
from fedjax_llm.types import Context, Error, Masks


def run(update, masks=None, cohort=None):
  params = toy.params()
  masks = masks or tree.full_masks(params, scopes.everything().labels(params))
  batches = tree.take((cohort or toy.cohort()).batches, 1)
  return jax.jit(update.run)(
    toy.base(),
    params,
    update.init(params),
    batches,
    masks,
    Context(key=jax.random.key(0)),
  )


@pytest.mark.parametrize(
  'name, keywords',
  [('sgd', {'momentum': 0.9}), ('adamw', {'weight_decay': 0.1}), ('lion', {})],
)
def test_a_named_optimizer_is_optax_with_the_same_arguments(name, keywords):
  ours = local.optimizer(name, 0.05, **keywords)
  theirs = getattr(optax, name)(0.05, **keywords)
  params = {'w': jnp.array([1.0, -2.0, 3.0])}
  grads = {'w': jnp.array([0.5, 0.1, -1.0])}
  a, b = ours.init(params), theirs.init(params)
  p, q = params, params
  for step in range(3):
    u, a = ours.update(grads, a, p, step)
    v, b = theirs.update(grads, b, q)
    p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
  toy.close(p, q)


def test_entries_that_are_not_trained_do_not_move_even_by_weight_decay():
  params = toy.params()
  masks = tree.full_masks(params, scopes.everything().labels(params))
  only = masks.trained['q']._replace(a=jnp.array([True, False]))  # [R]
  masks = Masks(masks.held, {'q': only})
  update = local.sgd(toy.loss, local.optimizer('adamw', 0.1, weight_decay=0.5))
  out = run(update, masks)
  moved = np.abs(out.update['q'].a)
  assert moved[:, 0].min() > 0
  assert moved[:, 1].max() == 0


def test_clipping_bounds_the_first_step():
  batches = toy.cohort(steps=1)
  free = run(local.sgd(toy.loss, toy.sgd(1.0)), cohort=batches)
  bound = float(tree.norm(free.update)) / 3
  out = run(local.sgd(toy.loss, toy.sgd(1.0, clip_norm=bound)), cohort=batches)
  np.testing.assert_allclose(tree.norm(out.update), bound, rtol=1e-5)
  loose = local.sgd(toy.loss, toy.sgd(1.0, clip_norm=bound * 100))
  toy.close(run(loose, cohort=batches).update, free.update)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda: local.optimizer('adamv'), "Did you mean 'adam"),
    (lambda: local.optimizer('adamw', weight_decy=1), "'weight_decay'"),
    (lambda: local.optimizer(schedule={'name': 'cosine'}), 'cosine_decay'),
    (
      lambda: local.optimizer(
        schedule={'name': 'cosine_decay_schedule', 'init_value': 1.0}
      ),
      'decay_steps',
    ),
    (lambda: local.sgd(toy.loss, toy.sgd(), prox=-1.0), '0 or more'),
    (lambda: toy.sgd(clip_norm=0.0), 'above 0'),
  ],
)
def test_mistakes_are_told_in_one_sentence(call, words):
  with pytest.raises(Error) as caught:
    call()
  assert words in str(caught.value)
  assert '\n' not in str(caught.value)
