"""pFedPG: the server generates a prompt for each client.

Yang et al. 2023, arXiv 2308.15367.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, server, tree
from fedjax_llm.aggregators.weights import by_weight
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Prompt
from fedjax_llm.recipes.composing import compose, refuse
from fedjax_llm.types import (
  Aggregate,
  Aggregator,
  ClientOutput,
  ClientState,
  Codec,
  Error,
  FederatedAlgorithm,
  Key,
  LocalUpdate,
  Loss,
  Masks,
  Params,
  Private,
  Scope,
  Shared,
  known,
)

# What the config of each method changes.
NEEDS = {
  'p_fed_pg': dict(
    adapter=dict(name='soft_prompt'), algorithm=dict(num_heads=2)
  ),
}

_HIGHEST = jax.lax.Precision.HIGHEST


class Generator(NamedTuple):
  """The server's part: attention of client descriptors to common prompts."""

  descriptors: Any  # [N, D]
  common: Any  # [P, D], the prompts that all clients start from
  query: Any  # [D, D]
  key: Any  # [D, D]
  value: Any  # [D, D]
  out: Any  # [D, D]


class Known(NamedTuple):
  """A client's state with its number, -1 for a client that never trained."""

  client: Any  # [] int32
  inner: Any


def p_fed_pg(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  num_clients: int,
  num_heads: int = 4,
  server_rate: float = 0.1,
  **parts: Any,
) -> FederatedAlgorithm:
  """pFedPG: the server generates a prompt for each client.

      P_k = P + out(attention(queries d_k, keys P, values P))   (to every row),
      client: P_k' = local steps from P_k; it sends Delta_k = P_k' - P_k,
      server: phi <- phi + eta_s sum_k w_k J_k(phi)' Delta_k

  where phi are the descriptors d of all clients, the common prompts P and the
  matrices of the attention, and J_k the Jacobian of P_k (Yang et al. 2023,
  arXiv 2308.15367): the server descends without seeing a gradient of a client,
  with the optimizer of the section `server`. A prompt then moves by about
  eta_s J J' Delta. The rate 1 of an average of prompts, where J = I, is too
  large for a J J' with eigenvalues far above 1: prompts diverge, so the default
  of eta_s is 0.1. phi never travels: a client
  receives and sends one prompt. Other leaves of the adapter, such as a head,
  are the client's own, as in the paper. A client is served its prompt; one that
  never trained gets that of the mean descriptor. No official code is known; the
  attention has several heads and no biases.

  Args:
    num_clients: N.
    num_heads: heads of the attention, a divisor of D.
    server_rate: eta_s, which the server optimizer's own rate multiplies.

  Raises:
    Error: an aggregator, a scope or a download in `parts`; parameters without a
      soft prompt; a number of heads that does not divide D; a rate that is not
      above 0.

  >>> method = p_fed_pg(None, local.optimizer('sgd'), num_clients=3)
  >>> params = {'inputs': Prompt(jnp.ones((2, 8)))}
  >>> state = method.init(jax.random.key(0), params)
  >>> state.params['generator'].descriptors.shape
  (3, 8)
  """
  for section in ('aggregator', 'scope', 'download'):
    refuse('p_fed_pg', section, parts)
  if known(server_rate) and server_rate <= 0:
    raise Error(f'algorithm.server_rate is {server_rate}; it must be above 0.')
  generated = functools.partial(generate, num_heads=num_heads)

  def wrap(key: Key, params: Params) -> Params:
    rows = rows_of('p_fed_pg', params)
    width = rows.shape[-1]
    if width % num_heads:
      raise Error(
        f'algorithm.num_heads is {num_heads}; it must divide the width {width} '
        'of the prompt.'
      )
    names = jax.random.split(jax.random.fold_in(key, 1), 5)
    spread = jnp.std(rows)
    draw = lambda i: jax.random.normal(names[i], (width, width)) / width**0.5
    generator = Generator(
      spread * jax.random.normal(names[4], (num_clients, width)),
      jnp.array(rows),
      *(draw(i) for i in range(4)),
    )
    return {'generator': generator, 'adapter': params}

  def prompt_of(wrapped: Params, client: Any) -> Params:
    rows = generated(wrapped['generator'], client)
    return {**wrapped['adapter'], 'inputs': Prompt(rows)}

  def serve(wrapped: Params, state: ClientState | None) -> Params:
    new = prompt_of(wrapped, jnp.int32(-1))
    if state is None:
      return new
    client = state.local.client
    mine = prompt_of(wrapped, client)
    return {**mine, 'inputs': Prompt(jnp.where(
      client >= 0, mine['inputs'].rows, new['inputs'].rows))}  # fmt: skip

  return server.on_part(
    functools.partial(
      compose,
      _on_adapter(local.sgd(loss, optimizer)),
      scope=_scope(),
      aggregator=_rule(generated, server_rate),
      download=_download(generated),
      **{'measure': None, **parts, 'fold': None},
    ),
    wrap=wrap,
    get=lambda wrapped: prompt_of(wrapped, jnp.int32(-1)),
    put=lambda wrapped, part: {**wrapped, 'adapter': part},
    serve=serve,
  )


