"""What messages hold beside a role and a content, and what is learned of it."""

import json

import numpy as np
import pytest

from fedjax_llm import data
from fedjax_llm.data import chat, messages, text, tokenizers
from fedjax_llm.data.sources import Record
from fedjax_llm.run import narration
from fedjax_llm.types import Error
from tests import tiny_tokenizers

pytest.importorskip('tokenizers')

# Writes reasoning, calls, their results and names, as many templates do.
RICH = (
  "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}"
  "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
  "{% if m.name %}{{ ' ' + m.name }}{% endif %}{{ '\n' }}"
  "{% if m.role == 'assistant' and m.reasoning_content %}"
  "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
  "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + "
  "c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {
  'id': 'c1',
  'type': 'function',
  'function': {'name': 'weather', 'arguments': '{"city": "Bern"}'},
}


def user(content, **more):
  return {'role': 'user', 'content': content, **more}


def reply(content, **more):
  return {'role': 'assistant', 'content': content, **more}


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """Tokenizers of single bytes with these chat templates."""
  made = {}

  def one(template):
    if template not in made:
      folder = tmp_path_factory.mktemp('tokenizer')
      path = tiny_tokenizers.write(folder, template)
      made[template] = tokenizers.pretrained(path)
    return made[template]

  return one


def read(*turns, **more):
  """The record of a line of JSON with these messages."""
  found = messages.read(json.loads(json.dumps(turns)), 'messages', 'x:1')
  return Record(messages=found, where='x:1', **more)


def learned(record, tokenizer, template='chat'):
  """What the examples of a record learn, as text with special tokens."""
  names = {number: name for name, number in tokenizer.special.items()}
  spell = lambda ids: ''.join(
    names[i] if i in names else tokenizer.decode([i]) for i in map(int, ids)
  )
  return [
    spell(np.asarray(e.tokens)[np.asarray(e.loss_mask)])
    for e in data.encode(record, tokenizer, template, 1024)
  ]


# --------------------------------------------------------- what is learned --


def test_reasoning_and_calls_are_learned_and_results_are_not(make):
  record = read(
    user('Weather?'),
    reply(None, reasoning_content='look it up', tool_calls=[CALL]),
    {'role': 'tool', 'tool_call_id': 'c1', 'name': 'weather', 'content': 'sun'},
    reply('It is sunny.', tool_calls=None),
  )
  assert learned(record, make(RICH)) == [
    '<think>look it up</think><call>weather {"city": "Bern"}<|im_end|>'
    'It is sunny.<|im_end|>'
  ]


@pytest.mark.parametrize('name', ['reasoning_content', 'reasoning', 'thinking'])
def test_reasoning_has_several_names(make, name):
  record = read(user('Hi'), reply('Ho', **{name: 'they greet'}))
  assert learned(record, make(RICH)) == [
    '<think>they greet</think>Ho<|im_end|>'
  ]


def test_arguments_stay_a_text_for_templates_that_expect_one(make):
  template = RICH.replace(
    'c.function.arguments | tojson', 'c.function.arguments'
  )
  record = read(user('Hi'), reply('', tool_calls=[CALL]))
  assert learned(record, make(template)) == [
    '<call>weather {"city": "Bern"}<|im_end|>'
  ]


def test_a_weight_of_zero_is_context_and_not_learned(make):
  turns = (user('a'), reply('no', weight=0), user('b'), reply('yes', weight=1))
  for template, said in (('chat', 'yes<|im_end|>'), ('plain', 'yes<|im_end|>')):
    assert learned(read(*turns), make(RICH), template) == [said]
  (example,) = data.encode(read(*turns), make(RICH))
  assert b'no' in bytes(make(RICH).decode(example.tokens), 'utf8')
  assert learned(read(*turns[:2]), make(RICH)) == []


def test_parts_of_a_content_are_joined(make):
  parts = [{'type': 'text', 'text': 'H'}, {'type': 'text', 'text': 'o'}]
  assert learned(read(user(parts), reply(parts)), make(RICH)) == [
    'Ho<|im_end|>'
  ]


