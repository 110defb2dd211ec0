"""The contracts: types of the values that pass between all rooms.

They stand in the order in which data flows:

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
the structure of the parameters with `None` in place of its absent leaves, so
that `jax.tree.map` over it visits only the others (`tree.merge` puts the parts
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
Params = Any  # owned and broadcast by the server; never the base
Update = Any  # end - start, with the start that this client received
Key = jax.Array  # a typed PRNG key (threefry)
Metrics = Mapping[str, jax.Array]  # 'room/name' -> array


class Error(ValueError):
  """A mistake of the user, described in one sentence (programs exit with 1).

  A notebook shows the sentence without a traceback.

  >>> raise Error('config: num_rounds is 0; it must be at least 1.')
  Traceback (most recent call last):
    ...
  fedjax_llm.types.Error: config: num_rounds is 0; it must be at least 1.
  """

  def _render_traceback_(self) -> list[str]:  # called by IPython
    return [f'Error: {self}']


def known(number: Any) -> bool:
  """Returns True for a Python number and False for a JAX tracer.

  A builder inside `jit` or `grad` may get a traced number in place of a float
  (`sweep` trains runs that differ in it as one program). Builders check the
  range of known numbers alone; for a tracer the caller has to.

  >>> known(0.5), jax.jit(lambda x: jax.numpy.asarray(known(x)))(0.5).item()
  (True, False)
  """
  return not isinstance(number, Tracer)


# ---------------------------------------------------------------- adapters --


class Adapter(NamedTuple):
  """A parameter-efficient change of the base.

  `init(key, base) -> params`; `merge(base, params) -> base` writes the change
  into the weights; `fold(base, params) -> (base, params)` writes only its
  frozen dense parts (residuals), once a round, outside `vmap`.
  """

  init: Callable[[Key, Base], Params]
  merge: Callable[[Base, Params], Base]
  fold: Callable[[Base, Params], tuple[Base, Params]]
  peft: Mapping[str, Any] = {}  # fields of PEFT's config beside the factors


# -------------------------------------------------------------------- data --


class Example(NamedTuple):
  """One text of a client, as tokens.

  `loss_mask[t]` is True where the loss includes token t, predicted from the
  tokens before it. Token 0 has nothing before it and never counts. A text to be
  classified has a label, and its loss includes no token.
  """

  tokens: np.ndarray  # [T] int32
  loss_mask: np.ndarray  # [T] bool
  label: int | None = None  # the number of its class
  types: np.ndarray | None = None  # [T] int32: 0 in a first text, 1 in a second


class Pair(NamedTuple):
  """Two replies to one prompt, of which a client prefers the first.

  The references are log-probabilities of the replies, in nats, under the
  reference model of a preference loss; a task's `prepare` may fill them in, and
  the prompt with the preferred reply of another pair (KTO).
  """

  chosen: Example  # the prompt with the preferred reply
  rejected: Example  # the prompt with the other reply
  reference_chosen: float = 0.0  # log p(chosen reply | prompt)
  reference_rejected: float = 0.0  # log p(rejected reply | prompt)
  mismatched: Example | None = None  # the prompt with a reply to another
  reference_mismatched: float | None = None  # its log p(reply | prompt)


class Image(NamedTuple):
  """One picture of a client, as pixels."""

  pixels: np.ndarray  # [H, W, C]
  label: int | None = None  # the number of its class


class ImageWithText(NamedTuple):
  """A picture and a text about it."""

  pixels: np.ndarray  # [H, W, C]
  text: Example  # the text about it


class Either(NamedTuple):
  """A picture, a text, or both, of one class."""

  pixels: np.ndarray | None  # [H, W, C]
  text: Example | None
  label: int  # the number of its class


class Population(NamedTuple):
  """The data of N clients that train, and of clients that never train.

  A client's id is its place in `names`, which is sorted: the id does not
  depend on the order of the records in a file. Examples are of one kind:
  `Example`, `Pair`, `Image`, `ImageWithText`, or a task's own.
  """

  names: tuple[str, ...]  # [N]
  train: tuple[tuple[Any, ...], ...]  # [N], each at least one example
  heldout: tuple[tuple[Any, ...], ...]  # [N], the same clients' other examples
  new_names: tuple[str, ...] = ()  # clients that no round trains on
  new: tuple[tuple[Any, ...], ...] = ()  # all examples of each of them
  report: Mapping[str, Any] = {}  # records left out, with reasons; histogram
  pooled: bool = False  # True: one client trains, on the examples of all


@jax.tree_util.register_static
class Bound(int):
  """A number that belongs to the structure of a batch, not to its arrays.

  `jax.tree.map` passes it on unchanged, and a compiled program holds it as a
  constant.

  >>> jax.tree.leaves(Bound(3)), jax.tree.map(lambda x: x + 1, Bound(3))
  ([], 3)
  """


# The kinds of batches. Each has four methods on its contents:
#   real() -> [...] bool     which steps hold anything but padding
#   places() -> int          places of one step, padding included
#   used() -> [...] int      places of each step that are not padding
#   learned() -> [...] int   terms of the loss in each step
# with [...] the axes before B. A user's own kind is any NamedTuple with these
# four; `batching` calls them. Pytrees without them count as full.


class Batch(NamedTuple):
  """Token arrays of one step, [..., B, T]; rows may hold several texts.

  `segments` is 0 on padding and 1, 2, ... on the texts packed in a row;
  `positions` restart with every text. A step without any loss token is padding
  and changes nothing. Texts to be classified stand one a row, with a label; -1
  marks a row of padding.

  `bound` is an upper bound on the tokens with a loss in one step, not counting
  the first column: logits are computed for that many places. None: for all
  places. `batching.bounded` sets it and checks it on the host.
  """

  tokens: Any  # int32
  loss_mask: Any  # bool
  segments: Any  # int32
  positions: Any  # int32
  label: Any = None  # [..., B] int32, where texts are classified
  types: Any = None  # int32: 0 in the first of two texts, 1 in the second
  bound: Any = None  # a `Bound`, static

  def real(self) -> Any:
    return (self.segments > 0).any((-2, -1))

  def places(self) -> int:
    return self.segments.shape[-2] * self.segments.shape[-1]

  def used(self) -> Any:
    return (self.segments > 0).sum((-2, -1))

  def learned(self) -> Any:
    if self.label is None:
      return self.loss_mask.sum((-2, -1))
    return (self.label >= 0).sum(-1)


class Pairs(NamedTuple):
  """Preferred and rejected replies, a pair a row: see `Pair`."""

  chosen: Batch  # [..., B, T]
  rejected: Batch  # [..., B, T]
  reference_chosen: Any  # [..., B] float32, nats
  reference_rejected: Any  # [..., B] float32, nats
  mismatched: Any = None  # [..., B, T], where the loss needs it
  reference_mismatched: Any = None  # [..., B] float32, nats

  def real(self) -> Any:
    return self.chosen.real() | self.rejected.real()

  def places(self) -> int:
    return sum(text.places() for text in self._texts())

  def used(self) -> Any:
    first, *others = (text.used() for text in self._texts())
    return sum(others, start=first)

  def _texts(self) -> list[Batch]:
    texts = (self.chosen, self.rejected, self.mismatched)
    return [text for text in texts if text is not None]

  def learned(self) -> Any:
    return (self.chosen.segments > 0).any(-1).sum(-1)


class Images(NamedTuple):
  """Pictures with classes; a label of -1 is unknown."""

  pixels: Any  # [..., B, H, W, C]
  label: Any  # [..., B] int32
  present: Any  # [..., B] bool, False on rows of padding

  def real(self) -> Any:
    return (self.present > 0).any(-1)

  def places(self) -> int:
    return self.present.shape[-1]

  def used(self) -> Any:
    return (self.present > 0).sum(-1)

  def learned(self) -> Any:
    return ((self.present > 0) & (self.label >= 0)).sum(-1)


class ImagesWithTexts(NamedTuple):
  """Pictures, each with the text of the same row."""

  pixels: Any  # [..., B, H, W, C]
  text: Batch  # [..., B, T]

  def real(self) -> Any:
    return self.text.real()

  def places(self) -> int:
    return self.text.places()

  def used(self) -> Any:
    return self.text.used()

  def learned(self) -> Any:
    return self.text.learned()


class Eithers(NamedTuple):
  """Pictures and texts with classes; a row may lack one of the two.

  Rows without a text are padding in `text`. Without any picture in a run's
  examples `pixels` is [..., B, 0, 0, 0].
  """

  pixels: Any  # [..., B, H, W, C]
  pictured: Any  # [..., B] bool, False on rows without a picture
  text: Batch  # [..., B, T]
  label: Any  # [..., B] int32, -1 on rows of padding

  def worded(self) -> Any:
    """Returns True for rows with a text, [..., B]."""
    return (self.text.segments > 0).any(-1)

  def real(self) -> Any:
    return (self.label >= 0).any(-1)

  def places(self) -> int:
    return self.text.places() + self.pictured.shape[-1]

  def used(self) -> Any:
    return self.text.used() + (self.pictured > 0).sum(-1)

  def learned(self) -> Any:
    return (self.pictured > 0).sum(-1) + self.worded().sum(-1)


# ----------------------------------------------------------------- clients --


class Draw(NamedTuple):
  """The clients of a round.

  `ids[k] == -1` is padding (fewer clients were available than asked for);
  `reports[k]` is False for padding and for a client that drops out.
  `started[k]` is the round of the parameters that the client starts from, in
  asynchronous methods (`fed_opt(history=V)`). `steps[k]` is the number of local
  steps that the client has time for, at most. `tier[k]` is the group of clients
  of one speed that it belongs to, 0 the fastest; a cohort has it in its
  profiles, under that name.
  """

  ids: np.ndarray  # [K] int32
  reports: np.ndarray  # [K] bool
  started: np.ndarray | None = None  # [K] int32; None: this round
  steps: np.ndarray | None = None  # [K] int32; None: all
  tier: np.ndarray | None = None  # [K] int32; None: there are no tiers


Sampler = Callable[[int], Draw]  # of a round; pure, so a resumed run agrees


class Label(enum.Enum):
  """Whether a leaf of the parameters is trained, sent, kept or frozen."""

  SHARED = 'shared'  # trained by clients, sent, aggregated
  PRIVATE = 'private'  # trained by a client and kept by it
  FROZEN = 'frozen'  # not trained by clients; absent from updates


Shared, Private, Frozen = Label.SHARED, Label.PRIVATE, Label.FROZEN


class Context(NamedTuple):
  """The client, the round, keys and the server's news, passed to each station.

  Scopes, local updates and codecs get one for a single client; `key` differs by
  station, `round_key` is the same for all clients and for the server. Keys are
  derived from (seed, round, client), never from a position.
  """

  client: Any = 0  # [] int32, the id in the population
  round: Any = 0  # [] int32, rounds done before this one
  key: Any = None  # a PRNG key
  profile: Any = ()  # the client's capacities: rank, layers, bytes
  news: Any = None  # `Aggregator.broadcast` of the round before
  peers: Any = None  # [K] int32, ids of all who agreed; for additive codecs
  reported: Any = None  # [K] bool, of `peers`; for `decode` of a sum
  round_key: Any = None  # a PRNG key of (seed, round): common randomness


class Reports(NamedTuple):
  """The last report of every client of a population, for plans on the host."""

  values: Any  # [N, ...], zeros for a client that never reported
  round: Any  # [N] int32: the round of the report, -1 for never


class Masks(NamedTuple):
  """The entries that a client holds, and those of them that it may change.

  Both have the structure of the parameters with `None` on frozen leaves. A
  leaf is boolean and broadcasts to its parameter from the right ([R] masks
  ranks). A held-out entry is zero for the client; an untrained one keeps the
  value received.
  """

  held: Any
  trained: Any


class ClientState(NamedTuple):
  """The state that a client keeps between rounds; often empty."""

  private: Any = None  # private leaves, None elsewhere
  local: Any = ()  # of the local update: control variates, optimizer moments
  upload: Any = ()  # of the upload: the error that compression left
  seen: Any = ()  # the rule's broadcasts that it has: `Aggregator.num_bytes`


class Scope(NamedTuple):
  """The leaves and entries that a client trains, shares and keeps.

  `labels(params)` returns a `Label` a leaf, and `mask(start, state, context) ->
  Masks` runs inside the round. Plans that the host makes between rounds
  (knapsacks, searches) reach it in `context.profile`: `server.planned`.
  """

  labels: Callable[[Params], Any]
  mask: Callable[[Params, ClientState, Context], Masks]


class Cohort(NamedTuple):
  """The clients of one round, stacked; rows that are padding are not valid."""

  ids: Any  # [K] int32
  batches: Any  # Batch of [K, S, B, T], or a pytree of [K, S, ...]
  weight: Any  # [K] float32: examples, tokens, or ones
  valid: Any  # [K] bool
  profiles: Any = ()  # [K, ...] capacities: rank, layers, bytes
  states: Any = ClientState()  # ClientState of [K, ...]
  started: Any = None  # [K] int32, see `Draw.started`


# ------------------------------------------------------------------- local --


class Model(NamedTuple):
  """A network as two pure functions: logits can be computed where needed.

  `hidden(base, params, batch) -> [B, T, D]`;
  `logits(base, params, hidden [..., D]) -> [..., V]` in float32;
  `hidden_with_statistics(base, params, batch) -> (hidden, statistics)` also
  returns the statistics of the nodes that have any (`nodes.Routing` of
  `nodes.Experts`), in the tree of the adapter with None elsewhere. It is None
  for a network without such a function.

  `layers(base, params, batch, numbers, hidden=None, *, ends=True)` computes the
  layers of these numbers alone, from the states `hidden` of the layers below or
  from the tokens if None; with `ends` as the last ones of the network, so that
  `hidden(...)` is `layers(..., range(c, L), layers(..., range(c), ends=False))`
  for every cut c. None for a network that cannot be cut.

  `read(hidden, batch) -> [B, D]` is the state of each text that a head of whole
  texts reads: of a causal network that of the last token. None: that of the
  first token.
  """

  hidden: Callable[[Base, Params, Batch], jax.Array]
  logits: Callable[[Base, Params, jax.Array], jax.Array]
  hidden_with_statistics: (
    Callable[[Base, Params, Batch], tuple[jax.Array, Any]] | None
  ) = None
  layers: Callable[..., jax.Array] | None = None
  read: Callable[[jax.Array, Any], jax.Array] | None = None


class LossSum(NamedTuple):
  """A loss as a sum and a count: means of parts then compose exactly."""

  total: jax.Array  # [] float32, nats
  count: jax.Array  # [] float32, tokens (0 marks a padding step)
  correct: jax.Array  # [] float32, tokens with the right arg max


Loss = Callable[[Base, Params, Any, Key], LossSum]  # (base, params, batch, key)


# The gradient of one step, an argument of `local.sgd`:
# (loss, base, trained, start, batch, key) -> (grads, LossSum), where the grads
# are those of the token mean and have the structure of `trained`.
Gradient = Callable[
  [Loss, Base, Params, Params, Any, Key], tuple[Params, LossSum]
]


class Work(NamedTuple):
  """Amounts of work that one client did in a round; parts add up."""

  tokens: Any = 0.0  # [] float32, learned: tokens, labels, pairs
  steps: Any = 0  # [] int32, steps taken; steps of padding are none
  used: Any = None  # [] float32, places of its texts that held a token
  turns: Any = 0  # [] int32, steps computed, those of padding too


class ClientOutput(NamedTuple):
  """One client's result: update, masks, state and metrics.

  `metrics` are scalars: 'loss' and 'accuracy' are means over the client's
  tokens and averaged so over clients, any other is averaged over clients; all
  are reported as 'local/NAME'.
  """

  update: Update  # end - start on trained leaves, None on frozen ones
  masks: Masks  # the entries trained; a method may narrow those it received
  state: Any = ()  # ClientState.local
  private: Any = None  # new values of private leaves that no update moves
  weight: Any = None  # [] its weight, in place of `Cohort.weight`
  report: Any = None  # a pytree for the server's next plan (`server.planned`)
  work: Work = Work()  # the amounts that it computed
  metrics: Mapping[str, Any] = {}


class LocalUpdate(NamedTuple):
  """Training on one client: `vmap` makes it a cohort.

  `init(params) -> state` is the state that one client keeps;
  `run(base, start, state, batches [S, ...], masks, context) -> ClientOutput`.
  """

  init: Callable[[Params], Any]
  run: Callable[..., ClientOutput]


# ----------------------------------------------------------------- uploads --


class Codec(NamedTuple):
  """A coding of messages: an upload codes updates, a download parameters.

  All four are for one client:
  `init(update) -> state`,
  `encode(update, masks, state, context) -> (message, state)`,
  `decode(message, start, context) -> update` (the context of `encode`),
  `num_bytes(message, masks) -> ` int32 counts, one a leaf of the message,
  summed on the host: 32 bits do not hold the sum over a cohort.

  The messages of an `additive` upload are summed before they are decoded
  (secure sums, seeds, sketches). A client then encodes its weight times its
  update, and the server decodes the sum once, with a context that has `peers`
  and `reported`; only rules that are `linear` take it.

  A `private` codec hides the update: a client may then send nothing else that
  depends on its texts (reports, weights or masks of its own).

  A `lossy` codec may decode other values than it encoded. A download is the
  same for all clients and has no state: `encode` gets that of `init`.
  """

  init: Callable[[Update], Any]
  encode: Callable[[Update, Masks, Any, Context], tuple[Any, Any]]
  decode: Callable[[Any, Params, Context], Update]
  num_bytes: Callable[[Any, Masks], Any]
  additive: bool = False
  lossy: bool = False
  private: bool = False


Upload = Codec
Download = Codec


class Uploads(NamedTuple):
  """The updates that the server receives, stacked over clients.

  Rows that are not valid hold zeros and have weight zero. A rule that needs
  whole factors takes `tree.whole(uploads)`, never `params + update`: a client
  may have received a masked or compressed start.
  """

  update: Update  # [K, ...]
  start: Params  # [K, ...] as each client received it, scales included
  masks: Masks  # [K, ...]
  weight: Any  # [K] float32
  valid: Any  # [K] bool
  ids: Any = None  # [K] int32
  profiles: Any = ()  # [K, ...]
  staleness: Any = None  # [K] int32, rounds since the client started
  reports: Any = None  # [K, ...] `ClientOutput.report`


# ------------------------------------------------------------- aggregators --


class Traits(NamedTuple):
  """Properties of a rule, each of which `fed_opt` or another rule enforces."""

  linear: bool = False  # uses only sum_k w_k u_k: additive uploads are allowed
  changes_basis: bool = False  # factors change meaning: no server moments
  writes_residual: bool = False  # of `LowRank` nodes: needs `Adapter.fold`
  # Depends on lengths and angles alone: `aggregators.in_products` takes it.
  rotates: bool = False
  always: bool = False  # acts in a round without reports too, as noise must
  # `finalize` of a rule that clips and noises: no other rule may wrap it, and
  # no upload may be summed before it.
  private: Any = None


class Aggregate(NamedTuple):
  """The outcome of a rule: a change for the optimizer, values to assign.

  The server optimizer takes `delta`; `assign` is written as it is. Both have
  the structure of the parameters, `None` for absent leaves. `trained` holds
  booleans that broadcast to the leaves of `delta` from the right: the entries
  that some client trained. `fed_opt` fills it in; the server optimizer leaves
  the other entries and their moments as they are.
  """

  delta: Update
  assign: Any = None
  trained: Any = None


class Aggregator(NamedTuple):
  """A rule on the whole stack [K, ...].

  `init(params, key) -> state`;
  `aggregate(uploads, state, params, key) -> (Aggregate, state)`;
  `broadcast(state) -> ` arrays that every client of the next round receives
  (`Context.news`); their bytes are counted as downloads;
  `num_bytes(state, seen) -> (counts, seen)`: int32 counts of the bytes that a
  client receives at the start of the next round beside the shared leaves (such
  as changes of the base), and the client's new `seen`. The argument `seen` is
  the value returned when the client last took part, `()` if it never did; it is
  kept in its `ClientState`;
  `weights(uploads) -> [K]`: the weight of each client in this rule, for metrics
  (`None`: `uploads.weight`).
  """

  init: Callable[[Params, Key], Any]
  aggregate: Callable[[Uploads, Any, Params, Key], tuple[Aggregate, Any]]
  traits: Traits = Traits()  # they decide on its combinations
  num_bytes: Callable[[Any, Any], tuple[Any, Any]] | None = None
  weights: Callable[[Uploads], jax.Array] | None = None
  broadcast: Callable[[Any], Any] | None = None


class StreamingAggregator(NamedTuple):
  """A rule on blocks of clients in turn, so memory stays flat as K grows.

  `init`, `traits`, `num_bytes`, `broadcast` and `weights` as in `Aggregator`;
  `zero(params) -> sums`; `accumulate(sums, uploads, state, params) -> sums`;
  `finalize(sums, state, params, key) -> (Aggregate, state)`. Sums are
  additive: those of two blocks may be added, also across devices.
  """

  init: Callable[[Params, Key], Any]
  zero: Callable[[Params], Any]
  accumulate: Callable[[Any, Uploads, Any, Params], Any]
  finalize: Callable[[Any, Any, Params, Key], tuple[Aggregate, Any]]
  traits: Traits = Traits()
  num_bytes: Callable[[Any, Any], tuple[Any, Any]] | None = None
  weights: Callable[[Uploads], jax.Array] | None = None
  broadcast: Callable[[Any], Any] | None = None


AnyAggregator = Aggregator | StreamingAggregator

# ------------------------------------------------------------------ server --

ServerOptimizer = optax.GradientTransformation  # sees -delta

# (uploads, key) -> uploads: malicious clients, between clients and the rule.
Adversary = Callable[[Uploads, Key], Uploads]


class ServerState(NamedTuple):
  """The server's state from round to round, which a checkpoint holds."""

  round: Any  # [] int32, rounds done
  params: Params  # sent to clients; private leaves: their start
  optimizer: Any  # of the server optimizer: its moments
  aggregator: Any  # the rule's state
  key: Any  # the seed's key: rounds fold their number in, it never changes
  history: Any = ()  # [V, ...] parameters of the last rounds, the newest first


