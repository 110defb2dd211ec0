"""Shows a data set: what it is, a sample, and its partition over clients.

    python -m fedjax_llm.data dolly
    python -m fedjax_llm.data dolly --path dolly.jsonl \
        --partition dirichlet num_clients=20 alpha=0.1 --figure clients.png
    python -m fedjax_llm.data notes.jsonl client_key=author text_key=text

A data set is a name of the table (`--list`), a packaged one, or a file with the
keys of `data.sources.hf`. Nothing is trained.
"""

import argparse
import ast
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from fedjax_llm.data import (
  drift,
  named,
  partition,
  skew,
  sources,
  text,
  tokenizers,
)
from fedjax_llm.data.named import spec as spec_lib
from fedjax_llm.data.sources import Record
from fedjax_llm.types import Error

PARTITIONS: Mapping[str, Callable[..., partition.Partition]] = {
  name: getattr(module, name)
  for module in (partition, skew, drift)
  for name in module.__all__
  if name != 'pooled'
}
_WIDTH = 1200  # characters of a sample that are shown


def listing() -> str:
  """Returns the named data sets by domain, one a line."""
  lines = []
  width = max(map(len, named.TABLE))
  for domain, sets in named.DOMAINS.items():
    lines.append(f'{domain}:')
    lines += [f'  {name:{width}}  {s.title}' for name, s in sets.items()]
  lines.append(
    'packaged (no network): '
    + ', '.join(p.name.split('.')[0] for p in _packaged())
  )
  return '\n'.join(lines)


def _packaged() -> list[Any]:
  return sorted(sources.PACKAGED.glob('*.jsonl.gz'))


def card(name: str) -> str:
  """Returns what a named data set is, from its entry in the table.

  >>> print(card('gsm8k').split('\\n')[0])
  gsm8k: Word problems of primary school, with working
  """
  entry = named.find(name)
  where = f'https://huggingface.co/datasets/{entry.hub}'
  lines = [
    f'{name}: {entry.title}',
    f'  from       {where if entry.hub else entry.place}',
    f'  licence    {entry.licence or "not stated by the source: see its card"}',
    f'  form       {spec_lib.form(entry)}',
    f'  fields     {", ".join(spec_lib.fields(entry))}',
    f'  client     {entry.client or "none: choose a partition"}',
    f'  label      {entry.label or "none"}',
    f'  read from  {entry.source} ({entry.read})',
  ]
  if entry.subset or entry.revision:
    parts = [f'subset {entry.subset}'] if entry.subset else []
    parts += [f'revision {entry.revision}'] if entry.revision else []
    lines.insert(2, f'  part       {", ".join(parts)}')
  if entry.others:
    lines.insert(-1, f'  more keys  {", ".join(entry.others)}')
  if entry.sizes:
    sizes = ', '.join(f'{k} {n:,}' for k, n in entry.sizes.items())
    lines.insert(-1, f'  rows       {sizes}')
  return '\n'.join(lines)


def sample(record: Record, template: str) -> str:
  """Returns a record as a model sees it, cut where it is long.

  >>> print(sample(Record(prompt='2+2?', response='4'), 'plain'))
  2+2?
  4
  """
  if record.chosen is not None:
    shown = (
      f'{record.prompt}\n--- preferred ---\n{record.chosen}\n'
      f'--- not preferred ---\n{record.rejected}'
    )
  elif record.text is not None:
    second = f'\n--- second text ---\n{record.pair}' if record.pair else ''
    shown = f'{record.text}{second}'
  else:
    tokenizer = tokenizers.bytes()
    examples = text.encode(
      record, tokenizer, template=template, max_length=1_000_000
    )
    shown = '\n'.join(
      tokenizer.decode([t for t in e.tokens.tolist() if t < 256])
      for e in examples
    )
  if record.label is not None:
    shown += f'\n--- label ---\n{record.label}'
  return shown if len(shown) <= _WIDTH else f'{shown[:_WIDTH]}...'


def dealt(
  records: Sequence[Record],
  rule: str | None,
  settings: Mapping[str, Any],
  seed: int,
) -> tuple[str, list[str] | None]:
  """Returns the partition in words and the client of each record, or None.

  Without a rule it is `natural`, where the records have clients.
  """
  if rule is None:
    if records[0].client is None:
      return 'these records have no clients: choose a --partition', None
    rule = 'natural'
  if '=' in rule:
    raise Error(
      f'--partition: {rule!r} is a setting; name the partition before it, as '
      f'in --partition dirichlet {rule}.'
    )
  if rule not in PARTITIONS:
    raise Error(
      f'--partition: there is no {rule!r}; there are {", ".join(PARTITIONS)}.'
    )
  builder = PARTITIONS[rule]
  known = inspect.signature(builder).parameters
  for field in settings:
    if field not in known:
      raise Error(
        f'--partition: {rule} has no {field!r}; it has '
        f'{", ".join(known) or "no settings"}.'
      )
    kind, value = known[field].annotation, settings[field]
    if kind in (int, float) and not isinstance(value, int | kind):
      article = 'an integer' if kind is int else 'a number'
      raise Error(
        f'--partition: {field} of {rule} is {value!r}; it must be {article}.'
      )
  missing = [
    name
    for name, parameter in known.items()
    if parameter.default is parameter.empty and name not in settings
  ]
  if missing:
    raise Error(f'--partition: {rule} needs {missing[0]}=...')
  words = ' '.join(f'{k}={v}' for k, v in settings.items())
  return f'{rule} {words}'.strip(), builder(**settings)(records, seed)


