"""Reward models: scores as in torch, the loss of pairs, a judge of replies."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_alignment as ref
import tiny

from fedjax_llm import adapters, data, local, models
from fedjax_llm.adapters import peft
from fedjax_llm.data import collate, encoding
from fedjax_llm.local.grpo import rolled
from fedjax_llm.models import families
from fedjax_llm.models.files import load
from fedjax_llm.run import preferences, reward_models, rewarded, tasks
from fedjax_llm.types import Batch, Error, Example, LossSum, Model, Pair

GOLDEN = pathlib.Path(__file__).parent / 'golden'
LENGTH = 24


def texts(tokens, lengths) -> Batch:
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  inside = positions < np.asarray(lengths)[:, None]
  return Batch(tokens, inside, inside.astype(np.int32), positions)


# ------------------------------------------------------------------- score --


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_scores_equal_those_of_torch(name):
  loaded = models.pretrained(GOLDEN / 'rewards' / name)
  golden = np.load(GOLDEN / 'rewards' / name / 'logits.npz')
  batch = texts(golden['tokens'], golden['lengths'])
  score = jax.jit(local.class_logits(loaded.model))
  value = score(loaded.base, {}, batch)
  scale = np.abs(golden['logits']).max()
  assert scale > 0.5 and not loaded.config.writes
  np.testing.assert_allclose(value, golden['logits'], atol=1e-5 * scale)
  # Of no other token: where the text ends in a token that pads, not of that.
  hidden = jax.jit(loaded.model.hidden)(loaded.base, {}, batch)
  all_of = loaded.model.logits(loaded.base, {}, hidden)
  away = np.abs(np.asarray(all_of) - golden['logits'][:, None]).max(-1)
  near = np.argmin(away, 1).tolist()
  assert near == [22 if name == 'gpt2' else 23, 14]


def test_a_config_with_scores_is_written_as_it_was_read():
  for name in ('llama', 'gpt2'):
    config = families.read_config(GOLDEN / 'rewards' / name)
    assert (
      config.labels
      == {
        'llama': ('reward',),
        'gpt2': ('sad', 'neutral', 'glad'),
      }[name]
    )
    raw = families.to_hf(config)
    assert raw['architectures'][0].endswith('ForSequenceClassification')
    assert list(raw['id2label'].values()) == list(config.labels)


def test_a_language_model_gets_a_new_score_and_keeps_the_rest():
  for name in ('llama', 'gpt2', 'phi'):  # untied; tied; a head with a bias
    plain = models.pretrained(GOLDEN / 'models' / name)
    one, again, other = (
      models.pretrained(GOLDEN / 'models' / name, labels=['reward'], seed=seed)
      for seed in (0, 0, 1)
    )
    kernel = one.base['score']['kernel']
    assert kernel.shape == (32, 1) and 'lm_head' not in one.base
    np.testing.assert_array_equal(kernel, again.base['score']['kernel'])
    assert np.abs(kernel - other.base['score']['kernel']).max() > 1e-3
    rest = {k: v for k, v in one.base.items() if k != 'score'}
    mine = {k: v for k, v in plain.base.items() if k != 'lm_head'}
    jax.tree.map(np.testing.assert_array_equal, rest, mine)


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
@pytest.mark.parametrize('name', sorted(families.FAMILIES))
def test_every_causal_family_scores_as_torch_does(name, tmp_path):
  kind = families.FAMILIES[name]
  if 'score' not in kind.heads.values():
    pytest.skip(f'{name} has no head of scores')
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  source = next(
    folder
    for folder in sorted((GOLDEN / 'models').iterdir())
    if families.read_config(folder).family == name
  )
  (architecture,) = (k for k, v in kind.heads.items() if v == 'score')
  theirs = getattr(transformers, architecture).from_pretrained(
    source, num_labels=2, dtype=torch.float32
  )
  theirs.config.pad_token_id = 0
  theirs.eval().save_pretrained(tmp_path)
  tokens = np.load(source / 'logits.npz')['tokens'].clip(3)
  with torch.no_grad():
    want = theirs(torch.asarray(tokens).long()).logits.numpy()
  loaded = models.pretrained(tmp_path)
  batch = texts(tokens, [LENGTH, LENGTH])
  value = local.class_logits(loaded.model)(loaded.base, {}, batch)
  np.testing.assert_allclose(value, want, atol=2e-5 * np.abs(want).max())


# -------------------------------------------------------------------- loss --


def reward_network():
  config = tiny.loaded().config._replace(head='score', labels=('reward',))
  base = {k: v for k, v in tiny.base().items() if k != 'lm_head'}
  rng = np.random.default_rng(3)
  kernel = jnp.asarray(rng.normal(size=(tiny.D, 1)), jnp.float32)
  return load.assemble(config, {**base, 'score': {'kernel': kernel}}, name='r')


def some_pairs():
  text = lambda *tokens: Example(
    np.array(tokens, np.int32), np.arange(len(tokens)) > 0
  )
  return [
    Pair(text(5, 6, 7, 8), text(5, 6, 9)),
    Pair(text(4, 8, 8), text(4, 3, 2, 9, 9)),
    Pair(text(2, 7, 6, 5), text(2, 7, 6, 1)),
  ]


@pytest.fixture(scope='module')
def scored():
  """The network, its batch with a row of padding, and each text's reward."""
  loaded, pairs = reward_network(), some_pairs()
  batch = collate.pairs(pairs, 6)([*([pair] for pair in pairs), []])
  reward = jax.jit(local.reward_of(loaded.model))
  sides = [
    np.asarray(reward(loaded.base, {}, side), np.float64)[:3]
    for side in (batch.chosen, batch.rejected)
  ]
  return loaded, batch, sides