# (state, base, data, key) -> state: a traced phase of the server after the
# rule, on data of its own, an argument of the round.
After = Callable[[ServerState, Base, Any, Key], ServerState]


class RoundInfo(NamedTuple):
  """The outcome of a round beside its state."""

  reported: Any  # [K] bool, clients that count
  finite: Any  # [K] bool, False: left out, for a value that is not finite
  bytes_up: Any  # [K, leaves] int32, summed on the host
  bytes_down: Any  # [K, leaves] int32
  metrics: Metrics  # 'room/name' -> array, mostly scalars
  reports: Any = None  # [K, ...] `ClientOutput.report`, for plans


class FederatedAlgorithm(NamedTuple):
  """A whole federated method as pure functions.

  `init(key, params) -> ServerState`;
  `init_client(params) -> ClientState` of a client that never took part;
  `round(state, cohort, base, data=None) -> (state, states [K], RoundInfo)`;
  `personal(params, state) -> params` returns a client's own model
  (`state=None`: a client that never trained);
  `train(state, cohort, base) -> (Uploads, states [K], RoundInfo)` and
  `aggregate(state, uploads, base, data=None) -> (state, metrics)` are the two
  halves of `round`, None where a method has no halves (split learning);
  `plan(state) -> state` is host code between rounds (`server.planned`), None
  for a method without plans;
  `exchanged(params, base, batches) -> (up, down)` counts the bytes that a
  client sends and receives within S steps that hold no padding, of batches
  [K, S, ...] or their shapes; None for methods that exchange nothing there.
  """

  init: Callable[[Key, Params], ServerState]
  init_client: Callable[[Params], ClientState]
  round: Callable[..., tuple[ServerState, ClientState, RoundInfo]]
  personal: Callable[[Params, ClientState | None], Params]
  train: Callable[..., tuple[Uploads, ClientState, RoundInfo]] | None = None
  aggregate: Callable[..., tuple[ServerState, Metrics]] | None = None
  plan: Callable[[ServerState], ServerState] | None = None
  exchanged: Callable[[Params, Base, Any], tuple[int, int]] | None = None


# ------------------------------------------------------------------- evals --

# (base, params, store of client states, key) -> {'evals/name': number}: see
# `run.evaluators`.
Evaluator = Callable[..., Mapping[str, Any]]
