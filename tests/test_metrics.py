"""What a run records: exact, resumable, readable."""

import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import metrics
from fedjax_llm.types import Error, RoundInfo


def lines(workdir):
  return (workdir / 'metrics.jsonl').read_bytes().splitlines(keepends=True)


def run(workdir, rounds, keep=-1):
  record = metrics.recorder(str(workdir), keep, tensorboard=False)
  for r in rounds:
    record.write(r, {'z/loss': np.float32(1) / (r + 3), 'a/bytes': 2**40 + r})


def test_a_record_is_one_sorted_line_with_exact_floats(tmp_path):
  record = metrics.recorder(str(tmp_path), tensorboard=False)
  loss = np.float32(0.1)
  record.write(
    3,
    {
      'b': jnp.float32(0.1),
      'a': float('nan'),
      'c': {'left out': ('x', 'y')},
      'inf': np.float64(np.inf),
    },
  )
  (line,) = lines(tmp_path)
  assert line == (
    b'{"a": null, "b": 0.10000000149011612, "c": {"left out": ["x", "y"]},'
    b' "inf": null, "round": 3}\n'
  )
  assert np.float32(json.loads(line)['b']) == loss


def test_a_line_is_on_disk_before_write_returns(tmp_path):
  record = metrics.recorder(str(tmp_path), tensorboard=False)
  record.write(0, {'x': 1})
  assert len(lines(tmp_path)) == 1  # the recorder is still open


@pytest.mark.parametrize('torn', [b'', b'{"round": 4, "z/l', b'{"rou', b'\n'])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  run(whole, range(6))
  run(killed, range(4))
  if torn != b'\n':
    with open(killed / 'metrics.jsonl', 'ab') as file:
      file.write(torn)
  else:  # killed between the last byte of the record and its newline
    path = killed / 'metrics.jsonl'
    path.write_bytes(path.read_bytes()[:-1])
  # The checkpoint is older than the last records.
  for keep in (3, 2):
    run(killed, range(keep + 1, 6), keep=keep)
    assert lines(killed) == lines(whole)
  run(killed, range(6))
  assert lines(killed) == lines(whole)
  assert [r['round'] for r in metrics.read(killed / 'metrics.jsonl')] == [
    *range(6)
  ]


def test_a_file_damaged_in_its_middle_is_named_and_kept(tmp_path):
  run(tmp_path, range(3))
  path = tmp_path / 'metrics.jsonl'
  damaged = path.read_bytes().replace(b'{"a/bytes": 1099511627777', b'{"a')
  path.write_bytes(damaged)
  with pytest.raises(Error, match=r'metrics.jsonl:2 is no record'):
    run(tmp_path, [], keep=2)
  assert path.read_bytes() == damaged


def test_records_missing_before_the_checkpoint_are_an_error(tmp_path):
  run(tmp_path, range(3))
  with pytest.raises(Error, match=r'of round 5, but the last .* of round 2'):
    run(tmp_path, [], keep=5)
  assert len(lines(tmp_path)) == 3
  with pytest.raises(Error, match='round none'):
    run(tmp_path / 'new', [], keep=1)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_is_a_sentence(tmp_path):
  record = metrics.recorder(str(tmp_path), tensorboard=False)
  os.remove(tmp_path / 'metrics.jsonl')
  os.symlink('/dev/full', tmp_path / 'metrics.jsonl')
  with pytest.raises(Error, match=r'metrics.jsonl cannot be written: No space'):
    record.write(1, {'x': 1})


def test_a_workdir_that_is_a_file_is_a_sentence(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(Error, match='cannot be written'):
    metrics.recorder(str(tmp_path / 'file'), tensorboard=False)


def test_tensorboard_gets_the_scalars(tmp_path):
  from tensorboardX.proto import event_pb2

  record = metrics.recorder(str(tmp_path))
  record.write(4, {'local/loss': 0.5, 'names': ['x'], 'bad': float('nan')})
  (path,) = (tmp_path / 'tensorboard').iterdir()
  data, found = path.read_bytes(), []
  while data:  # length, its checksum, event, its checksum
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])  # type: ignore
    data = data[16 + size :]
    found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
  assert found == [('local/loss', 0.5, 4)]


def test_bytes_are_summed_in_64_bits_and_scalars_become_numbers():
  who = jnp.ones(3, bool)
  told = metrics.summarise(
    RoundInfo(
      reported=who,
      finite=who,
      bytes_up=jnp.full((3, 2), 2**31 - 1, jnp.int32),
      bytes_down=jnp.array([[1, 1, 5]], jnp.int32),
      metrics={
        'local/loss': jnp.float32(0.25),
        'clients/valid': jnp.int32(7),
        'server/ok': jnp.bool_(True),
        'local/each': jnp.array([0.5, 1.5]),
      },
    )
  )
  assert told == {
    'uploads/bytes': 6 * (2**31 - 1),
    'downloads/bytes': 7,
    'local/loss': 0.25,
    'clients/valid': 7,
    'server/ok': 1,
    'local/each': [0.5, 1.5],
  }
  assert type(told['clients/valid']) is int
  assert type(told['server/ok']) is int


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_a_log_gets_few_lines_and_always_the_last_round():
  file, clock = io.StringIO(), Clock()
  bar = metrics.progress(20, 0, every=10, file=file, clock=clock)
  for r in range(1, 21):
    clock.now += 100 if r == 1 else 3  # the first round compiles
    bar.update(r, 2.0 - 0.05 * r, 1234.5)
  bar.close()
  told = file.getvalue().splitlines()
  assert told[0].startswith('round 1/20: loss 1.9500, 1,234 tokens/s')
  assert told[1] == 'round 5/20: loss 1.7500, 1,234 tokens/s, 00:45 left'
  assert told[-1] == 'round 20/20: loss 1.0000, 1,234 tokens/s, 00:00 left'
  assert len(told) == 1 + 4 + 1


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes():
  file, clock = Terminal(), Clock()
  bar = metrics.progress(10, 4, file=file, clock=clock)
  for r in range(5, 11):
    clock.now += 3600
    bar.update(r, 0.5, 10.0)
    if r == 5:
      bar.write('a sentence')
  bar.close()
  text = file.getvalue()
  assert '4/10' in text and '10/10' in text and '3/10' not in text
  assert 'a sentence\n' in text
  assert 'loss 0.5000, 10 tokens/s, 00:00 left' in text


def test_a_table_lines_up():
  text = metrics.table(
    [('held-out loss', 3.25, 2.5), ('sent', '', '1.84 MB')],
    ('', 'before', 'after'),
  )
  assert text.splitlines() == [
    '               before    after',
    '-------------  ------  -------',
    'held-out loss  3.2500   2.5000',
    'sent                   1.84 MB',
  ]


@pytest.mark.parametrize(
  ('n', 'text'),
  [
    (0, '0 B'),
    (1000, '1.00 kB'),
    (99_960, '100 kB'),
    (999_499, '999 kB'),
    (999_500, '1.00 MB'),
    (12_345_678, '12.3 MB'),
    (5 * 10**21, '5000 EB'),
  ],
)
def test_bytes_for_people(n, text):
  assert metrics.human_bytes(n) == text
