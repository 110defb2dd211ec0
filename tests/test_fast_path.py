"""What a round compiles to, and what it leaves uncomputed."""

import collections
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import fedjax_llm as fl
from fedjax_llm import clients, recipes, tree
from fedjax_llm.devices import compilation
from fedjax_llm.run import costs
from fedjax_llm.server.widths import narrowed
from fedjax_llm.types import Batch, Bound, Cohort, Draw, Error

ROOT = pathlib.Path(__file__).parents[1]
K, S, B, T, V = 5, 3, 1, 24, 83
STEPS = [1, 3, 1, 2, 1]  # with a text, of each client
LENGTHS = [5, 24, 7, 11, 6]


def cohort(steps=STEPS, lengths=LENGTHS, length=T, bound=22):
  rng = np.random.default_rng(0)
  num = len(steps)
  shape = (num, S, B, length)
  segments = np.zeros(shape, np.int32)
  for k in range(num):
    segments[k, : steps[k], :, : lengths[k]] = 1
  return Cohort(
    ids=np.arange(10, 10 + num, dtype=np.int32),
    batches=Batch(
      tokens=rng.integers(0, V, shape).astype(np.int32),
      loss_mask=(segments > 0) & (np.arange(length) > 1),
      segments=segments,
      positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
      bound=Bound(bound),
    ),
    weight=np.arange(1, num + 1).astype(np.float32),
    valid=np.ones(num, bool),
  )


def round_of(*, remat='none', **parts):
  loaded = fl.models.random(
    vocab_size=V, hidden_size=40, intermediate_size=56, remat=remat
  )
  algorithm = recipes.fed_avg(
    fl.local.causal_lm(loaded.model),
    fl.local.optimizer('adamw', 1e-2),
    **parts,
  )
  params = fl.adapters.lora(rank=4).init(jax.random.key(0), loaded.base)
  return algorithm, algorithm.init(jax.random.key(1), params), loaded.base


@pytest.fixture(scope='module')
def plain():
  """The round without blocks and widths, and its outcome."""
  algorithm, state, base = round_of()
  return jax.jit(algorithm.round)(state, cohort(), base)


@pytest.fixture(scope='module')
def narrow():
  """Blocks of two, rows of 8 or 24 tokens, everything recomputed."""
  algorithm, state, base = round_of(remat='full', block_size=2, widths=(8,))
  step = jax.jit(algorithm.round, donate_argnums=0)
  return step.lower(state, cohort(), base).compile(), state, base


# ------------------------------------------------------------ the program --


def test_blocks_and_widths_meet_the_base_in_one_matmul(narrow):
  """However the round is cut up: no copy of a weight for every client."""
  compiled, _, base = narrow
  text = compiled.as_text()
  kernels = {
    tuple(sorted(x.shape[-2:]))
    for path, x in jax.tree.leaves_with_path(base)
    if path[-1].key in ('kernel', 'embedding')
  }
  m = 2
  shapes = {}
  for name, dims in re.findall(r'(%[\w.-]+) = f32\[([\d,]+)\]', text):
    shape = [int(n) for n in dims.split(',')]
    shapes[name] = tuple(n for n in shape if n > 1)
    rest = list(shapes[name])
    if m in rest:
      rest.remove(m)
      # Layers are two as well: stacked [L, D, F] as they come, nothing more.
      assert rest.count(m) == 0 or tuple(sorted(rest[-2:])) not in kernels
  found = 0
  for line in text.splitlines():
    if ' dot(' in line:
      names = re.findall(r'%[\w.-]+', line.split(' dot(')[1].split(')')[0])
      if any(tuple(sorted(shapes.get(n, ()))) in kernels for n in names):
        found += 1
        assert not re.search(r'lhs_batch_dims=\{\d', line), line
  assert found >= 2 * 14  # seven matrices, twice, at two widths


def test_the_server_state_is_overwritten(narrow):
  compiled, state, base = narrow
  header = compiled.as_text().split('\n', 1)[0]
  aliased = re.findall(r'\{(\d+)\}: \((\d+), \{\}', header)
  leaves = jax.tree.leaves(state)
  # All of it but what is read again after it was written: the key.
  assert len(aliased) >= len(leaves) - 1
  told = compiled.memory_analysis()
  assert told.alias_size_in_bytes >= costs.num_bytes(state.params)
  given = jax.tree.map(jnp.copy, state)
  compiled(given, cohort(), base)
  assert all(x.is_deleted() for x in jax.tree.leaves(given.params))


def avals(jaxpr):
  for eqn in jaxpr.eqns:
    yield from (v.aval for v in eqn.outvars)
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from avals(inner)


