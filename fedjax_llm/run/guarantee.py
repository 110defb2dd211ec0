"""The section `privacy` of a config, coupled with all that it depends on.

`of` returns the plan, `applied` the parts of the method with their noise, and
`watched` the algorithm, with checks that nothing of the clients passes by.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_llm import clients, local, privacy, uploads
from fedjax_llm.local import per_example
from fedjax_llm.run import builders, clock
from fedjax_llm.types import Codec, Error, FederatedAlgorithm
from fedjax_llm.uploads import secure

# Adversaries in which the message of a client depends on that client alone.
_ALONE = ('free_riders', 'gaussian', 'sign_flip')
# The sampler that a mechanism counts with; None: any.
_SAMPLERS = {
  'central': ('poisson', 'samples in which each client is drawn on its own'),
  'correlated': ('rotating', 'the rounds between two turns of a client'),
}


def mechanism(conf: Mapping[str, Any]) -> str:
  """Returns the mechanism that a config with the section `privacy` names."""
  return (conf.get('privacy') or {}).get('mechanism', 'central')


def example_rate(conf: Mapping[str, Any]) -> float | None:
  """Returns the probability of an example in a step; None: there is none."""
  return (conf.get('privacy') or {}).get('example_rate')


def part(conf: Mapping[str, Any]) -> str | None:
  """Returns the section that privacy brings itself; None without privacy."""
  if not conf.get('privacy'):
    return None
  return 'aggregator' if mechanism(conf) in _SAMPLERS else 'upload'


def check(conf: Mapping[str, Any]) -> None:
  """Raises `Error` for a config whose sections break its section `privacy`."""
  if not conf.get('privacy'):
    return
  kind, name = mechanism(conf), builders.named(conf.get('clients'))
  cohort = conf.get('cohort') or {}
  if kind in _SAMPLERS and name != _SAMPLERS[kind][0]:
    raise Error(
      f'clients.name is {name!r}, and privacy counts {_SAMPLERS[kind][1]}: '
      f'set clients.name={_SAMPLERS[kind][0]}.'
    )
  if name in clock.TIMED:
    raise Error(
      f'clients.name is {name!r}, and which clients take part follows their '
      'work: privacy needs a schedule that no text changes, such as '
      'clients.name=uniform.'
    )
  if name == 'by_value':
    raise Error(
      "clients.name is 'by_value', and which clients take part follows values "
      'that were computed from their texts: privacy needs a schedule that no '
      'text changes, such as clients.name=uniform.'
    )
  if kind == 'central' and (conf.get('clients') or {}).get('rate') is None:
    raise Error(
      'clients.rate is missing: privacy counts with the probability that a '
      'client is drawn.'
    )
  if kind == 'examples' and example_rate(conf) is None:
    raise Error(
      'privacy.example_rate is missing: it is the probability that an example '
      'is in a step.'
    )
  if kind == 'examples' and conf.get('selection'):
    raise Error(
      'selection: the scores of some examples decide whether others are '
      'trained on, and privacy counts examples on their own: leave it out.'
    )
  by = cohort.get('weight_by', 'examples')
  if by != 'uniform' and not (kind == 'examples' and by == 'examples'):
    raise Error(
      f'cohort.weight_by is {by!r}, and with privacy all clients count the '
      'same: set cohort.weight_by=uniform.'
    )
  if conf.get('aggregator') and kind in ('central', 'correlated'):
    name = builders.named(conf['aggregator'])
    raise Error(
      f'aggregator.name is {name!r}, and privacy brings the only rule whose '
      'sensitivity is known, a sum of clipped updates: leave the section '
      'aggregator out.'
    )
  if conf.get('upload') and kind == 'distributed':
    raise Error(
      f'upload.name is {builders.named(conf["upload"])!r}, and privacy brings '
      'a secure sum of whole numbers: leave the section upload out.'
    )
  _check_adversary(conf.get('adversary'))
  if builders.named(conf.get('partition')) == 'pooled':
    raise Error(
      "partition.name is 'pooled': privacy protects clients, and pooled texts "
      'have only one.'
    )


def _check_adversary(section: Any) -> None:
  name = builders.named(section)
  alone = name in _ALONE or (
    name == 'model_replacement' and section.get('scale') is not None
  )
  if name is not None and not alone:
    raise Error(
      f'adversary.name is {name!r}, and privacy bounds what one client '
      'changes: an attacker whose message depends on other clients repeats '
      f'their texts. Those that act alone are {", ".join(_ALONE)}, and '
      'model_replacement with a scale.'
    )


def of(conf: Mapping[str, Any], num_clients: int) -> Any:
  """Returns the plan of a config with N clients; None without privacy."""
  check(conf)
  if not conf.get('privacy'):
    return None
  draws, cohort = conf['clients'], conf.get('cohort') or {}
  size = draws.get('cohort_size') or num_clients
  more = {}
  if mechanism(conf) != 'central':
    drawn = json.dumps(builders.plain_dicts(draws), sort_keys=True)
    more['turns'] = _turns(
      drawn, num_clients, conf['num_rounds'], conf.get('seed', 0)
    )
  return builders.build(
    conf['privacy'],
    privacy.section,
    rate=float(draws.get('rate') or 1.0),
    num_clients=num_clients,
    cohort_size=size,
    num_rounds=conf['num_rounds'],
    separation=-(-num_clients // size),
    batch_size=cohort.get('batch_size', 1),
    num_steps=cohort.get('num_steps', 1),
    **more,
  )


@functools.lru_cache(maxsize=64)
def _turns(
  draws: str, num_clients: int, num_rounds: int, seed: int
) -> tuple[int, ...]:
  """Returns the most turns of one client in 0, 1, ..., T rounds.

  The schedule depends on no text, so it is counted as it is. A sampler of one's
  own, or one that reads sizes, counts as if every client were in every round.
  """
  section = json.loads(draws)
  if section.get('name') not in ('cyclic', 'full', 'poisson', 'rotating',
                                 'uniform'):  # fmt: skip
    return tuple(range(num_rounds + 1))
  sampler = builders.build(
    section, clients.sampling, num_clients=num_clients, sizes=None, seed=seed
  )
  counts, most = np.zeros(num_clients, int), [0]
  for number in range(num_rounds):
    ids = sampler(number).ids
    counts[ids[ids >= 0]] += 1
    most.append(int(counts.max()))
  return tuple(most)


class Uses:
  """Counts calls while a round is traced, to check that noise is not missed."""

  def __init__(self) -> None:
    self.descents = 0  # of the client that is traced
    self.codec = False  # the codec was asked for its state


def applied(
  conf: Mapping[str, Any], num_clients: int, parts: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
  """Returns the parts of a method with their noise, and the check of its use.

  The check is an argument of `watched`, None without privacy. What only reads a
  trained state (`parts['loss']` is None) needs no accountant.
  """
  check(conf)
  if not conf.get('privacy'):
    return parts, None
  kind, uses = mechanism(conf), Uses()
  if parts['loss'] is None:
    rule = {
      'central': lambda: privacy.noisy_mean(1.0, 1.0, 1.0),
      'correlated': lambda: privacy.correlated_mean(
        1.0, 1.0, 1.0, _bands(conf, num_clients), stream=_stream(conf)
      ),
    }
    if kind in rule:
      parts = parts | {'aggregator': rule[kind]()}
    return parts, uses
  plan = of(conf, num_clients)
  if kind in ('central', 'correlated'):
    return parts | {'aggregator': plan.rule()}, uses
  inner = parts.get('upload') or uploads.identity()
  if kind == 'local':
    codec = privacy.sent.noised(inner, plan.clip, plan.noise_multiplier)
  elif kind == 'distributed':
    codec = privacy.sent.skellam(
      plan.clip, plan.noise_multiplier, plan.least, plan.grid,
      secure.masked, secure.unmasked,
    )  # fmt: skip
  else:
    codec = _once(inner._replace(private=True), uses)
    parts = parts | _by_example(plan, parts, uses)
  return parts | {'upload': _noticed(codec, uses)}, uses


def _bands(conf: Mapping[str, Any], num_clients: int) -> int:
  size = conf['clients'].get('cohort_size') or num_clients
  return conf['privacy'].get('bands') or -(-num_clients // size)


def _stream(conf: Mapping[str, Any]) -> Any:
  """Returns a stream whose state has the shape of the run's; None: banded."""
  matrix = conf['privacy'].get('matrix', 'banded')
  if matrix == 'banded':
    return None
  if matrix == 'tree':
    return privacy.streams.tree(conf['num_rounds'])
  zeros = [0.0] * conf['privacy'].get('buffers', 3)
  return privacy.streams.buffered(zeros, zeros, num_rounds=1)


