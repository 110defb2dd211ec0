"""Regular expressions of others: what they match, and for how long."""

import pytest

from fedjax_llm import patterns, scopes
from fedjax_llm.adapters import targets
from fedjax_llm.types import ClientState, Context, Error


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


def test_scopes_search_within_the_same_limits(monkeypatch):
  names = {'q_proj/a': 1.0, 'q_proj/b': 2.0, 'x' * 40 + '!': 3.0}
  scope = scopes.labelled({'(?:proj)/b$': 'private', '^x+!': 'frozen'})
  values = [label.value for label in scope.labels(names).values()]
  assert values == ['shared', 'private', 'frozen']
  builders = (scopes.private, scopes.untrained, scopes.in_turn)
  for builder in (*builders, lambda p: scopes.alternating('a', p)):
    with pytest.raises(Error, match=r"pattern: '\*' is no regular expression"):
      builder('*')
    with pytest.raises(Error, match=r'pattern: 3 is no regular expression'):
      builder(3)  # type: ignore
    with pytest.raises(Error, match='has 10,001 characters, and a regular ex'):
      builder('a' * 10_001)
  with pytest.raises(Error, match='needs one group'):
    scopes.in_turn('a')
  with pytest.raises(Error, match=r'finds q_proj/a without a number in its gr'):
    scopes.in_turn('/(a)$').mask(names, ClientState(), Context())
  monkeypatch.setattr(patterns, 'MAX_SECONDS', 0.1)
  with pytest.raises(Error, match=r"scope's pattern: .* does not come to"):
    scopes.private('^(x|xx)+$').labels(names)
