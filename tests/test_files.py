"""Data files: their formats, and values that stay as they are written."""

import gzip
import json

import pytest

from fedjax_llm import data
from fedjax_llm.data import hub
from fedjax_llm.types import Error

ROWS = (
  'who,text\n001,NA\n1,None\n1.0,True\n"a,b","two\nlines ""x"""\n'
  '2020-01-01,1e3\n'
)
WRITTEN = [
  ('001', 'NA'),
  ('1', 'None'),
  ('1.0', 'True'),
  ('a,b', 'two\nlines "x"'),
  ('2020-01-01', '1e3'),
]


def read(path, **more):
  records = data.hf(str(path), client_key='who', text_key='text', **more)
  return [(r.client, r.text) for r in records]


@pytest.mark.parametrize('end', ['.csv', '.CSV', '.csv.gz', '.CSV.GZ'])
def test_fields_of_a_csv_file_are_strings_as_they_are_written(tmp_path, end):
  content = ROWS.encode()
  file = tmp_path / f'rows{end}'
  file.write_bytes(gzip.compress(content) if 'gz' in end.lower() else content)
  assert read(file) == WRITTEN


def test_tabs_separate_the_fields_of_a_tsv_file(tmp_path):
  (tmp_path / 'rows.tsv').write_text('who\ttext\n001\ta,b\n')
  assert read(tmp_path / 'rows.tsv') == [('001', 'a,b')]


@pytest.mark.parametrize('end', ['json', 'jsonl', 'JSONL.GZ', 'ndjson'])
@pytest.mark.parametrize('form', ['lines', 'list', 'one'])
def test_json_values_are_not_guessed_at(tmp_path, end, form):
  rows = [{'who': w, 'text': t} for w, t in WRITTEN]
  content = '\n'.join(map(json.dumps, rows))
  if form != 'lines':
    if not end.startswith('json') or 'l' in end.lower():
      pytest.skip('lines are lines')
    content = json.dumps(rows if form == 'list' else rows[0], indent=2)
  file = tmp_path / f'rows.{end}'
  packed = gzip.compress(content.encode())
  file.write_bytes(packed if 'GZ' in end else content.encode())
  assert read(file) == WRITTEN[: 1 if form == 'one' else None]


def test_parquet_files_and_folders_of_csv_files_keep_strings(
  tmp_path, monkeypatch
):
  datasets = pytest.importorskip('datasets')
  import pyarrow
  from pyarrow import parquet

  monkeypatch.setattr(
    datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
  )
  columns = {'who': ['001', '1'], 'text': ['NA', 'x']}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'rows.PARQUET')
  assert read(tmp_path / 'rows.PARQUET') == [('001', 'NA'), ('1', 'x')]
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'train.csv').write_text('who,text\n001,NA\n1,None\n')
  assert read(folder) == [('001', 'NA'), ('1', 'None')]


def test_several_files_may_have_several_formats(tmp_path):
  (tmp_path / 'a.csv').write_text('who,text\n001,a\n')
  (tmp_path / 'b.jsonl').write_text('{"who": "1", "text": "b"}')
  both = [str(tmp_path / name) for name in ('a.csv', 'b.jsonl')]
  records = data.hf(both, client_key='who', text_key='text')
  assert [r.client for r in records] == ['001', '1']
  assert records[0].where == f'{tmp_path}/a.csv:2'


def test_a_file_that_is_packed_without_saying_so_is_read(tmp_path):
  file = tmp_path / 'rows.jsonl'
  file.write_bytes(gzip.compress(b'{"who": "a", "text": "b"}'))
  assert read(file) == [('a', 'b')]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    (
      'x.csv',
      'who,text\na\n',
      'x.csv:2: this row has 1 values, and the file h',
    ),
    ('x.csv', 'who,text\na,b,c\n', 'x.csv:2: this row has 3 values'),
    ('x.csv', 'who,who\na,b\n', "x.csv:1: the column 'who' is there twice"),
    ('x.csv', 'who,text\na,"b\n', 'x.csv:2: this row is damaged'),
    ('x.csv', 'who,text\n', 'x.csv: the file is empty'),
    ('x.csv', '', 'x.csv: the file is empty'),
    ('x.csv', 'who,text\n,b\n', "x.csv:2: the client 'who' is an empty string"),
    ('x.json', '[{"who": "a", "text": "b"}', 'x.json is not valid JSON'),
    ('x.json', '[3]', 'x.json, record 0: this line is no JSON object: 3'),
    (
      'x.jsonl',
      '{"who": "a", "te',
      r'x.jsonl:1: .*cannot be parsed \(untermin',
    ),
    ('x.jsonl', '[' * 100_000, 'x.jsonl:1: this line is nested too deeply'),
    ('x.jsonl', '9' * 5000, 'x.jsonl:1: this line is no JSON object'),
    ('x.json', '[' * 100_000, 'x.json is nested too deeply'),
    ('x.txt', 'who', 'x.txt: cannot tell the format; files end in csv, json'),
    ('x', 'who', 'x: cannot tell the format'),
    ('x.csv', b'who,text\na,\xff\n', 'x.csv: the file is not UTF-8 text'),
    ('x.csv.gz', b'who', 'x.csv.gz: the file is no gzip file'),
  ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(
  tmp_path, name, content, message
):
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(Error, match=message):
    read(tmp_path / name)


def test_a_table_under_jsonl_says_which_source_reads_it(tmp_path):
  (tmp_path / 'x.csv').write_text('who,text\na,b\n')
  with pytest.raises(Error, match='named as csv, which data'):
    data.jsonl(str(tmp_path / 'x.csv'), 'who', text_key='text')


def test_rows_that_arrow_cannot_read_are_one_sentence(tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  import pyarrow
  from pyarrow import parquet

  monkeypatch.setattr(
    datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
  )
  raw = pyarrow.array([b'\xff\xfe', b'abc'], pyarrow.binary())
  bad = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
  table = pyarrow.table({'who': ['a', 'a'], 'text': bad})
  parquet.write_table(table, tmp_path / 'bad.parquet')
  with pytest.raises(Error, match=r'bad.parquet.*UTF|bad.parquet.*utf'):
    read(tmp_path / 'bad.parquet')
  (tmp_path / 'cut.parquet').write_bytes(b'PAR1 and no more')
  with pytest.raises(Error, match=r'cut.parquet.* cannot be loaded: Arrow'):
    read(tmp_path / 'cut.parquet')
  label = datasets.Features(y=datasets.ClassLabel(names=['n', 'y']))
  with pytest.raises(
    Error, match=r'x: the class number 7 has no name.* 2 clas'
  ):
    hub.class_name(label['y'], 7, 'x')
  assert hub.class_name(label['y'], 1, 'x') == 'y'
  assert hub.class_name(label['y'], -1, 'x') == -1
