"""The data room: sources, tokenizers, templates, partitions, populations."""

import gzip
import importlib.machinery
import importlib.util
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_llm import data, evals
from fedjax_llm.data import population, sources, text, tokenizers
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

ROOT = Path(__file__).resolve().parents[1]

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes its own bos and no generation prompt, and wants roles to alternate.
INST = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
  "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
  "{% elif m['role'] == 'assistant' %}"
  "{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
  "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
  '{% endfor %}'
)
# Leaves the reasoning out of all turns but the last one.
FORGETFUL = (
  "{% for m in messages %}{% set said = m['content'] %}"
  "{% if m['role'] == 'assistant' and not loop.last %}"
  "{% set said = said.split('</think>')[-1] %}{% endif %}"
  "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = """{{ strftime_now('%d %b %Y') }}, {{ strftime_now("%Y-%m-%d") }}"""


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


@pytest.fixture(scope='module')
def hf_dir(tmp_path_factory):
  """Writes tiny Hugging Face tokenizers: byte-level BPE, or Llama-2-like."""
  import tokenizers as hf
  from transformers import PreTrainedTokenizerFast

  corpus = [r.response for r in sources.packaged()[:200]]

  def make(name, template, blank_in_front=False, **kwargs):
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token='<unk>'))
    special = ['<unk>', '<s>', '<|im_start|>', '<|im_end|>']
    if blank_in_front:
      tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(split=False)
      tokenizer.decoder = hf.decoders.Metaspace()
      alphabet = list('abcdefghijklmnopqrstuvwxyz[]/:\n▁ABCDEINSTUR')
    else:
      tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
        add_prefix_space=False
      )
      tokenizer.decoder = hf.decoders.ByteLevel()
      alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=special,
      initial_alphabet=alphabet,
      show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if blank_in_front:
      tokenizer.post_processor = hf.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
      )
    path = tmp_path_factory.mktemp(name)
    PreTrainedTokenizerFast(
      tokenizer_object=tokenizer,
      **{
        'bos_token': '<s>',
        'eos_token': '<|im_end|>',
        'chat_template': template,
        **kwargs,
      },
    ).save_pretrained(path)
    return str(path)

  return make


@pytest.fixture(scope='module')
def chatml(hf_dir):
  return tokenizers.pretrained(hf_dir('chatml', CHATML))


@pytest.fixture(scope='module')
def inst(hf_dir):
  return tokenizers.pretrained(hf_dir('inst', INST, blank_in_front=True))


@pytest.fixture(scope='module')
def forgetful(hf_dir):
  return tokenizers.pretrained(hf_dir('forgetful', FORGETFUL))


BYTES = tokenizers.bytes()


def tokens_of(example):
  return example.tokens.tolist()


def learned(example):
  return example.tokens[example.loss_mask].tolist()


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


# ------------------------------------------------------------- tokenizers --


@hypothesis.given(st.text(st.characters(exclude_categories=['Cs'])))
def test_bytes_round_trip(s):
  ids = BYTES.encode(s)
  assert max([0, *ids]) < 256
  assert BYTES.decode([257, *ids, 258, 256]) == s
  assert (BYTES.pad_id, BYTES.bos_id, BYTES.eos_id) == (256, 257, 258)
  assert BYTES.vocab_size == 259


def test_pretrained_adds_no_special_tokens(chatml, inst):
  for tokenizer in (chatml, inst):
    ids = tokenizer.encode('thou art')
    assert tokenizer.decode(ids) == 'thou art'
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    assert tokenizer.encode('<|im_end|>')[-1] == tokenizer.eos_id == 3
    assert tokenizer.pad_id == tokenizer.eos_id  # it has no pad token
    assert tokenizer.vocab_size == 400
  assert inst.bos_id == 1
  assert chatml.bos_id is None  # it has one but does not put it in front


def test_a_template_that_prints_the_date_prints_always_the_same(hf_dir):
  tokenizer = tokenizers.pretrained(hf_dir('dated', DATED + CHATML))
  said = tokenizer.chat([user('a')], True)
  assert said and said.startswith('26 Jul 2024, 2024-07-26<|im_start|>user')


def test_pretrained_names_what_is_missing(tmp_path, hf_dir):
  with pytest.raises(Error, match='no such directory'):
    tokenizers.pretrained(str(tmp_path / 'nowhere'))
  with pytest.raises(Error, match='no tokenizer in this directory'):
    tokenizers.pretrained(str(tmp_path))
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(Error, match='cannot be loaded'):
    tokenizers.pretrained(str(tmp_path))
  with pytest.raises(Error, match='eos_token'):
    tokenizers.pretrained(hf_dir('endless', None, eos_token=None))


def test_pretrained_imports_late_and_quietly(hf_dir):
  """Nothing is printed, and the data room itself does not load the library."""
  path = hf_dir('quiet', CHATML)
  code = (
    'import sys; from fedjax_llm.data import tokenizers\n'
    "assert not {'transformers', 'datasets'} & set(sys.modules)\n"
    f'print(tokenizers.pretrained({path!r}).eos_id)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
  )
  assert (done.stdout, done.stderr) == ('3\n', '')


# ------------------------------------------------------------------- text --

PAIR = Record('ann', prompt='2+2?', response='4')


@pytest.mark.parametrize(
  ('template', 'before', 'said'),
  [
    ('plain', '2+2?\n', '4'),
    ('chat', 'user: 2+2?\nassistant: ', '4'),
    (
      'alpaca',
      'Below is an instruction that describes a task. Write a response that '
      'appropriately completes the request.\n\n### Instruction:\n2+2?\n\n'
      '### Response:\n',
      '4',
    ),
    (
      'vicuna',
      'A chat between a curious user and an artificial intelligence assistant.'
      " The assistant gives helpful, detailed, and polite answers to the user's"
      ' questions. USER: 2+2? ASSISTANT:',
      ' 4',
    ),
  ],
)
def test_a_template_is_bos_prompt_reply_end(template, before, said):
  (example,) = data.encode(PAIR, BYTES, template)
  assert tokens_of(example) == [257, *before.encode(), *said.encode(), 258]
  assert learned(example) == [*said.encode(), 258]
  assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool


def test_chatml_learns_the_reply_and_its_marker_but_not_the_line_end(chatml):
  (example,) = data.encode(PAIR, chatml)
  whole = chatml.chat([user('2+2?'), assistant('4')], False)
  assert whole is not None
  assert tokens_of(example) == chatml.encode(whole.rstrip())  # no bos, no eos
  assert learned(example) == chatml.encode('4<|im_end|>')


def test_a_bos_that_the_template_writes_is_not_written_twice(inst):
  (example,) = data.encode(PAIR, inst)
  assert tokens_of(example).count(inst.bos_id) == 1
  (other,) = data.encode(PAIR, inst, 'plain')
  assert tokens_of(other)[0] == inst.bos_id


def test_no_blank_is_invented_between_prompt_and_reply(inst):
  """A Llama-2-like tokenizer puts a blank in front of whatever it encodes."""
  record = Record(prompt='are you there', response='so')
  (example,) = data.encode(record, inst, 'plain')
  whole = inst.encode('are you there\nso')
  assert tokens_of(example) == [inst.bos_id, *whole, inst.eos_id]
  assert learned(example)[0] != inst.encode('so')[0]  # encoded alone
  (example,) = data.encode(record, inst)
  whole = '<s>[INST] are you there [/INST] so <|im_end|>'
  assert tokens_of(example) == inst.encode(whole)


TOKENIZERS = ['bytes', 'chatml', 'inst', 'forgetful']
words = st.text(st.sampled_from('ab \n:.éZ<'), min_size=1, max_size=12)


@pytest.mark.parametrize('template', list(data.TEMPLATES))
@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_reply_is_generated_from_what_it_was_trained_after(
  name, template, request
):
  tokenizer = BYTES if name == 'bytes' else request.getfixturevalue(name)

  @hypothesis.settings(max_examples=25, deadline=None)
  @hypothesis.given(words, words)
  def check(asked, said):
    record = Record(prompt=asked, response=said)
    examples = data.encode(record, tokenizer, template)
    assert len(examples) == bool(said.strip())  # a blank reply says nothing
    for example in examples:
      first = int(np.argmax(example.loss_mask))
      before = data.prompt(record, tokenizer, template)
      assert tokens_of(example)[:first] == before
      assert example.loss_mask[first:].all()  # it ends with the reply
      reply = tokenizer.decode(learned(example))
      if name != 'inst':  # whose small alphabet lacks some letters
        assert reply.strip() == said.strip()
      assert learned(example)[-1] == tokenizer.eos_id

  check()


@pytest.mark.parametrize('template', list(data.TEMPLATES))
@pytest.mark.parametrize('name', ['bytes', 'chatml', 'inst'])
def test_every_turn_of_a_chat_is_learned_in_one_example(
  name, template, request
):
  tokenizer = BYTES if name == 'bytes' else request.getfixturevalue(name)
  turns = (user('ab'), assistant('cd'), user('ef'), assistant('gh'))
  (example,) = data.encode(Record(messages=turns), tokenizer, template)
  starts = np.flatnonzero(np.diff(example.loss_mask.astype(int)) == 1) + 1
  ends = np.flatnonzero(np.diff(example.loss_mask.astype(int)) == -1) + 1
  assert len(starts) == 2 and len(ends) == 1
  tokens = tokens_of(example)
  assert tokenizer.decode(tokens[starts[0] : ends[0]]).strip() == 'cd'
  assert tokenizer.decode(tokens[starts[1] :]).strip() == 'gh'
  assert tokens[ends[0] - 1] == tokens[-1] == tokenizer.eos_id
  # Each reply is generated from what stands before it, also the first one.
  for cut, start in ((2, starts[0]), (4, starts[1])):
    before = data.prompt(Record(messages=turns[:cut]), tokenizer, template)
    assert before == tokens[:start]
    asked = Record(messages=turns[: cut - 1])
    assert data.prompt(asked, tokenizer, template) == before


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_reply(
  forgetful,
):
  turns = (
    user('ab'),
    assistant('<think>x</think>cd'),
    user('ef'),
    assistant('gh'),
  )
  one, two = data.encode(Record(messages=turns), forgetful)
  assert forgetful.decode(learned(one)) == '<think>x</think>cd'
  assert forgetful.decode(learned(two)) == 'gh'
  assert 'think' not in forgetful.decode(tokens_of(two))
  before = tokens_of(two)[: -len(learned(two))]
  assert data.prompt(Record(messages=turns), forgetful) == before


def test_a_system_message_replaces_the_preamble():
  turns = ({'role': 'system', 'content': 'Be brief.'}, user('a'))
  ids = data.prompt(Record(messages=turns), BYTES, 'alpaca')
  assert BYTES.decode(ids) == (
    'Be brief.\n\n### Instruction:\na\n\n### Response:\n'
  )


def test_what_a_template_cannot_do_is_told(hf_dir, inst):
  bare = tokenizers.pretrained(hf_dir('bare', None))
  with pytest.raises(Error, match='no chat template; choose the template'):
    data.encode(PAIR, bare)
  turns = ({'role': 'system', 'content': 'x'}, user('a'), assistant('b'))
  with pytest.raises(Error, match=r'f:3: .*only user and assistant'):
    data.encode(Record(messages=turns, where='f:3'), inst)
  with pytest.raises(Error, match=r"no 'vicunia'; choose from chat, alpaca"):
    data.encode(PAIR, BYTES, 'vicunia')
  with pytest.raises(Error, match="long_replies is 'keep'"):
    data.encode(PAIR, BYTES, long_replies='keep')
  with pytest.raises(Error, match='max_length is 1'):
    data.encode(PAIR, BYTES, max_length=1)
  with pytest.raises(Error, match='a record holds'):
    data.encode(Record(prompt='a'), BYTES)


def test_a_template_of_ones_own_is_a_function():
  def shout(messages, tokenizer):
    del tokenizer
    asked, said = (m['content'] for m in messages)
    return [[text.Piece(asked + '!'), text.Piece(said, True, end=True)]]

  (example,) = data.encode(PAIR, BYTES, shout)
  assert BYTES.decode(tokens_of(example)) == '2+2?!4'


# --------------------------------------------------------- text: too long --


def test_a_long_prompt_loses_its_left_and_keeps_its_bos():
  record = Record(prompt='abcdefgh', response='yes')
  result = text.encode_counted(record, BYTES, 'plain', max_length=8)
  (example,) = result.examples
  assert tokens_of(example) == [257, *b'gh\nyes', 258]
  assert learned(example) == [*b'yes', 258]
  assert result[1:4] == (1, 0, 0)
  assert data.prompt(record, BYTES, 'plain', max_length=4) == [257, *b'gh\n']
  no_bos = BYTES._replace(bos_id=None)
  (example,) = data.encode(record, no_bos, 'plain', max_length=8)
  assert tokens_of(example) == [*b'fgh\nyes', 258]


@pytest.mark.parametrize('bos', [257, None])
def test_a_reply_is_never_cut_unless_asked(bos):
  tokenizer = BYTES._replace(bos_id=bos)
  record = Record(prompt='abcdefgh', response='0123456')  # 8 with its end
  fits = data.encode(record, tokenizer, 'plain', max_length=9)
  assert [learned(e) for e in fits] == [[*b'0123456', 258]]
  dropped = text.encode_counted(record, tokenizer, 'plain', max_length=8)
  assert dropped == text.Encoded([], replies_left_out=1)
  cut = text.encode_counted(record, tokenizer, 'plain', 8, 'cut')
  (example,) = cut.examples
  assert len(example.tokens) == 8 and cut.replies_cut == 1
  assert bytes(learned(example)) == (b'012' if bos else b'0123')
  assert bytes(t for t in tokens_of(example) if t < 256) in (
    b'fgh\n0123',
    b'fgh\n012',
  )


def test_of_a_long_chat_every_reply_is_learned_exactly_once():
  turns = []
  for i in range(9):
    turns += [user(f'question {i}'), assistant(f'<{i}>' + 'x' * i)]
  record = Record(messages=tuple(turns))
  said = [f'<{i}>' + 'x' * i for i in range(9)]
  for max_length in (13, 20, 40, 64, 100, 1000):
    result = text.encode_counted(record, BYTES, 'plain', max_length)
    assert result.replies_left_out == 0
    assert all(len(e.tokens) <= max_length for e in result.examples)
    replies = ''.join(
      ''.join(chr(t) if t < 256 else '.' for t in learned(e))
      for e in result.examples
    )
    assert replies == ''.join(f'{s}.' for s in said)
  assert len(result.examples) == 1
  result = text.encode_counted(record, BYTES, 'plain', 12)
  assert result.replies_left_out == 1  # the longest has 12 tokens


@hypothesis.given(
  st.text(st.sampled_from('abc '), min_size=1, max_size=40).filter(str.strip),
  st.integers(2, 12),
  st.sampled_from([257, None]),
)
def test_a_long_text_becomes_chunks_in_which_each_token_is_learned_once(
  body, max_length, bos
):
  tokenizer = BYTES._replace(bos_id=bos)
  examples = data.encode(Record(text=body), tokenizer, max_length=max_length)
  whole = ([] if bos is None else [bos]) + [*body.encode(), 258]
  assert [t for e in examples for t in learned(e)] == whole[1:]
  assert tokens_of(examples[0]) == whole[:max_length]
  for one, two in itertools.pairwise(examples):
    assert len(one.tokens) == max_length
    before, *rest = tokens_of(two)[0 if bos is None else 1 :]
    if bos is not None:
      assert two.tokens[0] == bos
    if rest:  # two tokens have no place for the last one of the row before
      assert one.tokens[-1] == before and not two.loss_mask[-len(rest) - 1]


def test_rows_begin_with_all_that_a_tokenizer_puts_in_front():
  """Some tokenizers begin a text with more than one token."""
  tokenizer = BYTES._replace(bos_id=7, begin=(7, 8))
  rows = data.encode(Record(text='abcdefgh'), tokenizer, max_length=5)
  assert [tokens_of(row) for row in rows] == [
    [7, 8, *b'abc'], [7, 8, *b'cde'], [7, 8, *b'efg'], [7, 8, *b'gh', 258]
  ]  # fmt: skip
  assert [learned(row) for row in rows] == [
    [8, *b'abc'], [*b'de'], [*b'fg'], [*b'h', 258]
  ]  # fmt: skip
  record = Record(prompt='abcdefgh', response='x')
  cut = data.prompt(record, tokenizer, 'plain', max_length=5)
  assert cut == [7, 8, *b'gh\n']


def test_samples_that_are_cut_keep_the_beginning_of_their_text():
  record = Record(prompt='abcdefgh', response='xyz')
  (example,) = data.encode(record, BYTES, 'plain')
  ask = lambda **more: evals.questions([[example]], 1, max_prompt=4, **more)
  assert ask(begin=[257])[0].prompt == [257, *b'gh\n']
  assert ask()[0].prompt == [*b'fgh\n']
  (_, row, *_) = data.encode(Record(text='abcdefghij'), BYTES, max_length=6)
  (question,) = evals.questions([[row]], 1, begin=[257])
  assert question.prompt == [257, *b'ef']  # half of the row


def test_the_prompt_of_a_text_is_how_it_begins():
  record = Record(text='abcdefgh')
  assert data.prompt(record, BYTES) == [257, *b'abcd']
  assert len(data.prompt(Record(text='ab' * 99), BYTES)) == 33
  assert data.encode(Record(text=' \n'), BYTES) == []


# -------------------------------------------------------------- partition --


def make(n, num_labels=3, num_clients=4):
  return [
    Record(
      f'c{i % num_clients}',
      text=f'text {i}',
      label=f'l{i % num_labels}',
      where=f'f:{i}',
    )
    for i in range(n)
  ]


BUILDERS = {
  'natural': lambda n: data.natural(),
  'iid': lambda n: data.iid(n),
  'dirichlet': lambda n: data.dirichlet(n, alpha=0.1),
  'quantity': lambda n: data.quantity(n),
  'one_label': lambda n: data.one_label(n),
}


@pytest.mark.parametrize('name', BUILDERS)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(8, 60), st.integers(3, 8), st.integers(0, 99))
def test_a_partition_depends_on_the_seed_and_not_on_the_order_of_the_file(
  name, num_records, num_clients, seed
):
  records = make(num_records)
  split = BUILDERS[name](num_clients)
  names = split(records, seed)
  assert names == split(records, seed)
  order = np.random.default_rng(seed).permutation(num_records)
  moved = [records[i]._replace(where='elsewhere') for i in order]
  assert split(moved, seed) == [names[i] for i in order]
  if name != 'natural':  # every client holds something, as asked
    assert len(set(names)) == num_clients


@pytest.mark.parametrize('name', ['iid', 'dirichlet', 'quantity', 'one_label'])
def test_another_seed_is_another_partition(name):
  records, split = make(60), BUILDERS[name](6)
  assert split(records, 0) != split(records, 1)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(1, 50), st.integers(1, 50))
def test_iid_sizes_differ_by_at_most_one(num_records, num_clients):
  hypothesis.assume(num_clients <= num_records)
  sizes = Counter(data.iid(num_clients)(make(num_records), 0)).values()
  assert max(sizes) - min(sizes) <= 1


def mixes(names, records):
  """Share of each label in each client, [N, labels]."""
  table = Counter(zip(names, (r.label for r in records)))
  clients, labels = sorted(set(names)), sorted({r.label for r in records})
  counts = np.array([[table[c, label] for label in labels] for c in clients])
  return counts / counts.sum(1, keepdims=True)


def test_dirichlet_goes_from_one_label_a_client_to_iid():
  records = make(1200, num_labels=3)
  skew = [
    np.abs(mixes(data.dirichlet(10, alpha)(records, 0), records) - 1 / 3).mean()
    for alpha in (0.01, 1.0, 1e6)
  ]
  assert skew[0] > 0.4 > skew[1] > 0.05 > 0.01 > skew[2]  # one label: 4 / 9
  sizes = Counter(data.dirichlet(10, 1e6)(records, 0)).values()
  assert max(sizes) - min(sizes) <= 3  # one of each label


def test_dirichlet_shares_have_the_variance_of_their_distribution():
  """Var p = (1/N)(1 - 1/N) / (N alpha + 1); here over 200 labels."""
  records = make(200 * 100, num_labels=200)
  for alpha in (0.2, 2.0):
    names = data.dirichlet(4, alpha, min_size=0)(records, 3)
    table = Counter(zip(names, (r.label for r in records)))
    shares = [
      table[f'client000{c}', f'l{k}'] / 100
      for k in range(200)
      for c in range(4)
    ]
    expected = 0.25 * 0.75 / (4 * alpha + 1)
    np.testing.assert_allclose(np.var(shares), expected, rtol=0.15)


def test_dirichlet_lifts_small_clients_to_the_least_size():
  records = make(100, num_labels=2)
  for seed in range(5):
    small = data.dirichlet(20, 0.01, min_size=0)(records, seed)
    assert len(set(small)) < 20  # some would hold nothing
    sizes = Counter(data.dirichlet(20, 0.01, min_size=5)(records, seed))
    assert set(sizes.values()) == {5}
    sizes = Counter(data.dirichlet(20, 0.01, min_size=3)(records, seed))
    assert len(sizes) == 20 and min(sizes.values()) == 3


def test_quantity_is_log_normal_with_a_heavy_tail():
  records = make(20000)
  logs = {}
  for sigma in (0.0, 0.5, 1.0, 1.5):
    sizes = Counter(data.quantity(100, sigma)(records, 1)).values()
    assert sum(sizes) == 20000 and len(sizes) == 100
    logs[sigma] = np.std(np.log(list(sizes)))
    if sigma >= 1:
      assert np.mean(list(sizes)) > 1.25 * np.median(list(sizes))
  assert logs[0.0] == 0
  # The same draw, scaled: sigma is a slope (rounding aside).
  np.testing.assert_allclose(logs[0.5] / logs[1.0], 0.5, rtol=0.05)
  np.testing.assert_allclose(logs[1.0], 1.0, rtol=0.25)


def test_one_label_clients_are_pure_and_even():
  records = make(90, num_labels=2)[:60] + make(30, num_labels=1)
  for num_clients in (None, 2, 7):
    names = data.one_label(num_clients)(records, 0)
    assert (mixes(names, records).max(1) == 1).all()
  sizes = Counter(names)  # 60 of label l0, 30 of l1, over 7 clients
  assert sorted(sizes.values()) == [12, 12, 12, 12, 12, 15, 15]


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    (data.natural(), 'f:1: the partition natural needs the client'),
    (data.one_label(), 'f:2: the partition one_label needs the label'),
    (data.dirichlet(2), 'f:2: the partition dirichlet needs the label'),
    (data.iid(4), 'num_clients is 4, but must be between 1 and the 3 records'),
    (data.iid(0), 'num_clients is 0'),
    (data.quantity(4), 'num_clients is 4'),
    (data.quantity(2, sigma=-1.0), 'sigma is -1.0'),
  ],
)
def test_partitions_say_what_they_miss(split, message):
  records = [
    Record('a', text='x', label='u', where='f:0'),
    Record(None, text='y', label='v', where='f:1'),
    Record('b', text='z', where='f:2'),
  ]
  with pytest.raises(Error, match=message):
    split(records, 0)


def test_label_partitions_check_their_numbers():
  records = make(9)
  for split, message in [
    (data.dirichlet(2, alpha=0.0), 'alpha is 0.0'),
    (data.dirichlet(4, min_size=3), 'num_clients is 4, .* min_size=3'),
    (data.dirichlet(4, min_size=-1), 'min_size is -1'),
    (data.one_label(2), 'num_clients is 2, .* 3 labels and the 9 records'),
    (data.one_label(10), 'num_clients is 10'),
  ]:
    with pytest.raises(Error, match=message):
      split(records, 0)


def test_the_histogram_counts_every_client_once():
  names = ['a'] * 1 + ['b'] * 2 + ['c'] * 3 + ['d'] * 1024
  head, *bars = data.histogram(names).split('\n')
  assert head == (
    '4 clients, 1,030 records: min 1, median 2.5, max 1,024 a client'
  )
  assert len(bars) == 11  # 1, 2-3, 4-7, ..., 1,024-2,047
  assert [int(bar.split()[-1]) for bar in bars] == [1, 2, *[0] * 8, 1]
  assert data.histogram([]) == '0 clients, 0 records'


# ------------------------------------------------------------- population --


def build(records, **kwargs):
  settings = {'template': 'plain', 'max_length': 64} | kwargs
  return population.build(records, BYTES, **settings)


def texts(examples):
  return [BYTES.decode(e.tokens.tolist()) for e in examples]


def test_every_text_is_trained_on_or_held_out_once():
  records = make(40)
  made = build(records, heldout_fraction=0.25, new_clients=1)
  assert len(made.names) == 3 and len(made.new_names) == 1
  assert list(made.names) == sorted(made.names)
  assert sorted(made.names + made.new_names) == ['c0', 'c1', 'c2', 'c3']
  for names, groups in (
    (made.names, [a + b for a, b in zip(made.train, made.heldout)]),
    (made.new_names, made.new),
  ):
    for name, group in zip(names, groups):
      expected = [r.text or '' for r in records if r.client == name]
      assert sorted(texts(group)) == sorted(expected)
  assert {len(one) for one in made.heldout} == {2}
  assert made.report['num_records'] == 40 and made.report['num_clients'] == 3
  assert made.report['histogram'] == data.histogram(['a', 'b', 'c'] * 8)
  assert (
    made.report['tokens'] - made.report['train_examples']
    == (made.report['loss_tokens'])
  )
  json.dumps(made.report)


def same(one, two):
  assert one.names == two.names and one.new_names == two.new_names
  assert one.report == two.report
  for field in ('train', 'heldout', 'new'):
    a, b = getattr(one, field), getattr(two, field)
    assert list(map(texts, a)) == list(map(texts, b))


@pytest.mark.parametrize('name', BUILDERS)
def test_a_population_does_not_depend_on_the_order_of_the_records(name):
  records = make(50) + make(5)  # some of them twice
  split = BUILDERS[name](5)
  first = build(records, partition=split, new_clients=0.3, max_clients=4)
  order = np.random.default_rng(0).permutation(len(records))
  same(
    first,
    build(
      [records[i] for i in order],
      partition=split,
      new_clients=0.3,
      max_clients=4,
    ),
  )


def test_a_clients_split_does_not_depend_on_the_other_clients():
  records = make(40)
  whole = build(records)
  alone = build([r for r in records if r.client == 'c2'])
  at = whole.names.index('c2')
  assert texts(whole.train[at]) == texts(alone.train[0])
  assert texts(whole.heldout[at]) == texts(alone.heldout[0])
  other = build(records, seed=1)
  assert texts(other.heldout[at]) != texts(whole.heldout[at])


@pytest.mark.parametrize('fraction', [0.01, 0.5, 0.99])
def test_two_texts_suffice_for_one_on_each_side(fraction):
  records = [
    Record('a', text='x'),
    Record('a', text='y'),
    Record('b', text='z'),
  ]
  made = build(records, heldout_fraction=fraction)
  assert [len(one) for one in made.train] == [1, 1]
  assert [len(one) for one in made.heldout] == [1, 0]
  assert made.report['clients_without_heldout'] == 1
  none = build(records, heldout_fraction=0)
  assert [len(one) for one in none.train] == [2, 1]


def test_no_text_is_both_trained_on_and_held_out():
  # 'hi' belongs to everybody, 'a0' is there three times for one client.
  records = [Record(c, text='hi') for c in 'abcdef'] + [
    Record(c, text=f'{c}{i}') for c in 'abcdef' for i in range(3)
  ]
  records += [records[6], records[6]]
  for seed in range(8):
    made = build(records, heldout_fraction=0.5, new_clients=2, seed=seed)
    trained = {t for one in made.train for t in texts(one)}
    held = [t for one in made.heldout + made.new for t in texts(one)]
    assert not trained & set(held)
    lost = made.report['heldout_duplicates']
    assert sum(map(len, made.train)) + len(held) + lost == len(records)
    assert lost > 0 and 'hi' in trained


def test_chunks_of_a_text_stay_on_one_side_unless_there_is_but_one_text():
  long = [Record('a', text=f'{c}' * 100) for c in 'xyz']
  made = build(long, heldout_fraction=0.3, max_length=21)
  letters = [
    {t[0] for t in texts(side[0])} for side in (made.train, made.heldout)
  ]
  assert len(letters[0]) == 2 and len(letters[1]) == 1
  one = build(
    [Record('a', text='abcdefghij' * 3)], heldout_fraction=0.3, max_length=8
  )
  assert len(one.train[0]) > len(one.heldout[0]) > 0


def test_clients_without_a_usable_example_are_left_out_and_counted():
  records = [
    Record('long', prompt='q', response='x' * 99),
    Record('mute', prompt='q', response=' '),
    Record('fine', prompt='q' * 99, response='ok'),
  ]
  made = build(records)
  assert made.names == ('fine',)
  expected = {
    'clients_left_out': 2,
    'clients_left_out_names': ['long', 'mute'],
    'replies_left_out': 1,
    'empty_records': 1,
    'prompts_truncated': 1,
    'replies_cut': 0,
  }
  assert expected.items() <= made.report.items()
  kept = build(records, long_replies='cut')
  assert kept.names == ('fine', 'long') and kept.report['replies_cut'] == 1
  with pytest.raises(
    Error, match=r'no client is left: none of the 2 .*1 empty'
  ):
    build(records[:2])
  many = [Record(f'{i}', text=' ') for i in range(9)] + [Record('a', text='b')]
  report = build(many).report
  assert report['clients_left_out'] == 9
  assert report['clients_left_out_names'] == ['0', '1', '2', '3', '4']


def test_min_examples_and_max_clients_choose_by_key():
  records = [*make(40), Record('poor', text='one')]
  made = build(records, min_examples=2)
  assert 'poor' not in made.names and made.report['clients_left_out'] == 1
  few = build(records, min_examples=2, max_clients=3, new_clients=1)
  assert len(few.names) == 2 and len(few.new_names) == 1
  assert few.report['clients_not_drawn'] >= 1
  chosen = {
    build(records, min_examples=2, max_clients=2, seed=s).names
    for s in range(9)
  }
  assert len(chosen) > 2


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'heldout_fraction': 1.0}, 'heldout_fraction is 1.0'),
    ({'new_clients': 4}, r'new_clients is 4, .* 4 clients and one must be'),
    ({'new_clients': -1}, 'new_clients is -1'),
    ({'new_clients': 1.5}, 'new_clients is 1.5'),
    ({'max_clients': 0}, 'max_clients is 0'),
    ({'min_examples': -1}, 'min_examples is -1'),
  ],
)
def test_numbers_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(Error, match=message):
    build(make(8), **settings)


def test_the_packaged_text_makes_32_clients_that_hold_out_a_tenth():
  made = population.build(data.packaged(), BYTES, max_length=512)
  assert len(made.names) == 32 and made.names[0].startswith('all-s-well')
  assert {len(one) for one in made.heldout} == {7}
  assert made.report['replies_left_out'] == 0
  assert made.report['train_examples'] == 2013


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


def test_random_deals_are_those_of_earlier_versions():
  """Keys are made of a record's fields: new ones must not change old deals."""
  records = [Record(text=f'text {i}', label=str(i % 3)) for i in range(9)]
  names = data.iid(num_clients=3)(records, 5)
  assert [int(name[-1]) for name in names] == [0, 2, 0, 1, 1, 2, 2, 1, 0]
