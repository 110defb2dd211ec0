"""A few changed files; `scripts/fuzz` tries thousands."""

import fuzzing
import pytest


@pytest.fixture(scope='module')
def room(tmp_path_factory):
  return fuzzing.room(tmp_path_factory.mktemp('fuzz') / 'room')


def test_a_changed_file_is_a_sentence_or_something_to_compute(room):
  outcomes = [fuzzing.run(room, case) for case in range(40)]
  faults = [x for x in outcomes if x.kind in ('traceback', 'hang')]
  assert faults == []
  assert {x.file.split('/')[0] for x in outcomes} == set(room.actions)
  assert sum(x.kind == 'sentence' for x in outcomes) > 10
  # Every file is whole again.
  again = {top: read(room.folder) for top, read in room.actions.items()}
  assert repr(again) == repr(room.expected)


def test_a_case_is_the_same_each_time(room):
  assert fuzzing.run(room, 7) == fuzzing.run(room, 7)
