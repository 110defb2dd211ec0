"""Evaluates what a run has made on tasks of lm-eval.

    python -m fedjax_llm.evaluate --workdir DIR --tasks NAME[,NAME ...]
        [--client NAME] [--round N|best] [--limit N] [--out FILE]

A task is a name that lm-eval knows, whose data lm-eval loads itself, or a local
file NAME.yaml. The model is what everybody is served, or with `--client` the
own model of a client. Results with their origin (commit, versions, seed, digest
of the config, task versions, numbers of examples, hardware) are printed and
written as JSON to `--out`, by default DIR/evaluations/ROUND-CLIENT-TASKS.json.
Needs the extra lm-eval.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys
from typing import Any

from fedjax_llm import adapters, data
from fedjax_llm.run import command, harness, provenance, rebuild, workdir
from fedjax_llm.run.ends import ends
from fedjax_llm.types import Error


def run(argv: list[str]) -> None:
  args = _arguments(argv)
  tasks = [name.strip() for name in args.tasks.split(',') if name.strip()]
  if not tasks:
    raise Error('--tasks is empty: name a task of lm-eval or a file NAME.yaml.')
  if args.limit is not None and args.limit < 1:
    raise Error(f'--limit is {args.limit}; it must be at least 1.')
  if args.batch_size < 1:
    raise Error(f'--batch-size is {args.batch_size}; it must be at least 1.')
  made = rebuild.open(
    args.workdir,
    client=args.client,
    round=args.round,
    trusted=args.trust_code,
  )
  loaded = made.loaded
  if not loaded.config.writes:
    raise Error(f'--workdir {args.workdir}: this run trained no model of text.')
  tokenizer = data.tokenizers.bytes()
  if loaded.directory is not None:
    tokenizer = data.tokenizers.pretrained(str(loaded.directory))
  base, params = adapters.fold(loaded.base, made.params)
  network = harness.model(
    loaded,
    tokenizer,
    base,
    params,
    stops=ends(loaded, tokenizer),
    batch_size=args.batch_size,
  )
  done = harness.evaluate(
    network,
    tasks,
    limit=args.limit,
    num_fewshot=args.num_fewshot,
    seed=made.config.get('seed', 0),
  )
  origin = provenance.of(
    made.config,
    model=made.what,
    workdir=str(args.workdir),
    task_versions=done['versions'],
    num_examples=done['num_examples'],
    limit=args.limit,
    num_fewshot=args.num_fewshot,
  )
  result = {'results': done['results'], 'provenance': origin}
  file = pathlib.Path(args.out) if args.out else _file(args, made.what, tasks)
  file.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1, default=str)
  workdir.replace(file, f'{text}\n')
  print('\n'.join([*made.notes, f'{args.workdir}: {made.what}', '']))
  print(table(done['results'], done['num_examples']))
  print(f'\nwritten to {file}')


def _file(
  args: argparse.Namespace, what: str, tasks: list[str]
) -> pathlib.Path:
  """Returns the file of a result, another one for each model and tasks."""
  key = hashlib.sha256(repr((tasks, vars(args))).encode()).hexdigest()[:8]
  plain = lambda text: re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')
  name = f'{plain(what)}_{plain("-".join(tasks))[:60]}_{key}.json'
  return pathlib.Path(args.workdir) / 'evaluations' / name


def table(results: dict[str, Any], counts: dict[str, Any]) -> str:
  """Returns a row for each task and metric: value, standard error, examples.

  >>> print(table({'quiz': {'alias': 'quiz', 'acc,none': 0.5,
  ...   'acc_stderr,none': 0.1}}, {'quiz': 20}))
  quiz  acc  0.5000 +- 0.1000  (20 examples)
  """
  rows = []
  for task, metrics in results.items():
    for name, value in metrics.items():
      metric, _, which = name.partition(',')
      if metric.endswith('_stderr') or not isinstance(value, int | float):
        continue
      error = metrics.get(f'{metric}_stderr,{which}')
      plus = f' +- {error:.4f}' if isinstance(error, float) else ''
      number = f'  ({counts[task]} examples)' if task in counts else ''
      rows.append((task, metric, f'{value:.4f}{plus}{number}'))
  widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
  return '\n'.join(
    f'{task:{widths[0]}}  {metric:{widths[1]}}  {text}'
    for task, metric, text in rows
  )


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--workdir', required=True, metavar='DIR', help='the folder of a run')
  add('--tasks', required=True, metavar='NAMES', help='with commas between')
  add('--client', metavar='NAME', help="that client's own model")
  add('--round', type=_round, metavar='N', help="a kept round, or 'best'")
  add('--limit', type=int, metavar='N', help='examples of each task')
  add('--num-fewshot', type=int, metavar='N')
  add('--batch-size', type=int, default=16, metavar='N')
  add('--out', metavar='FILE')
  add(rebuild.TRUST, action='store_true', help='allow import paths in DIR')
  return command.parse(parser, argv)


def _round(text: str) -> int | str:
  if text == 'best':
    return text
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(
      f"{text!r} is no round; it must be 'best' or a whole number of 0 or more."
    )
  return int(text)


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
