"""Federated LoRA with one rank for everybody.

Kernels are (in, out): a token x of width D gives x W + s (x a) b with a of
[D, R] and b of [R, F]. Papers write W + s B A, so that their A is our a
transposed and their B our b transposed; the factor that meets the input is
"A" there and a here.

Every recipe takes a loss and a local optimizer, and hands further keywords
(`server`, `upload`, `block_size`, ...) to `fed_opt`.
Examples that train nothing have no loss, `None`.
"""

from typing import Any

from fedjax_llm import aggregators, local, server, tree, uploads
from fedjax_llm.clients import scopes
from fedjax_llm.local import LocalOptimizer
from fedjax_llm.recipes import averaging
from fedjax_llm.types import Error, FederatedAlgorithm, Loss, Shared


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

  >>> import jax
  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import Cohort, LossSum, LowRank
  >>> loss = lambda base, p, x, key: LossSum(
  ...   jnp.sum((p.a @ p.b - x) ** 2), *jnp.float32([1, 0]))
  >>> method = fed_it(loss, local.optimizer('sgd', 0.1))
  >>> params = LowRank(*jnp.float32([[[1]], [[1]]]), scale=jnp.float32(1))
  >>> state = method.init(jax.random.key(0), params)
  >>> cohort = Cohort(jnp.arange(2), jnp.array([[0.0], [4.0]]), jnp.ones(2),
  ...                 jnp.ones(2, bool))
  >>> _, _, told = jax.jit(method.round)(state, cohort)
  >>> round(float(told['aggregators/error']), 3)  # of one step on each client
  0.1
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

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import LowRank
  >>> method = ffa_lora(
  ...   None, local.optimizer('adamw'), server=server.fed_avgm())
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> moments = method.init(None, {'q': node}).optimizer[0].m['q']
  >>> moments.a, moments.b.shape  # of a nothing comes to the server
  (None, (2, 3))
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

  >>> from jax import numpy as jnp
  >>> turns, params = scopes.alternating('b$', 'a$'), {'a': 1.0, 'b': 2.0}
  >>> [[name for name, m in turns.mask(params, (), None, jnp.int32(t),
  ...   None).trained.items() if m] for t in (0, 1)]
  [['b'], ['a']]
  >>> method = rolora(None, local.optimizer('adamw'))
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

  >>> from jax import numpy as jnp
  >>> from fedjax_llm.types import LowRank
  >>> method = fed_sa(None, local.optimizer('adamw'))
  >>> node = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> kept = method.init_client({'q': node}).private['q']
  >>> kept.a, kept.b.shape
  (None, (2, 3))
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

  >>> from jax import numpy as jnp
  >>> from fedjax_llm import adapters
  >>> from fedjax_llm.types import LowRank
  >>> method = fedex_lora(None, local.optimizer('adamw'), fold=adapters.fold)
  >>> params = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.float32(1))
  >>> method.init(None, params).params.residual.shape  # for what factors miss
  (4, 3)
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

  >>> lora_fair(None, local.optimizer('adamw'), penalty=0.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: lora_fair: penalty=0.0 must be positive.
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

  >>> fed_svd(  # doctest: +ELLIPSIS
  ...   None, local.optimizer('adamw'), server=server.fed_adam())
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: this aggregator changes the basis of the factors ...
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

  >>> fedrot_lora(None, local.optimizer('adamw'), strength=2.0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: fedrot: strength=2.0 must be from 0 to 1.
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

  >>> lora_a2(None, local.optimizer('adamw'), budget=0)
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: selected: budget=0 must be at least 1.
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
  variant: str = 'paper',
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
    variant: 'paper', the default, is algorithm 1 with the FedAdam that it cites
      and serves P dense. 'code' is what the authors' program does: the server
      is torch's AdamW (`server.adamw` with its defaults, of these settings only
      the learning rate), and what is evaluated and served is top_k(P), as a
      client would download it.

  Raises:
    Error: a density out of range, another variant; another server or upload is
      given as well.

  >>> from jax import numpy as jnp
  >>> method = flasc(None, local.optimizer('adamw'), upload_density=1 / 16)
  >>> method.init(None, {'w': jnp.ones(2)}).optimizer[0].m  # FedAdam's
  {'w': Array([0., 0.], dtype=float32)}
  """
  for section in ('server', 'upload', 'download'):
    refuse('flasc', section, parts)
  if variant not in ('paper', 'code'):
    raise Error(f"flasc: variant={variant!r} is neither 'paper' nor 'code'.")
  download = uploads.top_k(download_density, per)
  step = server.fed_adam(server_learning_rate, b1, b2, tau)
  if variant == 'code':
    step = server.adamw(server_learning_rate)
  algorithm = averaging.fed_avg(
    loss,
    optimizer,
    clip_norm=clip_norm,
    download=download,
    upload=uploads.top_k(upload_density, per),
    server=step,
    **{'aggregator': aggregators.uniform_mean(), **parts},
  )
  if variant == 'paper':
    return algorithm
  labels = (parts.get('scope') or scopes.everything()).labels

  def personal(params, state):
    shared = tree.select(params, labels(params), Shared)
    masks = tree.full_masks(params, labels(params))
    message, _ = download.encode(shared, masks, (), None)
    sparse = tree.merge(download.decode(message, params, None), params)
    return algorithm.personal(sparse, state)

  return algorithm._replace(personal=personal)


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
