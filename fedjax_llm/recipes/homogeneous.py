"""Federated LoRA with one rank for everybody.

Kernels are (in, out): a token x of width D gives x W + s (x a) b with a of
[D, R] and b of [R, F]. Papers write W + s B A, so that their A is our a
transposed and their B our b transposed; the factor that meets the input is
"A" there and a here.

Every recipe takes a loss and a local optimizer, and hands further keywords
(`server`, `upload`, `block_size`, ...) to `fed_opt`.
"""

from typing import Any

from fedjax_llm import aggregators, local, server, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.types import Error, FederatedAlgorithm, Loss


def fed_it(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedIT: federated averaging of the factors.

      a <- sum_k w_k a_k,   b <- sum_k w_k b_k

  Zhang et al. 2023, arXiv 2305.05644. It is `fed_avg` by the name that papers
  compare with. The mean of the factors is not the mean of the products:
  'aggregators/error' tells how far apart they are.
  """
  return averaging.fed_avg(loss, optimizer, clip_norm=clip_norm, **parts)


def ffa_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FFA-LoRA: a stays as it was drawn, and only b is trained and sent.

      b <- sum_k w_k b_k,   so that   a b = sum_k w_k a b_k   exactly

  Sun et al. 2024, arXiv 2403.12313, section 4. It halves what travels.
  """
  scope = scopes.frozen('/a$')
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, scope=scope, **parts
  )


def rolora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """RoLoRA: rounds take turns between b (the first) and a.

      even t: b <- sum_k w_k b_k, a stays;   odd t: a <- sum_k w_k a_k, b stays

  One factor is the same for everybody in every round, so the mean is exact
  (Chen et al. 2024, arXiv 2409.02346). Half travels up; down go both factors,
  since a client may not have been there in the round before. Moments of the
  local optimizer start afresh in every round.
  """
  scope = scopes.alternating('/b$', '/a$')
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, scope=scope, **parts
  )


