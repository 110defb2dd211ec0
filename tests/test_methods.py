"""`configs/methods.py`: every recipe has a config that fits it."""

import functools
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import named_images
import numpy as np
import pytest
import tiny

from fedjax_llm import adapters, local, models, recipes, server, tree, uploads
from fedjax_llm.adapters.prompts import classes
from fedjax_llm.run import builders, config, experiment, sections
from fedjax_llm.types import Error, LossSum

PATH = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
METHODS = runpy.run_path(str(PATH))
each = pytest.mark.parametrize('name', METHODS['NAMES'])
# Their loss is of the network: its statistics, logits or states.
TOLD_BY_NETWORKS = (
  *('fed_amole', 'fed_biot', 'fed_dat', 'fed_l2p', 'fed_mkt', 'fed_pgp'),
  *('fed_rs', 'fed_sp', 'offsite_tuning', 'sgpt'),
)


def parsed(name, *more):
  given = ['--config', f'{PATH}:{name}', '--workdir', 'none']
  return config.parse([*given, *more], sections.SPEC).config


def sum_of_squares(base, params, batch, key):
  """A loss that is cheap to trace: what is tried is all but the network."""
  del base, key
  count = jnp.sum(batch.segments > 0).astype(jnp.float32)
  floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
  total = sum(jnp.sum((x - 1) ** 2) for x in floats)  # zeros move too
  return LossSum(count * total, count, count)


@each
def test_the_long_form_is_the_smoke_form_with_more_of_it(name):
  long, smoke = parsed(name), parsed(f'{name}:smoke')
  assert long['num_rounds'] > smoke['num_rounds']
  for section in ('adapter', 'local', 'model'):
    assert long[section] == smoke[section]
  assert long['algorithm'].keys() == smoke['algorithm'].keys()


@pytest.mark.parametrize('arg', ['fed_sab', 'fed_sb:smoky', 'smoke:fed_sb'])
def test_an_unknown_method_is_one_sentence(arg):
  with pytest.raises(Error) as told:
    parsed(arg)
  assert str(told.value).count('. ') == 0
  if arg == 'fed_sab':
    assert "nearest is 'fed_sb'" in str(told.value)


def test_stages_of_a_run_fit_into_its_rounds():
  for name in ('fed_dpa_f', 'slora'):
    for form in ('', ':smoke'):
      conf = parsed(f'{name}{form}')
      stages = {'federated_rounds', 'first_rounds'} & set(conf['algorithm'])
      assert stages
      for stage in stages:
        assert conf['algorithm'][stage] < conf['num_rounds']


# ------------------------------------------------------------------ halves --

N = 10  # clients


@functools.cache
def network(labels, num_layers=2):
  """The smallest models of the configs: of two layers, as `fed_ra` wants."""
  sizes: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=16, vocab_size=29
  )
  if labels:
    return models.random_encoder(labels=('a', 'b'), **sizes)
  return models.random(num_layers=num_layers, **sizes)


def small(name):
  """A method of the configs on a small adapter: (algorithm, params, cohort)."""
  conf = parsed(f'{name}:smoke')
  task = conf.get('task') or {'name': 'causal_lm'}
  labels = task['name'] == 'classification'
  images = task['name'] == 'zero_shot'
  loaded = network(labels, conf['model'].get('num_layers', 2))
  base = loaded.base
  if images:  # a toy of two towers
    sizes = classes.sizes(named_images.D, named_images.V, 8)
    base = {**named_images.base(features=8), **sizes}
  if conf['adapter'].get('targets') == 'all-linear':
    conf['adapter']['targets'] = ('q_proj',)
  make = lambda section, **more: builders.build(
    conf[section], sections.SPEC.sections[section], **more
  )
  profiles = None
  if conf.get('profiles'):
    profiles = make('profiles', num_clients=N, seed=0)
  adapter = make('adapter')
  loss = sum_of_squares
  if name in TOLD_BY_NETWORKS:
    loss = (local.classification if labels else local.causal_lm)(loaded.model)
  if images:
    loss = named_images.LOSS
  if task['name'] == 'grpo':
    rule = local.rewards.ended()
    sample = models.sampler(loaded, max_new_tokens=3, stops=(1, 2, 3))
    loss = local.Sampled(loaded.model, sample, rule, (1, 2, 3))
  algorithm = experiment.algorithm(
    conf,
    loss=loss,
    model=loaded.model,
    adapter=adapter,
    num_clients=N,
    profiles=profiles,
    public=tiny.texts(2, 2),
  )
  batches = tiny.texts(3, 1, 2)
  if labels:
    label = np.array([[[0, -1]], [[1, 0]], [[-1, 1]]], np.int32)
    batches = batches._replace(label=label)
  if images:
    batches = named_images.batches(3, 1)
  ids = np.array([4, 0, 3], np.int32)
  tiered = conf['clients'].get('name') == 'tiered'
  tiers = {'tier': np.ones(3, np.int32)} if tiered else ()
  cohort = tiny.cohort(batches=batches, ids=ids)._replace(
    valid=np.array([True, False, True]),
    profiles=jax.tree.map(lambda x: np.asarray(x)[ids], profiles or ())
    or tiers,
  )
  return algorithm, adapter.init(tiny.KEY, base), cohort, base