def test_no_array_holds_all_logits_or_all_pairs_of_places():
  length, most = 278, 30
  loaded = fl.models.random(vocab_size=V, attention='blocked')
  algorithm = recipes.fed_avg(
    fl.local.causal_lm(loaded.model), toy.sgd(), block_size=2
  )
  params = fl.adapters.lora(rank=2).init(jax.random.key(0), loaded.base)
  state = algorithm.init(jax.random.key(1), params)
  texts = cohort([S] * K, [most] * K, length, bound=most)
  program = jax.make_jaxpr(algorithm.round)(state, texts, loaded.base)
  seen = collections.Counter()
  for aval in avals(program.jaxpr):
    shape = getattr(aval, 'shape', ())
    if V in shape:
      rest = int(np.prod(shape)) // V
      # Logits of a block, or the vocabulary's own matrix.
      assert rest <= max(2 * most, 64), aval
      seen['vocabulary'] += 1
    assert shape.count(length) + shape.count(length - 1) < 2, aval
    seen['places'] += length in shape
  assert seen['vocabulary'] and seen['places']


# ------------------------------------------------------------ compilations --


@pytest.mark.parametrize('name', ['fed_avg', 'fed_adam', 'rolora'])
def test_a_method_compiles_once_whoever_reports(name, caplog):
  algorithm = getattr(recipes, name)(toy.loss, toy.sgd(), block_size=2)
  state = algorithm.init(jax.random.key(0), toy.params())
  step = jax.jit(algorithm.round, donate_argnums=0)
  many = toy.cohort(num_clients=5)
  many = many._replace(
    states=tree.broadcast(algorithm.init_client(state.params), 5)
  )
  with caplog.at_level(logging.WARNING), jax.log_compiles():
    for reporting in (5, 3, 0, 1, 5):  # alternation: four kinds of rounds
      valid = np.arange(5) < reporting
      state, states, _ = step(state, many._replace(valid=valid), toy.base())
      many = many._replace(states=states)
  compiled = [
    r.getMessage()
    for r in caplog.records
    if re.match(r'Compiling jit\(round_fn\)', r.getMessage())
  ]
  assert len(compiled) == 1, compiled
  assert int(state.round) == 5


def test_a_second_start_compiles_nothing_again(tmp_path):
  """Two processes: what the first compiled, the second reads."""
  program = """
import json, sys
import jax
from fedjax_llm import train
from fedjax_llm.devices import compilation
counts = {}
def count(name, **_):
  counts[name] = counts.get(name, 0) + 1
jax.monitoring.register_event_listener(count)
status = train.main(sys.argv[1:])
found = {k.rsplit('/', 1)[-1]: v for k, v in counts.items()}
print(json.dumps([status, found.get('cache_misses', 0),
                  found.get('cache_hits', 0)]))
"""
  told, big = [], []
  for rounds in (1, 2):
    words = [
      *('--config', f'{ROOT}/configs/tiny.py:smoke'),
      *('--workdir', str(tmp_path / 'run')),
      *('--config.evals.samples=0', '--config.model.hidden_size=32'),
      *('--config.block_size=auto', f'--config.num_rounds={rounds}'),
      f'--config.compilation_cache={tmp_path}/xla',
    ]
    env = {k: v for k, v in os.environ.items() if 'COMPILATION_CACHE' not in k}
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    done = subprocess.run(
      [sys.executable, '-c', program, *words],
      capture_output=True,
      text=True,
      env=env,
      cwd=ROOT,
      timeout=300,
    )
    told.append(json.loads(done.stdout.splitlines()[-1]))
    assert told[-1][0] == 0, done.stderr
    big.append(
      {
        file.name
        for file in (tmp_path / 'xla').iterdir()
        if file.name.endswith('-cache') and file.stat().st_size > 20_000
      }
    )
    if rounds == 1:
      # What 'auto' chose is kept, and holds on another machine.
      file = tmp_path / 'run' / 'config.json'
      conf = json.loads(file.read_text())
      assert conf['block_size'] == 'auto'
      assert conf['chosen'] == {'block_size': 4}  # 1024 rows, 2 x 128 a client
      conf['chosen']['block_size'] = 1
      file.write_text(json.dumps(conf))
      assert told[0][1] > 10
    else:
      assert json.loads(file.read_text())['chosen'] == {'block_size': 1}
      assert '1 clients at once' in done.stdout
  # Blocks of one are another program, and the only one; the rest is helpers
  # of the resumption, a few instructions each.
  assert told[1][1] < 12 < told[1][2]
  assert big[0] < big[1]
  assert [name.split('-')[0] for name in big[1] - big[0]] == ['jit_round_fn']
  assert any(name.startswith('jit_rows') for name in big[0])  # evaluation


