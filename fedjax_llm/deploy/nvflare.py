"""The halves of a run as a job of NVIDIA FLARE (package `nvflare`).

`job` returns a `FedJob` with a `Controller` on the server and an `Executor` on
every site; any method whose rule is on uploads runs. The package is the extra
`nvflare`. What travels are FLARE's `FLModel`s with named arrays, LoRA factors
with PEFT's names, so FLARE's filters see them like those of a PyTorch client.

The sites are a list of names; the i-th serves the clients whose number is i
modulo their count. Private state of clients stays in the memory of their site
until the job ends.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_llm.deploy import halves, serving
from fedjax_llm.types import Error

_Executor: Any = object
_Controller: Any = object
_FLModel: Any = None
_convert: Any = None
try:
  from nvflare.apis.executor import (  # pyright: ignore[reportMissingImports]
    Executor as _Executor,
  )
  from nvflare.app_common.abstract.fl_model import (  # pyright: ignore[reportMissingImports]
    FLModel as _FLModel,
  )
  from nvflare.app_common.utils.fl_model_utils import (  # pyright: ignore[reportMissingImports]
    FLModelUtils as _convert,
  )
  from nvflare.app_common.workflows.model_controller import (  # pyright: ignore[reportMissingImports]
    ModelController as _Controller,
  )
except ImportError:
  pass


def _check() -> None:
  if _FLModel is None:
    raise Error(
      'NVIDIA FLARE is not installed: pip install "fedjax_llm[nvflare]".'
    )


class Executor(_Executor):
  """A site of FLARE that runs the clients' half for the clients it serves.

  A task's `FLModel` has the round's message as `params` and the client's number
  as `meta['client']`; the reply has its upload and its metrics.

  Args:
    config: FILE or FILE:ARG, as `--config` of `train`.
    fields: 'section.field=value ...', separated by spaces.
    sites: the names of all sites, in the order in which they serve clients.

  Raises:
    Error: FLARE is not installed.

  >>> Executor.__name__
  'Executor'
  """

  def __init__(
    self, config: str, fields: str = '', sites: Sequence[str] = ('site-1',)
  ):
    _check()
    super().__init__()
    self.config, self.fields, self.sites = config, fields, list(sites)
    self.kept: dict[int, Any] = {}

  def execute(self, task_name, shareable, fl_ctx, abort_signal):
    """Trains the client of a task; returns its reply, a `Shareable`.

    Raises:
      Error: a client that another site serves. FLARE tells the server of it.
    """
    del task_name, abort_signal
    site = serving.site({'config': self.config, 'fields': self.fields})
    message = _convert.from_shareable(shareable)
    client, name = int(message.meta['client']), fl_ctx.get_identity_name()
    if self.sites[client % len(self.sites)] != name:
      raise Error(
        f'site {name} was asked for client {client}, which '
        f'{self.sites[client % len(self.sites)]} serves.'
      )
    sent, self.kept[client], metrics = halves.train(
      site, message.params, client, self.kept.get(client)
    )
    finite = {k: v for k, v in metrics.items() if np.isfinite(v)}
    reply = _FLModel(
      params=sent,
      metrics=finite,
      current_round=message.current_round,
      meta={'client': client},
    )
    return _convert.to_shareable(reply)


class Controller(_Controller):
  """The server of FLARE that runs the rounds and writes the final adapter.

  Args:
    config, fields, sites: as of the `Executor`s.
    workdir: the adapter is written to WORKDIR/adapter; empty: nowhere.
    seconds: how long a round waits for its clients; 0: as long as it takes.

  Raises:
    Error: FLARE is not installed.

  >>> Controller.__name__
  'Controller'
  """

  def __init__(
    self,
    config: str,
    fields: str = '',
    sites: Sequence[str] = ('site-1',),
    workdir: str = '',
    seconds: int = 0,
  ):
    _check()
    # A client that fails dropped out of its round.
    super().__init__(persistor_id='', ignore_result_error=True)
    self.config, self.fields, self.sites = config, fields, list(sites)
    self.workdir, self.seconds = workdir, seconds
    self.state: Any = None

  def run(self):
    """Runs all rounds; FLARE calls it once."""
    site = serving.site({'config': self.config, 'fields': self.fields})
    self.state = serving.run(site, self._ask, self.workdir)

  def _ask(self, number, message, clients):
    replies: list[Any] = []
    for client in clients:
      self.send_model(
        task_name='train',
        data=_FLModel(
          params=message, current_round=number, meta={'client': client}
        ),
        targets=[self.sites[client % len(self.sites)]],
        timeout=self.seconds,
        callback=replies.append,
      )
    while self.get_num_standing_tasks():
      if self.abort_signal.triggered:
        raise Error(f'the job was aborted in round {number + 1}.')
      time.sleep(self._task_check_period)
    for reply in replies:
      yield int(reply.meta['client']), reply.params, reply.metrics or {}


def job(
  config: str,
  fields: str = '',
  *,
  sites: Sequence[str],
  workdir: str = '',
  seconds: int = 0,
  name: str = 'federated_tuning',
) -> Any:
  """Returns FLARE's `FedJob` of a run: submit, export or simulate it.

  The package is not copied into the job: every site has it installed, and
  allows the prefix `fedjax_llm.deploy.nvflare` in its `class_allow_list`.

  Args:
    config, fields: of the run, as on every site.
    sites: the names of the sites, in the order in which they serve clients.
    workdir: of the server.
    seconds: how long a round waits; 0: as long as it takes.
    name: of the job.

  Raises:
    Error: FLARE is not installed, or no site.

  >>> job('configs/tiny.py', sites=())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: sites is (): a federation needs a site.
  """
  if not sites:
    raise Error(f'sites is {sites!r}: a federation needs a site.')
  _check()
  from nvflare.job_config.api import (  # pyright: ignore[reportMissingImports]
    FedJob,
  )

  made = FedJob(name=name, min_clients=len(sites))
  made.set_app_packages(['fedjax_llm'])
  more = dict(workdir=workdir, seconds=seconds)
  made.to(Controller(config, fields, sites, **more), 'server')
  for site in sites:
    made.to(Executor(config, fields, sites), site)
  return made
