"""Trains runs one after another, each with `run.training`."""

import contextlib
import io
from collections.abc import Callable, Sequence

from fedjax_llm.run import config, training, workdir
from fedjax_llm.run.narration import Diverged
from fedjax_llm.sweep import folder as folders
from fedjax_llm.sweep.grid import Run


def train_each(
  runs: Sequence[Run],
  folder: folders.Folder,
  say: Callable[[str], None] = print,
) -> None:
  """Trains the runs that have not ended; an interrupted run continues.

  Each run writes a whole workdir with checkpoints and adapter. Runs share
  compiled programs through `compilation_cache`.
  """
  for number, run in enumerate(runs, 1):
    say(f'run {number} of {len(runs)}: {run.name}')
    where = str(folders.place(folder, run))
    error = None
    try:
      with workdir.stoppable(), contextlib.redirect_stdout(io.StringIO()):
        training.train(config.Arguments(run.conf, where, ''))
    except Diverged as diverged:
      error = str(diverged)
    records = folders.records(folder, run)
    done = records[-1]['round'] if records else 0
    if error is None and done < run.conf['num_rounds']:
      raise workdir.Stopped  # by a signal, which `train` has heeded
    folders.close(folder, run, folders.Outcome(done, error))
