"""Metrics of a round: means over the clients that count, work and bytes.

`of_clients` returns a `RoundInfo`, `of_server` a dictionary of metrics.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_llm import tree
from fedjax_llm.types import Aggregate, Cohort, Error, Params, RoundInfo, Work

# The metrics of a client that are means over its tokens.
BY_TOKENS = ('loss', 'accuracy')


class Rows(NamedTuple):
  """Results of the clients of a cohort, [K] of each."""

  reported: Any  # bool
  finite: Any  # bool
  weight: Any  # float32, 0 for those that do not count
  work: Work
  metrics: Any  # name -> [K]
  bytes_up: Any  # [K, leaves]
  bytes_down: Any  # [K, leaves]
  reports: Any  # [K, ...], or None
  places: Any  # [K] token places of its block, on the block's first client


def of_clients(rows: Rows, cohort: Cohort) -> RoundInfo:
  """Returns the outcome of local training: means, sums and bytes.

  Raises:
    Error: a local update reports a metric that is not a scalar.
  """
  valid = rows.reported
  clean = lambda x: jnp.where(valid, x, 0)
  tokens = clean(rows.work.tokens)
  by_tokens = tree.normalise(tokens)
  by_client = tree.normalise(valid.astype(jnp.float32))
  metrics = {
    'local/tokens': jnp.sum(tokens),
    'local/steps': jnp.sum(clean(rows.work.steps)),
  }
  for name, values in rows.metrics.items():
    if values.ndim != 1:
      raise Error(
        f'local/{name} has the shape {values.shape[1:]} on a client: a metric '
        'is a scalar; arrays go into ClientOutput.report.'
      )
    weight = by_tokens if name in BY_TOKENS else by_client
    metrics[f'local/{name}'] = jnp.sum(weight * clean(values))
  if rows.work.used is not None:  # of texts; other batches have no places
    places = jnp.sum(rows.places.astype(jnp.float32))
    used = jnp.sum(clean(rows.work.used))
    metrics['clients/useful_tokens'] = used / jnp.maximum(places, 1)
  some = lambda keep, x: jnp.where(keep[:, None], x, 0)
  return RoundInfo(
    reported=valid,
    finite=rows.finite,
    bytes_up=some(cohort.valid, rows.bytes_up),
    bytes_down=some(cohort.ids >= 0, rows.bytes_down),
    metrics=metrics,
    reports=rows.reports,
  )


def of_server(aggregate: Aggregate, old: Params, new: Params) -> dict[str, Any]:
  """Returns the norms of the aggregate and of the server's step."""
  return {
    'aggregators/norm': tree.norm(aggregate.delta),
    'server/step_norm': tree.norm(tree.sub(new, old)),
  }
