"""Trains one federated run: from a config to a workdir with an adapter.

    python -m fedjax_llm.train --config configs/NAME.py --workdir DIR
        [--config.section.field=value ...]

The same command on the same workdir goes on from the last checkpoint. The
program is `run.training.train`, which is meant to be copied and changed.
"""

import sys

from fedjax_llm.run import config, workdir
from fedjax_llm.run.sections import SPEC
from fedjax_llm.run.training import train as train


def run(argv: list[str]) -> None:
  train(config.parse(argv, SPEC))


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