def test_share_gpt_lists_are_read(make):
  turns = [
    {'from': 'system', 'value': 'Be brief.'},
    {'from': 'human', 'value': 'Hi'},
    {'from': 'gpt', 'value': 'Ho', 'weight': None},
  ]
  record = read(*turns)
  assert [m['role'] for m in record.messages or ()] == [
    'system',
    'user',
    'assistant',
  ]
  assert learned(record, make(RICH)) == ['Ho<|im_end|>']


def test_tools_of_a_record_reach_the_template(make, tmp_path):
  tools = [{'name': 'clock'}]
  file = tmp_path / 'x.jsonl'
  rows = [{'messages': [user('Hi'), reply('Ho')], 'tools': t}
          for t in (tools, json.dumps(tools), None, [])]  # fmt: skip
  file.write_text('\n'.join(map(json.dumps, rows)))
  records = data.jsonl(str(file), None)
  assert [r.tools for r in records] == [tuple(tools), tuple(tools), None, None]
  whole = [make(RICH).decode(data.prompt(r, make(RICH))) for r in records]
  assert whole[0] == whole[1] == 'tools\n[{"name": "clock"}]\n' + whole[2]
  assert whole[2] == whole[3] == 'user\nHi\nassistant\n'
  plain = make(tiny_tokenizers.CHATML)
  with pytest.raises(Error, match=r"x.jsonl:1: .* does not write the record's"):
    data.encode(records[0], plain)
  with pytest.raises(Error, match='template alpaca does not write the record'):
    data.encode(records[0], plain, 'alpaca')


# --------------------------------------------------------- what is refused --


@pytest.mark.parametrize(
  ('turn', 'message'),
  [
    (user('a', weight=1), "'weight' is 1, but only messages of the role 'assi"),
    (reply('a', weight=0.5), "'weight' is 0.5, but must be 0"),
    (reply('a', weight=True), "'weight' is True, but must be 0"),
    (user([{'type': 'image_url', 'image_url': 'x'}]), "the type 'image_url'"),
    (user([{'type': 'text'}]), "0: 'text' is None, but must be a string"),
    (user([3]), '0: 3 is no part of a content'),
    (reply('a', tool_calls=3), "'tool_calls' is 3, but must be a list of obj"),
    (reply('a', tool_calls=[3]), "'tool_calls' is .3., but must be a list of"),
    ({'role': 3, 'content': 'a'}, "'role' is 3, but must be a string"),
    ({'content': 'a'}, "there is no 'role'; there is 'content'"),
    (
      {'from': 'bob', 'value': 'a'},
      "'from' is 'bob', but must be one of human",
    ),
    ({'from': 'gpt'}, "there is no 'value'; there is 'from'"),
    ({'role': 'assistant'}, "there is no 'content'; there is 'role'"),
    (reply('a', note='\ud83d'), "'note' holds half a character"),
    (reply('a', note=float('nan')), "'note' cannot be passed on"),
  ],
)
def test_what_no_message_holds_is_named_with_its_place(turn, message):
  with pytest.raises(Error, match=f'^x:1, message 1[:,] .*{message}'):
    messages.read([user('Hi'), turn], 'messages', 'x:1')


@pytest.mark.parametrize(
  ('turns', 'message'),
  [
    (
      [user('a'), reply('b', reasoning='c')],
      "1: .* does not write 'reasoning'",
    ),
    ([user('a'), reply('', tool_calls=[CALL])], "does not write 'tool_calls'"),
    ([user('a', name='Eve'), reply('b')], "0: .* does not write 'name'"),
    ([user('a'), reply('b', train=False)], "1: .* does not write 'train'"),
  ],
)
@pytest.mark.parametrize('template', ['chat', 'alpaca', 'vicuna', 'plain'])
def test_fields_that_a_template_leaves_out_are_named(
  make, turns, message, template
):
  with pytest.raises(Error, match=f'x:1: .*{message}'):
    data.encode(read(*turns), make(tiny_tokenizers.CHATML), template)


