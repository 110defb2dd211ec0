"""Compares federated prompts on pictures of three vendors, with a dual encoder.

    scripts/compare_vlm [--budget MINUTES]

Three clients, one a vendor of emoji. The things of six categories are dealt to
them in shares that Dirichlet(0.3) draws, so both styles and classes differ. The
dual encoder is fitted once, on other things that one vendor drew: DINOv2-small
for pictures of 56 x 56, a ridge map from its states to the space of
all-MiniLM-L6-v2, which reads the names. Features of pictures are computed once,
since no method here changes them before the map.

Accuracies, of each method and seed: `own`, on held-out things of a client's
vendor and categories; `base`, on held-out things of all vendors and the six
categories; `new`, on the three categories that no client knows, by their names.

Every cell is a JSON file in `--out`, so the same command resumes a stopped
comparison; within `--budget` minutes no cell begins that would end after it, by
the longest so far. Prints the table; with every cell of the three seeds there,
`--write` stores the results and a figure beside this file.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables

import fedjax_llm as fl
from fedjax_llm.nodes import Pictures
from fedjax_llm.types import Cohort, Images

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))

import cell_files  # noqa: E402

KEY: Any = None  # nothing here is random in a loss
BASE = (
  *('Activities', 'Animals & Nature', 'Objects'),
  *('People & Body', 'Smileys & Emotion', 'Symbols'),
)
NEW = ('Flags', 'Food & Drink', 'Travel & Places')
VENDORS = ('fluent', 'google', 'twitter')
NUM_CLIENTS = len(VENDORS)
METHODS: dict[str, Any] = {  # name: (adapter, settings, learning rate)
  'zero_shot': None,
  'prompt_fl': (fl.adapters.context(4), {}, 1e-2),
  'fed_otp': (fl.adapters.context(4), {}, 1e-2),
  'fed_pgp_clip': (fl.adapters.context(4), {}, 1e-2),
  'fed_tpg': (fl.adapters.generated_context(4, 4, 1), {}, 1e-3),
  'fed_clip': (fl.adapters.feature_attention(), {}, 1e-3),
}


def cache():
  home = os.environ.get('FEDJAX_LLM_CACHE') or '~/.cache/fedjax_llm'
  return pathlib.Path(home).expanduser()


# ------------------------------------------------------------- the encoders --


def words(names):
  """Returns class names as padded texts, and the places of their ends."""
  tokenizer = fl.data.tokenizers.pretrained(str(cache() / 'all-MiniLM-L6-v2'))
  texts = [name.lower().replace('&', 'and') for name in names]
  assert tokenizer.whole is not None
  rows = [tokenizer.whole(text, None, 32).tokens for text in texts]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return tokens, np.array([len(row) - 1 for row in rows], np.int32)


def encoders(things):
  """Returns the dual encoder, and features of the pictures of some things."""
  folder = cache() / 'prompts_on_emoji'
  folder.mkdir(exist_ok=True)
  files = folder / f'fit_{things}.npz', folder / f'features_{things}.npz'
  if not files[1].exists():
    _fit(files, things)
  dual = fl.models.joined(
    cache() / 'all-MiniLM-L6-v2', cache() / 'dinov2-small', files[0]
  )
  with np.load(files[1]) as arrays:
    return dual, dict(arrays)


def _fit(files, things):
  """Fits the map from DINOv2's states to MiniLM's space: ridge regression."""
  with np.load(cache() / 'emoji' / 'emoji_56.npz') as emoji:
    emoji = dict(emoji)
  kinds = np.unique(emoji['thing'])
  order = np.random.default_rng(0).permutation(kinds)[:things]
  place = {thing: i for i, thing in enumerate(order)}
  kept = np.array([thing in place for thing in emoji['thing']])
  emoji = {name: x[kept] for name, x in emoji.items()}
  rank = np.array([place[thing] for thing in emoji['thing']])

  # Both encoders with maps that change nothing.
  text, image = 384, 768
  plain = {
    'text_kernel': np.eye(text, image),
    'text_bias': np.zeros(image),
    'image_kernel': np.eye(image),
    'image_bias': np.zeros(image),
    'logit_scale': np.zeros(()),
  }
  np.savez(files[0], **plain)
  dual = fl.models.joined(
    cache() / 'all-MiniLM-L6-v2', cache() / 'dinov2-small', files[0]
  )

  both: Any = dual.dual

  @jax.jit
  def see(base, pixels):
    whole, local = both.image(base, {}, pixels)
    return jnp.concatenate([whole[:, None], local], axis=1)

  parts = []
  for first in range(0, len(rank), 48):
    some = emoji['pixels'][first : first + 48]
    padded = np.pad(some, ((0, 48 - len(some)), *[(0, 0)] * 3))
    parts.append(np.asarray(see(dual.base, padded))[: len(some)])
  states = np.concatenate(parts).astype(np.float64)  # [M, 1 + N, 2 D]

  fit = (rank % 3 == 0) & (emoji['domain'] == 'google')
  read = jax.jit(lambda base, tokens, ends: both.text(
    base, {}, tokens, ends=ends))  # fmt: skip
  target = np.asarray(read(dual.base, *words(emoji['name'][fit])))[:, :text]
  target = target / np.linalg.norm(target, axis=1, keepdims=True)
  x = states[fit, 0]
  mean, middle = x.mean(0), target.mean(0)
  x, target = x - mean, target - middle
  penalty = 0.1 * np.trace(x @ x.T) / len(x)
  kernel = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), target)
  bias = middle - mean @ kernel
  np.savez(
    files[0],
    text_kernel=np.eye(text),
    text_bias=np.zeros(text),
    image_kernel=kernel,
    image_bias=bias,
    logit_scale=np.zeros(()),
  )
  draft = files[1].with_name(f'.{files[1].name}')
  np.savez_compressed(
    draft,
    features=(states @ kernel + bias).astype(np.float32),
    rank=rank,
    domain=emoji['domain'],
    category=emoji['category'],
  )
  draft.rename(files[1])


def loss_of(dual, names, scale):
  """Returns the loss on features of pictures and classes of these names."""
  read = fl.local.towers(dual.dual, *words(names))

  def seen(base, params, pictures):
    x = pictures.pixels  # features, in the place of pixels

    def images(rows=None):
      assert rows is None, 'features of pictures stand'
      return Pictures(x[:, 0], x[:, 1:])

    return read(base, params, pictures)._replace(
      images=images, scale=jnp.float32(scale)
    )

  return fl.local.by_names(seen)


# --------------------------------------------------------------- federation --


def shares(data, seed):
  """Returns the pictures of each client: those that train, those held out.

  A third of the things fitted the map, one trains, and one is held out.
  """
  rng = np.random.default_rng(seed)
  third = data['rank'] % 3
  own: list = [[] for _ in VENDORS]
  for category in BASE:
    here = (data['category'] == category) & (third == 2)
    things = rng.permutation(np.unique(data['rank'][here]))
    parts = np.cumsum(rng.dirichlet([0.3] * NUM_CLIENTS))[:-1]
    dealt = np.split(things, np.round(parts * len(things)).astype(int))
    for k, some in enumerate(dealt):
      rows = here & np.isin(data['rank'], some)
      own[k] += np.flatnonzero(rows & (data['domain'] == VENDORS[k])).tolist()
  tests = []
  for k, rows in enumerate(own):
    names, counts = np.unique(data['category'][rows], return_counts=True)
    known = np.isin(data['category'], names[counts >= 2])
    mine = (data['domain'] == VENDORS[k]) & known
    tests.append(np.flatnonzero(mine & (third == 1)))
  return own, tests, third == 1


def labelled(data, rows, names):
  label = np.array([names.index(c) for c in data['category'][rows]], np.int32)
  return Images(data['features'][rows], label, np.ones(len(rows), bool))


def cohort(data, own, states, seed, round, steps, batch):
  rng = np.random.default_rng((seed, round))
  rows = np.stack([
    rng.choice(x, steps * batch, replace=len(x) < steps * batch) for x in own
  ])  # fmt: skip
  flat = labelled(data, rows.ravel(), BASE)
  shape = (NUM_CLIENTS, steps, batch)
  return Cohort(
    ids=np.arange(NUM_CLIENTS, dtype=np.int32),
    batches=jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), flat),
    weight=np.array([len(x) for x in own], np.float32),
    valid=np.ones(NUM_CLIENTS, bool),
    states=states,
  )


class Comparison:
  """The data, the encoders and the compiled programs of all cells."""

  def __init__(self, things, rounds, steps, batch):
    self.dual, self.data = encoders(things)
    self.base = self.dual.base
    self.size = (rounds, steps, batch)
    self.scale = self._scale()
    self.losses = {
      names: loss_of(self.dual, names, self.scale) for names in (BASE, NEW)
    }
    self.programs = {}

  def _scale(self):
    """Chooses the scale of cosines on the things of the fitted map."""
    rows = (self.data['rank'] % 3 == 0) & np.isin(self.data['category'], BASE)
    rows = np.flatnonzero(rows & (self.data['domain'] == 'google'))
    batch = labelled(self.data, rows, BASE)
    loss = jax.jit(lambda base, scale: loss_of(self.dual, BASE, scale)(
      base, {}, batch, KEY).total)  # fmt: skip
    nats = lambda scale: float(loss(self.base, scale))
    return min((5.0, 10.0, 20.0, 40.0, 80.0), key=nats)

  def program(self, method):
    """Returns the method, its compiled round, and its compiled accuracies."""
    if method not in self.programs:
      built = METHODS[method]
      algorithm = None
      if built is not None:
        optimizer = fl.local.optimizer('adam', built[2])
        recipe = getattr(fl.recipes, method)
        algorithm = recipe(self.losses[BASE], optimizer, **built[1])
      correct = {
        names: jax.jit(lambda base, params, batch, loss=loss: loss(
          base, params, batch, KEY).correct)
        for names, loss in self.losses.items()
      }  # fmt: skip
      step = None if algorithm is None else jax.jit(algorithm.round)
      self.programs[method] = algorithm, step, correct
    return self.programs[method]

  def accuracy(self, method, params, rows, names, size=128):
    correct, hits = self.program(method)[2][names], 0.0
    for first in range(0, len(rows), size):
      some = rows[first : first + size]
      batch = labelled(self.data, np.resize(some, size), names)
      present = np.arange(size) < len(some)
      hits += float(correct(self.base, params, batch._replace(present=present)))
    return hits / len(rows)

  def cell(self, method, seed):
    began = time.perf_counter()
    rounds, steps, batch = self.size
    own, tests, held = shares(self.data, seed)
    algorithm, step, _ = self.program(method)
    served, common, sent = lambda k: {}, {}, 0
    if algorithm is not None:
      keys = jax.random.split(jax.random.key(seed))
      params = jax.jit(METHODS[method][0].init)(keys[0], self.base)
      state = algorithm.init(keys[1], params)
      states = fl.tree.broadcast(
        algorithm.init_client(state.params), NUM_CLIENTS
      )
      for t in range(rounds):
        of = cohort(self.data, own, states, seed, t, steps, batch)
        state, states, info = step(state, of, self.base)
      sent = int(np.asarray(info.bytes_up).sum(1)[0])
      common = algorithm.personal(state.params, None)

      def served(k):
        mine = jax.tree.map(lambda x: x[k], states)
        return algorithm.personal(
          fl.tree.merge(mine.private, state.params)
          if mine.private is not None else state.params, mine)  # fmt: skip

    base_rows = np.flatnonzero(held & np.isin(self.data['category'], BASE))
    new_rows = np.flatnonzero(held & np.isin(self.data['category'], NEW))
    own_hits = [
      self.accuracy(method, served(k), rows, BASE)
      for k, rows in enumerate(tests)
    ]
    return {
      'method': method,
      'seed': seed,
      'own': float(np.mean(own_hits)),
      'base': self.accuracy(method, common, base_rows, BASE),
      'new': self.accuracy(method, common, new_rows, NEW),
      'bytes_up': sent,
      'scale': self.scale,
      'seconds': time.perf_counter() - began,
    }


# ------------------------------------------------------------------ program --


def read(folder, size):
  """Returns the cells in a folder, all of the same size.

  `size` maps 'things', 'rounds', 'steps' and perhaps 'batch' to their numbers.

  Raises:
    SystemExit: a cell of another size.
  """
  cells = []
  for file in sorted(folder.glob('*.json')):
    cell = json.loads(file.read_text())
    for name, number in size.items():
      if cell.get(name, number) != number:
        raise SystemExit(
          f'{file} was trained with {name}={cell[name]}, and --{name} is '
          f'{number}: take another --out.'
        )
    cells.append(cell)
  return cells


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--out', default='runs/compare_vlm')
  parser.add_argument('--budget', type=float, help='minutes; by default all')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--methods', nargs='+', default=list(METHODS))
  parser.add_argument('--things', type=int, default=480)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=2)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--write', action='store_true')
  args = parser.parse_args()
  unknown = set(args.methods) - set(METHODS)
  if unknown:
    parser.error(f'--methods {min(unknown)} is none of {", ".join(METHODS)}')
  budget = cell_files.budget(args.budget)
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  names = ('things', 'rounds', 'steps', 'batch')
  size = {name: getattr(args, name) for name in names}
  read(out, size)
  comparison, longest = None, 0.0
  for seed in range(args.seeds):
    for method in args.methods:
      file = out / f'{method}_{seed}.json'
      if file.exists():
        continue
      left = budget.left()
      if left < longest or left <= 0:
        print(f'{file.name}: no time is left', flush=True)
        continue
      if comparison is None:
        comparison = Comparison(
          args.things, args.rounds, args.steps, args.batch
        )
      cell = comparison.cell(method, seed)
      longest = max(longest, cell['seconds'])
      cell.update(size)
      cell_files.save(file, cell, indent=2)
      print(json.dumps(cell), flush=True)
  cells = read(out, size)
  print(tables.markdown(cells))
  if args.write:
    if len(cells) < 3 * len(METHODS):
      parser.error(f'--write needs {3 * len(METHODS)} cells; {args.out} has '
                   f'{len(cells)}')  # fmt: skip
    (HERE / 'results.json').write_text(json.dumps(cells, indent=1) + '\n')
    tables.draw(cells, HERE / 'results.png')


if __name__ == '__main__':
  main()
