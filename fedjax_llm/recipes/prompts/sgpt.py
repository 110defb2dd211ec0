"""SGPT: a prompt for all texts, and one for the group of a text.

Deng et al. 2024, CVPR, arXiv 2310.18285.

    phase 1   shared rows and head, without the rows of groups
    phase 2   rows and keys of groups, and head:
              CE([shared; group of x]) + mean_x (1 - cos(relu(q(x)), key of x))

The phases, the choice of a group (`nodes.Grouped`) and the server's rule are
those of the authors' program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, tree
from fedjax_llm.aggregators.weights import by_weight, counted
from fedjax_llm.local import LocalOptimizer, Phase
from fedjax_llm.local.observed import with_statistics
from fedjax_llm.nodes import Grouped, Prompt
from fedjax_llm.recipes.composing import compose, only, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  Frozen,
  LocalUpdate,
  Loss,
  Params,
  Shared,
  known,
)

# What the config of each method changes.
NEEDS = {
  'sgpt': dict(
    adapter=dict(name='grouped_prompt', size=4),
    algorithm=dict(least=4),
  ),
}


class Groups(NamedTuple):
  """The rule's state: the texts that each group had so far, [G]."""

  texts: Any


def sgpt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  momentum: float = 0.5,
  key_momentum: float = 0.5,
  strength: float = 1.0,
  least: int = 50,
  **parts: Any,
) -> FederatedAlgorithm:
  """SGPT: clients train shared rows, then the rows and keys of groups.

      shared, head   <- sum_k w_k (...)_k
      groups         <- m groups + (1 - m) sum_k w_k groups_k
      key_g          <- m' key_g + (1 - m') sum_k r_kg key_kg,
                        r_kg = c_kg / sum_k c_kg, or 1 / K for at most
                        `least` texts

  Deng et al. 2024, arXiv 2310.18285, where c_kg are the texts of client k in
  the group g. The server counts the texts of each group; a group that had many
  gets fewer in the next round (`nodes.Grouped`). Each phase takes all batches
  of the round. The authors' program puts both prompts into layers of a vision
  transformer and asks a frozen pass of it for the group; here both stand in
  front of the text, whose embedded tokens choose, as in `fed_l2p`. Texts are
  counted with the keys that a client received.

  Args:
    loss: of the task, with statistics of its network.
    momentum: m.
    key_momentum: m'.
    strength: of the term that pulls keys to texts.
    least: up to this many texts in a round a group's key is a plain mean.

  Raises:
    Error: an aggregator or a scope in `parts`, a number out of range; from
      `init`, an adapter without a grouped prompt.

  >>> sgpt(None, local.optimizer('sgd'), momentum=1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: algorithm.momentum is 1.0; it must be from 0 to \
below 1.
  """
  for section in ('aggregator', 'scope'):
    refuse('sgpt', section, parts)
  for name, m in (('momentum', momentum), ('key_momentum', key_momentum)):
    if known(m) and not 0 <= m < 1:
      raise Error(f'algorithm.{name} is {m}; it must be from 0 to below 1.')
  if known(strength) and strength < 0:
    raise Error(f'algorithm.strength is {strength}; it must be 0 or more.')
  first, second = without_groups(loss), pulled(loss, strength)
  phases = local.phases(
    Phase(local.sgd(first, optimizer), _training(r'^inputs/(groups|keys)$')),
    Phase(local.sgd(second, optimizer), _training('^inputs/shared$')),
  )
  hint = 'trains a prompt of groups: adapter.name=grouped_prompt.'
  algorithm = compose(
    counting(phases, loss),
    scope=only('sgpt', scopes.everything(), _grouped, hint),
    aggregator=balanced(momentum, key_momentum, least),
    **parts,
  )
  return _billed(algorithm)


def _grouped(params: Params) -> bool:
  inputs = params.get('inputs') if isinstance(params, dict) else None
  return isinstance(inputs, Grouped)


def _training(frozen: str) -> Any:
  return scopes.labelled({frozen: Frozen, '': Shared})


def without_groups(loss: Loss) -> Loss:
  """Returns the loss of the network with the shared rows alone."""

  def on(base, params, batch, key):
    alone = {**params, 'inputs': Prompt(params['inputs'].shared)}
    return loss(base, alone, batch, key)

  return on


def pulled(loss: Loss, strength: Any) -> Loss:
  """Returns the loss plus strength * mean over texts of (1 - cos(q, key))."""

  def on(base, params, batch, key):
    sums, statistics = with_statistics(loss)(base, params, batch, key)
    term = strength * statistics['inputs'].distance
    return sums._replace(total=sums.total + sums.count * term)

  return on


def counting(inner: LocalUpdate, loss: Loss) -> LocalUpdate:
  """Returns `inner` with the balance of the groups, and its texts as report.

  `Context.news` are the texts that each group had, [G].
  """

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    node, texts = start['inputs'], context.news
    total = jnp.sum(texts)
    share = jnp.where(total > 0, texts / jnp.maximum(total, 1), 1.0)
    balanced = {**start, 'inputs': node._replace(share=share)}

    def count(batch):  # its network is not computed: only the tokens' rows are
      _, statistics = with_statistics(loss)(base, balanced, batch, context.key)
      return statistics['inputs'].counts

    counts = jax.lax.map(count, jax.tree.map(jnp.asarray, batches)).sum(0)
    out = inner.run(base, balanced, state, batches, masks, context)
    return out._replace(report=counts)

  return LocalUpdate(inner.init, run)


def balanced(momentum: Any, key_momentum: Any, least: int) -> Aggregator:
  """Returns the rule of `sgpt`, whose reports are texts of groups [K, G]."""

  def init(params: Params, key: Any) -> Groups:
    del key
    return Groups(jnp.zeros_like(params['inputs'].share))

  def aggregate(uploads, state, params, key):
    del key
    weight = tree.normalise(by_weight(uploads))
    here = counted(uploads).astype(jnp.float32)  # [K]
    delta = tree.map_present(
      lambda u, p: tree.weighted_sum(u, weight).astype(p.dtype),
      uploads.update,
      params,
    )
    texts = uploads.reports * here[:, None]
    total = texts.sum(0)  # [G]
    even = here / jnp.maximum(here.sum(), 1)
    ratio = jnp.where(
      total > least, texts / jnp.maximum(total, 1), even[:, None]
    )
    moved = jnp.einsum('kg,kgd->gd', ratio, uploads.update['inputs'].keys)
    node = delta['inputs']
    node = node._replace(
      groups=(1 - momentum) * node.groups, keys=(1 - key_momentum) * moved
    )
    new = Groups(state.texts + total)
    return Aggregate({**delta, 'inputs': node}), new

  return Aggregator(
    init, aggregate, broadcast=lambda state: state.texts, weights=by_weight
  )


def _billed(algorithm: FederatedAlgorithm) -> FederatedAlgorithm:
  """Returns the method with the bytes of the texts of groups, [G] a client."""
  assert algorithm.train is not None
  first, whole = algorithm.train, algorithm.round

  def with_report(info):
    size = jnp.where(info.reported, jnp.int32(4 * info.reports.shape[-1]), 0)
    up = jnp.concatenate([info.bytes_up, size[:, None]], axis=1)
    return info._replace(bytes_up=up)

  def train(state, cohort, base=None):
    uploads, states, info = first(state, cohort, base)
    return uploads, states, with_report(info)

  def round(state, cohort, base=None, data=None):
    new, states, info = whole(state, cohort, base, data)
    return new, states, with_report(info)

  return algorithm._replace(train=train, round=round)
