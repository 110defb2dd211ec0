"""Outputs of a run's metrics besides `metrics.jsonl`: files and services."""

from fedjax_llm.run.trackers.files import board, saving, sheet
from fedjax_llm.run.trackers.services import Tracker, tracking

__all__ = ['Tracker', 'board', 'saving', 'sheet', 'tracking']
