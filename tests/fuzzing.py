"""Files with something wrong in them, and what the programs make of them.

A case is a number: it says which file is changed, and how. What a part of the
project then does is one of these:

    same        as if nothing had happened
    other       it computes something, of the changed file
    sentence    an `Error`, or one of the system that names its file
    traceback   anything else is raised: a fault of the project
    hang        no answer within the limit of time: also a fault

`scripts/fuzz` tries thousands of cases, `test_fuzz.py` a few.
"""

import collections
import contextlib
import io
import json
import math
import os
import pathlib
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import runs

from fedjax_llm import data, models, report, train
from fedjax_llm.report import markup
from fedjax_llm.run import (
  builders,
  checkpoint,
  config,
  experiment,
  metrics,
  rebuild,
  warm,
  workdir,
)
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error


class Hang(BaseException):
  """The limit of time is over."""


class Outcome(NamedTuple):
  case: int
  file: str
  change: str
  kind: str  # see above
  words: str = ''  # the sentence, or where it was raised


class Room(NamedTuple):
  """Whole files, and what the project makes of them."""

  folder: pathlib.Path
  actions: dict[str, Callable[[pathlib.Path], Any]]  # by the first folder
  files: list[str]
  expected: dict[str, Any]


# -------------------------------------------------------------------- files --


def room(folder: pathlib.Path) -> Room:
  """Makes a run, a model, an adapter, a tokenizer, texts and a config."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'data').mkdir()
  texts = runs.texts(folder / 'data' / 'texts.jsonl')
  for name in ('chats', 'pairs'):
    lines = [json.dumps(_record(name, i)) + '\n' for i in range(6)]
    (folder / 'data' / f'{name}.jsonl').write_text(''.join(lines))
  words = runs.arguments(
    texts,
    folder / 'run',
    algorithm__name='local_only',
    num_rounds=3,
    evals__samples=0,
  )
  runs.done(train, words)
  (folder / 'run' / 'samples.json').write_text(
    '{"round": 3, "samples": [{"client": "ann", "prompt": "the", "reply": '
    '"fox", "before": "a", "after": "b"}]}'
  )
  loaded = models.random(
    vocab_size=259, hidden_size=16, intermediate_size=16, num_layers=1,
    num_heads=2,
  )  # fmt: skip
  models.save(folder / 'model', loaded.config, loaded.base)
  shutil.copytree(folder / 'run' / 'adapter', folder / 'adapter')
  _tokenizer(folder / 'tokenizer')
  (folder / 'config').mkdir()
  conf = json.loads((folder / 'run' / 'config.json').read_text())
  (folder / 'config' / 'config.json').write_text(
    json.dumps(workdir.settings_of(conf))
  )
  (folder / 'config' / 'config.py').write_text(CONFIG)
  shallow = models.random(
    vocab_size=259, hidden_size=32, intermediate_size=32, num_layers=1
  )
  actions = {
    'data': _read_texts,
    'run': _read_run,
    'model': _read_model,
    'adapter': lambda path: _sums(warm.load_adapter(path / 'adapter', shallow)),
    'tokenizer': _read_tokenizer,
    'config': _read_config,
  }
  files = [
    path.relative_to(folder).as_posix()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
    and path.name not in ('.lock', 'config.py')
    and 'tfevents' not in path.name
  ]
  expected = {name: action(folder) for name, action in actions.items()}
  return Room(folder, actions, files, expected)


CONFIG = """
import json
import pathlib


def get_config(arg=''):
  file = pathlib.Path(__file__).with_name('config.json')
  return json.loads(file.read_text())
