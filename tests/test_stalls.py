"""Rounds that stand still are named, those that work are not."""

import itertools
import threading

from fedjax_llm.run import stalls


def test_a_round_without_work_is_named_once():
  lines, looks, second = [], itertools.count(), threading.Event()

  def used():
    if lines and next(looks) > 3:  # and it has gone on looking
      second.set()
    return 1.0  # no more than before

  with stalls.watched(lines.append, seconds=0.01, used=used) as begins:
    begins(3)
    assert second.wait(60)
  assert lines == [stalls.sentence(3, 0.01)]
  assert 'fedjax_llm.linalg' in lines[0]


def test_a_round_that_works_is_not_named():
  lines, looks, enough = [], itertools.count(), threading.Event()

  def used():
    number = next(looks)
    if number > 5:
      enough.set()
    return float(number)  # far more than a hundredth of the time

  with stalls.watched(lines.append, seconds=0.01, used=used) as begins:
    begins(1)
    assert enough.wait(60)
  assert lines == []


def test_a_round_that_ends_in_time_is_not_named():
  lines, looks, enough = [], itertools.count(), threading.Event()
  begun = []

  def used():
    number = next(looks)
    for begins in begun:
      begins(number + 1)  # another round at each look
    if number > 5:
      enough.set()
    return 1.0

  with stalls.watched(lines.append, seconds=0.01, used=used) as begins:
    begun.append(begins)
    assert enough.wait(60)
  assert lines == []
