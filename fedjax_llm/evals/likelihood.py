"""Held-out loss, perplexity and accuracy: of all text, and client by client.

Data come as groups, one a length T: a `Batch` of [M, B, T] and the owner of
every row, [M, B], -1 on padding. The loss returns sums for each row, `LossSum`
of [B] (`per_row=True`), so that one program serves every evaluation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.types import Base, Error, Key, Loss, LossSum, Params

Group = tuple[Any, np.ndarray]  # batches [M, B, ...], owner [M, B]


class ClientSums(NamedTuple):
  """Sums for each of n clients with at least one token, in order of id.

  >>> sums = ClientSums(np.array([3]), *np.array([[8.0], [4.0], [1.0]]))
  >>> (sums.total / sums.count).tolist()  # nats a token of client 3
  [2.0]
  """

  ids: np.ndarray  # [n] int
  total: np.ndarray  # [n] float64, nats
  count: np.ndarray  # [n] float64, tokens
  correct: np.ndarray  # [n] float64, tokens whose arg max is right


class Report(NamedTuple):
  """The result of an evaluation: metrics over all texts, sums by client.

  >>> Report({'evals/heldout/loss': 2.0}, {}).metrics['evals/heldout/loss']
  2.0
  """

  metrics: dict[str, float]  # 'evals/heldout/loss' and so on
  clients: dict[str, ClientSums]  # by the middle part of the name: 'heldout'


def summary(sums: ClientSums, worst: float = 0.1) -> dict[str, float]:
  """Returns metrics computed from the sums of n clients.

  With l_k = total_k / count_k: `loss` is sum(total) / sum(count) in nats a
  token, `perplexity` exp(loss), `accuracy` sum(correct) / sum(count),
  `client_mean` the mean of l_k, `client_worst_10` the mean of the
  ceil(worst * n) largest, `client_std` their standard deviation over n.

  >>> ones = np.ones(2)
  >>> s = ClientSums(np.arange(2), np.array([1.0, 9.0]), np.array([1, 3]), ones)
  >>> {k: round(v, 3) for k, v in summary(s).items()}  # doctest: +ELLIPSIS
  {'loss': 2.5, 'perplexity': 12.182, ... 'client_worst_10': 3.0, ...}
  """
  count = np.sum(sums.count)
  loss = float(np.sum(sums.total) / count)
  each = sums.total / sums.count
  with np.errstate(over='ignore'):
    perplexity = float(np.exp(loss))
  return {
    'loss': loss,
    'perplexity': perplexity,
    'accuracy': float(np.sum(sums.correct) / count),
    'client_mean': float(np.mean(each)),
    f'client_worst_{round(100 * worst)}': worst_mean(each, worst),
    'client_std': float(np.std(each)),
  }


def worst_mean(each: np.ndarray, worst: float = 0.1) -> float:
  """Returns the mean of the ceil(worst * n) largest of n numbers."""
  # Rounded first: 0.1 * 30 is a little more than 3.
  num = max(1, math.ceil(round(worst * len(each), 6)))
  return float(np.mean(np.sort(each)[-num:]))


def likelihood(loss: Loss, *, worst: float = 0.1) -> Callable[..., Report]:
  """Returns a function that evaluates one model on the texts of all clients.

  Args:
    loss: sums for each row of a batch, [B].
    worst: the share of clients averaged in `client_worst_10`.

  Returns:
    `evaluate(base, params, groups, key, name='heldout') -> Report`, with
    metrics 'evals/{name}/loss' and so on (see `summary`). Each length is one
    program over all of its M batches; sums are added in float64. Raises
    `Error` if the groups hold no token.

  >>> def loss(base, params, batch, key):
  ...   n = jnp.sum(batch.loss_mask, -1, dtype=jnp.float32)
  ...   return LossSum(n * params, n, n)
  >>> from fedjax_llm.types import Batch
  >>> full = np.ones((1, 2, 4), np.int32)
  >>> group = Batch(full, full > 0, full, full), np.array([[7, -1]])
  >>> evaluate = likelihood(loss)
  >>> evaluate(None, 2.0, [group], jax.random.key(0)).metrics[
  ...   'evals/heldout/loss']
  2.0
  """

  @jax.jit
  def rows(base, params, batches, key):
    return jax.lax.map(
      lambda batch: _per_row(loss(base, params, batch, key), batch), batches
    )

  def evaluate(
    base: Base,
    params: Params,
    groups: Sequence[Group],
    key: Key,
    name: str = 'heldout',
  ) -> Report:
    sums = [rows(base, params, batch, key) for batch, _ in groups]  # [M, B]
    owners = [owner for _, owner in groups]
    clients = _by_owner(jax.device_get(sums), owners, name)
    return _report({name: clients}, worst)

  return evaluate


def personal(
  loss: Loss, *, chunk_size: int = 8, worst: float = 0.1
) -> Callable[..., Report]:
  """Returns a function that evaluates every client's own model.

  Each model is evaluated on the client's own texts and on common texts.

  Args:
    loss: sums for each row of a batch, [B].
    chunk_size: number of clients with parameters on the device at a time.
    worst: as in `likelihood`.

  Returns:
    `evaluate(base, params, ids, own, common, key, name='personal') -> Report`:
    row k of the stack `params` [K, ...] belongs to client `ids[k]`; `params`
    may also be a function from places in `ids` [C] to their stack [C, ...], if
    all K do not fit. Of the groups `own` each client is tested on its own rows
    (rows of clients not in `ids` are left out), of the groups `common` on all
    rows. Metrics are 'evals/{name}/own/loss' and 'evals/{name}/common/loss' and
    so on; empty groups have no metrics. Raises `Error` if both are empty.

  >>> def loss(base, params, batch, key):
  ...   n = jnp.sum(batch.loss_mask, -1, dtype=jnp.float32)
  ...   return LossSum(n * params, n, n)
  >>> from fedjax_llm.types import Batch
  >>> full = np.ones((1, 2, 4), np.int32)
  >>> own = [(Batch(full, full > 0, full, full), np.array([[7, 9]]))]
  >>> models, key = jnp.array([1.0, 5.0]), jax.random.key(0)  # of 7 and 9
  >>> report = personal(loss)(None, models, [7, 9], own, [], key)
  >>> report.clients['personal/own'].total.tolist()  # four tokens each
  [4.0, 20.0]
  """

  @jax.jit
  def own_rows(base, params, place, batches, key):
    # Each row uses the parameters of its owner: matmuls with the frozen base
    # keep the whole batch, and one program serves any mix of clients.
    def step(xs):
      at, batch = xs
      one = jax.tree.map(lambda x: x[:, None], batch)  # B batches of [1, T]
      mine = jax.tree.map(lambda x: x[at], params)
      sums = jax.vmap(loss, in_axes=(None, 0, 0, None))(base, mine, one, key)
      return _per_row(jax.tree.map(lambda x: jnp.squeeze(x, 1), sums), batch)

    return jax.lax.map(step, (place, batches))

  @jax.jit
  def common_rows(base, params, batches, key):
    def step(batch):
      return jax.vmap(lambda p: _per_row(loss(base, p, batch, key), batch))(
        params
      )

    return jax.lax.map(step, batches)

  def evaluate(
    base: Base,
    params: Params | Callable[[np.ndarray], Params],
    ids: Sequence[int] | np.ndarray,
    own: Sequence[Group],
    common: Sequence[Group],
    key: Key,
    name: str = 'personal',
  ) -> Report:
    ids = np.asarray(ids)
    chunks = _chunks(len(ids), chunk_size)
    dealt = [_deal(batch, owner, ids, chunks) for batch, owner in own]
    results: dict[str, list[Any]] = {'own': [], 'common': []}
    owners: dict[str, list[np.ndarray]] = {'own': [], 'common': []}
    for c, chunk in enumerate(chunks):
      if callable(params):
        mine = params(chunk)
      else:
        mine = jax.tree.map(lambda x, chunk=chunk: x[chunk], params)
      for batches, places in dealt:
        if places.shape[1] == 0:
          continue
        batch = jax.tree.map(lambda x, c=c: x[c], batches)
        at = np.maximum(places[c], 0)
        sums = own_rows(base, mine, at, batch, key)
        results['own'].append(jax.device_get(sums))
        owners['own'].append(np.where(places[c] < 0, -1, ids[chunk][at]))
      fresh = len(ids) - c * chunk_size
      for batch, owner in common:
        sums = common_rows(base, mine, batch, key)  # [M, C, B]
        results['common'].append(jax.device_get(sums))
        # The last chunk is filled with clients that were tested already.
        valid = (np.arange(len(chunk)) < fresh)[:, None]
        owners['common'].append(
          np.where(
            valid & (np.asarray(owner)[:, None] >= 0), ids[chunk][:, None], -1
          )
        )
    kinds = {
      f'{name}/{kind}': _by_owner(results[kind], owners[kind], f'{name}/{kind}')
      for kind, groups in (('own', own), ('common', common))
      if groups
    }
    if not kinds:
      raise Error(f'evals/{name}: there is no text to test on.')
    return _report(kinds, worst)

  return evaluate


def _per_row(sums: LossSum, batch: Any) -> LossSum:
  want = jax.tree.leaves(batch)[0].shape[:1]
  if sums.total.shape != want:
    raise ValueError(
      f'evals need a loss for each row, {want}, not {sums.total.shape}: build'
      ' it with per_row=True.'
    )
  return sums


def _by_owner(
  results: Sequence[LossSum], owners: Sequence[np.ndarray], name: str
) -> ClientSums:
  """Sums rows by owner in float64, leaving out clients without a token."""
  rows = [np.asarray(owner).ravel() for owner in owners]
  owner = np.concatenate([np.zeros(0, np.int64), *rows])
  ids, place = np.unique(owner[owner >= 0], return_inverse=True)
  sums = []
  for field in LossSum._fields:
    flat = [np.asarray(getattr(x, field), np.float64).ravel() for x in results]
    values = np.concatenate([np.zeros(0), *flat])[owner >= 0]
    sums.append(np.bincount(place, values, minlength=len(ids)))
  total, count, correct = sums
  some = count > 0
  if not some.any():
    raise Error(f'evals/{name}: there is no text to test on.')
  return ClientSums(ids[some], total[some], count[some], correct[some])


def _report(kinds: Mapping[str, ClientSums], worst: float) -> Report:
  metrics = {
    f'evals/{name}/{field}': value
    for name, sums in kinds.items()
    for field, value in summary(sums, worst).items()
  }
  return Report(metrics, dict(kinds))


def _chunks(num: int, chunk_size: int) -> list[np.ndarray]:
  """Splits places 0 ... num - 1 into chunks of one size, for one program.

  The last chunk is filled with the first places.
  """
  size = min(chunk_size, num)
  return [
    np.arange(start, start + size) % num for start in range(0, num, size or 1)
  ]


def _deal(
  batch: Any, owner: np.ndarray, ids: np.ndarray, chunks: list[np.ndarray]
) -> tuple[Any, np.ndarray]:
  """Sorts rows [M, B, ...] into chunks of clients: [chunks, M', B, ...].

  Also returns the place of each row's owner within its chunk, -1 on padding.
  """
  num_rows, width = np.asarray(owner).size, np.asarray(owner).shape[1]
  flat = np.asarray(owner).ravel()
  order = {int(i): k for k, i in enumerate(ids) if i >= 0}
  place = np.array([order.get(int(o), -1) for o in flat])
  size = len(chunks[0]) if chunks else 1
  dealt_rows = [np.flatnonzero(place // size == c) for c in range(len(chunks))]
  # -1 // size is -1: rows without an owner belong to no chunk.
  depth = max((-(-len(rows) // width) for rows in dealt_rows), default=0)
  index = np.full((len(chunks), depth * width), -1)
  for c, rows in enumerate(dealt_rows):
    index[c, : len(rows)] = rows
  index = index.reshape(len(chunks), depth, width)

  def deal(x):
    x = np.asarray(x).reshape(num_rows, *np.shape(x)[2:])
    empty = (index < 0).reshape(*index.shape, *(1,) * (x.ndim - 1))
    # Zeros, in `segments` too: a row without an example is not counted.
    return np.where(empty, np.zeros_like(x[:1]), x[index])

  dealt = jax.tree.map(deal, batch)
  where = np.where(index < 0, -1, place[index] % size)
  return dealt, where
