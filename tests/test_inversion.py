"""Tokens from gradients of low-rank factors, through the real transformer."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fedjax_llm import data, local
from fedjax_llm.data import collate
from fedjax_llm.run import inverting
from fedjax_llm.types import Error, Example, FederatedAlgorithm

nobody: Any = None
SERVED = FederatedAlgorithm(
  *(nobody, nobody, nobody), lambda params, state: params
)
TARGETS = [f'self_attn/{name}_proj' for name in 'qkv']


@pytest.fixture(scope='module')
def built():
  tokens = np.random.default_rng(0).permutation(tiny.V)[:24].astype(np.int32)
  text = Example(tokens, np.ones(24, bool))
  built = SimpleNamespace(
    owned=[[text], []],
    loaded=tiny.loaded(),
    task=SimpleNamespace(collate=collate.texts),
    tokenizer=data.tokenizers.bytes()._replace(pad_id=0),
  )
  loss = local.causal_lm(tiny.loaded().model, per_row=True)
  built.evaluator = functools.cache(
    lambda num: inverting.inversion(built, SERVED, loss, num_tokens=num)
  )
  return built


def audit(built, params, num_tokens):
  got = built.evaluator(num_tokens)(
    tiny.base(), params, None, jax.random.key(0)
  )
  return got['evals/inversion/recall'], got['evals/inversion/precision']


def test_tokens_are_recovered_exactly_while_the_rank_holds_them(built):
  params = tiny.lora(*TARGETS)
  # Three weights of rank 2: six columns hold four inputs, and not twenty.
  assert audit(built, params, 5) == (1.0, 1.0)
  recall, _ = audit(built, params, 21)
  assert recall < 0.5


def test_in_the_first_round_b_gives_a_token_away(built):
  params = tiny.lora(*TARGETS)
  zero: Any = lambda node: node._replace(b=jnp.zeros_like(node.b))
  start = jax.tree.map(zero, params, is_leaf=lambda x: hasattr(x, 'b'))
  assert audit(built, start, 2) == (1.0, 1.0)  # one input, two columns
  recall, _ = audit(built, start, 5)  # as many directions as columns
  assert recall == 0.0


def test_what_cannot_be_inverted_is_refused(built):
  with pytest.raises(Error, match='needs low-rank factors at q_proj'):
    audit(built, tiny.lora('mlp/up_proj'), 5)
  with pytest.raises(Error, match='num_tokens=1 at least 2'):
    audit(built, {}, 1)
  with pytest.raises(Error, match='no training text has num_tokens=99'):
    audit(built, {}, 99)
