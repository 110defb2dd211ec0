"""Tokenizers and templates: records as texts to learn."""

import itertools
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_llm import data, evals
from fedjax_llm.data import sources, text, tokenizers
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
