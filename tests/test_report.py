"""The report of runs: what it says, what it refuses, what a browser sees."""

import html
import itertools
import json
import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from reports import CLIENTS, Page, config, finish, records, write

from fedjax_llm import privacy, report
from fedjax_llm.report import __main__ as program
from fedjax_llm.report import curves, drawing, numbers, runs, style
from fedjax_llm.types import Error

pytest.importorskip('matplotlib')

SECTIONS = 'summary loss clients aggregation time samples config'.split()  # noqa: SIM905
FIGURES = {
  *('loss-rounds', 'loss-tokens', 'loss-bytes', 'loss-training', 'accuracy'),
  *('clients-loss', 'clients-sizes', 'clients-loss-by-size', 'drift', 'error'),
  *('drift-layers', 'error-layers', 'rank', 'stations', 'speed'),
}
EVIL = '<script>alert(1)</script>&"\'<img src=x onerror=alert(2)>'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A finished run, one of own models that goes on, one just begun."""
  base = tmp_path_factory.mktemp('runs')
  trimmed = {'name': 'trimmed_mean', 'trim_fraction': 0.2}
  write(base / 'fed_avg', config(aggregator=trimmed), records(6), finished=True)
  own = config(algorithm={'name': 'local_only'}, compilation_cache=None)
  write(base / 'own', own, records(3, own=True))
  write(base / 'young', config(seed=1), records(0))
  return [base / name for name in ('fed_avg', 'own', 'young')]


@pytest.fixture(scope='module')
def text(folders):
  return report.page(folders)


@pytest.fixture(scope='module')
def page(text):
  return Page(text)


def test_the_unit_is_the_tasks(tmp_path):
  sizes = {'clients': {'a': {'examples': 2}}, 'new': {}}
  for unit in ({'unit': 'image'}, {}):
    folder = tmp_path / unit.get('unit', 'none')
    write(folder, config(), records(2))
    (folder / 'clients.json').write_text(json.dumps({**sizes, **unit}))
  one, plain = report.read([tmp_path / 'image', tmp_path / 'none'])
  assert (one.unit, plain.unit) == ('image', 'token')
  assert len(numbers.same_clients([one, plain])) == 1
  assert 'Held-out loss in nats per image' in report.page([one.path])
  (tmp_path / 'image' / 'clients.json').write_text('{"unit": 3}')
  with pytest.raises(Error, match=r'clients.json is damaged: unit is 3, not a'):
    report.read(tmp_path / 'image')


# --------------------------------------------------------------- structure --


def test_the_page_needs_nothing_but_itself(page):
  assert page.all('script') == []
  for _, attributes in page.tags:
    for name in ('src', 'href', 'xlink:href', 'action', 'srcset', 'data'):
      if name in attributes:
        assert attributes[name].startswith(('#', 'data:'))
  assert 'url(' not in style.CSS and '@import' not in style.CSS


def test_every_section_and_every_figure_is_there_with_words_for_it(page):
  assert [a['id'] for a in page.all('section')] == SECTIONS
  assert {a['id'] for a in page.all('figure')} == FIGURES
  pictures = [a for a in page.all('svg') if a.get('role') == 'img']
  assert len(pictures) == len(FIGURES)
  for attributes in pictures:
    assert len(attributes['aria-label'].split()) > 4
    assert 'width' not in attributes and 'viewbox' in attributes
  alt = {a['aria-label'] for a in pictures}
  assert any(
    'fed_avg: 6 at round 0, 3.293 at round 6' in words for words in alt
  )


def test_ids_are_unique_and_links_lead_somewhere(page):
  ids = [a['id'] for _, a in page.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  links = [a['href'] for a in page.all('a')]
  links += [a['xlink:href'] for a in page.all('use')]
  assert {link[1:] for link in links} <= set(ids)


def test_tables_and_headings_can_be_read_aloud(page):
  assert len(page.all('caption')) == len(page.all('table')) >= 3
  assert all('scope' in a for a in page.all('th'))
  levels = [int(t[1]) for t, _ in page.tags if t in ('h1', 'h2', 'h3')]
  assert levels[0] == 1 and levels.count(1) == 1
  assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
  assert page.all('html')[0]['lang'] == 'en'
  assert any(a.get('name') == 'viewport' for a in page.all('meta'))


def contrast(a, b):
  def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    line = [
      x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
    ]
    return float(np.dot(line, [0.2126, 0.7152, 0.0722]))

  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_light_and_dark():
  dark = style.CSS.split('prefers-color-scheme: dark')[1]
  colour = lambda css, name: css.split(f'--{name}: ')[1][:7]
  for css in (style.CSS, dark):
    ground = colour(css, 'ground')
    for name in ('ink', 'quiet', 'link'):
      assert contrast(colour(css, name), ground) >= 4.5
    assert all(contrast(c, ground) >= 3 for c in drawing.COLOURS)


def test_names_and_replies_hold_no_markup(tmp_path):
  folder = tmp_path / 'a$b$ <b>&amp; 日本'
  names = [EVIL, '\x1b[2J', *CLIENTS[:2]]
  told = records(2, names=names)
  told[1]['clients/not_finite_names'] = [EVIL]
  other = write(tmp_path / '_other', config(seed=EVIL), told, names=names)
  write(folder, config(num_rounds=2), told, names=names)
  finish(folder, 2, EVIL, reply=EVIL)
  found = Page(report.page([folder, other]))
  assert found.all('script') == found.all('img') == found.all('b') == []
  assert found.text.count(EVIL) >= 4  # as text it is there
  assert 'a$b$ <b>&amp; 日本' in found.text
  assert '\x1b' not in found.text and '\\x1b[2J' in found.text


# ----------------------------------------------------------------- content --


def row(page, *start):
  (found,) = [
    r for r in page.rows if tuple(r[: len(start)]) == start and len(r) > 1
  ]
  return found


def test_the_summary_tells_how_far_each_run_is_and_what_it_cost(page):
  header = row(page, 'run', 'state')
  told = {
    name: dict(zip(header, row(page, name), strict=True))
    for name in ('fed_avg', 'own', 'young')
  }
  assert told['fed_avg']['state'] == 'finished, 6 rounds'
  assert told['own']['state'] == 'unfinished, round 3 of 6'
  assert told['young']['state'] == 'before its first round, of 6'
  last = 6 * np.exp(-0.6)
  assert told['fed_avg']['before'] == '6.0000'
  assert told['fed_avg']['after'] == f'{last:.4f}'
  assert told['fed_avg']['change'] == f'−{6 - last:.4f}'  # noqa: RUF001
  assert told['fed_avg']['worse off'] == '0 of 6'
  assert told['fed_avg']['learned'] == '6.00 k tokens'
  assert told['fed_avg']['up, down'] == '1.80 MB, 1.20 MB'
  assert told['own']['after'] == f'{6 * np.exp(-0.2) - 0.5:.4f}'  # own models
  assert told['own']['up, down'] == '0 B, 0 B'
  assert told['young']['after'] == ''


def test_a_run_with_a_clock_has_its_simulated_time_and_energy(tmp_path):
  clock = {'clock/joules': 2500.0, 'clock/joules_network': 1.2e6}
  some = [
    {**record, 'clock/seconds': 125.0 * record['round'], **clock}
    if record['round']
    else record
    for record in records(3)
  ]
  write(tmp_path / 'clocked', config(), some)
  page = Page(report.page([tmp_path / 'clocked']))
  cells = dict(zip(row(page, 'run', 'state'), row(page, 'clocked')))
  assert cells['simulated time'] == '6:15'
  assert cells['simulated energy'] == '2.5 kJ, 1,200.0 kJ of the network'


def test_the_worst_clients_are_named_with_what_they_hold(page):
  start = next(i for i, r in enumerate(page.rows) if r[0] == 'client')
  assert page.rows[start] == ['client', 'texts', 'before', 'loss', 'change']
  assert page.rows[start + 1] == ['fed_avg']
  first = page.rows[start + 2]
  assert first[:3] == ['play/ROLE 5', '15', '6.5000']
  assert first[3] == f'{6 * np.exp(-0.6) + 0.5:.4f}'


def test_curves_stand_over_what_was_spent_until_then(folders):
  run, own, _ = report.read(folders)
  tokens = numbers.curve(run, 'served/loss', 'tokens')
  assert tokens.x == [0, 2000, 4000, 6000]
  assert numbers.curve(run, 'served/loss', 'bytes').x[1] == 1_000_000
  assert tokens.y[1] == numbers.curve(run, 'evals/heldout/loss').y[1]
  served = numbers.curve(own, 'served/loss')
  assert served.y[1] == numbers.curve(own, 'evals/personal/own/loss').y[0]
  assert numbers.stations(run)['training, uploads, server'] == 9.0


def test_only_fields_that_differ_are_shown(page):
  header = row(page, 'field')
  assert header == ['field', 'fed_avg', 'own', 'young']
  start = page.rows.index(header)
  assert page.rows[start + 1 :] == [
    ['aggregator.name', 'trimmed_mean', 'absent', 'absent'],
    ['aggregator.trim_fraction', '0.2', 'absent', 'absent'],
    ['algorithm.name', 'fed_avg', 'local_only', 'fed_avg'],
    ['seed', '0', '0', '1'],
  ]


def test_replies_stand_side_by_side(folders, tmp_path, monkeypatch):
  undrawn(monkeypatch)
  other = shutil.copytree(folders[0], tmp_path / 'other')
  finish(other, 6, CLIENTS[0], reply='never')
  words = Page(report.page([folders[0], other])).text
  assert words.count('How long?') == 1
  for said in ('client A day.', 'before training xq'):
    assert words.count(said) == 1
  assert 'fed_avg, after round 6 for ever' in words
  assert 'other, after round 6 never' in words


def test_what_a_run_lacks_is_said_in_words(page, folders, tmp_path):
  assert 'Loss against bytes: nothing travels (own).' in page.text
  assert 'Aggregation error: not told (own).' in page.text
  assert 'Replies: told at the end (own, young).' in page.text
  new = Page(report.page(write(tmp_path / 'new', config())))
  assert new.all('figure') == []
  for words in (
    'before its start',
    'Held-out loss: nothing has been tested.',
    'What each client holds was not recorded',
    'Drift by layer: told from the first round on.',
    'No time has been measured yet.',
    'Replies: told at the end.',
  ):
    assert words in new.text
  young = Page(report.page(folders[2]))
  assert 'a single test so far' in young.text


def test_a_private_run_tells_what_its_guarantee_does_not_cover(page, tmp_path):
  assert 'differential privacy' not in page.text
  folder = write(tmp_path / 'run', config(), records(2))
  limits = privacy.plan.NOT_COVERED
  record = {
    **{'epsilon': 2.5, 'delta': 1e-3, 'unit': 'client'},
    'not covered by the guarantee': limits,
  }
  (folder / 'privacy.json').write_text(json.dumps(record))
  text = Page(report.page(folder)).text
  assert (
    'differential privacy for each client, epsilon 2.5, delta 0.001' in text
  )
  assert ' '.join(limits.split()) in ' '.join(text.split())
  for epsilon in (None, float('inf')):  # noise that is left out
    record['epsilon'] = epsilon
    (folder / 'privacy.json').write_text(json.dumps(record))
    text = Page(report.page(folder)).text
    assert 'no differential privacy: privacy.json has no epsilon' in text


def test_losses_that_are_not_finite_are_worst_and_break_nothing(tmp_path):
  told = records(2)
  told[2]['evals/heldout/clients']['play/ROLE 2'] = None
  told[2]['evals/heldout/loss'] = told[1]['local/loss'] = None
  found = Page(report.page(write(tmp_path / 'run', config(), told)))
  assert row(found, 'play/ROLE 2')[2:] == ['6.2000', 'not finite', '']
  (loss,) = [a for a in found.all('figure') if a['id'] == 'loss-rounds']
  assert loss and 'nan' not in found.text


def test_labels_of_runs_are_as_long_as_they_must_be():
  found = runs.labels([pathlib.Path(p) for p in ('/x/a/1', '/x/b/1', '/x/b/2')])
  assert found == ['a/1', 'b/1', 'b/2']


def test_twenty_runs_of_a_sweep_differ_in_their_marks(tmp_path):
  for i in range(20):
    conf, told = config(seed=i), records(2, start=6.0 + 0.1 * i)
    folder = write(tmp_path / 'runs' / f'seed_{i:02d}', conf, told[: i % 3])
    (folder / 'outcome.json').write_text('{}')
  found = report.read(tmp_path)
  assert [run.label for run in found] == [f'seed_{i:02d}' for i in range(20)]
  keys = [drawing.run_key(i, '') for i in range(30)]
  assert len(set(keys)) == 30
  words = Page(report.page(tmp_path)).text
  assert 'seed_19' in words and 'Colours of 20 runs' in words


# ----------------------------------------------------------------- figures --


def test_figures_are_those_of_the_page_and_png_files_are_not_blank(
  folders, tmp_path
):
  from PIL import Image

  report.write(folders[:1], tmp_path / 'deep' / 'r.html')
  made = tmp_path / 'deep' / 'r_files'
  assert {path.stem for path in made.iterdir()} == FIGURES - {'loss-training'}
  for path in made.iterdir():
    pixels = np.asarray(Image.open(path).convert('L'))
    assert pixels.min() < 80 and pixels.max() == 255
    assert min(pixels.shape) > 200
  assert {path.name for path in (tmp_path / 'deep').iterdir()} == {
    *('r.html', 'r_files'),
  }


def test_figures_are_for_notebooks_too(folders):
  found = report.figures(folders[0])
  assert FIGURES - set(found) == {'loss-training'}  # one run: with the others
  (axes,) = found['loss-rounds'].axes
  assert len(axes.lines) == 3
  held = axes.lines[1].get_xydata()
  np.testing.assert_allclose(held[:, 0], [0, 2, 4, 6])
  np.testing.assert_allclose(held[:, 1], 6 * np.exp(-0.1 * held[:, 0]))


def test_without_matplotlib_the_extra_is_named(folders, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(Error, match=r'fedjax_llm\[viz\]'):
    report.page(folders)


# ------------------------------------------------------------ command line --


def refused(arguments, capsys):
  assert program.main([str(x) for x in arguments]) == 1
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  return err


def test_mistakes_are_one_sentence(tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').write_text('')
  bad = write(tmp_path / 'bad', config(), records(1))
  lines = (bad / 'metrics.jsonl').read_text().split('\n')
  (bad / 'metrics.jsonl').write_text('\n'.join([lines[0][:9], *lines[1:]]))
  held = write(tmp_path / 'held', config(), records(1))
  (held / 'clients.json').write_text('{')
  for name, words in {
    'nowhere': 'there is no such folder',
    'empty': 'holds no run',
    'file': 'is a file',
    'bad': 'metrics.jsonl:1 is no record of a round',
    'held': 'clients.json is damaged',
  }.items():
    assert words in refused([tmp_path / name], capsys)
  good = write(tmp_path / 'good', config(), records(1))
  out = ['--out', tmp_path / 'file' / 'r.html']
  assert 'cannot be made' in refused([good, *out], capsys)
  assert '--every 0' in refused([good, '--watch', '--every=0'], capsys)
  assert 'WORKDIR' in refused([], capsys)


def test_a_torn_last_line_is_left_out(tmp_path):
  folder = write(tmp_path / 'run', config(), records(2))
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"round": 3, "loc')
  (run,) = report.read(folder)
  assert run.round == 2 and not run.finished


def undrawn(monkeypatch):
  """No figures: they are slow, and not looked at here."""
  monkeypatch.setattr(drawing, 'png', lambda *_: b'')
  monkeypatch.setattr(drawing, 'svg', lambda _: '')


def watched(folder, out, wait):
  program.run([str(folder), '--watch', '--out', str(out), '--every=7'], wait)
  return Page(out.read_text())


def test_watching_writes_again_until_the_run_is_finished(tmp_path, monkeypatch):
  folder = write(tmp_path / 'run', config(), records(2))
  out, seen = tmp_path / 'r.html', []
  undrawn(monkeypatch)

  def wait(seconds):
    page = Page(out.read_text())
    again = [a['content'] for a in page.all('meta') if 'http-equiv' in a]
    state = row(page, 'run', 'state')
    seen.append((seconds, again, page.rows[page.rows.index(state) + 1][1]))
    if len(seen) == 2:  # after a look at which nothing was new
      lines = [json.dumps(record) + '\n' for record in records(6)]
      (folder / 'metrics.jsonl').write_text(''.join(lines))
    if len(seen) == 3:
      finish(folder, 6, CLIENTS[0])
    assert len(seen) < 9

  page = watched(folder, out, wait)
  assert seen == [
    (7, ['7'], 'unfinished, round 2 of 6'),
    (7, ['7'], 'unfinished, round 2 of 6'),
    (7, ['7'], 'unfinished, round 6 of 6'),
  ]
  assert not any('http-equiv' in a for a in page.all('meta'))
  assert 'finished, 6 rounds' in page.text


def test_ctrl_c_leaves_a_page_that_loads_no_more(tmp_path, monkeypatch):
  folder = write(tmp_path / 'run', config(), records(1))
  undrawn(monkeypatch)

  def wait(seconds):
    raise KeyboardInterrupt

  page = watched(folder, tmp_path / 'r.html', wait)
  assert not any('http-equiv' in a for a in page.all('meta'))
  assert 'unfinished, round 1 of 6' in page.text


def test_a_sweep_is_watched_until_its_table_is_written(tmp_path, monkeypatch):
  folder = write(tmp_path / 's' / 'runs' / 'a', config(), records(1))
  (folder / 'outcome.json').write_text('{}')
  (tmp_path / 's' / 'sweep.json').write_text('{}')
  undrawn(monkeypatch)
  waited = []

  def wait(seconds):
    waited.append(seconds)
    (tmp_path / 's' / 'table.json').write_text('{}')

  watched(tmp_path / 's', tmp_path / 'r.html', wait)
  assert waited == [7]


# ----------------------------------------------------------------- browser --

# Asks two windows, of a phone and of a desk, what they show.
_PROBE = """
<!doctype html><title>probe</title><body><script>
addEventListener('load', () => {
  console.log('the console is heard');
  const told = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const wide = element => element.getBoundingClientRect().width;
    const seen = element => wide(element) > 100 &&
      element.getBoundingClientRect().height > 60;
    const figures = [...page.querySelectorAll('figure')];
    return {
      inner: root.clientWidth,
      scroll: root.scrollWidth,
      figures: figures.map(f => f.id),
      seen: figures.filter(f => seen(f.querySelector('svg'))).length,
      drawn: figures.every(f => f.querySelectorAll('path, use').length > 5),
      outside: [...page.querySelectorAll('main *')].filter(element =>
        !element.closest('svg, .scroll, details') &&
        element.getBoundingClientRect().right > root.clientWidth + 1
      ).length,
      tables: [...page.querySelectorAll('.scroll')].every(box =>
        getComputedStyle(box).overflowX === 'auto'),
      letters: parseFloat(getComputedStyle(page.body).fontSize),
    };
  });
  document.body.textContent = JSON.stringify(told);
});
</script>
"""


@pytest.mark.skipif(
  shutil.which('chromium') is None, reason='there is no chromium here'
)
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(text, tmp_path):
  frames = ''.join(
    f'<iframe style="width:{width}px;height:900px;border:0" '
    f'srcdoc="{html.escape(text)}"></iframe>'
    for width in (360, 1280)
  )
  (tmp_path / 'probe.html').write_text(_PROBE + frames)
  done = subprocess.run(
    [
      *('chromium', '--headless', '--no-sandbox', '--disable-gpu'),
      *('--disable-quic', '--no-first-run', '--disable-sync'),
      *('--disable-background-networking', '--disable-component-update'),
      *('--disable-dev-shm-usage', '--enable-logging=stderr', '--v=0'),
      *(f'--user-data-dir={tmp_path / "profile"}', '--dump-dom'),
      (tmp_path / 'probe.html').as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=300,
  )
  spoken = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
  assert len(spoken) == 1 and 'the console is heard' in spoken[0], done.stderr
  body = done.stdout[done.stdout.index('[{') : done.stdout.rindex('}]') + 2]
  for told, width in zip(
    json.loads(html.unescape(body)), (360, 1280), strict=True
  ):
    assert told['scroll'] <= told['inner'] <= width
    assert told['outside'] == 0
    assert set(told['figures']) == FIGURES
    assert told['seen'] == len(FIGURES) and told['drawn']
    assert told['tables'] and told['letters'] >= 16


def test_runs_with_a_clock_show_loss_by_seconds_and_joules():
  def run(label, clock):
    told = records(4)
    for record in told[1:] if clock else []:
      record['clock/seconds'] = 10.0 * record['round']
      record['clock/joules'] = math.nan  # the watts are not known
      record['clock/joules_network'] = 3.0
    return runs.Run(
      label, pathlib.Path(label), config(), told, None, None, True
    )

  timed, plain = run('timed', True), run('plain', False)
  # These metrics count from the start: they are not added up.
  by_seconds = numbers.curve(timed, 'evals/heldout/loss', 'seconds')
  assert by_seconds.x == [0.0, 20.0, 40.0]
  by_bytes = numbers.curve(timed, 'evals/heldout/loss', 'bytes')
  assert by_bytes.x == [0.0, 1e6, 2e6] and by_bytes.y == by_seconds.y
  shown = curves.losses([timed])
  pictures = [x for x in shown if isinstance(x, drawing.Picture)]
  names = [x.name for x in pictures]
  assert 'loss-seconds' in names and 'loss-joules' not in names
  (picture,) = (x for x in pictures if x.name == 'loss-seconds')
  assert 'at 40 s' in picture.alt
  both = [x for x in curves.losses([timed, plain]) if isinstance(x, str)]
  words = 'Held-out loss against simulated seconds: no such figure (plain).'
  assert words in both
  names = [getattr(x, 'name', '') for x in curves.losses([plain])]
  assert 'loss-seconds' not in names
