"""Fed-L2P: federated averaging of a pool of prompts with keys.

Learning to Prompt, Wang et al. 2022, arXiv 2112.08654, averaged over clients:
the baseline of papers on federated continual learning (HePCo, arXiv 2306.09970;
Fed-CPrompt, arXiv 2307.04869) and the base on which they build.

    loss = CE([P_s1; ...; P_sK; text]) + strength sum_i (1 - cos(q(text), k_si))

with the K prompts whose keys are nearest to the text's query q (`nodes.Pool`).
Defaults: 10 prompts of 5 rows, of which a text takes 5, as in the paper; the
strength of common code of L2P, 0.1.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import nodes, scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.local.observed import with_statistics
from fedjax_llm.recipes.averaging.fed_avg import fed_avg
from fedjax_llm.recipes.composing import only
from fedjax_llm.types import Error, FederatedAlgorithm, Loss, Params, known

# What its config changes.
NEEDS = {'fed_l2p': dict(adapter=dict(name='prompt_pool'))}


def fed_l2p(
  loss: Loss, optimizer: LocalOptimizer, *, strength: float = 0.1, **parts: Any
) -> FederatedAlgorithm:
  """Fed-L2P: clients train prompts and keys of a pool, the server averages.

      (P, k) <- sum_c w_c (P, k)_c

  A client trains the prompts that its texts choose, and their keys; other
  modules are trained if the adapter has some (such as a classifier's head).
  The query is the mean of the text's embedded tokens, where the paper takes the
  features of the frozen model; logits of absent classes are not masked. The
  paper classifies, with a query of the whole input; in a causal model the query
  holds the tokens before the first predicted one, since a query of the whole
  row would know what is predicted. Plain texts then choose by their first token
  alone: use questions with replies, or a classifier.

  Args:
    loss: of the task, with statistics of its network.
    optimizer: of the clients.
    strength: of the term that pulls chosen keys to the query (lambda).
    parts: of `fed_avg`.

  Raises:
    Error: a negative strength; from `init`, an adapter without a pool.

  >>> from fedjax_llm import local
  >>> method = fed_l2p(None, local.optimizer('sgd'))
  >>> method.init(None, {'inputs': nodes.Prompt(1.0)})
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_l2p trains a pool of prompts: adapter.name=\
prompt_pool.
  """
  if known(strength) and strength < 0:
    raise Error(f'fed_l2p: strength is {strength}; it must be 0 or more.')
  inner = parts.pop('scope', None) or scopes.everything()
  hint = 'trains a pool of prompts: adapter.name=prompt_pool.'
  scope = only('fed_l2p', inner, _pooled, hint)
  return fed_avg(pulled(loss, strength), optimizer, scope=scope, **parts)


def _pooled(params: Params) -> bool:
  inputs = params.get('inputs') if isinstance(params, dict) else None
  return isinstance(inputs, nodes.Pool)


def pulled(loss: Loss, strength: Any) -> Loss:
  """Returns the token mean of a loss plus the term of the chosen keys.

      strength * mean over texts of sum_i (1 - cos(q, k_si)),  i = 1, ..., K

  >>> from fedjax_llm.local.observed import Observed
  >>> from fedjax_llm.types import LossSum
  >>> choice = nodes.Choice(jnp.float32(0.25), None)
  >>> def both(base, params, batch, key):  # of two tokens
  ...   return LossSum(*jnp.float32([10, 2, 0])), {'inputs': choice}
  >>> pool = nodes.Pool(None, None, top=jnp.zeros(3))
  >>> loss = pulled(Observed(None, both), 0.5)
  >>> float(loss(None, {'inputs': pool}, None, None).total)
  10.75
  """

  def penalised(base, params, batch, key):
    sums, statistics = with_statistics(loss)(base, params, batch, key)
    top = jnp.shape(params['inputs'].top)[0]
    term = strength * top * statistics['inputs'].distance
    return sums._replace(total=sums.total + sums.count * term)

  return penalised
