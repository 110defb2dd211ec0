"""The server's rounds over a network, whatever carries the messages.

`site` builds the site of an app's settings once a process, `run` runs all
rounds with a function that asks clients, and writes the final adapter.
"""

import pathlib
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_llm.adapters import peft
from fedjax_llm.deploy import halves
from fedjax_llm.deploy.halves import Arrays, Site
from fedjax_llm.run import experiment
from fedjax_llm.types import Error, ServerState

# (round, message, clients) -> (client, its upload, its metrics) of each reply.
Ask = Callable[
  [int, Arrays, list[int]],
  Iterable[tuple[int, Arrays, Mapping[str, float]]],
]

_SITES: dict[tuple[str, ...], Site] = {}  # of this process


def site(settings: Mapping[str, Any]) -> Site:
  """Returns the site of an app's settings, built once a process.

  Args:
    settings: 'config', FILE or FILE:ARG as `--config` of `train`, and 'fields',
      'section.field=value ...', separated by spaces.

  Raises:
    Error: no config, and what `halves.open` refuses.

  >>> site({'fields': 'num_rounds=2'})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: the app's settings have no field config: FILE or \
FILE:ARG.
  """
  if not settings.get('config'):
    raise Error("the app's settings have no field config: FILE or FILE:ARG.")
  key = (str(settings['config']), *shlex.split(str(settings.get('fields', ''))))
  if key not in _SITES:
    _SITES[key] = halves.open(*key)
  return _SITES[key]


def run(site: Site, ask: Ask, workdir: str = '') -> ServerState:
  """Runs all rounds of a federation; returns the final state.

  Every round it draws clients as the simulation does, asks those that report,
  and aggregates their replies; clients without a reply dropped out.

  Args:
    site: of the server.
    ask: sends a message to clients and yields their replies in any order.
    workdir: the final adapter is written to WORKDIR/adapter, a PEFT directory;
      empty: nothing is written.

  Raises:
    Error: the adapter could not be written as PEFT, before the first round.

  >>> callable(run)
  True
  """
  if workdir:
    _check_adapter(site)
  state, num_rounds = site.start, site.built.settings.num_rounds
  for number in range(num_rounds):
    draw = site.built.sampler(number)
    asked = draw.ids[draw.reports].tolist()
    replies: dict[int, Arrays] = {}
    losses = []
    for client, upload, metrics in ask(
      number, halves.instruct(site, state), asked
    ):
      replies[client] = upload
      losses.append(float(metrics.get('local/loss', np.nan)))
    state = halves.collect(site, state, replies)
    loss = np.mean(losses) if losses else float('nan')
    print(
      f'round {number + 1}/{num_rounds}: {len(replies)} of {len(asked)} '
      f'clients reported, loss {loss:.4f}',
      flush=True,
    )
  if workdir:
    _save(site, state, pathlib.Path(workdir) / 'adapter')
  return state


def _check_adapter(site: Site) -> None:
  """Raises `Error` if the served parameters have no form in PEFT."""
  served = site.algorithm.personal(site.start.params, None)
  _, final = site.built.adapter.fold(site.built.base, served)
  if reason := peft.refusal(final, site.built.loaded.config):
    raise Error(f'workdir: the result would be no PEFT adapter: {reason}')


def _save(site: Site, state: ServerState, folder: pathlib.Path) -> None:
  """Writes the served adapter as a PEFT directory."""
  built = site.built
  served = site.algorithm.personal(state.params, None)
  base, final = built.adapter.fold(built.base, served)
  folder.parent.mkdir(parents=True, exist_ok=True)
  experiment.save_adapter(
    folder,
    jax.device_get(final),
    built.loaded._replace(base=base),
    built.task,
    base_model=built.loaded.name,
    peft_fields=built.adapter.peft,
  )
  print(f'adapter: {folder}', flush=True)
