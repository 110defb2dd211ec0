"""Configs: what may be said, and the sentence for what may not."""

import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pytest

from fedjax_llm.run import config
from fedjax_llm.types import Error

# --------------------------------------------------- a house of paper rooms --


class Run(NamedTuple):
  num_rounds: int
  seed: int = 0
  eval_every: float = 5.0
  note: str | None = None


def packaged(dataset: str = 'shakespeare', limit: int | None = None):
  return ('packaged', dataset, limit)


def jsonl(path: str | Sequence[str], client_key: str = 'client', limit=None):
  return ('jsonl', path, client_key, limit)


def split(heldout: float = 0.1, seed: int = 0):
  return ('split', heldout, seed)


def mean():
  return ('mean',)


def krum(num_byzantine: int, *, multi: bool = False, num_clients: int = 0):
  return ('krum', num_byzantine, multi, num_clients)


def trimmed_mean(trim: float = 0.1, kind: Literal['low', 'both'] = 'both'):
  return ('trimmed_mean', trim, kind)


def hands_on(scale: float = 1.0, **keywords):
  return ('hands_on', scale, krum(**keywords))


def sgd(
  loss: Callable,
  optimizer: Mapping[str, Any] = types.MappingProxyType(
    {'name': 'adamw', 'learning_rate': 0.5}
  ),
):
  return ('sgd', loss, dict(optimizer))


def no_optimizer(loss: Callable, sigma: float = 0.1):
  return ('no_optimizer', loss, sigma)


def adamw(
  learning_rate: float | Callable = 1e-3,
  b1: float = 0.9,
  schedule: Mapping[str, Any] | None = None,
):
  del schedule
  return ('adamw', learning_rate, b1)


def lion(learning_rate: float = 1e-4, beta: float = 0.9):
  return ('lion', learning_rate, beta)


def cosine(steps: int, floor: float = 0.0):
  return ('cosine', steps, floor)


class Krum(NamedTuple):
  """A class of a room is no builder."""


def room(*functions, **others):
  module = types.ModuleType('room')
  for f in functions:
    setattr(module, f.__name__, f)
  vars(module).update(others)
  module.__dict__['__all__'] = [f.__name__ for f in functions] + list(others)
  return module


