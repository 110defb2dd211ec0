"""Folders of runs as `train` leaves them, written by hand; and HTML, read."""

import html.parser
import json
import math

CLIENTS = [f'play/ROLE {i}' for i in range(6)]


def config(**changes):
  found = {
    'num_rounds': 6,
    'seed': 0,
    'algorithm': {'name': 'fed_avg'},
    'aggregator': None,
    'local': {'name': 'adamw', 'learning_rate': 0.01},
    'compilation_cache': 'auto',
  }
  return found | changes


def records(num_rounds, *, start=6.0, own=False, names=CLIENTS):
  """Tests in every second round, losses that fall; the last client's least."""
  found = []
  for number in range(num_rounds + 1):
    loss = start * math.exp(-0.1 * number)
    told = {'round': number, 'time/evals': 0.5}
    if number % 2 == 0:
      by_client = {n: loss + 0.1 * i for i, n in enumerate(names)}
      kinds = ['heldout'] + ['personal/own'] * (own and number > 0)
      for kind in kinds:
        shift = -0.5 if kind != 'heldout' else 0.0
        told |= {
          f'evals/{kind}/loss': loss + shift,
          f'evals/{kind}/accuracy': 0.1 * number,
          f'evals/{kind}/clients': {n: x + shift for n, x in by_client.items()},
          f'evals/{kind}/client_worst_10': max(by_client.values()) + shift,
        }
      told['evals/new/loss'] = loss + 0.2
    if number == 0:
      told['time/setup'] = 2.0
    else:
      told |= {
        'local/loss': loss,
        'local/tokens': 1000.0,
        'uploads/bytes': 0 if own else 300_000,
        'downloads/bytes': 0 if own else 200_000,
        'aggregators/drift': 0.5 + 0.01 * number,
        'time/data': 0.1,
        'time/round': 1.5,
        'time/tokens_per_second': 650.0,
      }
      if not own:
        layers = [0.1, 0.2, 0.3]
        told |= {
          'aggregators/error': 0.2,
          'aggregators/error_by_layer': layers,
          'aggregators/drift_by_layer': [2 * x for x in layers],
          'aggregators/effective_rank': 2.5,
        }
    found.append(told)
  return found


def write(folder, conf, told=None, *, names=CLIENTS, finished=False):
  """A run's folder; without `told` one that has only just begun."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(conf))
  if told is None:
    return folder
  lines = [json.dumps(record) + '\n' for record in told]
  (folder / 'metrics.jsonl').write_text(''.join(lines))
  held = {n: {'examples': 10 + i, 'tokens': 9} for i, n in enumerate(names)}
  (folder / 'clients.json').write_text(json.dumps({'clients': held}))
  if finished:
    finish(folder, told[-1]['round'], names[0])
  return folder


def finish(folder, number, client, reply='for ever'):
  said = {'client': client, 'prompt': 'How long?', 'reply': 'A day.'}
  said |= {'before': 'xq', 'after': reply}
  told = {'round': number, 'samples': [said]}
  (folder / 'samples.json').write_text(json.dumps(told))
  (folder / 'report.txt').write_text(f'After round {number}\n\ndone\n')


class Page(html.parser.HTMLParser):
  """What a page holds; `tags` are (name, attributes) in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.words = [], [], []
    self.rows = []  # of all tables, cells as text
    self.feed(text)
    self.close()
    assert self.open == []  # every element is closed

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'link', 'br'):
      self.open.append(tag)
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.words.append(data)
    if {'td', 'th'} & set(self.open):
      self.rows[-1][-1] += data

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]
