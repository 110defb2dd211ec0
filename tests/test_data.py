"""Sources of records: the packaged text, JSON lines, files of datasets."""

import gzip
import importlib.machinery
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedjax_llm import data
from fedjax_llm.data import sources
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

ROOT = Path(__file__).resolve().parents[1]


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


def write(path, *rows):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


# ---------------------------------------------------------------- sources --


def test_the_packaged_text_is_what_its_provenance_says():
  records = data.packaged()
  clients = Counter(r.client for r in records)
  assert len(records) == 2237 and len(clients) == 32
  assert len({c.split('/')[0] for c in clients if c}) == 32  # one role a play
  assert set(clients.values()) <= {68, 69, 70}
  assert len({r.label for r in records}) == 6
  assert all(r.prompt and r.response and r.text is None for r in records)
  assert (sources.PACKAGED / 'PROVENANCE.md').exists()


def test_a_misspelt_packaged_data_set_lists_what_there_is():
  with pytest.raises(Error, match=r"'shakespear'.*shakespeare_mini"):
    data.packaged('shakespear')


def test_jsonl_reads_each_form_plain_or_gz_one_file_or_many(tmp_path):
  pairs = write(
    tmp_path / 'a1.jsonl', {'u': 7, 'q': 'why', 'a': 'so', 'l': 1}, '', '  '
  )
  (record,) = data.jsonl(pairs, 'u', 'q', 'a', label_key='l')
  assert record == Record(
    '7', 'why', 'so', label='1', where=f'{tmp_path}/a1.jsonl:1'
  )
  with gzip.open(tmp_path / 'a2.jsonl.gz', 'wt') as f:
    f.write('{"u": "ann", "q": "é", "a": "b"}\n')
  both = data.jsonl(str(tmp_path / 'a*'), 'u', 'q', 'a')
  assert [r.client for r in both] == ['7', 'ann'] and both[1].prompt == 'é'
  listed = [str(tmp_path / 'a2.jsonl.gz'), pairs]
  assert data.jsonl(listed, 'u', 'q', 'a') == both[::-1]
  (note,) = data.jsonl(pairs, None, text_key='q')
  assert note.text == 'why' and note.client is None
  turns = [user('hi'), assistant('yo') | {'extra': 1, 'none': None}]
  chats = write(tmp_path / 'c.jsonl', {'messages': turns})
  (chat,) = data.jsonl(chats, None)  # `messages` is the default form
  assert chat.messages == (user('hi'), assistant('yo') | {'extra': 1})


def test_a_context_is_part_of_the_prompt_where_there_is_one(tmp_path):
  file = write(
    tmp_path / 'x.jsonl',
    {'q': 'sum up', 'c': 'long text', 'a': 'ok'},
    {'q': 'sum up', 'c': '', 'a': 'ok'},
    {'q': 'sum up', 'a': 'ok'},
  )
  records = data.jsonl(file, None, 'q', 'a', context_key='c')
  assert [r.prompt for r in records] == [
    'sum up\n\nlong text', 'sum up', 'sum up'
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('[1, 2]', r'x\.jsonl:2: this line is no JSON object'),
    ('"text"', r'x\.jsonl:2: this line is no JSON object'),
    ('{"client": "a", ', r'x\.jsonl:2: this line is no JSON object'),
    ('{"client": "a", "txt": "b"}', r":2: there is no 'text'.*'client', 'txt'"),
    ('{"text": "b"}', r":2: there is no 'client'"),
    ('{"client": "a", "text": 3}', r":2: 'text' is 3, but must be a string"),
    ('{"client": "a", "text": null}', r":2: 'text' is None"),
    ('{"client": 1.5, "text": "b"}', r":2: 'client' is 1.5.*or an integer"),
    ('{"client": true, "text": "b"}', r":2: 'client' is True"),
    ('{"client": "", "text": "b"}', r":2: the client 'client' is an empty"),
    (r'{"client": "a", "text": "\ud83d"}', r":2: 'text' holds half a char"),
  ],
)
def test_a_bad_line_is_told_with_file_and_line_number(tmp_path, line, message):
  file = write(tmp_path / 'x.jsonl', {'client': 'a', 'text': 'b'}, line)
  with pytest.raises(Error, match=message):
    data.jsonl(file, 'client', text_key='text')


@pytest.mark.parametrize(
  ('messages', 'message'),
  [
    ('hi', 'must be a list of messages'),
    ([], 'must be a list of messages'),
    (['hi'], r"message 0: 'hi' is no JSON object"),
    ([user('a'), {'role': 'assistant'}], r"message 1: there is no 'content'"),
    ([{'role': 'user', 'content': None}], "'content' is None"),
  ],
)
def test_bad_messages_are_told_with_their_place(tmp_path, messages, message):
  file = write(tmp_path / 'x.jsonl', {'messages': messages})
  with pytest.raises(Error, match=rf'x\.jsonl:1.*{message}'):
    data.jsonl(file, None)


