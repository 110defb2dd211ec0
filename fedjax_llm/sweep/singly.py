"""Runs one after another, each by `train`."""

import contextlib
import io
from collections.abc import Callable, Sequence

from fedjax_llm import train
from fedjax_llm.run import config, workdir
from fedjax_llm.run.narration import Diverged
from fedjax_llm.sweep import folder as folders
from fedjax_llm.sweep.grid import Run


def train_each(
  runs: Sequence[Run],
  folder: folders.Folder,
  say: Callable[[str], None] = print,
) -> None:
  """Trains what has not ended yet; an interrupted run goes on.

  Each leaves a whole workdir, checkpoints and adapter included. Programs are
  shared through the cache of compiled programs (`compilation_cache`).
  """
  for number, run in enumerate(runs, 1):
    say(f'run {number} of {len(runs)}: {run.name}')
    where = str(folders.place(folder, run))
    error = None
    try:
      with workdir.stoppable(), contextlib.redirect_stdout(io.StringIO()):
        train.train(config.Arguments(run.conf, where, ''))
    except Diverged as diverged:
      error = str(diverged)
    told = folders.records(folder, run)
    done = told[-1]['round'] if told else 0
    if error is None and done < run.conf['num_rounds']:
      raise workdir.Stopped  # by a signal, which `train` has heeded
    folders.close(folder, run, folders.Outcome(done, error))
