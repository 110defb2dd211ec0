"""A federation over messages computes what the simulation computes."""

import numpy as np
import pytest
import runs
import tiny

from fedjax_llm import models, train, tree
from fedjax_llm.deploy import halves, wire
from fedjax_llm.run import rebuild
from fedjax_llm.types import Error


def command(tmp_path, name, **fields):
  """The command line of a run of two rounds, and its fields for a site."""
  data = runs.texts(tmp_path / 'texts.jsonl')
  words = runs.arguments(
    data, tmp_path / 'run', algorithm__name=name, num_rounds=2,
    clients__cohort_size=3, compilation_cache='none', **fields,
  )  # fmt: skip
  mark = '--config.'
  of = [word.removeprefix(mark) for word in words if word.startswith(mark)]
  return words, of


def opened(fields):
  path = f'{runs.ROOT}/configs/tiny.py:smoke'
  return halves.open(path, *fields, say=lambda text: None)


def federated(site, rounds=2):
  """Runs server and clients by messages that pass through bytes."""
  state, kept = site.start, {}
  for _ in range(rounds):
    draw = site.built.sampler(int(state.round))
    message, replies = halves.instruct(site, state), {}
    for client in map(int, draw.ids[draw.reports]):
      sent, kept[client], metrics = halves.train(
        site, message, client, kept.get(client)
      )
      assert np.isfinite(metrics['local/loss'])
      replies[client] = {name: x.copy() for name, x in sent.items()}
    state = halves.collect(site, state, replies)
  return state, message, replies


@pytest.mark.parametrize('name', ['scaffold'])
def test_messages_and_the_simulation_end_at_the_same_adapter(name, tmp_path):
  words, fields = command(tmp_path, name)
  site = opened(fields)
  state, message, replies = federated(site)
  runs.done(train, words)
  made = rebuild.open(str(tmp_path / 'run'), trusted=True)
  served = site.algorithm.personal(state.params, None)
  tiny.close(served, made.params, 1e-5, 1e-6)
  assert tiny.differs(served, site.built.initial, by=1e-5)
  # The factors on the wire have the names of PEFT.
  wanted = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
  for arrays in (message, *replies.values()):
    assert any(key.endswith(wanted) for key in arrays)


def test_a_client_that_is_lost_leaves_the_round_to_the_others(tmp_path):
  site = opened(command(tmp_path, 'fed_avg')[1])
  state = site.start
  alone = int(site.built.sampler(0).ids[0])
  message = halves.instruct(site, state)
  sent, _, _ = halves.train(site, message, alone)
  new = halves.collect(site, state, {alone: sent})
  update = {
    key.removeprefix('update/'): x
    for key, x in sent.items()
    if key.startswith('update/')
  }
  moved = wire.pack(tree.sub(new.params, state.params), site.network)
  assert len(update) == 2
  for key, x in update.items():
    np.testing.assert_allclose(moved[key], x, 1e-5, 1e-6)
  with pytest.raises(Error, match='client 6 is not one of the 6'):
    halves.train(site, message, 6)


def test_messages_that_do_not_fit_are_one_sentence(tmp_path):
  network = models.random().config
  tree_ = {'w': np.zeros(2)}
  for arrays, words in (
    ({}, 'the message lacks w'),
    ({'w': np.zeros(3)}, r'w of shape \(3,\); it must be \(2,\)'),
    ({'w': np.zeros(2), 'v': np.zeros(1)}, 'the message has v'),
  ):
    with pytest.raises(Error, match=words):
      wire.unpack(arrays, tree_, network)
  staged = dict(
    stages__name='by_key', stages__key='client', stages__rounds=1,
    stages__order="(('ann','bob','cyd'),('dan','eve','fay'))",
    partition__name='iid',
    partition__num_clients=3, population__heldout_fraction=0.3,
  )  # fmt: skip
  budgets = dict(profiles__name='budgets', profiles__choices='(99,)')
  for name, words, more in (
    ('fed_buff', 'keeps versions for late clients', {}),
    ('fed_pipe', 'plans between rounds', budgets),
    ('fed_avg', 'decides in which rounds a client has data', staged),
    ('fed_avg', 'sums messages before', dict(upload__name='count_sketch')),
    (
      'fed_avg',
      'deadline simulates who arrives when',
      dict(clients__name='deadline', system__name='fleet'),
    ),
    (
      'centralised',
      'clients.name=deadline has a clock, and with pooled',
      dict(
        clients__name='deadline',
        system__name='fleet',
        partition__name='pooled',
      ),
    ),
  ):
    with pytest.raises(Error, match=words):
      opened(command(tmp_path, name, **more)[1])


# ------------------------------------------------------------------- flower --