def test_what_only_says_which_call_a_result_belongs_to_may_be_left_out(make):
  record = read(
    user('a'),
    reply('', tool_calls=[CALL]),
    {'role': 'tool', 'name': 'weather', 'tool_call_id': 'c1', 'content': 'sun'},
    reply('b'),
  )
  nameless = RICH.replace("{% if m.name %}{{ ' ' + m.name }}{% endif %}", '')
  assert len(learned(record, make(nameless))) == 1


def test_a_message_that_a_template_leaves_out_is_named(make):
  silent = tiny_tokenizers.CHATML.replace(
    '{% for m in messages %}',
    "{% for m in messages if m['role'] in ('user', 'assistant') %}",
  )
  record = read({'role': 'system', 'content': 'x'}, user('a'), reply('b'))
  with pytest.raises(Error, match=r"message 0: .* the role 'system'"):
    data.encode(record, make(silent))
  # One that is written otherwise than it was is no such message.
  shout = tiny_tokenizers.CHATML.replace("m['content']", "m['content'] | upper")
  assert learned(record, make(shout)) == ['B<|im_end|>']


@pytest.mark.parametrize('template', ['alpaca', 'vicuna', 'plain'])
def test_fixed_templates_know_three_roles(make, template):
  for turns in (
    [{'role': 'tool', 'content': 'x'}, reply('b')],
    [user('a'), {'role': 'system', 'content': 'x'}, reply('b')],
  ):
    with pytest.raises(
      Error, match=f'template {template} does not know the ro'
    ):
      data.encode(read(*turns), make(RICH), template)


def test_a_chat_that_the_assistant_opens_is_learned_or_told(make):
  record = read(reply('Hello'), user('a'), reply('b'))
  assert learned(record, make(tiny_tokenizers.CHATML)) == [
    'Hello<|im_end|>b<|im_end|>'
  ]
  first = "{% if messages[0]['role'] == 'user' %}{% endif %}"
  picky = make(first + tiny_tokenizers.CHATML)
  with pytest.raises(Error, match="x:1: the chat begins with the assistant's"):
    data.encode(record, picky)


# ------------------------------------------------------ where a reply ends --

ALWAYS = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.mark.parametrize(
  'template',
  [
    ALWAYS,
    # Something behind each reply that is no part of it.
    tiny_tokenizers.CHATML.replace(
      r"'<|im_end|>\n'", r"'<|im_end|>\n[next]\n'"
    ),
  ],
)
def test_what_follows_the_end_of_a_turn_is_not_learned(make, template):
  record = read(user('a'), reply('b'), user('c'), reply('d'))
  rows = learned(record, make(template))
  assert ''.join(rows) == 'b<|im_end|>d<|im_end|>'


def test_a_header_without_a_mark_is_not_learned_either(make):
  template = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% endfor %}{{ 'assistant: ' }}"
  )
  record = read(user('a'), reply('b'))
  assert learned(record, make(template)) == ['b<|im_end|>']


def test_the_mark_of_a_template_is_its_first_special_token(make):
  assert chat.end_mark(make(tiny_tokenizers.CHATML)) == '<|im_end|>'
  assert chat.end_mark(make(ALWAYS)) == '<|im_end|>'
  other = tiny_tokenizers.CHATML.replace('<|im_end|>', '<pad><|im_end|>')
  assert chat.end_mark(make(other)) == '<pad>'
  assert chat.end_mark(tokenizers.bytes()) == ''


def test_replies_of_which_a_template_leaves_something_out_are_counted(make):
  template = tiny_tokenizers.CHATML.replace(
    "m['content']", "m['content'].split('</think>')[-1]"
  )
  record = read(user('a'), reply('<think>x</think>b'), user('c'), reply('d'))
  result = text.encode_counted(record, make(template))
  assert result.replies_rewritten == 1
  assert learned(record, make(template)) == ['b<|im_end|>d<|im_end|>']
  people = data.build(
    [record._replace(client='ann')], make(template), heldout_fraction=0
  )
  assert people.report['replies_rewritten'] == 1


