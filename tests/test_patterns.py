"""Regular expressions of others: what they match, and for how long."""

import pytest

from fedjax_llm import patterns
from fedjax_llm.adapters import targets
from fedjax_llm.types import Error


@pytest.mark.parametrize(
  ('pattern', 'name', 'matches'),
  [
    ('q_proj', 'model.layers.0.q_proj', True),
    ('q_proj', 'model.layers.0.eq_proj', False),
    ('0.q_proj', 'model.layers.0.q_proj', True),
    ('0.q_proj', 'model.layers.0_q_proj', True),  # a dot is any letter
    (r'layers\.\d+\.(q|v)_proj', 'model.layers.11.v_proj', True),
    ('q_proj|v_proj', 'layers.v_proj', True),
    ('', 'layers.', True),
  ],
)
def test_a_pattern_matches_the_end_of_a_name(pattern, name, matches):
  match = patterns.matcher(pattern, 'x', within=r'(.*\.)?({})')
  assert match(name) is matches


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('(', r"x: '\(' is no regular expression \(missing \)"),
    ('*', 'is no regular expression'),
    (')|(', 'is no regular expression'),
    ('(' * 4000 + ')' * 4000, 'is no regular expression'),
    ('a' * 10_001, r'has 10,001 characters, and a regular expression may have'),
    (3, 'x: 3 is no regular expression'),
  ],
)
def test_what_is_no_pattern_is_named(pattern, message):
  with pytest.raises(Error, match=message):
    patterns.matcher(pattern, 'x')


def test_a_match_that_does_not_end_is_ended(monkeypatch):
  monkeypatch.setattr(patterns, 'MAX_SECONDS', 0.1)
  match = patterns.matcher('(a|aa)+', 'rank_pattern')
  with pytest.raises(Error, match=r'rank_pattern: .* does not come to an'):
    match('a' * 60 + '!')
  base = {'layers': {'a' * 60 + '!': {'kernel': 0}}}
  with pytest.raises(
    Error, match=r'adapter\.targets: .* does not come to an en'
  ):
    targets.find(base, '(a|aa)+')