def watched(upload):
  """Returns an `identity` that leaves the message in the client's state."""

  def init(update):
    blank = jax.tree.map(lambda u: jnp.zeros(u.shape, bool), update)
    return upload.init(update), (tree.zeros_like(update), blank)

  def encode(update, masks, state, context):
    message, inner = upload.encode(update, masks, state[0], context)
    entries = jax.tree.map(
      lambda u, m: jnp.broadcast_to(True if m is None else m, u.shape),
      update,
      masks.trained,
    )
    return message, (inner, (message, entries))

  return upload._replace(init=init, encode=encode)


@pytest.fixture
def watching(monkeypatch):
  """Every `identity` upload is `watched`, those of other codecs are not."""
  fed_opt = server.fed_opt

  def watching_fed_opt(update, **parts):
    upload = parts['upload']
    if upload.encode.__qualname__ == uploads.identity().encode.__qualname__:
      parts['upload'] = watched(upload)
    return fed_opt(update, **parts)

  monkeypatch.setattr(server, 'fed_opt', watching_fed_opt)


def check_bytes(states, bytes_up):
  """Asserts that bytes are those of a client's serialised message.

  A bitmap may come with entries that the client chose. Reports, counted behind
  the leaves of the message, have tests of their own.
  """
  if not states.upload:
    return  # a codec of its own: test_uploads, test_zeroth_order
  _, (message, entries) = states.upload
  pairs = zip(jax.tree.leaves(message), jax.tree.leaves(entries))
  for i, (x, mask) in enumerate(pairs):
    for k in (0, 2):  # clients that are no padding
      wire = np.asarray(x)[k][np.asarray(mask)[k]].tobytes()
      more = int(bytes_up[k][i]) - len(wire)
      bitmap = -(-mask[k].size // 8)
      assert more == 0 or (mask[k].any() and 0 < more <= bitmap)


def check_round(algorithm, params, cohort, base):
  """Asserts that a round without halves learns and bills what it exchanges."""
  assert algorithm.exchanged is not None
  state = algorithm.init(tiny.KEY, params)
  cohort = cohort._replace(states=tiny.fresh(algorithm, state, 3))
  new, states, info = jax.jit(algorithm.round)(state, cohort, base)
  assert tiny.differs(new.params, state.params, by=1e-6)
  sizes = algorithm.exchanged(state.params, base, cohort.batches)
  num_steps = cohort.batches.tokens.shape[1]
  for counts, size in zip((info.bytes_up, info.bytes_down), sizes):
    steps = np.asarray(counts)[:, -num_steps:]
    assert steps.sum(1).tolist() == [size, 0, size]
  check_bytes(states, info.bytes_up)


def check_halves(name):
  """Asserts that a round of a method is `aggregate` of `train`."""
  algorithm, params, cohort, base = small(name)
  train, aggregate = algorithm.train, algorithm.aggregate
  if train is None or aggregate is None:  # the server learns within the steps
    return check_round(algorithm, params, cohort, base)
  state = algorithm.init(tiny.KEY, params)
  arrays = [x for x in jax.tree.leaves(state._replace(key=None)) if x.size]
  places = [x.unsafe_buffer_pointer() for x in arrays]
  assert len(set(places)) == len(places)  # a run donates every buffer once
  cohort = cohort._replace(states=tiny.fresh(algorithm, state, 3))

  @jax.jit
  def both(state, cohort, base):
    uploads, states, info = train(state, cohort, base)
    new, metrics = aggregate(state, uploads, base)
    info = info._replace(metrics={**info.metrics, **metrics}, reports=None)
    whole = algorithm.round(state, cohort, base)
    return whole, (new, states, info)

  whole, parts = both(state, cohort, base)
  whole = (*whole[:2], whole[2]._replace(reports=None))
  plain = lambda x: x._replace(key=None)
  tiny.close(plain(parts[0]), plain(whole[0]), 1e-6, 1e-6)
  tiny.close(parts[1:], whole[1:], 1e-5, 1e-6)
  check_bytes(parts[1], parts[2].bytes_up)
  # They wait, their first rounds are local, or two clients of one version
  # cancel each other.
  if name not in ('align_fed', 'fed_at', 'fedlease', 'fwdllm', 'local_only'):
    assert tiny.differs(whole[0].params, state.params, by=1e-6)


@each
def test_a_round_of_every_method_is_its_two_halves(name, watching):
  check_halves(name)


def test_a_recipe_of_ones_own_gets_the_parts_that_it_hands_on():
  seen = {}

  def mine(loss, optimizer, **parts):
    seen.update(parts)
    return recipes.fed_avg(loss, optimizer, **parts)

  conf = {**parsed('fed_avg:smoke'), 'server': {'name': 'fed_avgm'}}
  conf['algorithm'] = {'name': mine}
  adapter = adapters.lora()
  experiment.algorithm(
    conf, loss=None, model=None, adapter=adapter, num_clients=3, block_size=2
  )
  assert seen['fold'] is adapter.fold and seen['block_size'] == 2
  assert 'server' in seen and 'model' not in seen
