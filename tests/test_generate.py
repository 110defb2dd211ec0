"""Generation: sampling by request, many adapters in one batch, the program."""

import contextlib
import io
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import data, generate, models, rebuild
from fedjax_llm.adapters import Dense, peft
from fedjax_llm.models import generate as say
from fedjax_llm.models import tenants
from fedjax_llm.types import Error, LowRank

GOLDEN = pathlib.Path(__file__).parent / 'golden'
PROMPTS = [[5, 17, 3], [9], list(range(20, 32)), [7, 8]]
WHICH = [1, 0, -1, 0]


def factors(loaded, seed, rank, targets, scale=2.0):
  rng = np.random.default_rng(seed)
  params = {}
  for group, target in (t.split('/') for t in targets):
    num_layers, d, f = loaded.base['layers'][group][target]['kernel'].shape
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params.setdefault(group, {})[target] = LowRank(
      draw(num_layers, d, rank) / d**0.5,
      draw(num_layers, rank, f) / rank**0.5,
      jnp.full([num_layers], scale),
    )
  return {'layers': params}


def two(loaded):
  """Adapters of other ranks, targets and scales."""
  return [
    factors(loaded, 0, 2, ['self_attn/q_proj', 'self_attn/v_proj']),
    factors(loaded, 1, 5, ['self_attn/q_proj', 'mlp/down_proj'], 3.0),
  ]


@pytest.fixture(scope='module')
def tiny():
  return models.random(vocab_size=61, hidden_size=32, intermediate_size=48)


def draws(loaded, prompts, **settings):
  settings = {'max_new_tokens': 6, 'temperature': 1.0, **settings}
  return say(loaded, loaded.base, {}, prompts, **settings)


# ---------------------------------------------------------------- adapters --


@pytest.mark.parametrize('name', ['llama', 'gemma3', 'gpt2'])
def test_adapters_in_one_batch_equal_each_alone(name):
  loaded = models.pretrained(GOLDEN / 'models' / name)
  adapters = two(loaded)
  if name == 'llama':  # of PEFT itself: by patterns, and rank-stabilised
    folders = [GOLDEN / 'adapters' / x for x in ('patterns', 'rslora')]
    adapters = [rebuild.load_adapter(x, loaded) for x in folders]
  if name == 'gemma3':  # the longest text leaves its windows behind
    assert max(loaded.config.windows) < len(PROMPTS[2]) + 6

  def all_of(which):
    return draws(
      loaded, PROMPTS, temperature=0.0, adapters=adapters, which=which
    )

  together = all_of(WHICH)
  for prompt, index, reply in zip(PROMPTS, WHICH, together, strict=True):
    params = {} if index < 0 else adapters[index]
    if name != 'llama' and index < 0:
      continue  # compiling it once is enough
    alone = say(loaded, loaded.base, params, [prompt], max_new_tokens=6)
    assert alone == [reply]
  plain = all_of([-1] * 4)
  changed = [a != b for a, b in zip(plain, together, strict=True)]
  assert changed == [True, True, False, True]
  if name == 'llama':  # without a cache
    bare = say(
      *(loaded.model, loaded.base, {}, PROMPTS),
      max_new_tokens=6,
      adapters=adapters,
      which=WHICH,
    )
    assert bare == together


def test_dense_changes_are_of_a_batch_too(tiny):
  """Residuals, biases and scales of norms, embeddings and heads."""
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  base = tiny.base
  first: dict[str, Any] = factors(tiny, 0, 2, ['self_attn/q_proj'])
  node = first['layers']['self_attn']['q_proj']
  kernel = base['layers']['self_attn']['q_proj']['kernel']
  first['layers']['self_attn']['q_proj'] = node._replace(residual=noise(kernel))
  first['lm_head'] = noise(base['lm_head']['kernel'])
  second = {
    'embed_tokens': noise(base['embed_tokens']['embedding']),
    'norm': {'scale': Dense(noise(base['norm']['scale']))},
    'layers': {'input_layernorm': noise(base['layers']['norm']['scale'])}
    if 'norm' in base['layers']
    else {'input_layernorm': noise(base['layers']['input_layernorm']['scale'])},
  }
  batch = PROMPTS[:2]
  together = say(
    *(tiny, base, {}, batch),
    max_new_tokens=4,
    adapters=[first, second],
    which=[0, 1],
  )
  for prompt, params, reply in zip(batch, (first, second), together):
    assert say(tiny, base, params, [prompt], max_new_tokens=4) == [reply]