def fed_sa(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  private: str = '/b$',
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSA-LoRA: both factors are trained, a is shared, and b stays at home.

      a <- sum_k w_k a_k,   b_k of client k goes on where it stopped

  Guo et al. 2025, arXiv 2410.01463, section 4. A personalised method: a client
  never trained on is served b as it started. On rank-stabilised factors the
  rule is the same.

  Args:
    private: what clients keep, as a pattern on the names of leaves; a head
      that the paper keeps too is added with '/b$|head'.
  """
  scope = scopes.private(private)
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, scope=scope, **parts
  )


def fedex_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  weighted: bool = False,
  residual_rank: int | None = None,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedEx-LoRA: the mean of the factors, and the base takes what it misses.

      W0 <- W0 + s (mean_k a_k b_k - (mean_k a_k)(mean_k b_k))

  Singhal et al. 2025, arXiv 2410.09432. The settings are those of
  `aggregators.fedex`; clients count the same unless `weighted`.
  """
  rule = aggregators.fedex(weighted=weighted, residual_rank=residual_rank)
  return with_rule('fedex_lora', rule, loss, optimizer, clip_norm, parts)


def lora_fair(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  penalty: float = 0.01,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """LoRA-FAIR: the mean of the factors, b corrected towards the mean product.

      b <- mean b_k + argmin_c ||mean a_k b_k - a (mean b_k + c)||^2
                               + penalty ||c||^2

  Bian et al. 2025, arXiv 2411.14961; in the closed form of
  `aggregators.lora_fair`. Clients start from the averaged factors.
  """
  rule = aggregators.lora_fair(penalty=penalty)
  return with_rule('lora_fair', rule, loss, optimizer, clip_norm, parts)


def fed_svd(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  every: int = 1,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedSVD: b alone is trained, and the server factors the product anew.

      b <- sum_k w_k b_k;   s a b = U S V':   a <- U,   b <- S V' / s

  Lee et al. 2025, arXiv 2505.12805: exact as FFA-LoRA, with a that follows
  what was learned. Both factors go down, b comes up. `every` as in
  `aggregators.fedsvd`.
  """
  rule = aggregators.fedsvd(every=every)
  scope = {'scope': scopes.untrained('/a$')}
  return with_rule(
    'fed_svd', rule, loss, optimizer, clip_norm, {**scope, **parts}
  )


def fedrot_lora(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  strength: float = 1.0,
  first: str = 'a',
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FedRot-LoRA: clients' factors are turned onto the server's before the mean.

      a <- sum_k w_k a_k R_k,   b <- sum_k w_k R_k' b_k,   R_k a rotation

  Zhang et al. 2026, arXiv 2602.23638; settings as in `aggregators.fedrot`. A
  client can turn its factors itself, so the bytes are those of FedIT.
  """
  rule = aggregators.fedrot(strength=strength, first=first)
  return with_rule('fedrot_lora', rule, loss, optimizer, clip_norm, parts)


def lora_a2(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  budget: int = 2,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """LoRA-A2: alternating factors, and of each only the units that matter.

      even t: b <- b + sum_k w_k m_k db_k;   odd t: a <- a + sum_k w_k m_k da_k

  with m_k the client's choice of rank-one units, `budget` a target and layer
  on average (Koo et al. 2025, arXiv 2410.22815). The score and the trial pass
  are those of `local.selected`; a unit that a client leaves out is a vote for
  no change. The paper's own learning rate for each factor is left to the
  optimizer, and every client has the same budget. What was chosen travels as
  well, a bit a unit.
  """
  update = local.selected(
    local.sgd(loss, optimizer, clip_norm=clip_norm), budget=budget
  )
  mine = {
    'scope': scopes.alternating('/b$', '/a$'),
    'upload': uploads.identity(bitmap=True),
  }
  return averaging.compose(update, **{**mine, **parts})


def flasc(
  loss: Loss,
  optimizer: LocalOptimizer,
  *,
  download_density: float = 0.25,
  upload_density: float = 0.25,
  per: str = 'tree',
  server_learning_rate: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
  clip_norm: float | None = None,
  **parts: Any,
) -> FederatedAlgorithm:
  """FLASC: dense training between a sparse download and a sparse upload.

      start_k = top_k(P);   u_k = top_k(end_k - start_k);
      P <- FedAdam(P, mean_k u_k)

  Kuo et al. 2024, arXiv 2406.05233, algorithm 1: the server keeps P dense,
  every client chooses its own entries, and clients count the same. Densities
  that the paper sweeps are powers of 1/4. A density of one both ways is
  FedAdam on LoRA. The paper chooses entries over all factors together; since
  b starts at zero, that starves b at first, and `per='leaf'` does not.

  Args:
    download_density, upload_density, per: see `uploads.top_k`.
    server_learning_rate, b1, b2, tau: of the server, see `server.fed_adam`.

  Raises:
    Error: a density out of range, another server or upload is given as well.
  """
  for section in ('server', 'upload', 'download'):
    refuse('flasc', section, parts)
  return averaging.fed_avg(
    loss,
    optimizer,
    clip_norm=clip_norm,
    download=uploads.top_k(download_density, per),
    upload=uploads.top_k(upload_density, per),
    server=server.fed_adam(server_learning_rate, b1, b2, tau),
    **{'aggregator': aggregators.uniform_mean(), **parts},
  )


def refuse(name: str, section: str, parts: dict[str, Any]) -> None:
  """Raises an `Error` if a part is given that the method brings itself."""
  if section in parts:
    raise Error(
      f'{name} brings its own {section}: leave the {section} section out, or '
      f'name fed_avg with the {section} that you want.'
    )


def with_rule(
  name: str,
  rule: Any,
  loss: Loss,
  optimizer: LocalOptimizer,
  clip_norm: float | None,
  parts: dict[str, Any],
) -> FederatedAlgorithm:
  """`fed_avg` with a rule that makes the method what it is.

  Raises:
    Error: another aggregator is given as well.
  """
  refuse(name, 'aggregator', parts)
  return averaging.fed_avg(
    loss, optimizer, clip_norm=clip_norm, aggregator=rule, **parts
  )