"""


def _record(name: str, i: int) -> dict[str, Any]:
  if name == 'pairs':
    return {'client': f'c{i % 2}', 'question': f'why {i}', 'answer': 'so'}
  turns = [('system', 'be short'), ('user', f'why {i}'), ('assistant', 'so')]
  return {
    'client': f'c{i % 2}',
    'messages': [{'role': role, 'content': text} for role, text in turns],
  }


def _tokenizer(folder: pathlib.Path) -> None:
  import tokenizers
  import transformers
  from tokenizers import models as kinds
  from tokenizers import pre_tokenizers

  words = {'<unk>': 0, '<s>': 1, '</s>': 2, 'the': 3, 'fox': 4, 'jumps': 5}
  made = tokenizers.Tokenizer(kinds.WordLevel(words, unk_token='<unk>'))
  made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore
  whole = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token='<unk>', bos_token='<s>', eos_token='</s>'
  )
  whole.chat_template = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
  )
  whole.save_pretrained(folder)


# ------------------------------------------------------------------ actions --


def _read_texts(folder: pathlib.Path) -> Any:
  sums = []
  for name, keys in (
    ('texts', {'text_key': 'text'}),
    ('chats', {'messages_key': 'messages'}),
    ('pairs', {'prompt_key': 'question', 'response_key': 'answer'}),
  ):
    records = data.sources.jsonl(
      str(folder / 'data' / f'{name}.jsonl'), client_key='client', **keys
    )
    people = data.population.build(
      records,
      data.tokenizers.bytes(),
      partition=data.partition.natural(),
      max_length=64,
      new_clients=0,
      seed=0,
    )
    sums.append(data.population.digest(people))
  return sums


def _read_run(folder: pathlib.Path) -> Any:
  run = folder / 'run'
  page = markup.render(report.read(run), None)
  raw = rebuild.read_config(run)
  ended = workdir.open(str(run), raw).finished(3)
  records = len(metrics.read(str(run / 'metrics.jsonl')))
  if records:
    keep = run.parent / 'again'
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir()
    shutil.copy(run / 'metrics.jsonl', keep)
    metrics.recorder(str(keep), keep=2, tensorboard=False)
  made = rebuild.open(str(run), trusted=True)
  own = rebuild.open(str(run), client='ann', trusted=True)
  kept = checkpoint.open(run / 'checkpoints', read_only=True).rounds()
  size = len(page)
  return size, ended, records, _sums(made.params), _sums(own.params), kept


def _read_model(folder: pathlib.Path) -> Any:
  loaded = models.pretrained(folder / 'model')
  return _sums(loaded.base)


def _read_tokenizer(folder: pathlib.Path) -> Any:
  found = data.tokenizers.pretrained(str(folder / 'tokenizer'))
  record = data.sources.Record(
    messages=(
      {'role': 'user', 'content': 'the'},
      {'role': 'assistant', 'content': 'fox'},
    )
  )
  ids = found.encode('the fox jumps')
  return ids, found.decode(ids), data.text.prompt(record, found, 'chat')


def _read_config(folder: pathlib.Path) -> Any:
  raw = config.load(str(folder / 'config' / 'config.py'))
  conf, _ = config.override(raw, [], SPEC)
  experiment.checked(conf)
  build = lambda section, **given: builders.build(
    conf[section], SPEC.sections[section], **given
  )
  sampler = build('clients', num_clients=6, sizes=[8] * 6, seed=0)
  algorithm = experiment.algorithm(
    conf, loss=None, model=None, adapter=build('adapter'), num_clients=6
  )
  build('partition')
  return (
    sampler(0).ids.tolist(),
    str(config.resolved(conf, SPEC)),
    bool(algorithm),
  )


def _sums(tree: Any) -> Any:
  import jax
  import numpy as np

  return [
    (np.shape(x), float(np.sum(np.abs(np.asarray(x, np.float32)))))
    for x in jax.tree.leaves(tree)
  ]


# ------------------------------------------------------------------ changes --

_VALUES = (
  *(None, True, False, -1, 0, 1, 2, 0.5, -0.5, 1e9, 10**30, 2**31, math.nan),
  *(math.inf, -math.inf, '', 'x', '../x', '\x00', '\ud800', 'é' * 300, []),
  *({}, [1], ['x'], {'x': 1}, [[]], 'x:y', 1e-300, 3.5),
)


def change(content: bytes, rng: random.Random, name: str) -> tuple[bytes, str]:
  """Changed bytes, and what was done in words."""
  if name.endswith(('.json', '.jsonl')) and rng.random() < 0.7:
    lines = content.split(b'\n') if name.endswith('.jsonl') else [content]
    place = rng.randrange(len(lines))
    try:
      tree = json.loads(lines[place])
    except ValueError:
      tree = None
    if isinstance(tree, dict | list) and tree:
      words = _change_json(tree, rng)
      lines[place] = json.dumps(tree).encode('utf-8', 'surrogatepass')
      return b'\n'.join(lines), f'line {place + 1}: {words}'
  return _change_bytes(content, rng)


def _change_json(tree: Any, rng: random.Random) -> str:
  node, path = tree, []
  while True:
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    path.append(key)
    inner = node[key]
    if not (isinstance(inner, dict | list) and inner and rng.random() < 0.8):
      break
    node = inner
  where, how = '.'.join(map(str, path)), rng.random()
  if how < 0.15:
    del node[key]
    return f'{where} is gone'
  if how < 0.2 and isinstance(node, dict):
    node[f'{key}x'] = node.pop(key)
    return f'{where} has another name'
  if how < 0.25:
    deep: Any = 1
    for _ in range(rng.choice([10, 900])):
      deep = [deep]
    node[key] = deep
    return f'{where} is nested deeply'
  node[key] = rng.choice(_VALUES)
  return f'{where} is {node[key]!r:.30}'


def _change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
  size = max(len(content), 1)
  at, length = rng.randrange(size), rng.randint(1, min(size, 40))
  how = rng.randrange(7)
  bad = bytearray(content)
  if how == 0 and content:
    bad[at] ^= 1 << rng.randrange(8)
  elif how == 1:
    del bad[at : at + length]
  elif how == 2:
    bad[at:at] = rng.randbytes(length)
  elif how == 3:
    del bad[at:]
  elif how == 4:
    bad[at:at] = bad[at : at + length] * rng.randint(1, 50)
  elif how == 5:
    bad = bytearray(rng.choice([b'', b'[' * 5000, b'{}', b'\xff\xfe', b'null']))
  else:
    bad[at : at + length] = rng.randbytes(length)
  words = ('a bit', 'a gap', 'noise', 'the end', 'copies', 'all', 'bytes')
  return bytes(bad), f'{words[how]} at {at}'


# -------------------------------------------------------------------- cases --


def run(
  room: Room,
  case: int,
  seed: int = 0,
  *,
  only: str | None = None,
  limit: float = 30.0,
) -> Outcome:
  """Tries one case, of one kind of files if `only` names it.

  The files are whole again afterwards.
  """
  rng = random.Random(f'{seed}/{case}')
  top = rng.choice(sorted(room.actions))
  top = only or top
  name = rng.choice([x for x in room.files if x.startswith(f'{top}/')])
  file = room.folder / name
  content = file.read_bytes()
  bad, words = change(content, rng, name)
  mode = file.stat().st_mode
  try:
    file.write_bytes(bad)
    with quiet(), limited(limit):
      try:
        result = room.actions[top](room.folder)
        kind, told = 'other', ''
        # NaN is not itself, and the same for us.
        if repr(result) == repr(room.expected[top]):
          kind = 'same'
      except (Error, OSError) as error:
        kind, told = 'sentence', str(error)
      except Hang as error:
        kind, told = 'hang', _place(error)
      except Exception as error:
        kind, told = 'traceback', _place(error)
  finally:
    file.write_bytes(content)
    file.chmod(mode)
  return Outcome(case, name, words, kind, ' '.join(told.split())[:300])


def _place(error: BaseException) -> str:
  """The innermost line of the project, and the error."""
  ours = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if f'{os.sep}fedjax_llm{os.sep}' in frame.filename
  ]
  frame = (ours or traceback.extract_tb(error.__traceback__))[-1]
  where = f'{pathlib.Path(frame.filename).name}:{frame.lineno}'
  return f'{where} {type(error).__name__}: {error}'


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
  """Raises `Hang` after so many seconds of work, or ten times as many of any.

  Seconds of work are those of the processor, so that a busy machine makes no
  hang of a slow answer.
  """
  began, worked = time.monotonic(), time.process_time()

  def over(number: int, frame: Any) -> None:
    waited = time.monotonic() - began
    if time.process_time() - worked > seconds or waited > 10 * seconds:
      raise Hang

  before = signal.signal(signal.SIGALRM, over)
  signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps away what libraries print."""
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    yield


def table(outcomes: list[Outcome]) -> str:
  """Counts by what was changed and what came of it."""
  kinds = ('same', 'other', 'sentence', 'traceback', 'hang')
  counts = collections.Counter((x.file.split('/')[0], x.kind) for x in outcomes)
  tops = sorted({top for top, _ in counts})
  rows = [
    [top, *(counts[top, kind] for kind in kinds)]
    for top in tops
  ]  # fmt: skip
  rows.append(['all', *(sum(row[i + 1] for row in rows) for i in range(5))])
  return metrics.table(rows, ('', *kinds))
