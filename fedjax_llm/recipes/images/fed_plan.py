"""PLAN: prompts of all clients, mixed by a trained attention.

Gong et al. 2024, arXiv 2411.10063.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import aggregators, local, scopes, server, tree
from fedjax_llm.adapters.prompts import draws
from fedjax_llm.local import LocalOptimizer, class_names
from fedjax_llm.nodes import PromptGroups
from fedjax_llm.nodes.encoded import Affine
from fedjax_llm.nodes.scores import compared
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.recipes.images.scored import IMAGES, node_of
from fedjax_llm.types import (
  Error,
  FederatedAlgorithm,
  Frozen,
  Key,
  LocalUpdate,
  Loss,
  LossSum,
  Masks,
  Params,
  Scope,
)

# What the config of each method changes.
NEEDS = {
  'fed_plan': {
    **IMAGES,
    'adapter': dict(name='prompt_groups', groups=1, length=4, image_length=4),
    'algorithm': dict(num_heads=1),
  },
}

_HIGHEST = jax.lax.Precision.HIGHEST


class Mixer(NamedTuple):
  """One layer of attention of the clients' prompts to each other."""

  inner: Affine  # [D, 3 D]: queries, keys, values
  out: Affine  # [D, D]
  first: Affine  # [D, 2 D]
  second: Affine  # [2 D, D]
  norms: Any  # two pairs of [D]


