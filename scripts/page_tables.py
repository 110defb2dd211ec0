"""Writes tables of committed results into the pages.

    .venv/bin/python scripts/page_tables.py [--check]

A page marks the place by `<!-- table: NAME -->` and `<!-- end -->`. The program
reads the committed results (JSON) of benchmarks, comparisons and reproductions
and measures nothing. `--check` changes no file and exits with 1 where a page
differs from its results. `scripts/method_table --write` and
`scripts/model_table --write` replace the tables of methods and of models, which
have no such file.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = 'scripts/README.md'
METHODS = 'fedjax_llm/recipes/README.md'  # scripts/method_table
MODELS = 'fedjax_llm/models/README.md'  # scripts/model_table


def replaced(text: str, name: str, table: str) -> str:
  """Returns the page `text` with `table` between the markers of `name`.

  >>> replaced('<!-- table: a -->\\nold\\n<!-- end -->', 'a', 'new')
  '<!-- table: a -->\\n\\nnew\\n\\n<!-- end -->'

  Raises:
    ValueError: the page has no such markers.
  """
  start = f'<!-- table: {name} -->'
  pattern = re.escape(start) + '.*?<!-- end -->'
  if not re.search(pattern, text, re.DOTALL):
    raise ValueError(
      f'the page has no table {name!r}: {start} ... <!-- end -->'
    )
  new = f'{start}\n\n{table.strip()}\n\n<!-- end -->'
  return re.sub(pattern, lambda _: new, text, count=1, flags=re.DOTALL)


def write(page: str, name: str, table: str) -> None:
  """Replaces the table `name` in the page at the relative path `page`."""
  path = ROOT / page
  path.write_text(replaced(path.read_text(), name, table))


def reproductions(results: Mapping[str, Any]) -> str:
  """Returns a row for each claim of `scripts/reproduce`."""
  lines = [
    '| trend | verdict | claim | mean (95 % interval) | this claim |',
    '|---|---|---|---|---|',
  ]
  for name, trend in results.items():
    paper = trend['arxiv']
    title = f'`{name}` ([{paper}](https://arxiv.org/abs/{paper}))'
    verdict = f'**{trend["verdict"]}**'
    for claim in trend['claims']:
      low, high = claim['interval_95']
      text = claim['claim'] + ('' if claim['published'] else ' (check of ours)')
      lines.append(
        f'| {title} | {verdict} | {text} | {claim["mean"]:.3g} '
        f'({low:.3g} to {high:.3g}) | {claim["verdict"]} |'
      )
      title = verdict = ''
  return '\n'.join(lines)


def tables() -> dict[str, str]:
  """Returns the tables of `scripts/README.md`, by name."""
  bench = _module('benchmarks/tables.py')
  methods = _module('methods_comparison/tables.py')
  wall = _module('memory/tables.py')
  prompts = _module('vlm_comparison/tables.py')
  whole = _module('pretraining/tables.py')
  pairs = _module('board/pairs.py')
  peft = _module('peft_comparison/tables.py')
  aggregation = _results('benchmarks/aggregation.json')['rules']
  trust, utility = (
    _module('trust/matrix.py'),
    _module('privacy_cells/tables.py'),
  )
  epsilons = ['1', '3', '8', 'none']
  people = lambda model: utility.markdown(
    utility.read(ROOT / f'scripts/privacy_cells/{model}/cells'), epsilons
  )
  arena = sorted((ROOT / 'scripts/trust/arena').glob('*.json'))
  return {
    'benchmark': bench.overview(_results('benchmarks/results.json')['regimes']),
    'shared cores': bench.table(
      _results('benchmarks/shared_cores.json')['regimes']
    ),
    'aggregation': bench.aggregation(1024, aggregation['1024']),
    'rounding': bench.rounding(
      _results('benchmarks/rounding.json')['svd_round']
    ),
    'costs': bench.costs(_results('benchmarks/costs.json')),
    'memory': wall.markdown(
      wall.cells(), _results('memory/results/larger.json')['bytes']
    ),
    'arena': trust.table([json.loads(file.read_text()) for file in arena]),
    'audit': trust.audited(_results('trust/audit.json')),
    'privacy_costs': trust.costs(_results('trust/costs.json')),
    'privacy_utility': people('smollm2'),
    'privacy_utility_small': people('small'),
    'methods': methods.markdown(_results('methods_comparison/results.json')),
    'prompts': prompts.markdown(_results('vlm_comparison/results.json')),
    'pretraining': whole.markdown(whole.read()),
    'recall': prompts.recalls(_results('vlm_comparison/recall.json')),
    **{
      f'tuning-{model}': peft.markdown(peft.read().get(model, {}))
      for model in peft.MODELS
    },
    'dpo_pairs': pairs.table(pairs.cells()),
    'reproductions': reproductions(_results('reproductions/results.json')),
  }


def _results(name: str) -> Any:
  return json.loads((ROOT / 'scripts' / name).read_text())


def _module(name: str) -> ModuleType:
  """Imports a file of `scripts`, with its own folder on the path meanwhile."""
  path = ROOT / 'scripts' / name
  spec = importlib.util.spec_from_file_location(
    name.removesuffix('.py').replace('/', '_'), path
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.path[:0] = [str(path.parent), str(ROOT)]
  try:
    spec.loader.exec_module(module)
  finally:
    del sys.path[:2]
  return module


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--check', action='store_true', help='change no file')
  args = parser.parse_args()
  path = ROOT / PAGE
  before = after = path.read_text()
  for name, table in tables().items():
    after = replaced(after, name, table)
  if args.check and after != before:
    print(f'{PAGE} differs from the results: run scripts/page_tables.py.')
    return 1
  if not args.check:
    path.write_text(after)
  return 0


if __name__ == '__main__':
  sys.exit(main())
