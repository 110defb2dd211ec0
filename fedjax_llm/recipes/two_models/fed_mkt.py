"""FedMKT: a server's large model and clients' small ones teach each other.

Fan et al. 2024, arXiv 2406.02224 (COLING 2025).

    client k   trains theta_k on its own texts
               S_k = {(l_k^i, p_k^i)}: mean loss and top-k logits of each public
               text i, written for the server's tokens
    server     S = {i: min_k l_k^i < l_0^i}, with the logits of the best k
               minimises lambda L_FT + (1 - lambda) L_KD(S), tells its S_0
    client k   S = {i: l_0^i < l_k^i}, the same loss with the server's logits

Defaults: lambda = 0.9, k = 16, one pass over the public texts on either side.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, scopes, server, tree
from fedjax_llm.local import LocalOptimizer, knowledge
from fedjax_llm.local.knowledge import Alignment, Knowledge
from fedjax_llm.recipes.two_models import teaching
from fedjax_llm.server.exchange import Centre, Member
from fedjax_llm.types import (
  Base,
  Batch,
  ClientOutput,
  Error,
  FederatedAlgorithm,
  Loss,
  Model,
  Params,
  Shared,
  known,
)

# What the config of each method changes. There is one packaged source of texts,
# so the public texts are like those of the clients.
NEEDS = {
  'fed_mkt': dict(
    cohort=dict(num_steps=2),
    public=dict(name='packaged', dataset='shakespeare_mini'),
    client_models=dict(
      models=(
        dict(hidden_size=32, name='random', num_layers=1),
        dict(hidden_size=16, name='random', num_layers=1, tokenizer='pairs'),
      ),
    ),
    algorithm=dict(public_steps=2),
    evals=dict(
      evaluators=[dict(name='likelihood'), dict(name='client_models')]
    ),
  ),
}

# The place of the clients' models in the base.
MODELS = 'client_models'


class Group(NamedTuple):
  """Clients of one architecture: their model, and public texts in its tokens.

  The weights and the adapter at the start are not here but in
  `base['client_models']`, a list of {'base': ..., 'start': ...}.
  """

  loss: Loss | None  # of the clients' own texts
  model: Model | None
  shapes: Params  # of the adapter
  public: Batch | None = None  # [M, B, T]
  up: Alignment | None = None  # the group's tokens for the server's, [M, ...]
  down: Alignment | None = None  # the server's tokens for the group's, [M, ...]


def fed_mkt(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  model: Model,
  public: Any = None,
  client_models: Sequence[Group] | None = None,
  top_k: int = 16,
  hard: float = 0.9,
  public_steps: int | None = None,
  epochs: int = 1,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedMKT: a server's large model and clients' small ones teach each other.

  Fan et al. 2024, arXiv 2406.02224, algorithms 1 and 2. The clients' models
  (section `client_models`) differ in architecture and tokenizer; nobody's
  parameters travel, only predictions on public texts (section `public`). The
  tokens of a text are aligned by edit distance, once for a run
  (`data.alignment`). The server is served; a client keeps its own model.

  Losses are means over a model's own tokens, as in the paper, so a tokenizer
  with shorter tokens has smaller ones. Where no token is aligned the teacher's
  distribution is the text itself. Optimizers begin anew in each phase. Without
  `client_models` clients have the server's model, as it was at the start, and a
  text is aligned with itself.

  Args:
    model: the server's network.
    public: batches [M, B, ...] of public texts, a text a row.
    client_models: a `Group` for each architecture; the program builds them.
    top_k: k, the number of logits that are sent for a token.
    hard: lambda, the weight of the texts themselves.
    public_steps: batches of public texts in a round, the next ones in the next
      round; None: all M.
    epochs: passes of the server over these batches.

  Raises:
    Error: a setting out of range, no public texts, a part of `fed_opt` that
      acts on updates: there are none.

  >>> loss = lambda base, params, batch, key: None
  >>> fed_mkt(loss, local.optimizer('sgd'), model=None)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fed_mkt exchanges predictions on public texts: add \
the section public, such as public.name=packaged.
  """
  _check(top_k, hard, public_steps, epochs, parts)
  if public is None and loss is not None:
    raise Error(
      'fed_mkt exchanges predictions on public texts: add the section public, '
      'such as public.name=packaged.'
    )
  public = teaching.texts_of(public)
  groups = client_models
  total = 0 if public is None else public.tokens.shape[0]
  steps = min(public_steps or total, total)
  at = lambda number: (number * steps + jnp.arange(steps)) % max(total, 1)

  def window(x: Any, number: Any) -> Any:
    """Returns the public batches of a round."""
    return jax.tree.map(lambda y: jnp.asarray(y)[at(number)], x)

  def teach(net, base, params, texts, teacher, own, number, passes):
    return teaching.taught(
      optimizer, net, base, params, texts, teacher, teacher.loss < own,
      hard=hard, first=number * steps * passes, epochs=passes,
    )  # fmt: skip

  member = functools.partial(
    _member, optimizer=optimizer, public=public, top_k=top_k, window=window,
    teach=teach,
  )  # fmt: skip
  if groups is None:
    members = [member(Group(loss, model, None, public), None)]
  else:
    members = [member(group, place) for place, group in enumerate(groups)]

  def none(base, state) -> Knowledge:
    shape = jax.eval_shape(
      lambda: teaching.known(
        model, base, state.params, window(public, 0), top_k
      )
    )
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    return blank._replace(loss=jnp.full(shape.loss.shape, jnp.inf))

  def learn(base, state, best: Knowledge):
    texts = window(public, state.round)
    own = teaching.known(model, base, state.params, texts, top_k).loss
    params, nats = teach(
      model, base, state.params, texts, best, own, state.round, epochs
    )
    return params, {
      'server/distillation': nats,
      'server/selected': teaching.share(best.loss < own, texts),
    }

  centre = Centre(
    none=none,
    merge=lambda best, other: jax.vmap(knowledge.nearer)(best, other),
    learn=learn,
    tell=lambda base, params, number: teaching.known(
      model, base, params, window(public, number), top_k
    ),
  )

  def shapes(params: Params) -> list[Params]:
    return [params] if groups is None else [group.shapes for group in groups]

  return server.exchange(members, centre, shapes, who='fed_mkt')