def fed_plan(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_heads: int = 8,
  strength: float = 1.0,
  **parts: Any,
) -> FederatedAlgorithm:
  """PLAN: local prompts in one round, their aggregation in the next.

      even rounds:  P_k, V_k <- local steps on CE(P_k, V_k) + strength
                    CE(softmax of the reference, P_k, V_k),
                    reference = the zero-shot classifier in the first round,
                    then the global prompts,
      odd rounds:   A <- mean_k local steps on CE(P_g, V_g),   all P, V frozen,
      P_g = mean_j LN(z_j + FFN(z_j)),
      z = LN(P + attention of the clients, place by place)

  Gong et al. 2024, arXiv 2411.10063. A = (A_text, A_image) are the aggregators;
  every client has the prompts of all, and is served the global ones. A client
  sends its two prompts in even rounds and A in odd ones. Layers, the first loss
  and the order of rounds are those of the authors' program. In its later even
  rounds the loss is that of global prompts without a gradient to any prompt;
  here it is that of the client's own prompts, as in the paper's description.
  Prompts stand in front of the first layer alone (there of all 12). Clients
  that never trained are left out of the attention. In that program 8 rows, 8
  heads, SGD with 5e-3, momentum 0.9, weight decay 5e-4; its `strength` was not
  established.

  Args:
    num_clients: N.
    num_heads: H, which divides the widths of both towers.
    strength: weight of the term that holds prompts near the reference.

  Raises:
    Error: an aggregator, a scope or a server in `parts`, a loss that is not of
      images and names of classes; from `init`, an adapter without one group of
      prompts, heads that do not divide a width.

  >>> node = PromptGroups(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 6)), jnp.ones(1))
  >>> method = fed_plan(None, local.optimizer('sgd'), num_clients=3,
  ...                   num_heads=2)
  >>> state = method.init(jax.random.key(0), {'scores': node})
  >>> state.params['prompts'].rows.shape, state.params['prompts'].visual.shape
  ((3, 2, 4), (3, 2, 6))
  """
  for section in ('aggregator', 'scope', 'server'):
    refuse('fed_plan', section, parts)
  seen = class_names.needed('fed_plan', loss)

  def wrap(key: Key, params: Params) -> Params:
    node = node_of('fed_plan', params, PromptGroups, 'prompt_groups')
    if len(node.rows) != 1:
      raise Error(
        f'fed_plan has one pair of prompts a client: adapter.groups is '
        f'{len(node.rows)}; it must be 1.'
      )
    widths = node.rows.shape[-1], node.visual.shape[-1]
    for width in widths:
      if width % num_heads:
        raise Error(
          f'algorithm.num_heads is {num_heads}, which does not divide the '
          f'{width} features of a tower.'
        )
    keys = jax.random.split(jax.random.fold_in(key, 1))
    blank = lambda x: jnp.zeros((num_clients, *x.shape[1:]), x.dtype)
    return {
      'common': params,
      'prompts': PromptGroups(blank(node.rows), blank(node.visual), ()),
      'mixers': [_mixer(name, width) for name, width in zip(keys, widths)],
    }

  def total(base, params, batch, key, round) -> LossSum:
    """The loss of a step; `params['own']` are the client's prompts."""
    del key
    inner = {n: x for n, x in params['common'].items() if n != 'scores'}
    towers = seen(base, inner, batch)
    both = mixed(params, num_heads)
    of = lambda node: compared(
      towers, towers.images(node.visual).pooled, towers.texts(node.rows)
    )

    def local_prompts() -> LossSum:
      plain = lambda: compared(
        towers, towers.images(None).pooled, towers.texts(None)
      )
      reference = jax.lax.cond(round == 0, plain, lambda: of(both))
      wanted = jax.nn.softmax(jax.lax.stop_gradient(reference))
      logits = of(params['own'])
      sums = class_names.summed(logits, batch)
      far = -jnp.sum(wanted * jax.nn.log_softmax(logits), -1)
      kept = jnp.sum(jnp.where(class_names.known_rows(batch), far, 0.0))
      return sums._replace(total=sums.total + strength * kept)

    return jax.lax.cond(
      round % 2 == 0,
      local_prompts,
      lambda: class_names.summed(of(both), batch),
    )

  def run(base, start, state, batches, masks, context):
    number = context.client
    mine = PromptGroups(
      start['prompts'].rows[number], start['prompts'].visual[number], ()
    )
    first = start['common']['scores']
    fresh = ~trained(start['prompts'])[number]
    own = PromptGroups(
      jnp.where(fresh, first.rows[0], mine.rows),
      jnp.where(fresh, first.visual[0], mine.visual),
      (),
    )
    even = context.round % 2 == 0
    still = {name: start[name] for name in ('common', 'prompts')}
    inner = {'own': own, 'mixers': start['mixers']}
    flag = lambda part, on: jax.tree.map(lambda _: on, part)
    mask = {'own': flag(own, even), 'mixers': flag(inner['mixers'], ~even)}

    def step(base, params, batch, key):
      return total(base, {**still, **params}, batch, key, context.round)

    out = local.sgd(step, optimizer).run(
      base, inner, (), batches, Masks(mask, mask), context
    )
    end = tree.add(own, out.update['own'])
    rows = lambda bank, new, old: (
      jnp.zeros_like(bank).at[number].set(jnp.where(even, new - old, 0.0))
    )
    prompts = PromptGroups(
      rows(start['prompts'].rows, end.rows, mine.rows),
      rows(start['prompts'].visual, end.visual, mine.visual),
      (),
    )
    nothing = jax.tree.map(lambda _: None, start['common'])
    update = {
      'common': nothing,
      'prompts': prompts,
      'mixers': out.update['mixers'],
    }
    return out._replace(update=update, masks=masks, state=())

  def get(wrapped: Params) -> Params:
    node = mixed(wrapped, num_heads)
    node = PromptGroups(node.rows[None], node.visual[None], jnp.ones(1))
    return {**wrapped['common'], 'scores': node}

  return server.on_part(
    functools.partial(
      compose,
      LocalUpdate(lambda trainable: (), run),
      scope=_scope(),
      aggregator=aggregators.masked_mean(weighted=False),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=get,
    put=lambda wrapped, part: {**wrapped, 'common': part},
  )


def _scope() -> Scope:
  """Returns the scope: own prompts in even rounds, aggregators in odd ones."""
  inner = scopes.labelled({'^common/': Frozen})

  def mask(start, state, context):
    full = tree.full_masks(start, inner.labels(start))
    even = context.round % 2 == 0
    row = jnp.arange(len(start['prompts'].rows)) == context.client
    mine = (row & even)[:, None, None]
    own = full.trained['prompts']._replace(rows=mine, visual=mine)
    odd = jax.tree.map(lambda _: ~even, full.trained['mixers'])
    return Masks(full.held, {**full.trained, 'prompts': own, 'mixers': odd})

  return Scope(inner.labels, mask)


def trained(prompts: PromptGroups) -> jax.Array:
  """Returns True for the clients whose prompts are no longer zeros, [N].

  >>> zero = jnp.zeros((2, 1, 3))
  >>> trained(PromptGroups(zero.at[1].set(2.0), zero, ())).tolist()
  [False, True]
  """
  return jnp.any(prompts.rows != 0, (1, 2)) | jnp.any(
    prompts.visual != 0, (1, 2)
  )


def mixed(wrapped: Params, num_heads: int) -> PromptGroups:
  """Returns the global prompts, rows [P, D] and visual [Q, V].

  They are the start's while no client has trained.
  """
  bank, first = wrapped['prompts'], wrapped['common']['scores']
  here = trained(bank)
  number = jnp.maximum(jnp.sum(here), 1)

  def one(x, start, mixer):
    y = jnp.where(here[:, None, None], among(mixer, x, here, num_heads), 0.0)
    return jnp.where(jnp.any(here), jnp.sum(y, 0) / number, start[0])

  text, image = wrapped['mixers']
  return PromptGroups(
    one(bank.rows, first.rows, text), one(bank.visual, first.visual, image), ()
  )


def among(mixer: Mixer, x: jax.Array, here: Any, num_heads: int) -> jax.Array:
  """Returns prompts x [N, P, D] after attention over N at each place.

  Clients with `here` [N] False are not attended to.

  >>> mixer = _mixer(jax.random.key(0), 4)
  >>> among(mixer, jnp.ones((3, 2, 4)), jnp.ones(3, bool), 2).shape
  (3, 2, 4)
  """
  parts = jnp.split(_affine(mixer.inner, x), 3, -1)
  q, k, v = (y.reshape(*y.shape[:-1], num_heads, -1) for y in parts)
  near = jnp.einsum('nphk,mphk->phnm', q, k, precision=_HIGHEST)
  near = jnp.where(here, near * q.shape[-1] ** -0.5, -1e9)
  share = jax.nn.softmax(near, -1)
  heads = jnp.einsum('phnm,mphk->nphk', share, v, precision=_HIGHEST)
  z = _norm(x + _affine(mixer.out, heads.reshape(x.shape)), mixer.norms[0])
  inner = jax.nn.relu(_affine(mixer.first, z))
  return _norm(z + _affine(mixer.second, inner), mixer.norms[1])


def _affine(layer: Affine, x: jax.Array) -> jax.Array:
  return jnp.matmul(x, layer.kernel, precision=_HIGHEST) + layer.bias


def _norm(x: jax.Array, layer: Any) -> jax.Array:
  x = x - jnp.mean(x, -1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
  return x * layer.kernel + layer.bias


def _mixer(key: Key, width: int) -> Mixer:
  """Returns a layer with the start of PyTorch's attention and layers."""
  keys = jax.random.split(key, 4)
  size = (6 / (4 * width)) ** 0.5  # Glorot's, of the stacked kernel
  inner = Affine(
    draws.uniform(keys[0], (width, 3 * width), size), jnp.zeros(3 * width)
  )
  out = draws.affine(keys[1], width, width)
  norm = Affine(jnp.ones(width), jnp.zeros(width))
  return Mixer(
    inner,
    out._replace(bias=jnp.zeros(width)),
    draws.affine(keys[2], width, 2 * width),
    draws.affine(keys[3], 2 * width, width),
    (norm, norm),
  )
