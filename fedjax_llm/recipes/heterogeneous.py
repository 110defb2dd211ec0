"""Federated LoRA with clients of different ranks.

The server's factors have the largest rank; a client of rank r holds their first
r columns (`scopes.ranks`), inside buffers of the full size, so one program
serves clients of all sizes. Ranks come in `Cohort.profiles`. The scale s is
the same for everybody: alpha grows with the rank.
Examples that train nothing have no loss, `None`.
"""

from typing import Any

import jax.numpy as jnp

from fedjax_llm import aggregators, local, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.recipes.homogeneous import refuse, with_rule
from fedjax_llm.types import FederatedAlgorithm, Loss, Scope


def zero_padding(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  keep_unheld: bool = True,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedIT with ranks: the mean of factors that are padded with zeros.

      a <- sum_k w_k [a_k 0],   b <- sum_k w_k [b_k; 0]

  The baseline of every paper on mixed ranks (called zero padding by Cho et al.
  2024, arXiv 2401.06432): ranks that few clients hold shrink in every round.
  Ranks that no client of a round holds keep their value; with
  `keep_unheld=False` they are set to zero for good, as the formula says.

  >>> zero_padding(  # doctest: +ELLIPSIS
  ...   None, None, aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: zero_padding brings its own aggregator: leave the ...
  """
  return with_rule(
    'zero_padding',
    aggregators.zero_padding(keep_unheld=keep_unheld),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), **parts},
  )


def rbla(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """RBLA: every rank is averaged over the clients that hold it.

      a[:, i] <- sum_{k: r_k > i} w_k a_k[:, i] / sum_{k: r_k > i} w_k

  and the rows of b likewise (Tavallaie et al. 2024, arXiv 2408.08699). A rank
  that no client of the round holds keeps its value.

  >>> from fedjax_llm.types import LowRank
  >>> node = lambda x: LowRank(jnp.full((1, 2), x), jnp.zeros((2, 1)), None)
  >>> sent = aggregators.received(
  ...   node(1.0), [node(4.0), node(8.0)], ranks=[1, 2])
  >>> rule = aggregators.as_stack(aggregators.masked_mean('mask'))
  >>> new, _ = rule.aggregate(sent, (), node(1.0), None)
  >>> (1.0 + new.delta.a).tolist()  # of two clients, and of one
  [[6.0, 8.0]]
  """
  return with_rule(
    'rbla',
    aggregators.masked_mean('mask'),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), **parts},
  )


def replication_padding(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """Small clients are padded with what the largest clients learned.

      a_k[:, i] <- mean of a_j[:, i] over the clients of the largest rank

  for the ranks that client k lacks, then the weighted mean (Byun and Lee 2025,
  arXiv 2406.17477). With two sizes of clients it is RBLA on the larger ranks.

  >>> replication_padding(  # doctest: +ELLIPSIS
  ...   None, None, aggregator=aggregators.mean())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: replication_padding brings its own aggregator: ...
  """
  return with_rule(
    'replication_padding',
    aggregators.replication(),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), **parts},
  )


def flora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLoRA: the stacked product goes into the base, and factors start afresh.

      W0 <- W0 + s sum_k w_k a_k b_k,   then a new a, and b = 0

  Wang et al. 2024, arXiv 2409.05976. Exact for any mix of ranks. The fresh
  factors are drawn from a common seed, so what goes down is the stack of the
  round before; clients of the same rank get the same columns.

  >>> from fedjax_llm import adapters
  >>> from fedjax_llm.types import LowRank
  >>> method = flora(None, local.optimizer('adamw'), fold=adapters.fold)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init(None, params).params.residual.shape  # on its way to the base
  (4, 3)
  """
  return with_rule(
    'flora',
    aggregators.flora(),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), 'download': uploads.known(), **parts},
  )


def flexlora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  split: str = 'b',
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FlexLoRA: the mean product, rounded to each client's rank by its SVD.

      s a b = SVD_R(s sum_k w_k a_k b_k); client k gets the first r_k columns

  Bai et al. 2024, arXiv 2402.11505. The settings are those of
  `aggregators.flexlora`.

  >>> from fedjax_llm import server
  >>> flexlora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  return with_rule(
    'flexlora',
    aggregators.flexlora(split=split),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), **parts},
  )


def hlora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """HLoRA, as NVIDIA FLARE's MedGemma example means it.

      a b = SVD_R(sum_k w_k a_k b_k) with the singular values on a

  and every client truncates it to its rank. The rule of FlexLoRA, where they
  are on b; b is the factor beside the output, whose rows are orthonormal here.

  >>> from fedjax_llm import server
  >>> hlora(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
  """
  return with_rule(
    'hlora',
    aggregators.flexlora(split='a'),
    loss,
    optimizer,
    clip_norm,
    {'scope': scopes.ranks(), **parts},
  )


