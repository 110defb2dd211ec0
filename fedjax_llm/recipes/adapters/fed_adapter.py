"""FedAdapter: the depth and width of adapters grow by trials during training.

Cai et al. 2023, arXiv 2205.10162 (AdaFL).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm import local, tree
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.nodes import Bottleneck, LowRank
from fedjax_llm.recipes import rows
from fedjax_llm.recipes.composing import refuse
from fedjax_llm.types import (
  ClientOutput,
  Cohort,
  Error,
  FederatedAlgorithm,
  LocalUpdate,
  Loss,
  Masks,
  Params,
)

# What the config of each method changes.
NEEDS = {
  'fed_adapter': dict(
    adapter=dict(name='bottleneck', size=4),
    algorithm=dict(width=2, width_step=2, window=1),
  ),
}

ARMS = 3  # in the order of preference: shallow, wide, deep


class Trials(NamedTuple):
  """A rule's state, and the trials of the current window."""

  inner: Any
  depth: Any  # [3] int32, layers with an adapter, from the top
  width: Any  # [3] int32
  turn: Any  # [] int32, rounds of the window that are done
  hits: Any  # [3] float32, of the last round in which the arm trained
  count: Any  # [3] float32


def time(depth: Any, width: Any) -> Any:
  """Returns the seconds of a round, as the authors' code models them.

      8 (0.02 + 0.05 d w / 32) + 29 * 0.09 d

  The first term is the exchange of the adapters at 1 MB/s, the second 29
  batches on a device that keeps the states below the lowest adapter.

  >>> round(float(time(1, 8)), 2)
  2.87
  """
  return 8 * (0.02 + 0.05 * depth * width / 32) + 29 * 0.09 * depth


