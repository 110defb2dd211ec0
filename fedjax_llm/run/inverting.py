"""The evaluator `inversion`: tokens that a message gives away exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import evals
from fedjax_llm.evals import inversion as spans
from fedjax_llm.nodes import LowRank
from fedjax_llm.types import (
  Error,
  Evaluator,
  Example,
  FederatedAlgorithm,
  Loss,
)

__all__ = ['inversion']

_SAME_INPUT = ('q_proj', 'k_proj', 'v_proj')


def inversion(
  built: Any,
  algorithm: FederatedAlgorithm,
  loss: Loss,
  *,
  num_texts: int = 8,
  num_tokens: int = 8,
  tolerance: float = 1e-3,
) -> Evaluator:
  """Returns the audit of one gradient of the factors on one training text.

  It is the worst case: a client that sends the update of one step of SGD on the
  first `num_tokens` tokens of one text, all of them learned. From the gradients
  of the first layer's factors a of q, k and v, and where they are zero (in the
  first round) of their b, the tokens are recovered whose inputs lie in the span
  (`evals.inversion`). 'evals/inversion/recall' is the share of the text's
  tokens that are recovered, 'evals/inversion/precision' that of the recovered
  tokens that are in the text (1 where none is).

  Raises:
    Error: a number out of range; no `LowRank` node at q, k or v; a network
      whose inputs depend on positions; no training text of `num_tokens` tokens.
  """
  if num_texts < 1 or num_tokens < 2:
    raise Error(
      f'inversion: num_texts={num_texts} must be at least 1, and '
      f'num_tokens={num_tokens} at least 2.'
    )
  long = [
    [x for x in own if isinstance(x, Example) and len(x.tokens) >= num_tokens]
    for own in built.owned
  ]
  texts = [x for own in evals.in_turn(long, num_texts) for x in own]
  if not texts:
    raise Error(f'inversion: no training text has num_tokens={num_tokens}.')
  config, base = built.loaded.config, built.loaded.base
  candidates = np.asarray(spans.inputs(config, base))
  mask = np.arange(num_tokens) > 0
  rows = [Example(x.tokens[:num_tokens], mask) for x in texts]
  collate = built.task.collate(rows, num_tokens, built.tokenizer.pad_id)

  def one(base, nodes, served, batch, key):
    whole = _with(served, nodes)
    return jnp.sum(loss(base, whole, batch, key).total)

  program = jax.jit(jax.grad(one, argnums=1))

  def evaluate(base, params, store, key):
    del store
    served = algorithm.personal(params, None)
    nodes = _nodes(served)
    factors = {name: (node.a, node.b) for name, node in nodes.items()}
    recall, precision = [], []
    for row in rows:
      grads = program(base, factors, served, collate([[row]]), key)
      first = {
        n: (np.asarray(a)[0], np.asarray(b)[0]) for n, (a, b) in grads.items()
      }
      seen = _recovered(first, nodes, candidates, tolerance)
      # The last token is an input of nothing that is learned.
      there = np.unique(row.tokens[:-1])
      hits = int(seen[there].sum())
      recall.append(hits / len(there))
      precision.append(hits / seen.sum() if seen.any() else 1.0)
    return {
      'evals/inversion/recall': float(np.mean(recall)),
      'evals/inversion/precision': float(np.mean(precision)),
    }

  return evaluate


def _recovered(grads, nodes, candidates, tolerance) -> np.ndarray:
  of_a = [a for a, _ in grads.values()]
  if any(np.abs(a).max() > 0 for a in of_a):
    return spans.spanned(of_a, candidates, tolerance=tolerance)
  # Each b sees the inputs through its own a: a token is in all of the spans.
  seen, some = np.ones(len(candidates), bool), False
  for name, (_, b) in grads.items():
    rank = np.linalg.matrix_rank(b, tol=1e-5 * np.abs(b).max())
    if not 0 < rank < b.shape[0]:
      continue  # it says nothing, or spans everything
    through = candidates @ np.asarray(nodes[name].a[0])
    seen &= spans.spanned([b], through, tolerance=tolerance)
    some = True
  return seen & some


def _nodes(params: Any) -> dict[str, LowRank]:
  attention = params.get('layers', {}).get('self_attn', {})
  nodes = {}
  for name in _SAME_INPUT:
    node = attention.get(name)
    node = node.get('kernel') if isinstance(node, dict) else node
    if isinstance(node, LowRank):
      nodes[name] = node
  if not nodes:
    raise Error(
      'inversion needs low-rank factors at q_proj, k_proj or v_proj: '
      'adapter.name=lora with these targets.'
    )
  return nodes


def _with(params: Any, factors: Any) -> Any:
  """Returns the parameters with other factors at q, k and v."""
  attention = dict(params['layers']['self_attn'])
  for name, (a, b) in factors.items():
    put = lambda node, a=a, b=b: node._replace(a=a, b=b)
    old = attention[name]
    if isinstance(old, dict):
      attention[name] = {**old, 'kernel': put(old['kernel'])}
    else:
      attention[name] = put(old)
  layers = {**params['layers'], 'self_attn': attention}
  return {**params, 'layers': layers}