def test_a_cache_is_left_off_or_refused_in_a_sentence(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir  # pyright: ignore
  assert compilation.keep(None) is None
  assert compilation.keep('') is None
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    (tmp_path / 'file').touch()
    with pytest.raises(Error, match='cannot be made'):
      compilation.keep(str(tmp_path / 'file' / 'xla'))
    monkeypatch.setenv('FEDJAX_LLM_CACHE', str(tmp_path))
    folder = compilation.keep('auto')
    assert folder is not None and folder.parent == tmp_path / 'xla'
    # A setting of JAX's own comes first.
    assert compilation.keep(str(tmp_path / 'other')) is None
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


# ------------------------------------------------------------- less padding --


def test_blocks_widths_and_order_change_nothing_but_rounding(plain, narrow):
  compiled, state, base = narrow
  whole, _, told = plain
  for texts in (cohort(), sorted_cohort()[1]):
    new, _, heard = compiled(jax.tree.map(jnp.copy, state), texts, base)
    toy.close(
      jax.tree.leaves(new.params),
      jax.tree.leaves(whole.params),
      rtol=1e-4,
      atol=2e-6,
    )
    for name in ('local/loss', 'local/tokens', 'local/steps', 'local/accuracy'):
      np.testing.assert_allclose(
        heard.metrics[name], told.metrics[name], rtol=1e-5
      )


def sorted_cohort():
  texts = cohort()
  draw = Draw(texts.ids, texts.valid)
  return clients.cohorts.by_size(draw, texts)


def test_useful_tokens_are_real_ones_over_places_computed(plain, narrow):
  real = sum(s * n for s, n in zip(STEPS, LENGTHS, strict=True))
  _, _, told = plain
  np.testing.assert_allclose(  # everybody takes three steps of 24
    told.metrics['clients/useful_tokens'], real / (K * 3 * T), rtol=1e-6
  )
  compiled, state, base = narrow
  copy = lambda: jax.tree.map(jnp.copy, state)
  # As they come: (5, 24), (7, 11) and (6, padding) tokens; 3, 2 and 1 steps.
  places = 2 * (3 * 24 + 2 * 24 + 1 * 8)
  told = compiled(copy(), cohort(), base)[2]
  np.testing.assert_allclose(
    told.metrics['clients/useful_tokens'], real / places
  )
  # Sorted: (24, 11), (7, 6) and (5, padding); 3, 1 and 1 steps.
  places = 2 * (3 * 24 + 1 * 8 + 1 * 8)
  told = compiled(copy(), sorted_cohort()[1], base)[2]
  np.testing.assert_allclose(
    told.metrics['clients/useful_tokens'], real / places
  )


def test_steps_of_padding_at_the_end_are_not_computed():
  calls = []

  def loss(base, params, batch, key):
    jax.debug.callback(lambda: calls.append(1))
    sums = toy.loss(base, params, toy.Rows(*ROWS), key)
    return sums._replace(count=jnp.sum(batch.loss_mask, dtype=jnp.float32))

  rng = np.random.default_rng(0)
  ROWS = (
    rng.normal(size=(B, toy.D)).astype(np.float32),
    rng.normal(size=(B, toy.F)).astype(np.float32),
    np.ones(B, bool),
  )
  algorithm = recipes.fed_avg(loss, toy.sgd(), block_size=2)
  state = algorithm.init(jax.random.key(0), toy.params())
  step = jax.jit(algorithm.round)
  turns = []
  for texts in (cohort(), sorted_cohort()[1]):
    calls.clear()
    _, _, told = jax.block_until_ready(step(state, texts, toy.base()))
    jax.effects_barrier()
    turns.append(len(calls))
    assert int(told.metrics['local/steps']) == sum(STEPS)
  # Blocks of (1, 3), (1, 2), (1, the last again) steps; then (3, 2), (1, 1), 1.
  assert turns[0] == turns[1] * (3 + 2 + 1) / (3 + 1 + 1)


def test_rows_are_cut_only_where_they_are_padding():
  batch = Batch(*(np.ones((2, 1, 1, 12), np.int32) for _ in range(4)))
  batch.segments[..., 7:] = 0
  seen = []
  for widths in ((6, 7, 9), (6, 9), (6,), ()):
    got, places = narrowed(
      lambda b: b.segments.sum() + 100 * b.tokens.shape[-1], batch, widths
    )
    seen.append(int(got) - 14)
    assert int(places) == seen[-1] // 100
  assert seen == [700, 900, 1200, 1200]
  with pytest.raises(Error, match='widths are'):
    recipes.fed_avg(toy.loss, toy.sgd(), widths=(0,))


def test_clients_are_dealt_out_to_rows_of_devices_by_size():
  draw, dealt = clients.cohorts.by_size(
    Draw(np.arange(10, 15), np.ones(5, bool)), cohort(), num_rows=2
  )
  # Most steps first, then longest: 11, 13, 12, 14, 10, in turn to two rows.
  assert draw.ids.tolist() == dealt.ids.tolist() == [11, 12, 10, 13, 14]
  assert dealt.weight.tolist() == [2, 3, 1, 4, 5]
  assert (dealt.batches.segments > 0).sum((1, 2, 3)).tolist() == [
    72, 7, 5, 22, 6,
  ]  # fmt: skip