def _by_example(plan: Any, parts: dict[str, Any], uses: Uses) -> Any:
  if isinstance(parts['loss'], local.Sampled):
    raise Error(
      "privacy.mechanism is 'examples', and the clients of this task sample "
      'replies outside of the gradient whose examples are clipped: take '
      "another task.name, or another mechanism, such as 'central'."
    )
  gradient = per_example.noisy(
    plan.clip,
    plan.noise_multiplier,
    plan.denominator,
    clipping=plan.clipping,
    microbatch=plan.microbatch,
  )

  def begins():
    uses.descents += 1

  made = {
    'loss': per_example.guarded(parts['loss']),
    'optimizer': per_example.private(parts['optimizer'], gradient, begins),
  }
  if (model := parts.get('model')) is not None:
    made['model'] = model._replace(
      hidden=per_example.guarded(model.hidden),
      hidden_with_statistics=model.hidden_with_statistics
      and per_example.guarded(model.hidden_with_statistics),
    )
  return made


def _once(codec: Codec, uses: Uses) -> Codec:
  """Returns the codec; it refuses a client that trained twice in a round."""

  def encode(update, masks, state, context):
    descents, uses.descents = uses.descents, 0
    if descents != 1:
      raise Error(
        f'privacy: the clients of this method train {descents} times on the '
        'texts of a round, and one time is counted: take another method.'
      )
    return codec.encode(update, masks, state, context)

  return codec._replace(encode=encode)