def rows_of(name: str, params: Params) -> jax.Array:
  """Returns the rows [P, D] of the soft prompt, or raises `Error`."""
  node = params.get('inputs') if isinstance(params, dict) else None
  if not isinstance(node, Prompt):
    raise Error(f'{name} trains a soft prompt: adapter.name=soft_prompt.')
  return jnp.asarray(node.rows)


def generate(generator: Generator, client: Any, num_heads: int) -> jax.Array:
  """Returns the prompt of a client, [P, D]; -1 means the mean descriptor.

  >>> zero = jnp.zeros((2, 2))
  >>> one = Generator(zero, jnp.ones((3, 2)), zero, zero, zero, zero)
  >>> generate(one, 0, num_heads=1).tolist()
  [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
  """
  table = generator.descriptors
  mine = jnp.where(client >= 0, table[client], jnp.mean(table, 0))
  dot = lambda x, m: jnp.matmul(x, m, precision=_HIGHEST)
  heads = lambda x: x.reshape(*x.shape[:-1], num_heads, -1)
  q = heads(dot(mine, generator.query))  # [H, D / H]
  k = heads(dot(generator.common, generator.key))  # [P, H, D / H]
  v = heads(dot(generator.common, generator.value))
  score = jnp.einsum('hd,phd->hp', q, k, precision=_HIGHEST)
  share = jax.nn.softmax(score / q.shape[-1] ** 0.5, axis=-1)
  seen = jnp.einsum('hp,phd->hd', share, v, precision=_HIGHEST).reshape(-1)
  return generator.common + dot(seen, generator.out)


def _scope() -> Scope:
  """Returns the scope: a client shares the prompt and keeps other leaves."""

  def labels(params):
    whole = scopes.everything().labels(params)
    own = jax.tree.map(
      lambda x: Private if x is Shared else x, whole['adapter']
    )
    own['inputs'] = whole['adapter']['inputs']
    return {**whole, 'adapter': own}

  def mask(start, state, context):
    full = tree.full_masks(start, labels(start))
    none = jax.tree.map(lambda _: jnp.bool_(False), full.held['generator'])
    return Masks(*({**m, 'generator': none} for m in full))

  return Scope(labels, mask)


def _on_adapter(update: LocalUpdate) -> LocalUpdate:
  """Returns a local update that trains the entry 'adapter' alone."""

  def init(trainable):
    return Known(jnp.int32(-1), update.init(trainable['adapter']))

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    own = Masks(*(m['adapter'] for m in masks))
    out = update.run(base, start['adapter'], state.inner, batches, own, context)
    still = tree.zeros_like(start['generator'])
    client = jnp.asarray(context.client, jnp.int32)
    return out._replace(
      update={'generator': still, 'adapter': out.update},
      masks=Masks(*({**m, 'adapter': x} for m, x in zip(masks, out.masks))),
      state=Known(client, out.state),
    )

  return LocalUpdate(init, run)


def _download(generated) -> Codec:
  """Returns a codec whose message is the client's prompt."""

  def encode(shared, masks, state, context):
    del masks
    return generated(shared['generator'], context.client), state

  def decode(message, start, context):
    del context
    none = jax.tree.map(lambda _: None, start)
    none['adapter']['inputs'] = Prompt(message)
    return none

  def num_bytes(message, masks):
    del masks
    return jnp.int32(message.size * message.dtype.itemsize)

  return Codec(lambda shared: (), encode, decode, num_bytes)


def _rule(generated, rate) -> Aggregator:
  """Returns the rule phi + rate * sum_k w_k J_k' Delta_k."""

  def aggregate(uploads, state, params, key):
    del key
    weight = tree.normalise(by_weight(uploads))
    change = uploads.update['adapter']['inputs'].rows

    def pull(client, delta):
      of = lambda phi: generated(phi, client)
      _, back = jax.vjp(of, params['generator'])
      return back(delta)[0]

    pulls = jax.vmap(pull)(jnp.maximum(uploads.ids, 0), change)
    delta = jax.tree.map(lambda _: None, params)
    moved = tree.weighted_sum(pulls, weight)
    delta['generator'] = jax.tree.map(lambda x: rate * x, moved)
    delta['adapter']['inputs'] = tree.zeros_like(params['adapter']['inputs'])
    return Aggregate(delta), state

  return Aggregator(lambda params, key: (), aggregate, weights=by_weight)
