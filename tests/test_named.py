"""Named data sets: the table, reading by schema, and the program that shows."""

import gzip
import json

import pytest

from fedjax_llm import data
from fedjax_llm.data import __main__ as program
from fedjax_llm.data import named
from fedjax_llm.data.named import forms, spec
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

NAMES = sorted(named.TABLE)


def write(folder, entry, rows):
  """Writes rows as the file of a data set: a list, or lists by client."""
  if entry.grouped:
    content = json.dumps({'ann': rows[:2], 'bob': rows[2:]})
    file = folder / 'clients.json'
  else:
    content = '\n'.join(map(json.dumps, rows))
    file = folder / 'rows.jsonl'
  file.write_text(content)
  return str(file)


def test_the_table_has_no_name_twice_and_no_faulty_entry():
  assert len(named.TABLE) == sum(len(s) for s in named.DOMAINS.values())
  assert {name: spec.faults(e) for name, e in named.TABLE.items()} == {
    name: [] for name in named.TABLE
  }


@pytest.mark.parametrize('name', NAMES)
def test_a_data_set_reads_a_file_of_its_schema(name, tmp_path):
  entry = named.find(name)
  rows = list(forms.made_up(entry, 4))
  records = named.hub(name, path=write(tmp_path, entry, rows))
  assert len(records) == 4
  for number, record in enumerate(records):
    text = record.text or record.prompt or record.messages
    assert text
    for field in spec.fields(entry):
      if field not in (entry.client, entry.label, entry.answer):
        assert str(number) in str(record), field  # each field is used
    if entry.chosen:
      assert record.chosen and record.rejected != record.chosen
    elif entry.prompt:
      assert record.response
    assert (record.client is None) == (entry.client is None)
    assert (record.label is None) == (entry.label is None)
  if entry.grouped:
    assert [r.client for r in records] == ['ann', 'ann', 'bob', 'bob']
  # A row without one of the fields: the field, and what is there.
  for field in spec.fields(entry):
    bad = [{k: v for k, v in row.items() if k != field} for row in rows]
    with pytest.raises(Error, match=rf"there is no '{field}\b.*; there is ."):
      named.hub(name, path=write(tmp_path, entry, bad))


def test_what_a_choice_a_pair_and_a_clause_become():
  row = {'question': 'Which?', 'cop': 1} | {f'op{x}': x.upper() for x in 'abcd'}
  (made,) = [forms.record(named.find('medmcqa'), row, 'x:1')]
  assert made.prompt == 'Which?\nA. A\nB. B\nC. C\nD. D\nAnswer:'
  assert made.response == 'B. B'
  row = {
    'qtext': 'Which?', 'ra': 4, 'category': 'nursing',
    'answers': [{'aid': i + 1, 'atext': x} for i, x in enumerate('wxyz')],
  }  # fmt: skip
  made = forms.record(named.find('head_qa'), row, 'x:1', client='category')
  assert (made.response, made.client) == ('D. z', 'nursing')
  with pytest.raises(Error, match="x:1: 'ra' is '5', which is none of the 4"):
    forms.record(named.find('head_qa'), row | {'ra': 5}, 'x:1')
  turns = [{'content': 'q'}, {'content': 'good'}]
  row = {'prompt': 'q', 'chosen': turns, 'rejected': [{}, {'content': 'bad'}]}
  made = forms.record(named.find('ultrafeedback'), row, 'x:1')
  assert (made.prompt, made.chosen, made.rejected) == ('q', 'good', 'bad')
  row = {'context': 'C', 'question': 'Q', 'answers': {'text': []}}
  made = forms.record(named.find('cuad'), row, 'x:1')
  assert (made.prompt, made.response) == ('C\n\nQ', 'There is no such clause.')
  row = {'sentence1': 'a', 'sentence2': 'b', 'label': 1}
  made = forms.record(named.find('glue_rte'), row, 'x:1', label='label')
  assert (made.text, made.pair, made.label) == ('a', 'b', 'not_entailment')
  hidden = forms.record(
    named.find('glue_rte'), row | {'label': -1}, 'x:1', label='label'
  )
  assert hidden.label is None
  with pytest.raises(Error, match=r"'label' is 2, but the classes are 0 to 1"):
    forms.record(
      named.find('glue_rte'), row | {'label': 2}, 'x:1', label='label'
    )
  row = {'question': 'q', 'system_prompt': None, 'response': 'r'}
  made = forms.record(named.find('openorca'), row, 'x:1')
  assert made.prompt == 'q'  # an empty paragraph is left out
  with pytest.raises(Error, match=r"x:1: 'question' is 1.5, but must be a str"):
    forms.record(named.find('openorca'), row | {'question': 1.5}, 'x:1')