def _member(
  group: Group,
  place: int | None,
  *,
  optimizer: LocalOptimizer,
  public: Any,
  top_k: int,
  window: Callable[..., Any],
  teach: Callable[..., Any],
) -> Member:
  """Returns the functions of a group; place None: the server's own model."""
  loss: Any = group.loss
  net: Any = group.model
  update = local.sgd(loss, optimizer)
  labels = lambda params: scopes.everything().labels(params)

  def weights(base: Base) -> Base:
    return base if place is None else base[MODELS][place]['base']

  def start(base, state) -> Params:
    return state.aggregator if place is None else base[MODELS][place]['start']

  def train(base, params, batches, context) -> ClientOutput:
    masks = tree.full_masks(params, labels(params))
    return update.run(weights(base), params, (), batches, masks, context)

  def tell(base, params, number) -> tuple[Knowledge, Any]:
    texts = window(group.public, number)
    mine = teaching.known(net, weights(base), params, texts, top_k)
    if group.up is None:
      return mine, mine.loss
    texts, how = window(public, number), group.up
    places = window(how.places, number)
    return teaching.mapped(mine, texts, places, how.table), mine.loss

  def learn(base, params, own, message, number):
    texts, how = window(group.public, number), group.down
    if how is not None:
      places = window(how.places, number)
      message = teaching.mapped(message, texts, places, how.table)
    params, nats = teach(
      net, weights(base), params, texts, message, own, number, 1
    )
    return params, {
      'distillation': nats,
      'selected': teaching.share(message.loss < own, texts),
    }

  def sizes(base, number):
    bill = lambda x: teaching.num_bytes(window(x, number), top_k)
    return bill(group.public), bill(public)

  return Member(
    start=start,
    trains=lambda params: tree.select(params, labels(params), Shared),
    train=train,
    tell=tell,
    learn=learn,
    sizes=sizes,
  )


def _check(top_k, hard, public_steps, epochs, parts) -> None:
  for name, value in (
    ('top_k', top_k), ('public_steps', public_steps), ('epochs', epochs),
  ):  # fmt: skip
    if value is not None and value < 1:
      raise Error(f'algorithm.{name} is {value}; it must be at least 1.')
  if known(hard) and not 0 <= hard <= 1:
    raise Error(f'algorithm.hard is {hard}; it must be from 0 to 1.')
  if parts.get('mesh') is not None:
    raise Error(
      'fed_mkt trains client after client, which is not built for several '
      'devices: run it on one (cpu_devices=1, mesh_model=1).'
    )
  for name in ('aggregator', 'upload', 'download', 'server', 'adversary',
               'scope', 'after'):  # fmt: skip
    if parts.get(name) is not None:
      raise Error(
        'fed_mkt exchanges predictions and no update: leave the section '
        f'{name} out.'
      )