def products(jaxpr, found):
  """Every dot_general inside, as (left, right, dimension numbers)."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      left, right = (x.aval.shape for x in equation.invars)
      found.append((left, right, equation.params['dimension_numbers']))
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        products(inner, found)
  return found


def test_the_base_is_one_product_of_all_rows(tiny):
  """No product with a weight of the base has a batch axis of adapters."""
  adapters = two(tiny)
  rows, width = 4, 8
  one = jnp.ones([rows, width], jnp.int32)
  batch = models.transformer.Batch(one, one > 0, one, jnp.cumsum(one, 1) - 1)
  own = tenants.rows(tenants.stack(tiny.base, adapters), jnp.asarray(WHICH))
  decoder = tenants.decoder(tiny.decoder)

  def extend(base, own):
    return decoder.extend(base, own, batch, decoder.empty(rows, width), 0)[0]

  found = products(jax.make_jaxpr(extend)(tiny.base, own).jaxpr, [])
  kernels = [
    module['kernel'].shape[1:]
    for group in ('self_attn', 'mlp')
    for module in tiny.base['layers'][group].values()
  ]
  of_base = [
    (left, right, batched)
    for left, right, (_, batched) in found
    if left in kernels or right in kernels
  ]
  assert len(of_base) == len(kernels) == 7
  for left, right, batched in of_base:
    assert batched == ((), ())
    activations = left if right in kernels else right
    assert np.prod(activations[:-1]) == rows * width
  # What differs from row to row is low-rank, padded to a target's largest.
  own_products = [
    right for _, right, (_, batched) in found if batched[0] and len(right) == 3
  ]
  assert len(own_products) == 2 * 3  # two a target
  assert {min(shape[1:]) for shape in own_products} == {2, 5}


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'which': [2]}, 'adapter 2; there are 2'),
    ({'which': [0, 0]}, 'of 2 entries'),
    ({'which': None}, 'not given'),
    ({'seeds': [1, 2]}, '2 seeds for 1 prompts'),
    ({'seeds': [-1]}, 'seed -1'),
    ({'top_p': 0.0}, 'top_p=0.0'),
  ],
)
def test_requests_that_make_no_sense_are_refused(tiny, settings, words):
  settings = {'which': [0], 'temperature': 0.0, **settings}
  with pytest.raises(Error, match=words):
    draws(tiny, [[1]], adapters=two(tiny), **settings)


def test_an_adapter_of_another_base_is_named(tiny):
  other = models.random(vocab_size=61, hidden_size=64, intermediate_size=48)
  adapters = [*two(tiny)[:1], two(other)[0]]
  greedy = {'temperature': 0.0, 'which': [0]}
  with pytest.raises(
    Error, match=r'adapter 1 is of another base: its layers/self_attn/q_proj'
  ):
    draws(tiny, [[1]], adapters=adapters, **greedy)
  with pytest.raises(Error, match='with params or with adapters'):
    say(
      *(tiny, tiny.base, adapters[0], [[1]]),
      max_new_tokens=1,
      adapters=adapters,
      which=[0],
    )
  dense = {'layers': {'self_attn': {'q_proj': jnp.zeros([2, 32, 32])}}}
  with pytest.raises(Error, match='q_proj in different ways'):
    draws(tiny, [[1]], adapters=[*adapters[:1], dense], **greedy)


# ---------------------------------------------------------------- sampling --


def test_a_sample_is_of_its_seed_whatever_else_is_in_the_batch(tiny):
  adapters = two(tiny)
  seeds = [7, 7, 3, 2**32 - 1]
  together = draws(tiny, PROMPTS, seeds=seeds, adapters=adapters, which=WHICH)
  backwards = draws(
    *(tiny, PROMPTS[::-1]),
    seeds=seeds[::-1],
    adapters=adapters,
    which=WHICH[::-1],
    batch_size=3,
  )
  assert backwards[::-1] == together
  alone = draws(tiny, PROMPTS[1:2], seeds=[7], adapters=adapters, which=[0])
  assert alone == together[1:2]
  again = draws(tiny, [[9]] * 3, seeds=[1, 2, 1])
  assert again[0] == again[2] != again[1]


def test_the_nucleus_is_what_numpy_finds(tiny):
  """400 draws of one token: the likeliest ones, in their proportion."""
  prompt, top_p = [4, 8, 15], 0.6
  drawn = draws(
    *(tiny, [prompt] * 400),
    max_new_tokens=1,
    key=jax.random.key(0),
    top_p=top_p,
    batch_size=400,
  )
  counts = np.bincount([d[0] for d in drawn], minlength=61)
  one = jnp.ones([1, 3], jnp.int32)
  batch = models.transformer.Batch(
    jnp.asarray([prompt]), one > 0, one, jnp.arange(3)[None]
  )
  hidden = tiny.model.hidden(tiny.base, {}, batch)[0, -1]
  logits = np.asarray(tiny.model.logits(tiny.base, {}, hidden), np.float64)
  share = np.exp(logits - logits.max())
  share /= share.sum()
  order = np.argsort(-share)
  size = 1 + np.searchsorted(np.cumsum(share[order]), top_p)
  nucleus = order[:size]
  assert 5 < size < 50
  assert counts[nucleus].sum() == 400
  wanted = 400 * share[nucleus] / share[nucleus].sum()
  pearson = np.sum((counts[nucleus] - wanted) ** 2 / wanted)
  assert pearson < size + 5 * np.sqrt(2 * size)


def test_a_narrow_nucleus_is_greedy_and_a_wide_one_changes_nothing(tiny):
  greedy = draws(tiny, PROMPTS, temperature=0.0)
  assert draws(tiny, PROMPTS, seeds=[1] * 4, top_p=1e-6) == greedy
  whole = draws(tiny, PROMPTS, seeds=[1] * 4)
  assert whole != greedy
  # All but what float32 cannot tell from nothing.
  assert draws(tiny, PROMPTS, seeds=[1] * 4, top_p=1 - 1e-7) == whole


def test_any_of_several_ends_stops_its_own_row(tiny):
  whole = draws(tiny, PROMPTS, temperature=0.0)
  ends = [whole[0][2], whole[1][0], 60]
  cut = [
    row[: min([i for i, t in enumerate(row) if t in ends], default=6)]
    for row in whole
  ]
  assert draws(tiny, PROMPTS, temperature=0.0, eos_id=ends) == cut
  assert len(set(map(len, cut))) > 1


# ----------------------------------------------------------------- program --


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A model and two adapters of it on the disk."""
  room = tmp_path_factory.mktemp('generate')
  loaded = models.random(
    vocab_size=259, hidden_size=32, intermediate_size=48, eos_ids=(258,)
  )
  models.save(room / 'model', loaded.config, loaded.base)
  for name, params in zip(('ann', 'bob'), two(loaded), strict=True):
    peft.save(
      room / name,
      params,
      module_name=lambda path, layer: models.families.hf_module_name(
        path, layer, loaded.config
      ),
      base_model='model',
    )
  return room, loaded, two(loaded)


