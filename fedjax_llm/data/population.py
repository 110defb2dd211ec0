"""Builds a `Population` from records: training and held-out examples.

Every random choice is keyed by (seed, client name, content): it does not depend
on the order of the records or on the other clients.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedjax_llm.data import encoding, text
from fedjax_llm.data.counting import digest as digest
from fedjax_llm.data.counting import (
  label_of,
  labels_of,
  num_loss_tokens,
  num_tokens,
)
from fedjax_llm.data.counting import longest as longest
from fedjax_llm.data.counting import sizes as sizes
from fedjax_llm.data.counting import trainers as trainers
from fedjax_llm.data.dealing import keyed
from fedjax_llm.data.encoding import content
from fedjax_llm.data.partition import (
  Partition,
  Pooled,
  histogram,
  natural,
)
from fedjax_llm.data.sources import Record
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.types import Error, Population

_NUM_NAMED = 5  # left-out clients named in the report; all are counted

Unit = list[Any]  # examples of one record, which are never separated

# (names, sorted) -> (client, its training records, labels) -> the records that
# it trains on instead; None: its own.
Alter = Callable[[Sequence[str]], Callable[..., Sequence[Record] | None]]


def build(
  records: Sequence[Record],
  tokenizer: Tokenizer,
  *,
  partition: Partition = natural(),  # noqa: B008 (a pure function)
  template: str | text.Template = 'chat',
  max_length: int = 256,
  long_replies: str = 'drop',
  heldout_fraction: float = 0.1,
  new_clients: float | Sequence[str] = 0,
  min_examples: int = 1,
  max_clients: int | None = None,
  labels: Sequence[str] | None = None,
  labelled: float = 1.0,
  seed: int = 0,
  encode: encoding.Encode | None = None,
  alter: Alter | None = None,
) -> Population:
  """Builds the population of a federation.

  `partition` assigns records to clients. `encode` turns a record into examples,
  with `template`, `max_length` and `long_replies` among its settings; it is the
  task's encoder, by default `encoding.texts`. Of each client's records a
  `heldout_fraction` is held out: at least one of two or more, never all. Copies
  of a text stay together, and an example that equals a training example of any
  client is not held out. (A client with one long text holds out some of its
  chunks.) `new_clients` clients (a number below 1 is a fraction, and names are
  those of clients) never train.
  Clients with fewer than `min_examples` usable examples are left out;
  `max_clients` limits the number of clients, new ones included. With `labels`
  the examples are classified: the default is then `encoding.labelled`, and each
  client keeps the labels of a share `labelled` of its training examples, at
  least one; the other labels become -1, for methods that label texts
  themselves. `alter` changes the records that clients train on, after the
  split: held-out examples stay (`adversary.poisoning`).

  `report` has `num_records`, `num_examples` (those of clients left out are
  among them), `num_clients`, `num_new_clients`,
  `clients_left_out` (with `clients_left_out_names`, the first few),
  `clients_not_drawn`, `empty_records`, `replies_left_out`, `replies_cut`,
  `prompts_truncated`, `replies_rewritten` (replies that the chat template
  changed), `heldout_duplicates`, `clients_without_heldout`, `train_examples`,
  `heldout_examples`, `new_examples`, `tokens` (of training examples),
  `loss_tokens` (learned tokens of these), `histogram` (examples per client, as
  text), `texts_cut`, `unlabelled` and, for classification, `labels` (training
  examples of each) and `labels_untrained` (tested examples of labels without a
  training example).

  Raises `Error` for an argument outside its range, or if no client is left.

  >>> from fedjax_llm.data import sources, tokenizers
  >>> population = build(
  ...   sources.packaged(), tokenizers.bytes(), max_length=512, new_clients=2
  ... )
  >>> len(population.names), len(population.new_names)
  (30, 2)
  >>> len(population.train[0]), len(population.heldout[0])
  (63, 7)
  """
  _check(heldout_fraction, new_clients, min_examples, max_clients)
  if not 0 <= labelled <= 1 or (labelled < 1 and labels is None):
    raise Error(
      f'population.labelled is {labelled}: it is a share from 0 to 1 of texts '
      'that are classified (task.name=classification).'
    )
  if encode is None:
    encode = encoding.texts if labels is None else encoding.labelled
  how = encoding.Encoding(tokenizer, template, max_length, long_replies, labels)
  holdings: dict[str, list[Record]] = {}
  for name, record in zip(partition(records, seed), records, strict=True):
    holdings.setdefault(name, []).append(record)
  clients, counts, left_out = {}, Counter(), []
  sources: dict[str, dict[bytes, list[Record]]] = {}
  waiting = sorted(holdings, key=lambda n: keyed(seed, 'clients', n))
  while waiting and (max_clients is None or len(clients) < max_clients):
    name = waiting.pop()
    units = []
    held: dict[bytes, list[Record]] = {}
    sources[name] = held
    for record in holdings[name]:
      encoded = encode(record, how)
      counts['prompts_truncated'] += encoded.prompts_truncated
      counts['replies_left_out'] += encoded.replies_left_out
      counts['replies_cut'] += encoded.replies_cut
      counts['texts_cut'] += encoded.texts_cut
      counts['replies_rewritten'] += encoded.replies_rewritten
      counts['examples'] += len(encoded.examples)
      if encoded.examples:
        units.append(encoded.examples)
        for example in encoded.examples if alter is not None else ():
          held.setdefault(content(example), []).append(record)
      elif not encoded.replies_left_out:
        counts['empty_records'] += 1
    if sum(map(len, units)) >= max(1, min_examples):
      clients[name] = units
    else:
      left_out.append(name)
  if not clients:
    raise Error(
      f'no client is left: none of the {len(holdings)} has {min_examples} or '
      f'more usable examples at max_length={max_length}, '
      f'long_replies={long_replies!r} ({len(records)} records, '
      f'{counts["empty_records"]} empty, {counts["replies_left_out"]} replies '
      'too long).'
    )
  new_names = _new(list(clients), new_clients, seed)
  names = sorted(set(clients) - set(new_names))
  splits = [_split(n, clients[n], heldout_fraction, seed) for n in names]
  if alter is not None:
    change = alter(names)
    for i, (name, (one, two)) in enumerate(zip(names, splits)):
      new = change(i, _records(one, sources[name]), labels)
      if new is not None:
        splits[i] = _encoded(name, new, encode, how), two
  train = tuple(
    tuple(_some_labelled(n, one, labelled, seed))
    for n, (one, _) in zip(names, splits, strict=True)
  )
  known = {content(example) for one in train for example in one}
  heldout = tuple(_without(known, two, counts) for _, two in splits)
  new = tuple(
    _without(known, _split(n, clients[n], 0, seed)[0], counts)
    for n in new_names
  )
  owners = [name for name, one in zip(names, train) for _ in one]
  report = {
    'num_records': len(records),
    'num_examples': counts['examples'],
    'num_clients': len(names),
    'num_new_clients': len(new_names),
    'clients_left_out': len(left_out),
    'clients_left_out_names': sorted(left_out)[:_NUM_NAMED],
    'clients_not_drawn': len(waiting),
    'empty_records': counts['empty_records'],
    'replies_left_out': counts['replies_left_out'],
    'replies_cut': counts['replies_cut'],
    'prompts_truncated': counts['prompts_truncated'],
    'replies_rewritten': counts['replies_rewritten'],
    'heldout_duplicates': counts['heldout_duplicates'],
    'clients_without_heldout': sum(not two for two in heldout),
    'train_examples': len(owners),
    'heldout_examples': sum(map(len, heldout)),
    'new_examples': sum(map(len, new)),
    'tokens': sum(num_tokens(one) for one in train),
    'loss_tokens': sum(num_loss_tokens(one) for one in train),
    'histogram': histogram(owners),
    'texts_cut': counts['texts_cut'],
    'unlabelled': sum(label_of(e) == -1 for one in train for e in one),
  }
  if labels is not None:
    report |= labels_of(labels, train, (*heldout, *new))
  return Population(
    *(tuple(names), train, heldout, new_names, new, report),
    pooled=isinstance(partition, Pooled),
  )


def _check(
  heldout_fraction: float,
  new_clients: float | Sequence[str],
  min_examples: int,
  max_clients: int | None,
) -> None:
  if not 0 <= heldout_fraction < 1:
    raise Error(
      f'heldout_fraction is {heldout_fraction}, but must be at least 0 and '
      'below 1.'
    )
  if isinstance(new_clients, int | float) and (
    not 0 <= new_clients < 2**31
    or (new_clients > 1 and new_clients != int(new_clients))
  ):
    raise Error(
      f'new_clients is {new_clients}, but must be a number of clients, or a '
      'fraction below 1.'
    )
  if min_examples < 0:
    raise Error(f'min_examples is {min_examples}, but must not be negative.')
  if max_clients is not None and max_clients < 1:
    raise Error(f'max_clients is {max_clients}, but must be at least 1.')


def _new(
  names: list[str], new_clients: float | Sequence[str], seed: int
) -> tuple[str, ...]:
  """Returns the names of the clients that never train, sorted."""
  if not isinstance(new_clients, int | float):
    some = [new_clients] if isinstance(new_clients, str) else new_clients
    if absent := sorted(set(some) - set(names)):
      raise Error(
        f'new_clients names {absent[0]!r}, which is none of the {len(names)} '
        'clients with usable examples.'
      )
    if len(set(some)) == len(names):
      raise Error(
        'new_clients names all clients, and one must be left to train.'
      )
    return tuple(sorted(set(some)))
  count = int(new_clients)
  if 0 < new_clients < 1:
    count = max(1, round(new_clients * len(names)))
  if count >= len(names):
    raise Error(
      f'new_clients is {new_clients}, but there are {len(names)} clients and '
      'one must be left to train.'
    )
  drawn = sorted(names, key=lambda name: keyed(seed, 'new', name))
  return tuple(sorted(drawn[:count]))


def _distinct(units: Iterable[Unit]) -> dict[tuple[bytes, ...], Unit]:
  """Groups equal units: returns one unit with all copies for each content."""
  distinct: dict[tuple[bytes, ...], Unit] = {}
  for unit in units:
    distinct.setdefault(tuple(map(content, unit)), []).extend(unit)
  return distinct


def _split(
  name: str, units: list[Unit], fraction: float, seed: int
) -> tuple[Unit, Unit]:
  """Returns (training examples, held-out examples), both in keyed order."""
  distinct: dict[tuple[bytes, ...], Any] = _distinct(units)
  if len(distinct) == 1:
    distinct = _distinct([example] for unit in units for example in unit)
  order = sorted(distinct, key=lambda key: keyed(seed, 'heldout', name, key))
  count = 0
  if fraction > 0 and len(order) > 1:
    count = min(max(1, round(fraction * len(order))), len(order) - 1)
  heldout, train = order[:count], order[count:]
  return (
    [example for key in train for example in distinct[key]],
    [example for key in heldout for example in distinct[key]],
  )


def _records(
  examples: Unit, sources: dict[bytes, list[Record]]
) -> list[Record]:
  """Returns the records that examples were made of, each once."""
  there = {
    id(record): record
    for example in examples
    for record in sources[content(example)]
  }
  return list(there.values())


def _encoded(
  name: str,
  records: Sequence[Record],
  encode: encoding.Encode,
  how: encoding.Encoding,
) -> Unit:
  """Returns the examples of altered records; an `Error` if there are none."""
  examples = [x for record in records for x in encode(record, how).examples]
  if not examples:
    raise Error(
      f'client {name}: none of its {len(records)} altered records is usable at '
      f'max_length={how.max_length}, long_replies={how.long_replies!r}.'
    )
  return examples


def _some_labelled(name: str, examples: Unit, share: float, seed: int) -> Unit:
  """Sets the label to -1 except for a share of the examples, at least one."""
  if share == 1:
    return examples
  order = sorted(
    range(len(examples)),
    key=lambda i: keyed(seed, 'labelled', name, i, content(examples[i])),
  )
  kept = set(order[: max(1, round(share * len(examples)))])
  return [
    e if i in kept else e._replace(label=-1) for i, e in enumerate(examples)
  ]


def _without(
  known: set[bytes], examples: Sequence[Any], counts: Counter
) -> tuple[Any, ...]:
  """Returns the examples that no client trains on, counting the others."""
  kept = tuple(e for e in examples if content(e) not in known)
  counts['heldout_duplicates'] += len(examples) - len(kept)
  return kept