def test_a_reward_is_that_of_the_last_token(scored):
  loaded, batch, (chosen, _) = scored
  hidden = loaded.model.hidden(loaded.base, {}, batch.chosen)
  last = [3, 2, 3]
  want = hidden[np.arange(3), last] @ loaded.base['score']['kernel'][:, 0]
  np.testing.assert_allclose(chosen, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('centre', [0.0, 0.3])
def test_the_loss_is_that_of_bradley_and_terry(scored, centre):
  loaded, batch, (chosen, rejected) = scored
  loss = local.bradley_terry(loaded.model, centre=centre, per_row=True)
  sums = jax.jit(loss)(loaded.base, {}, batch, tiny.KEY)
  want = ref.bradley_terry(chosen, rejected, centre)
  np.testing.assert_allclose(sums.total, [*want, 0], rtol=1e-4, atol=1e-6)
  assert sums.count.tolist() == [1, 1, 1, 0]
  assert sums.correct.tolist() == [*(chosen > rejected), 0]
  # The sides exchanged, and the centre left out, are other losses.
  assert np.abs(want - ref.bradley_terry(rejected, chosen, centre)).min() > 1e-3
  assert not np.allclose(want, ref.bradley_terry(chosen, rejected, 0.1))


def test_gradients_reach_adapter_and_head_and_padding_gives_none(scored):
  loaded, batch, _ = scored
  adapter = adapters.lora(rank=2, targets='q_proj', modules_to_save='score')
  params = adapter.init(tiny.KEY, loaded.base)
  loss = local.bradley_terry(loaded.model)
  value = jax.jit(
    jax.value_and_grad(
      lambda params: loss(loaded.base, params, batch, tiny.KEY).total
    )
  )
  first, slope = value(params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
  later = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
  assert value(later)[0] < first
  assert np.abs(slope['score']['kernel'].value).max() > 0


def test_a_loss_of_rewards_refuses_other_batches_and_settings(scored):
  loaded, batch, _ = scored
  loss = local.bradley_terry(loaded.model)
  with pytest.raises(Error, match=r'^a reward model learns from Pairs, not Ba'):
    loss(loaded.base, {}, batch.chosen, tiny.KEY)
  for build in (
    lambda: local.bradley_terry(loaded.model, centre=-1.0),
    lambda: reward_models.reward_model(centre=-1.0),
  ):
    with pytest.raises(Error, match=r'centre is -1.0; it must be 0 or more[.]'):
      build()


# -------------------------------------------------------------------- task --


def test_the_task_makes_pairs_and_names_its_head():
  task = reward_models.reward_model(centre=0.1)
  record = data.sources.Record(prompt='2+2', chosen='4', rejected='five')
  how = encoding.Encoding(data.tokenizers.bytes(), 'plain')
  (pair,) = task.encode(record, how).examples
  assert isinstance(pair, Pair)
  loaded = models.random(labels=task.scores, vocab_size=259)
  task.check(loaded)
  assert (task.head, task.peft_type) == (('score',), 'SEQ_CLS')
  loss = task.loss(loaded, per_row=True)
  batch = task.collate([pair], 12, 0)([[pair]])
  sums: LossSum = jax.jit(loss)(loaded.base, {}, batch, tiny.KEY)
  assert sums.count.tolist() == [1.0] and np.isfinite(sums.total).all()
  with pytest.raises(Error, match=r'^random-0 has 2 scores [(]a, b[)]; a rew'):
    task.check(models.random(labels=('a', 'b')))
  with pytest.raises(Error, match='has no score of whole texts'):
    task.check(models.random_encoder(labels=('a',)))


def test_a_causal_network_classifies_texts_by_their_last_token(scored):
  loaded, batch, (chosen, _) = scored
  tasks.classification().check(loaded)
  with pytest.raises(Error, match=r'^random-0 has no classifier: task[.]name='):
    tasks.classification().check(models.random())
  loss = jax.jit(tasks.classification().loss(loaded, per_row=True))
  labelled = batch.chosen._replace(label=np.array([0, 0, 0, -1]))
  sums = loss(loaded.base, {}, labelled, tiny.KEY)
  assert sums.total.tolist() == [0, 0, 0, 0]  # one class: p = 1
  two = jnp.concatenate([loaded.base['score']['kernel']] * 2, -1) * jnp.array(
    [1.0, -1.0]
  )
  base = {**loaded.base, 'score': {'kernel': two}}
  sums = loss(base, {}, labelled, tiny.KEY)
  want = np.log1p(np.exp(-2 * chosen))
  np.testing.assert_allclose(sums.total[:3], want, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------- judge --


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A merged reward model of a network on bytes."""
  loaded = models.random(labels=('reward',), vocab_size=259, hidden_size=16)
  adapter = adapters.lora(rank=2, modules_to_save='score')
  params = adapter.init(tiny.KEY, loaded.base)
  params = jax.tree.map(lambda x: x + 0.1, params)
  path = tmp_path_factory.mktemp('reward')
  base = adapter.merge(loaded.base, params)
  models.save(path, loaded.config, base)
  return path, loaded, base, params


def test_a_merged_reward_model_reads_as_the_adapter_that_made_it(folder):
  path, loaded, base, params = folder
  again = models.pretrained(path)
  jax.tree.map(np.testing.assert_array_equal, again.base, base)
  raw = json.loads((path / 'config.json').read_text())
  assert raw['architectures'] == ['LlamaForSequenceClassification']
  batch = tiny.texts(2)
  reward = jax.jit(local.reward_of(loaded.model))
  np.testing.assert_allclose(
    jax.jit(local.reward_of(again.model))(again.base, {}, batch),
    reward(loaded.base, params, batch),
    rtol=1e-3,
    atol=1e-4,
  )


def naming(config) -> tuple[dict[str, Any], dict[str, Any]]:
  return (
    dict(
      module_name=lambda p, i: families.hf_module_name(p, i, config, part=True),
      to_tensors=lambda leaves: families.to_checkpoint(leaves, config),
      task_type='SEQ_CLS',
    ),
    dict(
      path_of=lambda name: families.our_paths(name, config),
      from_tensors=lambda w: families.from_checkpoint(w, config),
    ),
  )


def test_an_adapter_takes_its_score_along(folder, tmp_path):
  _, loaded, _, params = folder
  saving, loading = naming(loaded.config)
  peft.save(tmp_path / 'x', params, base_model='m', **saving)
  again = peft.load(tmp_path / 'x', template=params, **loading)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  raw = json.loads((tmp_path / 'x' / peft.CONFIG).read_text())
  assert raw['modules_to_save'] == ['score'] and raw['task_type'] == 'SEQ_CLS'


@pytest.mark.filterwarnings('ignore')  # those of torch are not ours
def test_peft_computes_the_scores_of_our_adapter(folder, tmp_path):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  _, loaded, _, params = folder
  saving, _ = naming(loaded.config)
  models.save(tmp_path / 'base', loaded.config, loaded.base)
  base = str(tmp_path / 'base')
  peft.save(tmp_path / 'x', params, base_model=base, **saving)
  model = theirs.PeftModel.from_pretrained(
    transformers.AutoModelForSequenceClassification.from_pretrained(
      base, dtype=torch.float32
    ),
    tmp_path / 'x',
  ).eval()
  tokens = np.arange(3, 27, dtype=np.int32)[None]
  with torch.no_grad():
    want = model(torch.asarray(tokens).long()).logits.numpy()
  value = local.class_logits(loaded.model)(
    loaded.base, params, texts(tokens, [LENGTH])
  )
  np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5)


def test_grpo_adds_the_score_of_prompt_and_reply(folder):
  path, reward, weights, _ = folder
  loaded = models.random(vocab_size=259)
  task = rewarded.grpo(
    form=0.5, exact=0.0, reward_model=str(path), learned=2.0, max_new_tokens=4
  )
  assert task.beside is not None
  beside = task.beside(loaded)
  jax.tree.map(np.testing.assert_array_equal, beside, {'reward_model': weights})
  how = encoding.Encoding(data.tokenizers.bytes(), 'plain')
  record = data.sources.Record(prompt='1+1', response='2')
  (example,) = task.encode(record, how).examples
  batch = task.collate([example], 16, 0)([[example]])
  loss: Any = task.loss(loaded)
  reply = jnp.array([[50, 258, -1, -1], [50, 51, 52, 53]])
  both = jax.tree.map(lambda x: np.repeat(x, 2, 0), batch)
  base = {**loaded.base, **beside}
  value = jax.jit(loss.score)(both, reply, base)
  start = int(np.argmax(batch.loss_mask[0]))
  score = jax.jit(local.reward_of(reward.model))
  for i, end in enumerate((2, 4)):
    tokens = [*batch.tokens[0, :start], *np.asarray(reply)[i, :end]]
    whole = Example(np.array(tokens, np.int32), np.zeros(len(tokens), bool))
    text = collate.texts([whole], 24)([[whole]])
    want = 2 * float(score(weights, {}, text)[0]) + 0.5 * (i == 0)
    assert float(value[i]) == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_a_learned_reward_reaches_training_and_evaluation():
  """With weights from the base: they are no constants of the program."""
  model = Model(
    hidden=lambda base, params, batch: jnp.zeros((*batch.tokens.shape, 2)),
    logits=lambda base, params, hidden: jnp.zeros((*hidden.shape[:-1], 9)),
  )
  reply = jnp.array([[4, 2], [5, 6]])  # 2 ends a reply
  learned = lambda base, batch: (
    base['w'] * jnp.sum(jnp.where(batch.segments > 0, batch.tokens, 0), 1)
  )
  loss = local.Sampled(
    model=model,
    sample=lambda base, params, tokens, *rest, **more: reply[: len(tokens)],
    rule=lambda replies: replies.ended.astype(jnp.float32),
    stops=(2,),
    learned=learned,
  )
  tokens = np.array([[7, 8, 3]])
  batch = Batch(tokens, tokens == 3, np.ones_like(tokens), np.arange(3)[None])
  base = {'w': 0.5}
  want = [0.5 * (7 + 8 + 4 + 2) + 1, 0.5 * (7 + 8 + 5 + 6)]

  @jax.jit
  def both(base):
    out = rolled(loss, base, {}, batch, tiny.KEY, group_size=2)
    return out.reward, loss(base, {}, batch, tiny.KEY)

  reward, sums = both(base)
  np.testing.assert_allclose(reward, want)
  assert (float(sums.total), float(sums.count)) == (-want[0], 1.0)


def test_a_reward_model_with_other_tokens_is_refused(folder):
  path, *_ = folder
  with pytest.raises(Error, match=r'^task.reward_model: the tokens of .* one '):
    reward_models.judge(str(path), data.tokenizers.pairs())
  small = reward_models.judge
  with pytest.raises(Error, match=r'embeds 97 tokens, and the model that is t'):
    small(str(GOLDEN / 'rewards' / 'llama'), data.tokenizers.bytes())
  with pytest.raises(Error, match='no reply has a reward'):
    rewarded.grpo(exact=0.0, reward_model=str(path), learned=0.0)


def test_pairs_of_the_packaged_texts_are_those_of_preferences():
  task = reward_models.reward_model()
  assert task.encode is preferences.encode and task.prepare is None
