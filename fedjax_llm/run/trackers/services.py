"""Weights & Biases and MLflow: optional services for a run's metrics."""

import importlib
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedjax_llm.types import Error

Service = Literal['wandb', 'mlflow']
Records = Sequence[Mapping[str, Any]]


class Tracker(NamedTuple):
  """`write(round, record)` after every round; `close(finished)` at the end."""

  write: Callable[[int, Mapping[str, Any]], None]
  close: Callable[[bool], None]


def tracking(
  *,
  to: Service | Sequence[Service] = (),
  project: str = 'fedjax_llm',
  name: str | None = None,
) -> Callable[[str, Mapping[str, Any], Records], list[Tracker]]:
  """Returns a function that starts services for the scalars of every round.

  It is the section `tracking`. The address and account of a service come from
  its own settings: `wandb login`, WANDB_MODE, WANDB_ENTITY,
  MLFLOW_TRACKING_URI. A run that resumes continues the same run of the service
  (`trackers.json` keeps its id) and sends the rounds that the service lacks:
  those recorded while it could not be reached, or before it was configured. If
  a service fails during a run, the run prints a sentence and goes on.

  Args:
    to: 'wandb', 'mlflow', or several; the packages are extras of those names.
    project: the project of W&B, the experiment of MLflow.
    name: the name of the run; None: the workdir's.

  Returns:
    `start(workdir, config, records) -> trackers`, with the resolved config and
    the records of the rounds that are done.

  Raises:
    Error: a package is not installed; from `start`: a service refuses.

  >>> tracking()('runs/x', {}, [])
  []
  """
  services: list[Service] = [to] if isinstance(to, str) else list(to)  # type: ignore
  modules = {service: _module(service) for service in services}

  def start(
    workdir: str, config: Mapping[str, Any], records: Records
  ) -> list[Tracker]:
    title = name or pathlib.Path(workdir).absolute().name
    begun: list[Tracker] = []
    try:
      for service, module in modules.items():
        begun.append(
          _tracker(service, module, workdir, project, title, config, records)
        )
    except Error:
      for tracker in begun:
        tracker.close(False)
      raise
    return begun

  return start


def _module(service: str) -> Any:
  try:
    return importlib.import_module(service)
  except ImportError as error:
    raise Error(
      f'tracking.to: {service} is not installed '
      f'(pip install "fedjax_llm[{service}]").'
    ) from error


def _tracker(
  service: str,
  module: Any,
  workdir: str,
  project: str,
  name: str,
  config: Mapping[str, Any],
  records: Records,
) -> Tracker:
  """Returns the `Tracker` of one service; it resumes and handles errors."""
  file = pathlib.Path(workdir) / 'trackers.json'
  known = _known(file)
  mark = known.get(service) or {'id': None, 'round': -1}
  begin = _wandb if service == 'wandb' else _mlflow
  try:
    mark['id'], log, end = begin(
      module, mark['id'], project, name, config, workdir
    )
  except Exception as error:
    raise Error(f'tracking.to: {service} refuses: {_line(error)}') from error
  failed = []

  def write(round: int, record: Mapping[str, Any]) -> None:
    if failed or round <= mark['round']:
      return  # a round that is computed again
    scalars = {
      k: v
      for k, v in record.items()
      if isinstance(v, int | float) and k != 'round'
    }
    try:
      log(round, scalars)
    except Exception as error:
      failed.append(error)
      print(
        f'{service} fails after round {mark["round"]} ({_line(error)}): this '
        'run goes on without it; when resumed, it sends the missing rounds.',
        file=sys.stderr,
      )
      return
    mark['round'] = round
    _note(file, service, mark)

  def close(finished: bool) -> None:
    try:
      end(finished and not failed)
    except Exception as error:
      print(f'{service} could not be closed: {_line(error)}', file=sys.stderr)

  _note(file, service, mark)
  for record in records:
    write(record['round'], record)
  return Tracker(write, close)


def _known(file: pathlib.Path) -> dict[str, Any]:
  if not file.exists():
    return {}
  try:
    known = json.loads(file.read_text())
    if all({'id', 'round'} <= set(mark) for mark in known.values()):
      return known
  except (ValueError, AttributeError, TypeError):
    pass
  raise Error(
    f'{file} is damaged: remove it, and a new run is begun at each service.'
  )


def _note(file: pathlib.Path, service: str, mark: Mapping[str, Any]) -> None:
  fresh = file.with_name(f'{file.name}.new')
  try:
    fresh.unlink(missing_ok=True)
    with fresh.open('x') as out:  # not through a link
      out.write(json.dumps({**_known(file), service: mark}) + '\n')
    os.replace(fresh, file)
  except OSError as error:
    raise Error(f'{file} cannot be written: {error.strerror}.') from error


def _line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[0] if lines else type(error).__name__


# ----------------------------------------------------------------- services --
#
# Each takes (module, id, project, name, config, workdir), starts a run or
# continues that of the id; returns (id, log(round, scalars), end(finished)).


def _wandb(
  wandb: Any,
  id: str | None,
  project: str,
  name: str,
  config: Mapping[str, Any],
  workdir: str,
):
  id = id or uuid.uuid4().hex[:12]
  run = wandb.init(
    project=project,
    name=name,
    id=id,
    resume='allow',
    config=dict(config),
    dir=workdir,
  )

  def log(round: int, scalars: Mapping[str, float]) -> None:
    run.log(dict(scalars), step=round, commit=True)

  return id, log, lambda finished: run.finish(exit_code=0 if finished else 1)


def _mlflow(
  mlflow: Any,
  id: str | None,
  project: str,
  name: str,
  config: Mapping[str, Any],
  workdir: str,
):
  del workdir  # MLFLOW_TRACKING_URI sets the place
  entities = importlib.import_module('mlflow.entities')
  client = mlflow.MlflowClient()
  if id is None:
    known = client.get_experiment_by_name(project)
    experiment = known and known.experiment_id
    if experiment is None:
      experiment = client.create_experiment(project)
    id = client.create_run(experiment, run_name=name).info.run_id
    parameters = [entities.Param(k, str(v)) for k, v in _flat(config)]
    for i in range(0, len(parameters), 100):  # as many as one request takes
      client.log_batch(id, params=parameters[i : i + 100])
  else:
    client.update_run(id, status='RUNNING')

  def log(round: int, scalars: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    client.log_batch(
      id,
      metrics=[entities.Metric(k, v, now, round) for k, v in scalars.items()],
    )

  return (
    id,
    log,
    lambda finished: client.set_terminated(
      id, 'FINISHED' if finished else 'KILLED'
    ),
  )


def _flat(x: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in x.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value
