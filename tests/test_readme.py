"""Tests the front page: its round runs, and it stays short."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def test_the_round_of_the_readme_runs_and_learns(capsys):
  block = next(b for b in BLOCKS if 'algorithm.round' in b)
  assert len(block.strip().splitlines()) <= 20
  exec(compile(block, 'README.md', 'exec'), {})
  losses = [
    float(line.split()[1])
    for line in capsys.readouterr().out.split('\n')
    if line
  ]
  assert losses[-1] < losses[0]


def test_the_readme_is_short_and_leads_to_the_other_pages():
  assert len(TEXT.encode()) <= 8192
  table = TEXT.split('## I want to ...')[1].split('\n## ')[0]
  rows = [line for line in table.splitlines() if line.startswith('|')][2:]
  assert len(rows) == 10
  assert all(re.search(r'\]\([\w/]+\.md', row) for row in rows)


def test_the_comparison_is_that_of_the_committed_results():
  path = ROOT / 'scripts/benchmarks/results.json'
  many = json.loads(path.read_text())['regimes']['many']
  results = {k: v for k, v in many.items() if 'tokens_per_second' in str(v)}
  ours = [name for name in results if name.startswith('ours')]
  speed = {k: results[k]['tokens_per_second'] for k in results}
  best = max(speed[name] for name in ours)
  ratios = [best / speed[name] for name in results if name not in ours]
  plain = ' '.join(TEXT.split())
  assert f'{min(ratios):.1f} to {max(ratios):.0f} times as many' in plain
  loop = results['p0+']['peak_mb']  # the eager loop that computes our logits
  memory = [results[name]['peak_mb'] / loop for name in ours]
  assert f'in {min(memory):.1f} to {max(memory):.1f} times the memory' in plain