def _noticed(codec: Codec, uses: Uses) -> Codec:
  def init(update):
    uses.codec = True
    return codec.init(update)

  return codec._replace(init=init)


def built(
  part: str | None, name: Any, build: Any, *args: Any, **parts: Any
) -> Any:
  """Returns `build(*args, **parts)`; its errors name the part of privacy.

  `part` is the section that privacy brings, None without privacy.
  """
  try:
    return build(*args, **parts)
  except Error as error:
    if part is None or str(error).startswith('privacy'):
      raise
    raise Error(
      f'privacy brings the {part} of the run, and algorithm.name={name} '
      f'was refused with it: {error}'
    ) from error


def watched(
  algorithm: FederatedAlgorithm,
  name: Any,
  kind: str = 'central',
  uses: Uses | None = None,
) -> FederatedAlgorithm:
  """Returns the algorithm with checks of its guarantee, and its metrics.

  Raises:
    Error: the method plans from reports of clients; from `init`, it does not
      use the rule or the upload of privacy, or its upload keeps a state at the
      clients.
  """
  if algorithm.plan is not None:
    raise Error(
      f'privacy: algorithm.name={name} plans from reports of its clients, '
      'which are neither clipped nor noised: take another method.'
    )
  central = kind in ('central', 'correlated')
  rules = (privacy.clipping.State, privacy.correlated.State)

  def init(key, params):
    state = algorithm.init(key, params)
    if central and not isinstance(state.aggregator, rules):
      raise Error(
        f'privacy: algorithm.name={name} does not take the rule of privacy as '
        'its only aggregator: use a method with one linear rule, such as '
        'fed_avg or ffa_lora.'
      )
    newcomer = jax.eval_shape(algorithm.init_client, state.params)
    if central and jax.tree.leaves(newcomer.upload):
      raise Error(
        'privacy: this upload carries the error of its compression from round '
        'to round, for which no guarantee is established here: use an upload '
        'without error feedback.'
      )
    if not central and uses is not None and not uses.codec:
      raise Error(
        f'privacy: algorithm.name={name} sends messages of its own, to which '
        'no noise can be added: use a method that sends updates, such as '
        'fed_avg or ffa_lora.'
      )
    return state

  def round(state, cohort, base=None, data=None):
    if uses is not None:
      uses.descents = 0
    new, states, info = algorithm.round(state, cohort, base, data)
    if central:
      clip = {'privacy/clip': state.aggregator.clip}
      info = info._replace(metrics={**info.metrics, **clip})
    return new, states, info

  return algorithm._replace(init=init, round=round)


def same_noise(folder: pathlib.Path, plan: Any) -> None:
  """Raises `Error` if the run in a folder began with another noise."""
  path = folder / 'privacy.json'
  if path.exists():
    has = json.loads(path.read_text()).get('noise_multiplier')
    privacy.plan.check_noise(
      privacy.clipping.State(None, has), plan.noise_multiplier
    )