def test_other_clients_labels_dates_and_a_limit(tmp_path):
  rows = [
    {'inputs': f'q{i}', 'targets': 'a', 'language': 'ab'[i % 2], 'user_id': i}
    | {'language_code': 'x', 'annotation_type': 'new', 'when': f'202{i}'}
    for i in range(4)
  ]
  file = write(tmp_path, named.find('aya'), rows)
  assert [r.client for r in named.hub('aya', path=file)] == list('0123')
  records = named.hub(
    'aya',
    path=file,
    client_key=('language', 'user_id'),
    label_key='language_code',
    date_key='when',
    num_records=2,
  )
  assert [(r.client, r.label, r.date) for r in records] == [
    ('a/0', 'x', '2020'),
    ('b/1', 'x', '2021'),
  ]
  (row, *_) = data.jsonl(file, None, text_key='inputs', date_key='when')
  assert row.date == '2020'
  with pytest.raises(Error, match=r'data.num_records is 0, but must be at lea'):
    named.hub('aya', path=file, num_records=0)


def test_a_folder_is_read_by_split(tmp_path):
  entry = named.find('gsm8k')
  row, other = forms.made_up(entry, 2)
  with gzip.open(tmp_path / 'train-0.jsonl.gz', 'wt') as file:
    file.write(json.dumps(row))
  (tmp_path / 'test.jsonl').write_text(json.dumps(other))
  (tmp_path / 'README.md').write_text('# A card')
  (record,) = named.hub('gsm8k', path=str(tmp_path))
  assert record.prompt == 'question 0'
  (record,) = named.hub('gsm8k', path=str(tmp_path), split='test')
  assert record.prompt == 'question 1'
  with pytest.raises(Error, match="no file of the split 'dev'; there is test"):
    named.hub('gsm8k', path=str(tmp_path), split='dev')
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(Error, match='empty: there is no data file in this folde'):
    named.hub('gsm8k', path=str(empty))
  inner = tmp_path / 'training'  # the name of a file counts before its folder's
  inner.mkdir()
  (inner / 'test.jsonl').write_text(json.dumps(other))
  (record,) = named.hub('gsm8k', path=str(tmp_path))
  assert record.prompt == 'question 0'
  (empty / 'any.json').write_text(json.dumps([row, other]))
  assert len(named.hub('gsm8k', path=str(empty))) == 2  # names no split
  with pytest.raises(Error, match=r'README.md: cannot tell the format'):
    named.hub('gsm8k', path=str(tmp_path / 'README.md'))


def test_without_a_network_the_error_says_what_to_download(monkeypatch):
  def offline(*args, **kwargs):
    raise Error('hf: the data set cannot be loaded: ConnectionError: no.')

  monkeypatch.setattr('fedjax_llm.data.hub.load', offline)
  with pytest.raises(Error) as raised:
    named.hub('gsm8k')
  assert str(raised.value) == (
    'hf: the data set cannot be loaded: ConnectionError: no. Where there is a '
    'network, download https://huggingface.co/datasets/openai/gsm8k (subset '
    'main) into a folder and name the folder as data.path.'
  )
  with pytest.raises(Error, match=r'data.path: fed_aya is not on the hub; do'):
    named.hub('fed_aya')
  with pytest.raises(Error, match=r"no data set 'banking'; the nearest is 'ba"):
    named.hub('banking')


def test_the_rest_of_the_schema_is_named_with_a_missing_field(tmp_path):
  file = tmp_path / 'x.jsonl'
  file.write_text('{"instruction": "a", "answer": "b", "category": "c"}')
  with pytest.raises(Error) as raised:
    named.hub('dolly', path=str(file))
  assert str(raised.value) == (
    f"{file}:1: there is no 'context'; there is 'instruction', 'answer', "
    "'category'. The data set dolly has 'category', 'instruction', 'context', "
    "'response'."
  )


def test_a_saved_data_set_has_its_class_names(tmp_path):
  datasets = pytest.importorskip('datasets')
  features = datasets.Features(
    text=datasets.Value('string'),
    label=datasets.ClassLabel(names=['lost_card', 'top_up']),
  )
  table = datasets.Dataset.from_dict(
    {'text': ['a', 'b'], 'label': [1, 0]}, features=features
  )
  table.save_to_disk(str(tmp_path / 'saved'))
  records = named.hub('banking77', path=str(tmp_path / 'saved'))
  assert [r.label for r in records] == ['top_up', 'lost_card']