def figure(
  records: Sequence[Record], names: Sequence[str], title: str, file: str
) -> None:
  """Draws the labels that each client holds, or its size, as a picture.

  Raises:
    Error: matplotlib is not installed (extra `viz`).
  """
  try:
    import matplotlib
  except ImportError:
    raise Error(
      '--figure: the package `matplotlib` is not installed; install the extra '
      "viz: pip install 'fedjax-llm[viz]'."
    ) from None
  matplotlib.use('Agg')
  from matplotlib import pyplot, ticker

  clients = sorted(set(names))
  counts = Counter(
    (name, record.label) for name, record in zip(names, records, strict=True)
  )
  labels = [
    label for label, _ in Counter(r.label for r in records).most_common(12)
  ]
  plot, axes = pyplot.subplots(figsize=(8, 4), layout='constrained')
  bottom = [0] * len(clients)
  rest = Counter(names)
  for label in labels:
    heights = [counts[client, label] for client in clients]
    axes.bar(
      range(len(clients)), heights, bottom=bottom, label=label or 'records'
    )
    bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
  others = [rest[c] - b for c, b in zip(clients, bottom, strict=True)]
  if any(others):
    axes.bar(range(len(clients)), others, bottom=bottom, label='other labels')
  axes.set(title=title, xlabel=f'{len(clients)} clients', ylabel='records')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.legend(fontsize='x-small', loc='upper right')
  plot.savefig(file, dpi=150)
  pyplot.close(plot)


def _settings(words: Sequence[str], option: str) -> dict[str, Any]:
  """Reads `key=value` words; values are Python literals or strings."""
  settings = {}
  for word in words:
    key, equals, value = word.partition('=')
    if not equals or not key.isidentifier():
      raise Error(f'{option}: {word!r} is no setting such as alpha=0.1.')
    try:
      settings[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      settings[key] = value
  return settings


def _records(
  name: str, path: str | None, split: str | None, keys: dict[str, Any]
) -> list[Record]:
  """Reads a named data set, a packaged one, or files by their keys."""
  if name in named.TABLE:
    builder, keys = named.hub, {'dataset': name, 'path': path, **keys}
    keys['split'] = split
  elif any(p.name.split('.')[0] == name for p in _packaged()):
    builder, keys = sources.packaged, {'dataset': name, **keys}
  elif os.path.exists(name) or any(c in name for c in '/*.'):
    builder, keys = sources.hf, {'path': name, **keys}
    if split:
      keys['split'] = split
  else:
    named.find(name)  # raises, with the nearest name
    raise AssertionError
  known = inspect.signature(builder).parameters
  for key in keys:
    if key not in known:
      raise Error(f'{key} is no setting of this source: {", ".join(known)}.')
  return builder(**keys)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.data',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('name', nargs='?', help='a data set, or a file')
  parser.add_argument('keys', nargs='*', help='keys of the source, key=value')
  parser.add_argument('--path', help='where a named data set lies')
  parser.add_argument('--split', help='the split to read')
  parser.add_argument(
    '--partition', nargs='+', help='a partition and its settings, key=value'
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--template', default='plain', help='of the sample')
  parser.add_argument('--figure', help='draw the partition into this file')
  parser.add_argument('--list', action='store_true', help='list the data sets')
  return parser


def _refuse(message: str) -> NoReturn:
  raise Error(f'fedjax_llm.data: {message}.')


def show(argv: Sequence[str]) -> None:
  """Prints what the command line asks for."""
  parser = _parser()
  parser.error = _refuse
  args = parser.parse_args(argv)
  if args.list or args.name is None:
    print(listing())
    return
  if args.name in named.TABLE:
    print(card(args.name), flush=True)
  keys = _settings(args.keys, 'keys')
  records = _records(args.name, args.path, args.split, keys)
  print(f'\n{len(records):,} records; the first:\n')
  print(sample(records[0], args.template))
  chosen: list[str] = args.partition or []
  settings = _settings(chosen[1:], '--partition')
  rule = chosen[0] if chosen else None
  words, names = dealt(records, rule, settings, args.seed)
  print(f'\nPartition: {words}')
  if names is not None:
    print(partition.histogram(names))
  if args.figure:
    if names is None:
      raise Error('--figure: there is no partition to draw.')
    figure(records, names, f'{args.name}: {words}', args.figure)
    print(f'Written: {args.figure}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit status.

  >>> main(['shakespeare_mini', '--partition', 'iid', 'num_client=2'])
  1
  """
  try:
    show(sys.argv[1:] if argv is None else argv)
  except Error as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