def test_files_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n\n')
  whole = gzip.compress(b'{"text": "a"}\n' * 9)
  (tmp_path / 'cut.jsonl.gz').write_bytes(whole[:-9])
  (tmp_path / 'not.jsonl.gz').write_bytes(b'{"text": "a"}')
  (tmp_path / 'latin.jsonl').write_bytes('{"text": "é"}'.encode('latin1'))
  for name, message in {
    'empty.jsonl': 'empty.jsonl: the file is empty',
    'missing.jsonl': 'missing.jsonl: there is no such file',
    'missing*.jsonl': r'missing\*.jsonl: there is no such file',
    'cut.jsonl.gz': 'cut.jsonl.gz: the file is no gzip file, or is cut off',
    'not.jsonl.gz': 'not.jsonl.gz: the file is no gzip file',
    'latin.jsonl': 'latin.jsonl: the file is not UTF-8',
    '': 'this is a directory',
  }.items():
    with pytest.raises(Error, match=message):
      data.jsonl(str(tmp_path / name), None, text_key='text')
  with pytest.raises(Error, match='must name a file'):
    data.jsonl([], None, text_key='text')


def test_exactly_one_form_of_text_is_asked_for(tmp_path):
  file = write(tmp_path / 'x.jsonl', {'a': 'b'})
  with pytest.raises(Error, match='not text_key together with messages_key'):
    data.jsonl(file, None, text_key='a', messages_key='a')
  with pytest.raises(Error, match='belong together'):
    data.jsonl(file, None, prompt_key='a')
  with pytest.raises(Error, match='needs prompt_key'):
    data.jsonl(file, None, text_key='a', context_key='a')


def test_hf_reads_files_and_directories(tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(
    datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
  )
  rows = {'who': [1, 2], 'q': ['a', 'b'], 'a': ['c', 'd'], 'kind': [1, 0]}
  features = datasets.Features(
    who=datasets.Value('int64'),
    q=datasets.Value('string'),
    a=datasets.Value('string'),
    kind=datasets.ClassLabel(names=['bad', 'good']),
  )
  table = datasets.Dataset.from_dict(rows, features=features)
  table.save_to_disk(str(tmp_path / 'saved'))
  (record, _) = data.hf(
    str(tmp_path / 'saved'),
    client_key='who',
    prompt_key='q',
    response_key='a',
    label_key='kind',
  )
  assert record[:3] == ('1', 'a', 'c') and record.label == 'good'
  assert 'row 0' in record.where
  table.to_parquet(str(tmp_path / 'x.parquet'))
  table.to_csv(str(tmp_path / 'x.csv'))
  for name in ('x.parquet', 'x.csv'):
    records = data.hf(str(tmp_path / name), client_key='who', text_key='q')
    assert [(r.client, r.text) for r in records] == [('1', 'a'), ('2', 'b')]
  with pytest.raises(Error, match=r"csv:2: there is no 'z'; there is 'who'"):
    data.hf(str(tmp_path / 'x.csv'), client_key='z', text_key='q')
  with pytest.raises(Error, match='there is no such file'):
    data.hf(str(tmp_path / 'y.csv'), text_key='q')
  datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / 'dict'))
  with pytest.raises(Error, match=r"no split 'train'; there is test"):
    data.hf(str(tmp_path / 'dict'), text_key='q')
  with pytest.raises(Error, match='cannot be loaded'):
    data.hf(str(tmp_path), subset='nothing', text_key='q')


# ---------------------------------------------------------- fetch_chitchat --


@pytest.fixture(scope='module')
def chitchat():
  path = str(ROOT / 'scripts' / 'fetch_chitchat')
  loader = importlib.machinery.SourceFileLoader('fetch_chitchat', path)
  spec = importlib.util.spec_from_loader('fetch_chitchat', loader)
  assert spec
  module = importlib.util.module_from_spec(spec)
  sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
  loader.exec_module(module)
  sys.dont_write_bytecode = before
  return module


def test_a_reply_is_what_one_person_says_after_another(chitchat):
  def turn(sender, *said):
    return [{'sender': sender, 'text': s, 'timestamp': ''} for s in said]

  conversation = [
    turn('u', 'hi', 'there'),
    turn('b', 'yo '),
    turn('u', ' '),
    turn('b', 'well'),
    turn('a', 'so?', 'what'),
  ]
  records = chitchat.replies(
    {'k2': {'messages': conversation}, 'k1': {'messages': [], 'prompt': 'p'}}
  )
  assert [(r['client'], r['instruction'], r['response']) for r in records] == [
    ('a', 'well', 'so? what'),
    ('b', 'hi there', 'yo'),
  ]
  assert records[0]['topic'] == '' and records[0]['conversation'] == 'k2'


def test_a_wheel_with_another_checksum_writes_nothing(chitchat, tmp_path):
  (tmp_path / 'x.whl').write_bytes(b'no wheel')
  with pytest.raises(RuntimeError, match='but 7bf89f'):
    chitchat.fetch(tmp_path / 'out', tmp_path / 'x.whl')
  assert list((tmp_path / 'out').iterdir()) == []


def test_what_was_fetched_is_not_fetched_again(chitchat, tmp_path):
  (tmp_path / 'chitchat.jsonl.gz').write_bytes(b'records')
  known = {
    'wheel_sha256': chitchat.SHA256,
    'sha256': chitchat.checksum(tmp_path / 'chitchat.jsonl.gz'),
  }
  (tmp_path / 'manifest.json').write_text(json.dumps(known))
  assert chitchat.fetch(tmp_path, '/no/wheel') == (known, True)
  (tmp_path / 'chitchat.jsonl.gz').write_bytes(b'damaged')
  with pytest.raises(OSError):
    chitchat.fetch(tmp_path, '/no/wheel')