def fed_adapter(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  depth: int = 1,
  width: int = 8,
  depth_step: int = 1,
  width_step: int = 8,
  window: int = 5,
  expand: int = 4,
  cost: Callable[[Any, Any], Any] | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedAdapter: the depth and width of adapters grow by trials.

      three groups train (d, w), (d, w + w_step), (d + d_step, w) in a window of
      time T (expand * d + 1),
      (d, w) and the adapters of all groups <- those of the highest accuracy

  Cai et al. 2023, arXiv 2205.10162 (first version: AdaFL). An adapter of depth
  d is in the d layers at the top, and has the first w units of its bottleneck;
  units that join keep the values that they started with, so nothing is lost or
  compiled again. An arm trains as many rounds of a window as its `cost` allows:
  floor(rounds of the window * cost of (d, w) / its own cost), at least one. The
  clients of a round are spread over the arms that train; an accuracy is that of
  the arm's clients before each step in its last round (the paper evaluates on
  the server). Of equal accuracies the smaller adapter wins. The largest depth
  and width are those of the adapter in the config.

  Args:
    depth, width: at the start.
    depth_step, width_step: of the trials.
    window: rounds of (d, w) in a window of depth 0; the window has
      window * (expand * d + 1) rounds.
    expand: growth of the window with the depth, 4 in the authors' code.
    cost: `(depth, width) -> seconds` of a round; None: `time`.

  Raises:
    Error: an aggregator or a scope in `parts`, a size, a step or a window below
      one; from `init`, an adapter without bottlenecks or factors in the layers.

  >>> from fedjax_llm import nodes
  >>> method = fed_adapter(None, local.optimizer('sgd'), width=2, width_step=2)
  >>> node = nodes.Bottleneck(jnp.ones((3, 4, 6)), jnp.ones((3, 6, 4)))
  >>> params = {'layers': {'mlp': {'output': node}}}
  >>> trials = method.init(jax.random.key(0), params).aggregator
  >>> trials.depth.tolist(), trials.width.tolist()
  ([1, 1, 2], [2, 4, 2])
  """
  for section in ('aggregator', 'scope'):
    refuse('fed_adapter', section, parts)
  sizes = dict(
    depth=depth,
    width=width,
    depth_step=depth_step,
    width_step=width_step,
    window=window,
  )
  for name, number in sizes.items():
    if number < 1:
      raise Error(f'algorithm.{name} is {number}; it must be at least 1.')

  algorithm = rows.compose(
    _scored(local.sgd(loss, optimizer)),
    ARMS,
    lambda params, context: context.profile['arm'],
    parts,
    narrow=narrowed,
  )

  def arms(d: Any, w: Any, most: tuple[int, int]) -> tuple[Any, Any]:
    depth = jnp.stack([d, d, jnp.minimum(d + depth_step, most[0])])
    width = jnp.stack([w, jnp.minimum(w + width_step, most[1]), w])
    return depth.astype(jnp.int32), width.astype(jnp.int32)

  def init(key, params):
    most = largest(params)
    state = algorithm.init(key, params)
    start = [jnp.minimum(jnp.int32(x), m) for x, m in zip((depth, width), most)]
    none = [jnp.zeros(ARMS, jnp.float32) for _ in range(2)]
    sizes = arms(start[0], start[1], most)
    trials = Trials(
      state.aggregator, sizes[0], sizes[1], jnp.int32(0), none[0], none[1]
    )
    return state._replace(aggregator=trials)

  price_of = cost or time

  def bare(state):
    return state._replace(aggregator=state.aggregator.inner)

  def turns(trials: Trials) -> tuple[Any, Any]:
    """Returns the rounds of the window, and those of each arm, [3]."""
    total = window * (expand * trials.depth[0] + 1)
    price = jnp.asarray(price_of(trials.depth, trials.width), jnp.float32)
    own = jnp.floor(total * price[0] / price * (1 + 1e-6))
    return total, jnp.maximum(own.astype(jnp.int32), 1)

  def dealt(state, cohort: Cohort) -> tuple[Cohort, dict[str, Any]]:
    trials = state.aggregator
    _, own = turns(trials)
    active = trials.turn < own  # [3]
    order = jnp.argsort(~active, stable=True)
    at = jnp.argsort(jnp.argsort(cohort.ids)) % jnp.sum(active)
    arm = order[(at + state.round) % jnp.sum(active)].astype(jnp.int32)
    mine = {
      'arm': arm,
      'depth': trials.depth[arm],
      'width': trials.width[arm],
    }
    other = cohort.profiles if isinstance(cohort.profiles, Mapping) else {}
    return cohort._replace(profiles={**other, **mine}), mine

  def billed(info, cohort, mine):
    number = lambda tree: 4 * len(jax.tree.leaves(tree))
    add = lambda counts, more, who: jnp.concatenate(
      [counts, jnp.where(who, jnp.int32(more), 0)[:, None]], axis=1
    )
    return info._replace(
      bytes_up=add(info.bytes_up, number(info.reports), info.reported),
      bytes_down=add(info.bytes_down, number(mine), cohort.ids >= 0),
      reports=None,
    )

  def decided(state, new, arm, valid, reports):
    """Returns the state after a round, and after the window's last one."""
    trials = state.aggregator
    mine = (jnp.arange(ARMS)[:, None] == arm) & valid  # [3, K]
    hits, count = (
      jnp.sum(jnp.where(mine, x, 0.0), 1)
      for x in (reports['hits'], reports['count'])
    )
    fresh = count > 0
    hits = jnp.where(fresh, hits, trials.hits)
    count = jnp.where(fresh, count, trials.count)
    total, _ = turns(trials)
    end = trials.turn + 1 >= total
    accuracy = jnp.where(count > 0, hits / jnp.maximum(count, 1), -1.0)
    best = jnp.argmax(accuracy)
    most = largest(tree.take(new.params, 0))
    grown = arms(trials.depth[best], trials.width[best], most)
    keep = lambda x, y: jnp.where(end, x, y)
    inherited = jax.tree.map(
      lambda x: jnp.broadcast_to(x[best], x.shape), new.params
    )
    none = jnp.zeros_like(hits)
    after = Trials(
      new.aggregator,
      keep(grown[0], trials.depth),
      keep(grown[1], trials.width),
      keep(0, trials.turn + 1).astype(jnp.int32),
      keep(none, hits),
      keep(none, count),
    )
    return new._replace(
      params=jax.tree.map(keep, inherited, new.params), aggregator=after
    )

  def round(state, cohort, base=None, data=None):
    cohort, mine = dealt(state, cohort)
    new, states, info = algorithm.round(bare(state), cohort, base, data)
    valid = info.reported
    state = decided(state, new, mine['arm'], valid, info.reports)
    return state, states, billed(info, cohort, mine)

  def train(state, cohort, base=None):
    assert algorithm.train is not None
    cohort, mine = dealt(state, cohort)
    uploads, states, info = algorithm.train(bare(state), cohort, base)
    return uploads, states, billed(info, cohort, mine)

  def aggregate(state, uploads, base=None, data=None):
    assert algorithm.aggregate is not None
    new, metrics = algorithm.aggregate(bare(state), uploads, base, data)
    arm = uploads.profiles['arm']
    return decided(state, new, arm, uploads.valid, uploads.reports), metrics

  return algorithm._replace(
    init=init, round=round, train=train, aggregate=aggregate
  )


