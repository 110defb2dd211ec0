"""Chat templates are programs of others: what they may do, and for how long."""

import os

import pytest

from fedjax_llm.data import rendering, tokenizers
from fedjax_llm.types import Error
from tests import tiny_tokenizers

HI = [{'role': 'user', 'content': 'Hi'}]
QUICK = rendering.Limits(seconds=0.3, memory=2**28, characters=1000)


def render(template, messages=HI, add=True, tools=None, limits=QUICK):
  return rendering.renderer(template, {'bos_token': '<s>'}, 'tiny', limits)(
    messages, add, tools
  )


def test_a_template_sees_messages_tools_special_tokens_and_a_fixed_date():
  source = (
    '{{ bos_token }}'
    '{% generation %}{{ messages[0].content }}{% endgeneration %}'
    "{{ strftime_now('%Y-%m-%d') }}{{ tools[0] | tojson }}"
    '{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}'
    '{% endfor %}{% if add_generation_prompt %}>{% endif %}'
  )
  text = render(source, tools=[{'name': 'é<'}])
  assert text == '<s>Hi2024-07-26{"name": "é<"}1>'
  assert render('{% if tools is none %}no tools{% endif %}') == 'no tools'


def test_it_renders_as_transformers_does():
  template_utils = pytest.importorskip('transformers.utils.chat_template_utils')
  for add in (True, False):
    (theirs,), _ = template_utils.render_jinja_template(
      [HI], chat_template=tiny_tokenizers.CHATML, add_generation_prompt=add
    )
    assert render(tiny_tokenizers.CHATML, add=add) == theirs


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    # Loops without an end, in the language and inside of one operation.
    (
      '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
      '{% endfor %}',
      'the chat template of tiny did not come to an end within 0.3 seconds',
    ),
    ('{{ 10 ** (10 ** 9) }}', 'did not come to an end within 0.3 seconds'),
    ("{{ 'x' * 10 ** 12 }}", 'refuses the messages: it needs too much memory'),
    ("{{ 'x' * 2000 }}", 'refuses the messages: it writes 2,000 characters'),
    ("{{ ''.__class__.__mro__ }}", 'refuses the messages: access to attribute'),
    ("{{ raise_exception('only two') }}", 'refuses the messages: only two'),
    ('{% if %}', 'refuses the messages: Expected an expression'),
    (
      '{{ messages[7].content.x }}',
      'refuses the messages: .* no element 7',
    ),
  ],
)
def test_what_a_template_must_not_do_is_one_sentence(template, message):
  with pytest.raises(Error, match=message):
    render(template)


def test_a_template_goes_on_after_one_that_was_ended():
  source = (
    '{% if messages[0].content == "x" %}{% for i in range(99999) %}'
    '{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok'
  )
  one = rendering.renderer(source, {}, 'tiny', QUICK)
  with pytest.raises(Error, match='did not come to an end'):
    one([{'role': 'user', 'content': 'x'}], True)
  assert one(HI, True) == 'ok'


def test_a_template_of_too_many_characters_is_not_read():
  with pytest.raises(Error, match=r'tiny has 1,000,001 characters; at most'):
    rendering.renderer('x' * 1_000_001, {}, 'tiny')


def test_the_process_of_a_template_ends_with_it():
  one = rendering.renderer('{{ messages[0].content }}', {}, 'tiny')
  assert one([{'role': 'user', 'content': str(os.getpid())}], True)
  children = lambda: {
    int(entry)
    for entry in os.listdir('/proc')
    if entry.isdigit() and _parent(entry) == os.getpid()
  }
  if not os.path.isdir('/proc/self'):
    pytest.skip('no /proc')
  before = children()
  del one
  assert len(children()) < len(before)


def _parent(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return int(file.read().rpartition(')')[2].split()[1])
  except OSError:
    return None


def test_a_directory_with_an_endless_template_is_refused_when_it_is_used(
  tmp_path, monkeypatch
):
  endless = (
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
    '{% endfor %}'
  )
  monkeypatch.setattr(rendering, 'LIMITS', QUICK)
  path = tiny_tokenizers.write(tmp_path / 'm', endless)
  tokenizer = tokenizers.pretrained(path)
  with pytest.raises(Error, match=f'{path} did not come to an end within'):
    tokenizer.chat(HI, True)