def program(room, *more):
  """Status and what was said."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = generate.main(
      ['--model', str(room / 'model'), '--tokenizer', 'bytes', *more]
    )
  return status, out.getvalue() or err.getvalue()


def test_the_program_tells_one_reply_for_each_prompt_and_adapter(folders):
  room, loaded, adapters = folders
  names = [str(room / 'ann'), str(room / 'bob'), 'none']
  more = [x for name in names for x in ('--adapter', name)]
  ends = ['--prompt', 'one', '--prompt', 'two']
  drawn = ['--temperature', '0.7', '--top-p', '0.9', '--seed', '5']
  status, told = program(*(room, *more, *ends, *drawn), '--max-new-tokens', '6')
  assert status == 0, told
  tokenizer = data.tokenizers.bytes()
  wanted = []
  for number, prompt in enumerate(('one', 'two')):
    wanted += [prompt] if number == 0 else ['', prompt]
    for which in (0, 1, -1):
      (reply,) = say(
        *(loaded, loaded.base, {}, [[257, *prompt.encode()]]),
        max_new_tokens=6,
        temperature=0.7,
        top_p=0.9,
        seeds=[5 + number],
        eos_id=258,
        adapters=adapters,
        which=[which],
      )
      wanted.append(tokenizer.decode(reply))
  titles = ['prompt', *names, '', 'prompt', *names]
  width = max(map(len, names))
  shown = [
    f'{title:{width}}  '
    + f'\n{" " * (width + 2)}'.join(text.strip().splitlines())
    if title
    else ''
    for title, text in zip(titles, wanted, strict=True)
  ]
  assert told == '\n'.join(shown) + '\n'
  assert len({*wanted[1:4]}) == 3


def test_a_template_is_that_of_the_training():
  tokenizer = data.tokenizers.bytes()
  record = data.sources.Record(client='ann', prompt='2+2', response='4')
  for template in ('plain', 'alpaca', 'vicuna', 'chat'):
    found = generate._encode('2+2', tokenizer, template)
    assert found == data.text.prompt(record, tokenizer, template)
  assert generate._encode('2+2', tokenizer, None) == [257, *b'2+2']


def test_what_the_program_cannot_do_is_one_sentence(folders, tmp_path):
  room, _, _ = folders
  other = models.random(vocab_size=259, hidden_size=64, intermediate_size=48)
  peft.save(
    tmp_path / 'wide',
    two(other)[0],
    module_name=lambda path, layer: models.families.hf_module_name(
      path, layer, other.config
    ),
    base_model='other',
  )
  shutil.copytree(room / 'model', tmp_path / 'model')
  config = json.loads((room / 'model' / 'config.json').read_text())
  config |= {'architectures': ['MambaForCausalLM'], 'model_type': 'mamba'}
  (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
  prompt = ['--prompt', 'one']
  for more, words in [
    (['--adapter', str(tmp_path / 'no'), *prompt], 'no such directory'),
    (['--adapter', str(room), *prompt], 'no adapter_config.json'),
    (
      ['--adapter', str(tmp_path / 'wide'), *prompt],
      'wide is of another base: its layers/self_attn/q_proj is [2, 64, 64]',
    ),
    (['--model', str(tmp_path / 'model'), *prompt], 'MambaForCausalLM'),
    ([], 'required: --prompt'),
    ([*prompt, '--template', 'poem'], "'poem' (choose from chat, alpaca"),
    ([*prompt, '--top-p', '2'], 'top_p=2.0'),
    ([*prompt, '--tokenizer', str(tmp_path)], 'no tokenizer'),
  ]:
    status, told = program(room, *more)
    assert status == 1
    assert told.startswith('error: ') and told.count('\n') == 1
    assert words in told
