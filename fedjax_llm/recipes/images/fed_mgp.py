"""FedMGP: groups of prompts, of which a client shares a few.

Bo et al. 2025, arXiv 2511.00480.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, server, tree
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import PromptGroups
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import (
  ClientState,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  LossSum,
  Masks,
  Params,
  known,
)

# What the config of each method changes.
NEEDS = {
  'fed_mgp': {
    **IMAGES,
    'adapter': dict(name='prompt_groups', groups=3),
    'algorithm': dict(num_sent=2),
  },
}


_DRAW = 2**31 - 1  # the name of the draw among the keys of the steps


class Picked(NamedTuple):
  """The groups that a client sent last, G for a client that never trained."""

  rows: Any  # [s] int32
  visual: Any  # [s] int32


def fed_mgp(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_sent: int = 2,
  diversity: float = 1.0,
  temperature: float = 1.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedMGP: clients keep groups of prompts and average a few of them.

      client:  L = mean_g CE(group g) - diversity (d(texts) + d(images)) / 2,
               d(x) = mean_{g<h} mean_e |x_g,e - x_h,e| of unit features,
               s groups without replacement, p_g ~ exp(max_r cos(group_g, S_r)
               / temperature), even in the first round,
      server:  S_r <- mean_k of the r-th group drawn by client k,
      client:  its r-th drawn group <- S_r at the start of its next round

  Bo et al. 2025, arXiv 2511.00480, as in the authors' program: contexts and
  visual prompts are drawn apart, with the same noise, by the cosine of all
  their rows; the mean is unweighted. A client sends s (P D + Q V) numbers. The
  sign of the diversity is that of the paper's text, which wants groups apart;
  the program takes the absolute value of the term and so pulls them together
  (diversity=-1). A client is served its groups, with the newest S in place of
  those that it drew last, and the mean of their logits; one that never trained
  the mean over S. There 10 rounds of 2 epochs, SGD with 1e-3.

  Args:
    num_sent: s.
    diversity: weight of the distances between groups.
    temperature: of the choice.

  Raises:
    Error: an aggregator or a scope in `parts`, num_sent below one, a
      temperature that is not above 0, a loss that is not of images and names of
      classes; from `init`, an adapter without groups or with fewer than s.

  >>> node = PromptGroups(
  ...   jnp.ones((3, 2, 4)), jnp.ones((3, 2, 5)), jnp.ones(3) / 3)
  >>> method = fed_mgp(None, local.optimizer('sgd'))
  >>> state = method.init(jax.random.key(0), {'scores': node})
  >>> state.params['sent'].rows.shape
  (2, 2, 4)
  """
  for section in ('aggregator', 'scope'):
    refuse('fed_mgp', section, parts)
  if num_sent < 1:
    raise Error(f'algorithm.num_sent is {num_sent}; it must be at least 1.')
  if known(temperature) and temperature <= 0:
    raise Error(f'algorithm.temperature is {temperature}; it must be above 0.')
  seen = class_names.needed('fed_mgp', loss)

  def wrap(key: Key, params: Params) -> Params:
    del key
    node = node_of('fed_mgp', params, PromptGroups, 'prompt_groups')
    if num_sent > len(node.rows):
      raise Error(
        f'algorithm.num_sent is {num_sent}; it must be at most the '
        f'{len(node.rows)} groups of the adapter.'
      )
    first = lambda x: jnp.array(x[:num_sent])
    sent = PromptGroups(
      first(node.rows), first(node.visual), jnp.full(num_sent, 1 / num_sent)
    )
    rest = {name: x for name, x in params.items() if name != 'scores'}
    return {'rest': rest, 'groups': node, 'sent': sent}

  def total(base, params, batch, key) -> LossSum:
    del key
    node = params['groups']
    each = node.seen(seen(base, params['rest'], batch))
    nats = jax.vmap(lambda x: class_names.summed(x, batch).total)(each.logits)
    sums = class_names.summed(
      jnp.einsum('g,gbc->bc', node.share, each.logits), batch
    )
    real = class_names.known_rows(batch).astype(jnp.float32)
    images = distances(class_names.scores.unit(each.pooled))  # [B]
    apart = jnp.mean(distances(each.texts)) + jnp.sum(images * real) / (
      jnp.maximum(jnp.sum(real), 1.0)
    )
    term = -diversity * sums.count * apart / 2
    return sums._replace(total=jnp.mean(nats) + term)

  def run(base, start, state, batches, masks, context):
    received = _received(start, state)
    inner = {name: received[name] for name in ('rest', 'groups')}
    own = Masks(*({n: m[n] for n in inner} for m in masks))
    out = local.sgd(total, optimizer).run(
      base, inner, (), batches, own, context
    )
    ends = tree.merge(tree.add(inner, out.update), inner)['groups']
    noise = jax.random.gumbel(
      jax.random.fold_in(context.key, _DRAW), (len(ends.rows),)
    )
    drawn, sent = [], {}
    for name in ('rows', 'visual'):
      groups, common = getattr(ends, name), getattr(start['sent'], name)
      near = jnp.where(context.round > 0, nearness(groups, common), 0.0)
      index = jnp.argsort(-(near / temperature + noise))[:num_sent]
      drawn.append(index.astype(jnp.int32))
      sent[name] = groups[index] - common
    moved = tree.map_present(
      lambda end, before: end - before, ends, start['groups']
    )
    update = {
      'rest': out.update['rest'],
      'groups': moved._replace(share=None),
      'sent': PromptGroups(**sent, share=None),
    }
    return out._replace(update=update, masks=masks, state=Picked(*drawn))

  def first(trainable):
    nothing = jnp.full(num_sent, len(trainable['groups'].rows), jnp.int32)
    return Picked(nothing, nothing)

  def serve(wrapped: Params, state: ClientState | None) -> Params:
    if state is None:
      return {**wrapped['rest'], 'scores': wrapped['sent']}
    mine = _received(wrapped, state.local)['groups']
    number = len(mine.rows)
    new = state.local.rows[0] == number  # it never trained
    fill = lambda x, common: jnp.where(
      new, x.at[:num_sent].set(common.astype(x.dtype)), x
    )
    share = jnp.where(jnp.arange(number) < num_sent, 1 / num_sent, 0.0)
    node = PromptGroups(
      fill(mine.rows, wrapped['sent'].rows),
      fill(mine.visual, wrapped['sent'].visual),
      jnp.where(new, share, mine.share),
    )
    return {**wrapped['rest'], 'scores': node}

  return server.on_part(
    functools.partial(
      compose,
      LocalUpdate(first, run),
      scope=scopes.private('^groups/'),
      aggregator=aggregators.uniform_mean(),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: {**wrapped['rest'], 'scores': wrapped['sent']},
    put=lambda wrapped, part: {**wrapped, 'sent': part['scores']},
    serve=serve,
  )


def _received(wrapped: Params, picked: Picked) -> Params:
  """Returns the parameters with S in place of the groups that were drawn."""
  node, sent = wrapped['groups'], wrapped['sent']
  put = lambda x, index, new: x.at[index].set(new.astype(x.dtype), mode='drop')
  groups = node._replace(
    rows=put(node.rows, picked.rows, sent.rows),
    visual=put(node.visual, picked.visual, sent.visual),
  )
  return {**wrapped, 'groups': groups}


def distances(x: jax.Array) -> jax.Array:
  """Returns the mean distance of groups of features [G, B, E], [B].

      mean over pairs g < h and features e of |x_g,e - x_h,e|;   0 for one group

  >>> distances(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
  [1.0]
  """
  first, second = jnp.triu_indices(len(x), 1)
  if not len(first):
    return jnp.zeros(x.shape[1])
  return jnp.mean(jnp.abs(x[first] - x[second]), (0, -1))


def nearness(groups: jax.Array, common: jax.Array) -> jax.Array:
  """Returns the largest cosine of each group to the common ones, [G].

  `groups` [G, P, D] and `common` [s, P, D] are compared with all their rows;
  the cosine to a group of zeros is 0.

  >>> groups = jnp.array([[[1.0, 0.0]], [[0.0, -2.0]]])
  >>> nearness(groups, jnp.array([[[3.0, 0.0]]])).round(3).tolist()
  [1.0, 0.0]
  """
  flat = lambda x: class_names.scores.unit(x.reshape(len(x), -1))
  cosines = jnp.matmul(
    flat(groups), flat(common).T, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.max(cosines, -1)