def grid_of(app, site, num_nodes):
  """Returns Flower's grid, with nodes that are called in this process."""
  from flwr.app import Context, RecordDict  # pyright: ignore
  from flwr.serverapp import Grid  # pyright: ignore

  contexts = {
    100 + i: Context(
      run_id=1,
      node_id=100 + i,
      node_config={'partition-id': i, 'num-partitions': num_nodes},
      state=RecordDict(),
      run_config=site,
    )
    for i in range(num_nodes)
  }

  class InProcess(Grid):
    def __init__(self):
      self.replies = {}

    def set_run(self, run):
      del run

    @property
    def run(self):
      raise NotImplementedError

    def get_node_ids(self):
      return list(contexts)

    def create_message(self, *args, **more):
      raise NotImplementedError

    def push_messages(self, messages):
      for number, message in enumerate(messages):
        ident = f'{len(self.replies)}-{number}'
        message.metadata.__dict__['_message_id'] = ident
        context = contexts[message.metadata.dst_node_id]
        self.replies[ident] = app(message, context)
        yield ident

    def pull_messages(self, message_ids):
      return [self.replies.pop(i) for i in sorted(message_ids)]

    def send_and_receive(self, messages, *, timeout=None):
      del timeout
      return self.pull_messages(list(self.push_messages(messages)))

  return InProcess()


def test_both_apps_of_flower_end_at_the_adapter_of_the_simulation(tmp_path):
  pytest.importorskip('flwr')
  from flwr.supercore import task_identity  # pyright: ignore

  from fedjax_llm.deploy import flower

  task_identity.TaskIdentity.task_id = 1
  task_identity.TaskIdentity.run_id = 1
  task_identity.TaskIdentity.node_id = 1

  words, fields = command(tmp_path, 'ditto')
  settings = {
    'config': f'{runs.ROOT}/configs/tiny.py:smoke',
    'fields': ' '.join(fields),
    'workdir': str(tmp_path / 'served'),
  }
  state = flower.run(grid_of(flower.client_app(), settings, 2), settings)
  runs.done(train, words)
  made = rebuild.open(str(tmp_path / 'run'), trusted=True)
  site = opened(fields)
  served = site.algorithm.personal(state.params, None)
  tiny.close(served, made.params, 1e-5, 1e-6)
  assert (tmp_path / 'served' / 'adapter' / 'adapter_config.json').exists()


# -------------------------------------------------------------------- flare --


def test_a_missing_flare_is_one_sentence(monkeypatch):
  from fedjax_llm.deploy import nvflare

  monkeypatch.setattr(nvflare, '_FLModel', None)
  for build in (nvflare.Executor, nvflare.Controller):
    with pytest.raises(Error, match=r'FLARE is not installed: pip install'):
      build('configs/tiny.py')
  with pytest.raises(Error, match=r'FLARE is not installed: pip install'):
    nvflare.job('configs/tiny.py', sites=['site-1'])


def test_a_job_of_flare_ends_at_the_adapter_of_the_simulation(tmp_path):
  pytest.importorskip('nvflare')
  from nvflare.apis.fl_constant import ReservedKey  # pyright: ignore
  from nvflare.apis.fl_context import FLContext  # pyright: ignore
  from nvflare.apis.signal import Signal  # pyright: ignore
  from nvflare.app_common.abstract.fl_model import FLModel  # pyright: ignore
  from nvflare.app_common.decomposers import (  # pyright: ignore
    numpy_decomposers,
  )
  from nvflare.app_common.utils.fl_model_utils import (  # pyright: ignore
    FLModelUtils,
  )
  from nvflare.fuel.utils import fobs  # pyright: ignore
  from nvflare.private.fed.utils.fed_utils import (  # pyright: ignore
    nvflare_fobs_initialize,
  )

  from fedjax_llm.deploy import nvflare

  nvflare_fobs_initialize()
  numpy_decomposers.register()
  sites = ['site-1', 'site-2']
  words, fields = command(tmp_path, 'scaffold')
  config = f'{runs.ROOT}/configs/tiny.py:smoke'
  executors = {
    name: nvflare.Executor(config, ' '.join(fields), sites) for name in sites
  }

  def asked(name, message):
    """Passes a message and its reply through FLARE's bytes."""
    context = FLContext()
    context.set_prop(ReservedKey.IDENTITY_NAME, name, private=False)
    sent = fobs.loads(fobs.dumps(FLModelUtils.to_shareable(message)))
    reply = executors[name].execute('train', sent, context, Signal())
    return FLModelUtils.from_shareable(fobs.loads(fobs.dumps(reply)))

  class InProcess(nvflare.Controller):
    def send_model(self, *, data, targets, callback, **more):
      callback(asked(targets[0], data))

    def get_num_standing_tasks(self):
      return 0

  server = InProcess(config, ' '.join(fields), sites, str(tmp_path / 'served'))
  server.run()
  runs.done(train, words)
  made = rebuild.open(str(tmp_path / 'run'), trusted=True)
  served = opened(fields).algorithm.personal(server.state.params, None)
  tiny.close(served, made.params, 1e-5, 1e-6)
  assert (tmp_path / 'served' / 'adapter' / 'adapter_config.json').exists()
  with pytest.raises(Error, match='client 3, which site-2 serves'):
    asked('site-1', FLModel(params={}, meta={'client': 3}))
  # The job's files name the classes and their settings.
  job = nvflare.job(config, 'num_rounds=2', sites=sites, seconds=60)
  job.export_job(str(tmp_path))
  files = list((tmp_path / 'federated_tuning').rglob('config_fed_*.json'))
  texts = [path.read_text() for path in files]
  assert any('fedjax_llm.deploy.nvflare.Controller' in x for x in texts)
  assert any('fedjax_llm.deploy.nvflare.Executor' in x for x in texts)
  assert not list(tmp_path.rglob('custom/*'))
