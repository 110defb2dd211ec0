"""The contracts that every room speaks, in the order in which data flows.

    data -> clients -> local -> uploads -> aggregators -> server -> evals

Axis letters, used everywhere:

    K clients in the cohort     N clients in the population   S local steps
    B batch                     T tokens                      D model width
    F features                  R rank                        L layers
    V vocabulary

A part is a builder that returns a `NamedTuple` of pure functions: settings go
in by keyword, arrays flow through the functions, and nothing is inherited or
registered.

Absent leaves are `None`. An update, a mask or the private part of a client has
the structure of the parameters with `None` wherever it says nothing, so that
`jax.tree.map` over it touches only what is there (`tree.merge` puts the parts
together again).
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

Base = Any  # frozen weights of the model: a pytree, never batched over clients
Params = Any  # what the server owns and broadcasts; never the base
Update = Any  # end - start, where start is what this client received
Key = jax.Array  # a typed PRNG key (threefry)
Metrics = Mapping[str, jax.Array]  # 'room/name' -> array


class Error(ValueError):
  """A mistake of the user, told in one sentence (programs exit with 1).

  A notebook shows the sentence too, and no traceback.

  >>> raise Error('config: num_rounds is 0; it must be at least 1.')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: config: num_rounds is 0; it must be at least 1.
  """

  def _render_traceback_(self) -> list[str]:  # what IPython asks for
    return [f'Error: {self}']


def known(number: Any) -> bool:
  """Whether a setting can be asked about: not while it is being traced.

  A builder inside `jit` or `grad` may get a traced number where it wants a
  float (`sweep` trains runs that differ in it as one program). Its caller
  answers for its range.

  >>> known(0.5), jax.jit(lambda x: jax.numpy.asarray(known(x)))(0.5).item()
  (True, False)
  """
  return not isinstance(number, Tracer)


# ---------------------------------------------------------------- adapters --


class LowRank(NamedTuple):
  """The node of every LoRA-like adapter: W + scale * a @ b + residual.

  Stacked over layers every field has a leading L axis, so that one `lax.scan`
  walks the base and the adapter together. `scale` (alpha / R, or
  alpha / sqrt(R) for rsLoRA) is never trained and never averaged. `residual`
  is what an average of factors missed; it is dense, one a target, and is added
  to the base once a round, outside `vmap`.
  """

  a: Any  # [L, D, R]
  b: Any  # [L, R, F]
  scale: Any  # [L]
  residual: Any = None  # [L, D, F]


class Controlled(NamedTuple):
  """Parameters with the server's control variate c (SCAFFOLD).

  In an update: the client's update, and the change of its own c_k.
  """

  params: Any  # those of the adapter
  control: Any  # c, None where nothing is trained


class Dual(NamedTuple):
  """Two sets of parameters at one base: everybody's, and a client's own.

  A scope keeps `personal` with the client. What is served is a view of both.
  """

  shared: Any  # everybody's: sent and averaged
  personal: Any  # a client's own: it stays there


class Experts(NamedTuple):
  """An expert for every token, and for each token some out of a pool of E.

  Which change a token gets depends on it, so this is no change of a weight: see
  `adapters.experts`. A client works with the experts that it holds.
  """

  shared: LowRank  # the expert of every token
  pool: LowRank  # [L, E, ...]
  router: Any  # [L, D, R]
  held: Any  # [L, E] uint8, 1 for the experts that the client holds


class Routing(NamedTuple):
  """What a router tells of a batch: see `adapters.experts.added`."""

  balance: Any  # [L] how unevenly tokens go to experts, 1 where evenly
  experts: Any  # [L, E, R] sum over the tokens of A_e x
  tokens: Any  # [L, R] sum over the tokens of P x
  count: Any  # [L] tokens


class Adapter(NamedTuple):
  """A parameter-efficient change of the base.

  `init(key, base) -> params`; `merge(base, params) -> base` writes the change
  into the weights; `fold(base, params) -> (base, params)` writes only what is
  frozen and dense (residuals), once a round, outside `vmap`.
  """

  init: Callable[[Key, Base], Params]
  merge: Callable[[Base, Params], Base]
  fold: Callable[[Base, Params], tuple[Base, Params]]


# -------------------------------------------------------------------- data --


class Example(NamedTuple):
  """One text as a client holds it.

  `loss_mask[t]` says that token t is to be learned: predicted from the tokens
  before it. Token 0 has nothing before it and never counts. A text to be
  classified has a label, and no token of it is to be learned.
  """

  tokens: np.ndarray  # [T] int32
  loss_mask: np.ndarray  # [T] bool
  label: int | None = None  # the number of its class
  types: np.ndarray | None = None  # [T] int32: 0 in a first text, 1 in a second


class Population(NamedTuple):
  """The federation's data: N clients that train, and clients that never do.

  A client's id is its place in `names`, which is sorted: the id does not
  depend on the order of the records in a file.
  """

  names: tuple[str, ...]  # [N]
  train: tuple[tuple[Example, ...], ...]  # [N], each at least one example
  heldout: tuple[tuple[Example, ...], ...]  # [N], the same clients' other texts
  new_names: tuple[str, ...] = ()  # clients that no round trains on
  new: tuple[tuple[Example, ...], ...] = ()  # all texts of each of them
  report: Mapping[str, Any] = {}  # what was left out and why; histogram


class Batch(NamedTuple):
  """Token arrays of one step, [..., B, T]; rows may hold several texts.

  `segments` is 0 on padding and 1, 2, ... on the texts packed in a row;
  `positions` restart with every text. A step without any loss token is padding
  and changes nothing. Texts to be classified stand one a row, with a label; -1
  marks a row of padding.
  """

  tokens: Any  # int32
  loss_mask: Any  # bool
  segments: Any  # int32
  positions: Any  # int32
  label: Any = None  # [..., B] int32, where texts are classified
  types: Any = None  # int32: which of two texts a token is of


# ----------------------------------------------------------------- clients --


class Draw(NamedTuple):
  """Who takes part in a round.

  `ids[k] == -1` is padding (fewer clients were available than asked for);
  `reports[k]` is False for padding and for a client that drops out.
  """

  ids: np.ndarray  # [K] int32
  reports: np.ndarray  # [K] bool


Sampler = Callable[[int], Draw]  # round -> who; pure, so a resumed run agrees


class Label(enum.Enum):
  """What happens to a leaf of the parameters."""

  SHARED = 'shared'  # trained by clients, sent, aggregated
  PRIVATE = 'private'  # trained by a client and kept by it
  FROZEN = 'frozen'  # trained by nobody; absent from updates


Shared, Private, Frozen = Label.SHARED, Label.PRIVATE, Label.FROZEN


class Reports(NamedTuple):
  """What the clients of a population last told, for plans on the host."""

  values: Any  # [N, ...], zeros for a client that never reported
  round: Any  # [N] int32: when, -1 for never


class Masks(NamedTuple):
  """Which entries a client holds, and which of those it may change.

  Both have the structure of the parameters with `None` on frozen leaves. A
  leaf is boolean and broadcasts to its parameter from the right ([R] masks
  ranks). A held-out entry is zero for the client; an untrained one keeps the
  value received.
  """

  held: Any
  trained: Any


class ClientState(NamedTuple):
  """What a client keeps between rounds; often nothing at all."""

  private: Any = None  # private leaves, None elsewhere
  local: Any = ()  # of the local update: control variates, optimizer moments
  upload: Any = ()  # of the upload: what compression left behind
  seen: Any = ()  # what of the rule's broadcasts the client has: `num_bytes`


class Scope(NamedTuple):
  """What a client trains, shares and keeps.

  `labels(params)` gives a `Label` a leaf, and `mask(start, profile, state,
  round, key) -> Masks` runs inside the round. What the host decides between
  rounds (knapsacks, searches) reaches it in the profile: `server.planned`.
  """

  labels: Callable[[Params], Any]
  mask: Callable[[Params, Any, ClientState, jax.Array, Key], Masks]


class Cohort(NamedTuple):
  """The clients of one round, stacked; rows that are padding are not valid."""

  ids: Any  # [K] int32
  batches: Any  # Batch of [K, S, B, T], or any pytree with those first axes
  weight: Any  # [K] float32: examples, tokens, or ones
  valid: Any  # [K] bool
  profiles: Any = ()  # [K, ...] capacities: rank, layers, bytes
  states: Any = ClientState()  # ClientState of [K, ...]


# ------------------------------------------------------------------- local --


class Model(NamedTuple):
  """A network as two pure functions, so that logits can be computed late.

  `hidden(base, params, batch) -> [B, T, D]`;
  `logits(base, params, hidden [..., D]) -> [..., V]` in float32.
  """

  hidden: Callable[[Base, Params, Batch], jax.Array]
  logits: Callable[[Base, Params, jax.Array], jax.Array]


class LossSum(NamedTuple):
  """A loss as a sum and a count: means of parts then compose exactly."""

  total: jax.Array  # [] float32, nats
  count: jax.Array  # [] float32, tokens (0 marks a padding step)
  correct: jax.Array  # [] float32, tokens whose arg max is right


Loss = Callable[[Base, Params, Any, Key], LossSum]  # (base, params, batch, key)


class ClientOutput(NamedTuple):
  """What comes of training.

  `metrics` has 'loss' and 'tokens' at least. 'weight', if it is there, says
  how much the client counts in this round, in place of `Cohort.weight`;
  'report', a pytree, is what it tells the server for the next plan.
  """

  update: Update  # end - start on trained leaves, None on frozen ones
  masks: Masks  # of what it trained; a method may narrow those that it got
  state: Any  # ClientState.local
  metrics: Mapping[str, jax.Array]


class LocalUpdate(NamedTuple):
  """Training on one client: `vmap` makes it a cohort.

  `init(params) -> state` is what one client keeps;
  `run(base, start, state, batches [S, ...], masks, round, key) ->
  ClientOutput`.
  """

  init: Callable[[Params], Any]
  run: Callable[..., ClientOutput]


# ----------------------------------------------------------------- uploads --


class Codec(NamedTuple):
  """What travels: an upload codes updates, a download codes parameters.

  All four are for one client:
  `init(update) -> state`,
  `encode(update, masks, state, key) -> (message, state)`,
  `decode(message, start, key) -> update` (the same key as `encode`),
  `num_bytes(message, masks) -> ` int32 counts, one a leaf of the message,
  summed on the host: 32 bits do not hold the sum over a cohort.
  """

  init: Callable[[Update], Any]
  encode: Callable[[Update, Masks, Any, Key], tuple[Any, Any]]
  decode: Callable[[Any, Params, Key], Update]
  num_bytes: Callable[[Any, Masks], Any]


Upload = Codec
Download = Codec


class Uploads(NamedTuple):
  """What the server receives, stacked over clients.

  Rows that are not valid hold zeros and have weight zero. A rule that needs
  whole factors takes `tree.whole(uploads)`, never `params + update`: a client
  may have received a masked or compressed start.
  """

  update: Update  # [K, ...]
  start: Params  # [K, ...] what each client received, scales included
  masks: Masks  # [K, ...]
  weight: Any  # [K] float32
  valid: Any  # [K] bool


# ------------------------------------------------------------- aggregators --


class Traits(NamedTuple):
  """What a rule is, so that senseless combinations are refused when built."""

  linear: bool = False  # linear in the updates: secure aggregation may be used
  needs_stack: bool = True  # sees all clients at once: memory grows with K
  changes_basis: bool = False  # factors change meaning: no server moments
  writes_residual: bool = False  # of `LowRank` nodes: needs `Adapter.fold`


class Aggregate(NamedTuple):
  """The outcome of a rule. Not every change is a gradient.

  `delta` meets the server optimizer; `assign` is written as it is. Both have
  the structure of the parameters, `None` where they say nothing. `trained`
  holds booleans that broadcast to the leaves of `delta` from the right: the
  entries that some client trained. `fed_opt` fills it in; the server optimizer
  leaves the other entries and their moments as they are.
  """

  delta: Update
  assign: Any = None
  trained: Any = None


class Aggregator(NamedTuple):
  """A rule on the whole stack [K, ...].

  `init(params, key) -> state`;
  `aggregate(uploads, state, params, key) -> (Aggregate, state)`;
  `num_bytes(state, seen) -> (counts, seen)`: int32 counts of what else has to
  reach a client at the start of the next round, beside the shared leaves, and
  what it has seen then (`None`: nothing). `seen` is what this returned when the
  client last took part, `()` if it never did; it is kept in its `ClientState`;
  `weights(uploads) -> [K]`: how much each client counts in this rule, for
  metrics (`None`: `uploads.weight`).
  """

  init: Callable[[Params, Key], Any]
  aggregate: Callable[[Uploads, Any, Params, Key], tuple[Aggregate, Any]]
  traits: Traits = Traits()  # what it may be combined with
  num_bytes: Callable[[Any, Any], tuple[Any, Any]] | None = None
  weights: Callable[[Uploads], jax.Array] | None = None


class StreamingAggregator(NamedTuple):
  """A rule that eats blocks of clients, so memory stays flat as K grows.

  `init`, `traits`, `num_bytes` and `weights` as in `Aggregator`;
  `zero(params) -> sums`; `accumulate(sums, uploads, state, params) -> sums`;
  `finalize(sums, state, params, key) -> (Aggregate, state)`. Sums are
  additive: those of two blocks may be added, also across devices.
  """

  init: Callable[[Params, Key], Any]
  zero: Callable[[Params], Any]
  accumulate: Callable[[Any, Uploads, Any, Params], Any]
  finalize: Callable[[Any, Any, Params, Key], tuple[Aggregate, Any]]
  traits: Traits = Traits(linear=True, needs_stack=False)
  num_bytes: Callable[[Any, Any], tuple[Any, Any]] | None = None
  weights: Callable[[Uploads], jax.Array] | None = None


AnyAggregator = Aggregator | StreamingAggregator

# ------------------------------------------------------------------ server --

ServerOptimizer = optax.GradientTransformation  # sees -delta


class ServerState(NamedTuple):
  """What the server carries from round to round, and a checkpoint holds."""

  round: Any  # [] int32, rounds done
  params: Params  # what clients are sent, and their private leaves' start
  optimizer: Any  # of the server optimizer: its moments
  aggregator: Any  # of the rule: what it remembers
  key: Any  # the seed's key: rounds fold their number in, it never changes


class FederatedAlgorithm(NamedTuple):
  """A whole method.

  `init(key, params) -> ServerState`;
  `init_client(params) -> ClientState` of a client never seen before;
  `round(state, cohort, base) -> (state, states [K], metrics)`;
  `personal(params, state) -> params` is what a client is served
  (`state=None`: a client never trained on);
  `plan(state) -> state` is host code between rounds (`server.planned`), None
  where nothing is decided there.
  """

  init: Callable[[Key, Params], ServerState]
  init_client: Callable[[Params], ClientState]
  round: Callable[..., tuple[ServerState, ClientState, Metrics]]
  personal: Callable[[Params, ClientState | None], Params]
  plan: Callable[[ServerState], ServerState] | None = None


# ------------------------------------------------------------------- evals --

# (base, params, personal, data, key) -> {'evals/name': number}
Evaluator = Callable[..., Mapping[str, float]]