def test_a_named_data_set_is_a_source_of_configs(tmp_path):
  from fedjax_llm.run import builders, sections

  namespace = sections.SPEC.sections['data']
  entry = named.find('dolly')
  file = write(tmp_path, entry, list(forms.made_up(entry, 3)))
  section = {'name': 'hub', 'dataset': 'dolly', 'path': file}
  records = builders.build(section, namespace)
  people = data.build(records, data.bytes(), template='plain')
  assert people.names == ('category 0', 'category 1', 'category 2')


# ------------------------------------------------------------- the program --


def test_the_program_shows_a_data_set(tmp_path, capsys):
  entry = named.find('dolly')
  file = write(tmp_path, entry, list(forms.made_up(entry, 6)))
  assert program.main(['dolly', '--path', file]) == 0
  out = capsys.readouterr().out
  assert out.startswith('dolly: Instructions written by people')
  for line in (
    '  licence    cc-by-sa-3.0',
    '6 records; the first:',
    'instruction 0\n\ncontext 0\nresponse 0',
    'Partition: natural',
    '3 clients, 6 records: min 2, median 2, max 2 a client',
  ):
    assert line in out, line
  words = ['--partition', 'linear', 'num_clients=3']
  assert program.main(['dolly', '--path', file, *words]) == 0
  assert 'Partition: linear num_clients=3\n3 clients' in capsys.readouterr().out


def test_the_program_shows_packaged_sets_and_files(tmp_path, capsys):
  picture = tmp_path / 'clients.png'
  words = ['--partition', 'pathological', 'num_clients=4']
  drawn = []
  try:
    import matplotlib  # noqa: F401

    drawn = ['--figure', str(picture)]
  except ImportError:
    pass
  assert program.main(['shakespeare_mini', *words, *drawn]) == 0
  assert '4 clients, 2,237 records' in capsys.readouterr().out
  assert not drawn or picture.read_bytes()[:4] == b'\x89PNG'
  file = tmp_path / 'notes.jsonl'
  file.write_text('{"who": "ann", "note": "milk"}\n')
  assert program.main([str(file), 'client_key=who', 'text_key=note']) == 0
  assert '1 clients, 1 records' in capsys.readouterr().out
  assert program.main([str(file), 'text_key=note']) == 0
  assert 'no clients: choose a --partition' in capsys.readouterr().out
  assert program.main(['--list']) == 0
  out = capsys.readouterr().out
  assert all(name in out for name in NAMES) and 'shakespeare_mini' in out


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['dollie'], "there is no data set 'dollie'; the nearest is 'dolly'"),
    (['shakespeare_mini', 'path=3'], 'path is no setting of this source'),
    (['shakespeare_mini', '--partition', 'ii'], "there is no 'ii'; there are"),
    (['shakespeare_mini', '--partition', 'iid'], 'iid needs num_clients=...'),
    (
      ['shakespeare_mini', '--partition', 'alpha=x'],
      "--partition: 'alpha=x' is a setting; name the partition before it, as",
    ),
    (
      ['shakespeare_mini', '--partition', 'dirichlet', 'alpha=x'],
      "--partition: alpha of dirichlet is 'x'; it must be a number.",
    ),
    (
      ['shakespeare_mini', '--partition', 'iid', 'num_clients=2.5'],
      'num_clients of iid is 2.5; it must be an integer.',
    ),
    (
      ['shakespeare_mini', '--partition', 'iid', 'clients=3'],
      "iid has no 'clients'; it has num_clients",
    ),
    (['shakespeare_mini', '--nothing'], 'unrecognized arguments: --nothing'),
    (['nowhere.jsonl', 'text_key=a'], 'nowhere.jsonl: there is no such file'),
    (['shakespeare_mini', 'dataset'], "'dataset' is no setting such as"),
  ],
)
def test_a_wrong_command_line_is_one_sentence(words, message, capsys):
  assert program.main(words) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error


def test_samples_of_all_forms():
  pair = Record(prompt='q', chosen='a', rejected='b')
  assert program.sample(pair, 'plain').splitlines()[-1] == 'b'
  two = Record(text='a', pair='b', label='same')
  assert program.sample(two, 'plain').splitlines() == [
    'a', '--- second text ---', 'b', '--- label ---', 'same'
  ]  # fmt: skip
  assert program.sample(Record(text='x' * 5000), 'plain').endswith('x...')
