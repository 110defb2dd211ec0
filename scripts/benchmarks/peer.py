"""Shared parts of the frameworks' runners: arguments, clock, result.

A runner is a fresh process: `RUNNER.py --work DIR --out DIR --rounds R
--optimizer adamw`. It writes `result.json` (seconds of every round, with the
first) and `adapter.npz` (the final factors under PEFT's names), which the
driver compares with the float64 reference before it quotes any speed.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RATE = {'adamw': 1e-3, 'sgd': 1e-1}


def arguments(*more: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser()
  parser.add_argument('--work', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--optimizer', default='adamw', choices=sorted(RATE))
  parser.add_argument('--threads', type=int, default=2)
  for flag in more:
    parser.add_argument(f'--{flag}', default='')
  args = parser.parse_args()
  args.began = time.perf_counter()
  args.rate = RATE[args.optimizer]
  args.told = json.loads((args.work / 'work.json').read_text())
  return args


def data(work: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads the tokens [K, S, B, T] and the loss mask."""
  with np.load(work / 'data.npz') as file:
    return file['tokens'], file['mask']


def measure(args: Any, one_round: Callable[[], Any]) -> None:
  """Runs the rounds and writes their seconds."""
  setup, seconds = time.perf_counter() - args.began, []
  for _ in range(args.rounds):
    began = time.perf_counter()
    one_round()
    seconds.append(time.perf_counter() - began)
  write(args, setup, seconds)


def write(args: Any, setup: float, seconds: list[float]) -> None:
  args.out.mkdir(parents=True, exist_ok=True)
  result = {'setup': setup, 'rounds': seconds}
  (args.out / 'result.json').write_text(json.dumps(result) + '\n')


def save(args: Any, named: dict[str, Any]) -> None:
  args.out.mkdir(parents=True, exist_ok=True)
  np.savez(args.out / 'adapter.npz', **named)