AGGREGATORS = room(
  mean, krum, trimmed_mean, Krum=Krum, hands_on=config.onward(hands_on, krum)
)
SPEC = config.Spec(
  settings=Run,
  sections={
    'data': room(packaged, jsonl),
    'split': split,
    'local': {'sgd': sgd, 'no_optimizer': no_optimizer},
    'local.optimizer': {'adamw': adamw, 'lion': lion},
    'local.optimizer.schedule': {'cosine': cosine},
    'aggregator': AGGREGATORS,
    'upload': {'mean': mean, 'krum': krum},
    'parts.server': {'sgd': lion},
  },
  injected={
    'local': ('loss',),
    'aggregator': ('num_clients',),
    'split': ('seed',),
  },
  optional=('upload', 'parts.server'),
)
FILE = """
import ml_collections
def get_config(arg=''):
  if arg not in ('', 'smoke'):
    raise ValueError(f'no form {arg}')
  return ml_collections.ConfigDict(dict(
    num_rounds=1 if arg == 'smoke' else 10,
    data=dict(name='packaged', dataset='mini', limit=4),
    local=dict(name='sgd', optimizer=dict(name='adamw', b1=0.8)),
    aggregator=dict(name='mean'),
  ))
"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny.py').write_text(FILE)

  def parse(*words, file='tiny.py'):
    argv = ['--config', file, '--workdir', 'w', *words]
    return config.parse(argv, SPEC)

  return parse


def sentence(parse, *words, **keywords) -> str:
  with pytest.raises(Error) as caught:
    parse(*words, **keywords)
  text = str(caught.value)
  assert '\n' not in text
  return text


# ------------------------------------------------------------ command line --


def test_a_file_and_its_form_are_read_as_plain_dicts(parse):
  arguments = parse(file='tiny.py:smoke')
  assert arguments.config['num_rounds'] == 1
  assert type(arguments.config['local']['optimizer']) is dict
  assert arguments.workdir == 'w'
  assert arguments.config_path == 'tiny.py:smoke'
  assert parse().config['num_rounds'] == 10
  assert config.settings(parse().config, SPEC) == Run(10)


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('3', 3),
    ('-1e-3', -1e-3),
    ('TRUE', True),
    ('none', None),
    ("['a', 'b']", ['a', 'b']),
    ('a/b.jsonl', 'a/b.jsonl'),
    ("'3'", '3'),
    ('1 +', '1 +'),
  ],
)
def test_values_are_literals_or_else_strings(text, value):
  assert config.value(text) == value
  assert type(config.value(text)) is type(value)


def test_overrides_are_told_with_a_space_or_an_equals_sign(parse):
  words = ('--config.seed', '-3', '--config.note=x=y', '--config.seed=4')
  found = parse(*words).config
  assert (found['seed'], found['note']) == (4, 'x=y')


def test_an_override_may_name_a_keyword_that_the_file_leaves_alone(parse):
  found = parse(
    '--config.local.optimizer.learning_rate=0.1', '--config.split.heldout=0.5'
  ).config
  assert found['local']['optimizer'] == {
    'name': 'adamw',
    'b1': 0.8,
    'learning_rate': 0.1,
  }
  assert found['split'] == {'heldout': 0.5}


def test_mistakes_of_the_command_line(parse):
  assert sentence(config.parse, ['--workdir', 'w'], SPEC).startswith(
    '--config is missing (usage: --config FILE.py'
  )
  assert sentence(config.parse, ['--config', 'tiny.py'], SPEC).startswith(
    '--workdir is missing'
  )
  assert sentence(parse, '--confg.seed=1') == (
    "'--confg.seed=1' is no argument (the nearest is '--config';"
    ' there are --config, --workdir, --help).'
  )
  assert sentence(parse, '--config.seed') == (
    '--config.seed needs a value: --config.seed=VALUE.'
  )
  assert sentence(parse, '--config.seed', '--config.note=x') == (
    '--config.seed needs a value: --config.seed=VALUE.'
  )


def test_mistakes_of_the_file(parse, tmp_path):
  assert sentence(parse, file='no.py:smoke').startswith(
    '--config no.py: there is no such file, and no config of the project of '
    'that name ('
  )
  assert sentence(parse, file='tiny.py:smok') == (
    'tiny.py:5: ValueError: no form smok'
  )
  (tmp_path / 'e.py').write_text('raise SystemExit(3)')
  assert sentence(parse, file='e.py') == (
    'e.py: the config ends the program (3).'
  )
  (tmp_path / 'a.py').write_text('x = 1')
  assert sentence(parse, file='a.py') == 'a.py defines no get_config().'
  (tmp_path / 'b.py').write_text('def get_config():\n  return 3')
  assert 'must return a ConfigDict or a dict' in sentence(parse, file='b.py')
  assert sentence(parse, file='b.py:x') == (
    "b.py: get_config() takes no argument, 'x' was given."
  )
  (tmp_path / 'c.py').write_text('def get_config(:')
  assert sentence(parse, file='c.py').startswith('c.py: SyntaxError:')
  (tmp_path / 'd.txt').write_text('')
  assert sentence(parse, file='d.txt') == (
    '--config d.txt: a config is a Python file, NAME.py.'
  )
  (tmp_path / 'e.py').write_text(
    'def get_config():\n  deep = []\n  for _ in range(2000):\n    deep = [deep]'
    "\n  return {'data': {'limit': deep}}"
  )
  assert sentence(parse, file='e.py') == (
    'config: data.limit is nested more than 64 levels deep.'
  )


def test_help_lists_names_and_with_a_config_every_field(parse, capsys):
  with pytest.raises(SystemExit) as caught:
    config.parse(['--help'], SPEC)
  assert caught.value.code == 0
  told = capsys.readouterr().out
  assert '--config.aggregator.name: mean, krum, trimmed_mean, hands_on' in told
  assert '--config.num_rounds: int\n' in told
  with pytest.raises(SystemExit):
    parse('--help', '--config.aggregator.name=trimmed_mean')
  told = capsys.readouterr().out
  assert '--config.aggregator.trim=0.1\n' in told
  assert '--config.local.optimizer.b1=0.8\n' in told


# ---------------------------------------------------------------- overrides --


def test_a_new_name_starts_the_section_anew_and_tells_what_it_set_aside(parse):
  arguments = parse('--config.data.path=x.jsonl', '--config.data.name=jsonl')
  assert arguments.config['data'] == {
    'name': 'jsonl',
    'limit': 4,
    'path': 'x.jsonl',
  }
  assert arguments.notes == ('data.name=jsonl: set aside dataset of the file',)
  same_name = parse('--config.data.name=packaged')
  assert same_name.config['data']['dataset'] == 'mini'
  assert same_name.notes == ()


def test_the_order_of_overrides_does_not_matter(parse):
  words = [
    '--config.local.optimizer.schedule.floor=0.5',
    '--config.local.optimizer.schedule.steps=7',
    '--config.local.optimizer.schedule.name=cosine',
    '--config.upload.num_byzantine=1',
    '--config.upload.name=krum',
  ]
  found = parse(*words).config
  assert found == parse(*words[::-1]).config
  assert found['upload'] == {'name': 'krum', 'num_byzantine': 1}
  assert found['local']['optimizer']['schedule'] == {
    'name': 'cosine',
    'floor': 0.5,
    'steps': 7,
  }


def test_an_inner_section_may_be_left_at_the_outer_builders_default(tmp_path):
  file = {'num_rounds': 1, 'local': {'name': 'sgd'}}
  file |= {'data': {'name': 'packaged'}, 'aggregator': {'name': 'mean'}}
  change = lambda *pairs: config.override(file, pairs, SPEC)[0]['local']
  assert change(('local.optimizer.b1', 0.5))['optimizer'] == {
    'name': 'adamw',
    'learning_rate': 0.5,
    'b1': 0.5,
  }
  assert change(('local.optimizer.name', 'lion'))['optimizer'] == {
    'name': 'lion'
  }
  assert file['local'] == {'name': 'sgd'}  # untouched


def test_an_optional_section_comes_and_goes(parse):
  found = parse('--config.upload.name=mean', '--config.parts.server.name=sgd')
  assert found.config['upload'] == {'name': 'mean'}
  assert found.config['parts'] == {'server': {'name': 'sgd'}}
  assert parse('--config.upload=none').config['upload'] is None
  assert sentence(parse, '--config.upload.num_byzantine=1') == (
    '--config.upload has no name yet: give --config.upload.name, one of mean,'
    ' krum.'
  )
  assert sentence(parse, '--config.data=none').startswith(
    '--config.data is missing: a section dict(name=...), one of packaged, jsonl'
  )
  assert sentence(parse, '--config.data=3') == (
    '--config.data must be a section, dict(name=...), not 3.'
  )


def test_a_section_without_name_may_be_left_out_of_the_file(parse):
  assert 'split' not in config.load('tiny.py')
  found = parse().config['split']
  assert config.build(found, split) == ('split', 0.1, 0)


# ------------------------------------------------------------------ mistakes --


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (
      ['--config.num_round=3'],
      "--config.num_round: there is no 'num_round' (the nearest is"
      " 'num_rounds'; there are num_rounds, seed, eval_every, note, data,"
      ' split, local, aggregator, upload, parts).',
    ),
    (
      ['--config.agregator.name=mean'],
      "--config.agregator.name: there is no 'agregator.name' (the nearest is"
      " 'aggregator'; ",
    ),
    (
      ['--config.learning_rate=1'],
      "--config.learning_rate: there is no 'learning_rate' (there is"
      " 'local.optimizer.learning_rate'; ",
    ),
    (
      ['--config.parts.sever.name=sgd'],
      "--config.parts.sever.name: there is no 'sever.name' (the nearest is"
      " 'server'; there are server).",
    ),
    (
      ['--config.num_rounds.x=1'],
      "--config.num_rounds.x: there is no 'num_rounds.x' (the nearest is",
    ),
    (
      ['--config.aggregator.name=trimed_mean'],
      "--config.aggregator.name: there is no 'trimed_mean' (the nearest is"
      " 'trimmed_mean'; there are mean, krum, trimmed_mean, hands_on); one's"
      " own is named 'package.module:function'.",
    ),
    (
      ['--config.aggregator.name=Krum'],  # a class of the room
      "there is no 'Krum' (the nearest is 'krum'; ",
    ),
    (
      ['--config.aggregator.name=3'],
      '--config.aggregator.name: there is no 3 (there are mean',
    ),
    (
      ['--config.aggregator.name=no_lab.rules:rule'],
      '--config.aggregator.name: cannot import no_lab.rules: No module named',
    ),
    (
      ['--config.aggregator.name=math:hypt'],
      "--config.aggregator.name: math has no 'hypt' (the nearest is 'hypot'; ",
    ),
    (
      ['--config.aggregator.name=krum', '--config.aggregator.num_byzantin=1'],
      "--config.aggregator.num_byzantin: krum takes no 'num_byzantin' (the"
      " nearest is 'num_byzantine'; there are num_byzantine, multi).",
    ),
    (
      ['--config.aggregator.num_byzantine=1'],
      "--config.aggregator.num_byzantine: mean takes no 'num_byzantine' (there"
      ' are none).',
    ),
    (
      ['--config.aggregator.name=krum'],
      'tiny.py: aggregator.num_byzantine is missing: krum needs it, int.',
    ),
    (
      ['--config.aggregator.name=krum', '--config.aggregator.num_clients=1'],
      '--config.aggregator.num_clients is filled in by the program; leave it'
      ' out.',
    ),
    (
      ['--config.split.seed=1'],
      '--config.split.seed is filled in by the program; leave it out.',
    ),
    (
      ['--config.split.heldot=1'],
      "--config.split.heldot: split takes no 'heldot' (the nearest is"
      " 'heldout'; there are heldout).",
    ),
    (
      ['--config.local.optimizer.lr=1'],
      "--config.local.optimizer.lr: adamw takes no 'lr' (",
    ),
    (
      ['--config.local.name=no_optimizer', '--config.local.optimizer.b1=1'],
      "--config.local.optimizer: no_optimizer takes no 'optimizer' (there are"
      ' sigma).',
    ),
    (
      ['--config.aggregator.name=hands_on', '--config.aggregator.mult=true'],
      "--config.aggregator.mult: hands_on takes no 'mult' (the nearest is"
      " 'multi'; there are scale, num_byzantine, multi).",
    ),
  ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(parse, words, text):
  assert text in sentence(parse, *words)


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (['num_rounds=ten'], "num_rounds must be int, not 'ten'."),
    (['num_rounds=1e3'], 'num_rounds must be int, not 1000.0.'),
    (['num_rounds=true'], 'num_rounds must be int, not True.'),
    (['num_rounds=none'], 'num_rounds must be int, not None.'),
    (['eval_every=false'], 'eval_every must be float, not False.'),
    (['note=3'], 'note must be str or none, not 3.'),
    (['data.limit=all'], "data.limit must be int or none, not 'all'."),
    (
      ['data.name=jsonl', "data.path=['a', 3]"],
      "data.path must be str or Sequence[str], not ['a', 3].",
    ),
    (
      ['aggregator.name=krum', 'aggregator.multi=1'],
      'aggregator.multi must be bool, not 1.',
    ),
    (
      ['aggregator.name=trimmed_mean', 'aggregator.kind=up'],
      "aggregator.kind must be 'low' or 'both', not 'up'.",
    ),
    (
      ['local.optimizer.learning_rate=fast'],
      "local.optimizer.learning_rate must be float or Callable, not 'fast'.",
    ),
    (
      ['local.optimizer=adamw'],
      "local.optimizer must be Mapping[str, typing.Any], not 'adamw'.",
    ),
  ],
)
def test_a_value_of_another_type_is_told_with_what_is_allowed(
  parse, words, text
):
  words = [f'--config.{word}' for word in words]
  assert sentence(parse, *words) == f'--config.{text}'


@pytest.mark.parametrize(
  'word',
  [
    'eval_every=3',  # an int where a float may stand
    'note=none',
    'local.optimizer.learning_rate=1',
    "data={'name': 'jsonl', 'path': ['a', 'b']}",
    "data={'name': 'jsonl', 'path': ('a',)}",
    'local.optimizer.schedule=none',
  ],
)
def test_a_value_that_the_annotation_allows_passes(parse, word):
  parse(f'--config.{word}')


def test_mistakes_of_the_file_name_the_file(parse, tmp_path):
  for old, new, text in [
    ("'mini'", '3', 'tiny.py: data.dataset must be str, not 3.'),
    ('limit=', 'limits=', "tiny.py: data.limits: packaged takes no 'limits'"),
    ('data=', 'dta=', "tiny.py: dta: there is no 'dta' (the nearest is 'data'"),
    ("'mean'", "'men'", "tiny.py: aggregator.name: there is no 'men'"),
    ('b1=', 'b2=', "tiny.py: local.optimizer.b2: adamw takes no 'b2'"),
    ("name='mean'", '', 'tiny.py: aggregator.name is missing (there are'),
  ]:
    (tmp_path / 'tiny.py').write_text(FILE.replace(old, new))
    assert sentence(parse).startswith(text)
  (tmp_path / 'tiny.py').write_text(FILE.replace('dict(name=', 'dict(nam='))
  assert 'data.name is missing' in sentence(parse)
  (tmp_path / 'tiny.py').write_text(FILE.replace('num_rounds=', 'seed='))
  assert sentence(parse) == (
    'tiny.py: num_rounds is missing: a config needs it, int.'
  )


# ------------------------------------------------------------------ building --


def test_build_gives_a_builder_what_its_signature_names():
  section = {'name': 'krum', 'num_byzantine': 2}
  built = config.build(section, AGGREGATORS, num_clients=9, sizes=[1])
  assert built == ('krum', 2, False, 9)
  assert config.build({'heldout': 0.3}, split, seed=5) == ('split', 0.3, 5)
  with pytest.raises(Error, match="krum takes no 'sizes'"):
    config.build({**section, 'sizes': 3}, AGGREGATORS)
  with pytest.raises(Error, match='num_clients is filled in'):
    config.build({**section, 'num_clients': 3}, AGGREGATORS, num_clients=9)


def test_a_users_own_function_is_found_by_its_import_path():
  section = {'name': 'fractions:Fraction', 'numerator': 3}
  assert config.build(section, AGGREGATORS, denominator=4) == 3 / 4


def test_what_a_builder_hands_on_is_checked_and_built():
  section = {'name': 'hands_on', 'num_byzantine': 3, 'scale': 2.0}
  built = config.build(section, AGGREGATORS, num_clients=4)
  assert built == ('hands_on', 2.0, ('krum', 3, False, 4))
  partial = config.onward(functools.partial(hands_on, 0.5), krum)
  assert config.build({'num_byzantine': 1}, partial)[2][1] == 1


# ------------------------------------------------------------------- records --


def test_the_resolved_config_has_every_default_and_is_json(parse):
  arguments = parse('--config.data.limit=none')
  found = config.resolved(arguments.config, SPEC)
  assert found == {
    'num_rounds': 10,
    'seed': 0,
    'eval_every': 5.0,
    'note': None,
    'data': {'name': 'packaged', 'dataset': 'mini', 'limit': None},
    'split': {'heldout': 0.1},
    'local': {
      'name': 'sgd',
      'optimizer': {
        'name': 'adamw',
        'learning_rate': 1e-3,
        'b1': 0.8,
        'schedule': None,
      },
    },
    'aggregator': {'name': 'mean'},
    'upload': None,
    'parts': {'server': None},
  }
  assert json.loads(json.dumps(found)) == found
  again = config.override(found, [], SPEC)[0]
  assert config.resolved(again, SPEC) == found


def test_values_that_json_cannot_hold_are_told_by_name(parse):
  found = parse().config
  found['local']['optimizer']['learning_rate'] = len
  found['data'] = {'name': 'jsonl', 'path': ('a', 'b')}
  told = config.resolved(found, SPEC)
  assert told['local']['optimizer']['learning_rate'] == 'builtins:len'
  assert told['data']['path'] == ['a', 'b']


def test_saying_a_default_is_the_same_config(parse):
  plain = config.resolved(parse().config, SPEC)
  said = config.resolved(parse('--config.split.heldout=0.1').config, SPEC)
  assert config.same(plain, said) == []
  other = parse(
    '--config.num_rounds=20',
    '--config.aggregator.name=krum',
    '--config.aggregator.num_byzantine=1',
  )
  other = config.resolved(other.config, SPEC)
  assert config.same(plain, other) == [
    'aggregator.multi',
    'aggregator.name',
    'aggregator.num_byzantine',
    'num_rounds',
  ]
  assert config.same(plain, other, ignore=('num_rounds', 'aggregator')) == []
  stored = json.loads(json.dumps(plain))
  assert config.same(plain, stored) == []