# ------------------------------------------------------ chats that are cut --


@pytest.mark.parametrize('long_replies', ['drop', 'cut'])
def test_a_long_chat_is_cut_where_a_turn_begins(make, long_replies):
  tokenizer = make(RICH)
  turns = []
  for i in range(6):
    turns += [user(f'why {i}' * (1 + i % 3)), reply(f'so {i}')]
  names = {number: name for name, number in tokenizer.special.items()}
  spell = lambda ids: ''.join(
    names[i] if i in names else tokenizer.decode([i]) for i in map(int, ids)
  )
  whole = ''.join(
    f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in turns
  )
  for size in range(60, 110, 7):
    examples = data.encode(read(*turns), tokenizer, 'chat', size, long_replies)
    texts = [spell(e.tokens) for e in examples]
    assert all(len(e.tokens) <= size for e in examples)
    assert all(x.startswith('<|im_start|>user\nwhy') for x in texts)
    assert all(x in whole for x in texts)
    said = [spell(np.asarray(e.tokens)[e.loss_mask]) for e in examples]
    assert ''.join(said) == ''.join(f'so {i}<|im_end|>' for i in range(6))
    asked = spell(data.prompt(read(*turns), tokenizer, 'chat', size))
    assert asked.startswith('<|im_start|>user\nwhy')
    assert asked.endswith('<|im_start|>assistant\n')


def test_a_turn_that_is_too_long_loses_its_left(make):
  tokenizer = make(RICH)
  record = read(user('a'), reply('b'), user('c' * 99), reply('d'))
  last = data.encode(record, tokenizer, 'chat', 60)[-1]
  assert len(last.tokens) == 60 and int(sum(last.loss_mask)) == 2


@pytest.mark.parametrize('template', ['chat', 'vicuna', 'alpaca'])
def test_a_turn_longer_than_a_row_is_never_cut_inside_a_header(make, template):
  first, second = 'be kind and brief ' * 3, 'why is the sky blue ' * 3
  record = read(
    {'role': 'system', 'content': first.strip()},
    user(second.strip()),
    reply('light'),
  )
  tokenizer = make(tiny_tokenizers.CHATML)
  names = {number: name for name, number in tokenizer.special.items()}
  spell = lambda ids: ''.join(
    names[i] if i in names else tokenizer.decode([i]) for i in map(int, ids)
  )
  whole = data.prompt(record, tokenizer, template)
  text_, starts = spell(whole), []
  inside = set()
  for content in (first.strip(), second.strip()):
    starts.append(text_.index(content))
    inside |= set(range(starts[-1], starts[-1] + len(content)))
  shortest = len(tokenizer.encode(text_[max(inside) + 1 :])) + 4
  begins = set()
  for length in range(shortest, len(whole)):
    ids = data.prompt(record, tokenizer, template, length)
    assert len(ids) <= length
    assert ids == whole[len(whole) - len(ids) :]
    begins.add(len(text_) - len(spell(ids)))
  assert begins <= inside and starts[1] in begins
  assert min(begins) < starts[1] < max(begins)


def test_what_is_cut_is_told_with_its_share_and_the_field():
  record = lambda i, size: Record(
    client=f'c{i}', prompt='a' * size, response=f'yes {i}'
  )
  records = [record(i % 2, 3 if i % 3 else 30) for i in range(6)]
  people = data.population.build(
    records, tokenizers.bytes(), template='plain', max_length=16,
    heldout_fraction=0, new_clients=0,
  )  # fmt: skip
  said = narration.describe(people)
  assert 'none of their examples and no more clients are held out' in said
  assert (
    'cut on the left: 2 of 6 prompts, which are longer than '
    'population.max_length allows'
  ) in said