def _scored(inner: LocalUpdate) -> LocalUpdate:
  """Returns `inner` with its hits and their number as the report."""

  def run(base, start, state, batches, masks, context) -> ClientOutput:
    out = inner.run(base, start, state, batches, masks, context)
    count = jnp.asarray(out.work.tokens, jnp.float32)
    hits = jnp.asarray(out.metrics['accuracy'] * count, jnp.float32)
    return out._replace(report={'hits': hits, 'count': count})

  return LocalUpdate(inner.init, run)


def _is_node(x: Any) -> bool:
  return isinstance(x, (Bottleneck, LowRank))


def _nodes(params: Params) -> list[Any]:
  below = params.get('layers') if isinstance(params, Mapping) else None
  return [x for x in jax.tree.leaves(below, is_leaf=_is_node) if _is_node(x)]


def largest(params: Params) -> tuple[int, int]:
  """Returns the layers and the units of the adapters, or raises `Error`."""
  nodes = _nodes(params)
  if not nodes:
    raise Error(
      'fed_adapter grows bottlenecks in the layers: adapter.name=bottleneck.'
    )
  of = lambda x: x.down if isinstance(x, Bottleneck) else x.a
  return of(nodes[0]).shape[0], max(of(x).shape[-1] for x in nodes)


def narrowed(params: Params, masks: Masks, context: Any) -> Masks:
  """Returns the masks of the top layers and first units of a client's arm."""
  depth, width = context.profile['depth'], context.profile['width']

  def node(x, m):
    if not _is_node(x):
      return m
    first = x.down if isinstance(x, Bottleneck) else x.a
    L, _, units = first.shape
    layer = jnp.arange(L) >= L - depth  # [L]
    unit = layer[:, None] & (jnp.arange(units) < width)  # [L, R]
    if isinstance(x, LowRank):
      own = {'a': unit[:, None], 'b': unit[..., None]}
    else:
      own = {
        'down': unit[:, None],
        'up': unit[..., None],
        'down_bias': unit,
        'up_bias': layer[:, None],
      }
    return m._replace(**{
      name: mask & getattr(m, name)
      for name, mask in own.items()
      if getattr(m, name) is not None
    })  # fmt: skip

  def narrow(tree_of_masks):
    below = jax.tree.map(
      node, params['layers'], tree_of_masks['layers'], is_leaf=_is_node
    )
    return {**tree_of_masks, 'layers': below}

  return Masks(*map(narrow, masks))