def fed_hm(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  decay: float = 1e-4,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedHM: factorised weights of each client's rank, averaged as weights.

      client:  W_k = a_k b_k of rank r_k; loss + decay / 2 sum ||a_k b_k||_F^2,
      server:  W <- sum_k w_k a_k b_k,   a, b <- its SVD, truncated on the way

  Yao et al. 2021, arXiv 2111.14655: the rule of FlexLoRA on the adapter
  `factorised`, whose rank is that of the server and must be the smaller side
  for the mean to be exact. The decay is that of the product, and tuned.

  >>> fed_hm(None, local.optimizer('adamw'), decay=-1.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: frobenius_decay: strength=-1.0 must not be negative.
  """
  refuse('fed_hm', 'aggregator', parts)
  update = local.sgd(
    local.frobenius_decay(loss, decay), optimizer, clip_norm=clip_norm
  )
  return averaging.compose(
    update,
    aggregator=aggregators.flexlora(),
    **{'scope': scopes.ranks(), **parts},
  )


def hafl(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  beta1: float = 0.85,
  beta2: float = 0.85,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """HAFL, with freezing: all hold every unit, and train those that matter.

      client:  the r_k units of each target with the largest importance,
      server:  a[:, i] <- mean of a_k[:, i] over the clients that trained i

  and the rows of b likewise, with the weights of the round (Su et al. 2024,
  arXiv 2411.06581). The importance is AdaLoRA's, `local.important`; r_k is the
  client's profile. Which units it trained travels as well, a bit a unit. The
  variant that truncates instead, and the quantisation of HAFLQ, are left out.

  >>> from fedjax_llm.types import LowRank
  >>> method = hafl(None, local.optimizer('adamw'))
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init_client(params).local.sensitivity.a.shape  # of every entry
  (4, 2)
  """
  refuse('hafl', 'aggregator', parts)
  update = local.important(
    local.sgd(loss, optimizer, clip_norm=clip_norm),
    loss,
    beta1=beta1,
    beta2=beta2,
  )
  mine = {'scope': _trained_ranks(), 'upload': uploads.identity(bitmap=True)}
  return averaging.compose(
    update, aggregator=aggregators.masked_mean('mask'), **{**mine, **parts}
  )


def _trained_ranks() -> Scope:
  """As many columns as a client may train are trained, and all are held."""
  inner = scopes.everything()
  narrow = scopes.ranks(inner)

  def mask(start, profile, state, round, key):
    some = narrow.mask(start, profile, state, round, key)
    return inner.mask(start, profile, state, round, key)._replace(
      trained=some.trained
    )

  return inner._replace(mask=mask)


def het_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  penalty: float = 5e-4,
  gamma: float = 0.99,
  min_rank: int = 1,
  per: str = 'client',
  keep_unheld: bool = True,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """HetLoRA: truncated dispatch, self-pruning, weights by what was learned.

      client k: the first r_k columns; loss + penalty ||tail a|| ||tail b||;
                r_k <- floor(gamma r_k) where the tail shrank
      server:   mean of zero-padded factors with p_k ~ ||a_k b_k||_F

  Cho et al. 2024, arXiv 2401.06432. Settings as in `local.self_pruning` and
  `aggregators.norm_weighted`; r_k starts as the client's profile. What the
  paper leaves open: whether the norm runs over a client or a target (`per`).

  >>> from fedjax_llm.types import LowRank
  >>> method = het_lora(None, local.optimizer('adamw'))
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> int(method.init_client(params).local.rank)  # before it prunes itself
  2
  """
  refuse('het_lora', 'aggregator', parts)
  update = local.self_pruning(
    loss,
    optimizer,
    penalty=penalty,
    gamma=gamma,
    min_rank=min_rank,
    clip_norm=clip_norm,
  )
  return averaging.compose(
    update,
    aggregator=aggregators.norm_weighted(per=per, keep_unheld=keep_unheld),
    **{'scope': _pruned_ranks(), **parts},
  )


def _pruned_ranks() -> Scope:
  """The first ranks of the profile, less those that the client gave up."""
  inner = scopes.ranks()

  def mask(start, profile, state, round, key):
    rank = jnp.minimum(scopes.rank_of(profile), state.local.rank)
    return inner.mask(start, rank, state, round, key)

  return inner._replace(mask=mask)
