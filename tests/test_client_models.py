"""The section `client_models`: models and tokenizers that differ by client."""

import functools
import pathlib

import numpy as np
import pytest

from fedjax_llm import data, recipes
from fedjax_llm.data import tokenizers
from fedjax_llm.run import client_models, config, experiment, public, tasks
from fedjax_llm.run.sections import SPEC
from fedjax_llm.types import Error

PATH = pathlib.Path(__file__).parents[1] / 'configs' / 'methods.py'
ONE, TWO = tokenizers.bytes(), tokenizers.pairs()
PLAIN = {'template': 'plain', 'max_length': 16}


def conf(name='fed_mkt', **fields):
  words = [f'--config.{field}={value}' for field, value in fields.items()]
  argv = ['--config', f'{PATH}:{name}:smoke', '--workdir', 'none', *words]
  return config.parse(argv, SPEC).config


@functools.cache
def built():
  return experiment.build(conf(), say=lambda text: None)


def text(tokens, segments, tokenizer):
  return tokenizer.decode(tokens[np.asarray(segments) > 0])


def test_clients_and_public_texts_are_in_the_tokens_of_their_models():
  run = built()
  small, own = run.small, (ONE, TWO)
  assert small is not None and sorted(set(small.of_client)) == [0, 1]
  for client, group in enumerate(small.of_client):
    for mine, theirs in (
      (small.owned[client], run.population.train[client]),
      (small.heldout[client], run.population.heldout[client]),
    ):
      if group == 0:  # of the server's tokenizer
        words = {ONE.decode(x.tokens) for x in mine}
        assert words <= {ONE.decode(x.tokens) for x in theirs}
    # No client trains on a text on which the server is evaluated.
    known = '|'.join(own[group].decode(x.tokens) for x in small.owned[client])
    for kept in run.population.heldout[client]:
      assert ONE.decode(kept.tokens) not in known
    longest = max(int(max(x.tokens)) for x in small.owned[client])
    assert (longest > 258) == (group == 1)
  for group, one in zip(small.groups, own, strict=True):
    here, there = small.public, group.public
    assert there is not None and group.up is not None
    for at in np.ndindex(here.tokens.shape[:2]):
      want = text(here.tokens[at], here.segments[at], ONE)
      assert text(there.tokens[at], there.segments[at], one) == want
    assert group.up.places.shape == here.tokens.shape
    assert group.up.table.shape == (one.vocab_size,)
    assert group.down is not None
    assert group.down.places.shape == there.tokens.shape
  first = small.groups[0]
  assert first.up is not None  # two models with one tokenizer
  real = small.public.segments > 0
  row = np.arange(real.shape[-1])
  np.testing.assert_array_equal(first.up.places, np.where(real, row, -1))
  # A token that is not matched is a part of a pair, or a pair.
  second = small.groups[1].up
  assert second is not None
  places = second.places
  assert 0.3 < (places[real] >= 0).mean() < 1


def test_the_base_holds_the_weights_of_all_models():
  run = built()
  assert run.small is not None
  parts = run.base[client_models.MODELS]
  sizes = [one['base']['embed_tokens']['embedding'].shape for one in parts]
  assert sizes == [(259, 32), (TWO.vocab_size, 16)]
  profile = run.assemble(0)[1]
  want = run.small.of_client[profile.ids]
  np.testing.assert_array_equal(profile.profiles['group'], want)


@pytest.mark.parametrize(
  'records, limit, words',
  [
    ([], 16, 'public: the source has no text'),
    (
      [data.Record(text='to be or not to be, that is the question')],
      8,
      'none of the 1 texts has at most 8 tokens in all 2 tokenizers',
    ),
  ],
)
def test_public_texts_that_are_not_there_are_one_sentence(
  records, limit, words
):
  with pytest.raises(Error, match=words):
    public.in_common(
      records, {**PLAIN, 'max_length': limit}, [ONE, TWO],
      task=tasks.causal_lm(), batch_size=1, seed=0,
    )  # fmt: skip


def test_a_last_batch_that_is_not_full_has_rows_of_padding():
  texts = public.in_common(
    [data.Record(text='then')], PLAIN, [ONE, TWO],
    task=tasks.causal_lm(), batch_size=2, seed=0,
  )  # fmt: skip
  assert [x.tokens.shape[:2] for x in texts] == [(1, 2), (1, 2)]
  assert [x.segments[0, 1].any() for x in texts] == [False, False]


@pytest.mark.parametrize(
  'models, shares, words',
  [
    ([], None, 'client_models.models is empty'),
    ([{'layers': 2}], None, r'client_models.models\[0\] must be dict\(name='),
    ([{'name': 'random'}], [1, 2], 'shares has 2 entries, and there are 1'),
  ],
)
def test_sections_without_sense_are_refused(models, shares, words):
  with pytest.raises(Error, match=words):
    client_models.client_models(models, shares)


@pytest.mark.parametrize(
  'section, words',
  [
    ({'name': 'rando'}, r"models\[3\].name: there is no 'rando'"),
    ({'name': 'random', 'tokenizer': 'words'}, "no 'words'"),
    ({'name': 'random', 'layers': 2}, r"models\[3\].layers: .* no 'layers'"),
  ],
)
def test_models_without_sense_are_refused(section, words):
  with pytest.raises(Error, match=words):
    client_models._model(3, section)


def test_sections_that_need_one_tokenizer_are_refused():
  for fields, words in (
    ({'selection.name': 'near_duplicates'}, 'selection: a run with client_mod'),
    ({'task.name': 'dpo'}, 'task: a run with client_models exchanges'),
    ({'clients.name': 'buffered'}, "clients.name is 'buffered', whose clients"),
    ({'clients.name': 'compass'}, "clients.name is 'compass', whose clients"),
  ):
    with pytest.raises(Error, match=words):
      client_models.build(
        conf(**fields), lambda *_: None, settings={}, task=tasks.causal_lm(),
        records=[], population=built().population, tokenizer=ONE,
        key=built().round_key, seed=0, trained={},
      )  # fmt: skip
  mine = conf('fed_avg')
  mine['client_models'] = {'models': [{'name': 'random'}]}
  with pytest.raises(Error, match='leave the section client_models out'):
    experiment.algorithm(
      mine, loss=None, model=None, adapter=built().adapter, num_clients=3
    )
  assert 'client_models' in recipes.NEEDS['fed_mkt']


def test_an_evaluation_on_no_text_is_refused():
  with pytest.raises(
    Error, match='client_models: per_client=0 must be at leas'
  ):
    client_models.personal(built(), per_client=0)
