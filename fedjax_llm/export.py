"""Writes the result of a run as a PEFT adapter or as a whole model.

    python -m fedjax_llm.export --workdir DIR --to peft|merged --out DIR
        [--client NAME] [--rank R] [--round N|best] [--dtype DTYPE]
        [--trust-code]

'peft' is an adapter directory that PEFT loads, 'merged' a whole model that
transformers loads. The run may be unfinished: the program exports its newest
checkpoint without training, or with `--round` an earlier one that is kept.
Nothing in the workdir is changed.

A workdir may name functions outside the project. They are code of the author of
the workdir, and run only with `--trust-code`.

Changes that a method wrote into the base go into a merged model as they are,
and into a PEFT adapter as a low-rank change of the base before the run: exactly
where its rank is at most a quarter of the smaller side of each weight, or as
the nearest change of rank R with `--rank R`.
"""

import argparse
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import adapters, data, models
from fedjax_llm.adapters import peft
from fedjax_llm.adapters.peft import dora as peft_dora
from fedjax_llm.models import quantised
from fedjax_llm.models.files.load import DTYPES
from fedjax_llm.nodes import LowRank
from fedjax_llm.run import command, ends, experiment, rebuild, workdir
from fedjax_llm.types import Error, Params

# The relative error up to which a low-rank change counts as exact.
_TOLERANCE = 1e-5

# Files beside the weights that other tools read.
_BESIDE = (
  *('tokenizer*', 'special_tokens_map.json', 'added_tokens.json'),
  *('vocab.json', 'vocab.txt', 'merges.txt', '*.model', 'chat_template*'),
  'generation_config.json',
)


def run(argv: list[str]) -> None:
  args = _arguments(argv)
  out = pathlib.Path(args.out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise Error(f'--out {out} exists and is not empty: take a new folder.')
  if args.rank is not None and args.rank < 1:
    raise Error(f'--rank {args.rank} must be at least 1.')
  if args.rank is not None and args.to != 'peft':
    raise Error('--rank is of an adapter: leave it out, or use --to peft.')
  if args.dtype is not None and args.to != 'merged':
    raise Error('--dtype is of a merged model; adapters are float32.')
  made = rebuild.open(
    args.workdir,
    client=args.client,
    round=_round(args.round),
    trusted=args.trust_code,
  )
  whole = out.absolute()
  draft = whole.with_name(f'.{whole.name}.partial')
  shutil.rmtree(draft, ignore_errors=True)
  try:
    draft.mkdir(parents=True)
    if args.to == 'merged':
      description = _merged(draft, made, args.dtype)
    else:
      description = _adapter(draft, out, made, args.rank)
    if out.exists():
      out.rmdir()
    os.replace(draft, out)
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  print('\n'.join([*made.notes, f'{out}: {made.what}, as {description}']))


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--workdir', required=True, metavar='DIR', help='of the run')
  add('--to', required=True, choices=['peft', 'merged'])
  add('--out', required=True, metavar='DIR', help='a new or an empty folder')
  add('--client', metavar='NAME', help="that client's personal model")
  add('--dtype', choices=list(DTYPES), help='of the weights of a merged model')
  add('--rank', type=int, metavar='R', help='of the adapter')
  add('--round', metavar='N|best', help='a round with a kept checkpoint')
  trust = "follow import paths in the workdir's config.json, which run code"
  add(rebuild.TRUST, action='store_true', help=trust)
  return command.parse(parser, argv)


def _round(text: str | None) -> Any:
  if text is None or text == 'best':
    return text
  if not text.isdecimal():
    raise Error(f'--round {text}: it is a number from 0, or best.')
  return int(text)


# ------------------------------------------------------------------ merged --


def _merged(
  folder: pathlib.Path, made: rebuild.Made, dtype: str | None = None
) -> str:
  loaded = made.loaded
  base = adapters.merge(loaded.base, made.params)
  if dtype is not None:
    base = jax.tree.map(
      lambda x: quantised.dense(x, jnp.dtype(dtype)),
      base,
      is_leaf=lambda x: not isinstance(x, Mapping),  # quantised ones as well
    )
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(base)):
      raise Error(
        f'--dtype {dtype} cannot hold the values of this model: take bfloat16 '
        'or float32.'
      )
  models.save(folder, loaded.config, base)
  missing = ' without a tokenizer (its texts were bytes)'
  if loaded.directory is not None:
    missing = ''
    for pattern in _BESIDE:
      for file in loaded.directory.glob(pattern):
        if file.is_file():
          shutil.copyfile(file, folder / file.name)
    _hand_on_ends(folder, made)
  return f'a merged {loaded.config.family} model{missing}'


def _hand_on_ends(folder: pathlib.Path, made: rebuild.Made) -> None:
  """Writes the tokens that end replies, for models with a chat template."""
  loaded, template = made.loaded, made.config['population'].get('template')
  if loaded.directory is None or not loaded.config.writes:
    return
  if template in ('chat', None):
    try:
      tokenizer = data.tokenizers.pretrained(str(loaded.directory))
    except Error:
      return  # a model without a usable tokenizer has no chat template
    ends.hand_on(folder, loaded, tokenizer, 'chat')


# ----------------------------------------------------------------- adapter --


def _adapter(
  folder: pathlib.Path, out: pathlib.Path, made: rebuild.Made, rank: int | None
) -> str:
  loaded, base_model = made.loaded, made.loaded.name
  if loaded.directory is None:  # no model file holds this base
    models.save(folder / 'base', loaded.config, loaded.base)
    base_model = str(out.absolute() / 'base')
  kind = peft.kind(made.params)
  if kind != 'LORA':
    if rank is not None:
      raise Error(f'--rank is of low-rank adapters, and this one is {kind}.')
    experiment.save_adapter(
      folder,
      made.params,
      loaded,
      made.task,
      base_model=base_model,
      peft_fields={},
    )
    _hand_on_ends(folder, made)
    return f'a PEFT adapter of the kind {kind} of {base_model}'
  plain = adapters.as_low_rank(made.params)
  params, lengths = peft_dora.split(plain)
  changed = any(x.residual is not None for _, x in low_rank(params))
  lost = 0.0
  if lengths and (changed or rank is not None):
    raise Error(
      'A DoRA adapter cannot be written with another rank or with changes of '
      'the base; leave --rank out, or use --to merged, which writes all of it.'
    )
  if changed or rank is not None:
    params, lost = factored(params, rank)
  stabilised = made.adapter.peft.get('use_rslora', False)
  stabilised = stabilised and not changed and rank is None
  experiment.save_adapter(
    folder,
    peft_dora.put(params, lengths),
    loaded,
    made.task,
    base_model=base_model,
    peft_fields={**made.adapter.peft, 'use_rslora': stabilised},
  )
  _hand_on_ends(folder, made)
  ranks = sorted({node.a.shape[-1] for _, node in low_rank(params)})
  rank_text = ' and '.join(map(str, ranks)) or '0'
  nearest = ''
  if lost > _TOLERANCE:
    nearest = f' (nearest: one weight loses {lost:.1%} of its change)'
  return f'a PEFT adapter of rank {rank_text} of {base_model}{nearest}'


def low_rank(params: Params, path: tuple[str, ...] = ()) -> list[Any]:
  """Returns every (path, node) of the low-rank nodes."""
  if isinstance(params, LowRank):
    return [(path, params)]
  if not isinstance(params, Mapping):
    return []
  return [x for name in params for x in low_rank(params[name], (*path, name))]


def factored(params: Params, rank: int | None = None) -> tuple[Params, float]:
  """Returns low-rank nodes without residuals, and the largest relative error.

  The factors are U S^(1/2) and S^(1/2) V' of each change. For rank None they
  are exact, and all layers of a weight get the largest rank that one of them
  needs; else they are the nearest of this rank. The error of a change is
  ||rest||_F / ||change||_F.

  Raises `Error` where a change needs more than a quarter of its smaller side.
  """
  worst = 0.0

  def walk(node, path):
    nonlocal worst
    if isinstance(node, Mapping):
      return {name: walk(node[name], (*path, name)) for name in node}
    if not isinstance(node, LowRank):
      return node
    change = np.asarray(adapters.product(node), np.float64)
    *lead, d, f = change.shape
    # One after the other: NumPy's batched SVD takes no less time.
    parts = [
      np.linalg.svd(one, full_matrices=False)
      for one in change.reshape(-1, d, f)
    ]
    tails = [_tails(s) for _, s, _ in parts]
    need = max(int(np.sum(tail > _TOLERANCE)) for tail in tails)
    if rank is None and need > min(d, f) // 4:
      raise Error(
        f'The base changed by more than a plain PEFT adapter can hold: '
        f'{"/".join(path)} ({d} x {f}) needs rank {need}; use --to merged, or '
        '--rank R for the nearest adapter of rank R.'
      )
    keep = min(max(need, 1) if rank is None else rank, d, f)
    worst = max([worst, *(float(t[keep]) for t in tails if keep < len(t))])
    a = [u[:, :keep] * np.sqrt(s[:keep]) for u, s, _ in parts]
    b = [np.sqrt(s[:keep])[:, None] * v[:keep] for _, s, v in parts]
    shaped = lambda x, *to: np.stack(x).astype(np.float32).reshape(*lead, *to)
    return LowRank(
      a=shaped(a, d, keep),
      b=shaped(b, keep, f),
      scale=np.ones(lead, np.float32),
    )

  return walk(params, ()), worst


def _tails(s: np.ndarray) -> np.ndarray:
  """Returns the relative error of a change cut to rank 0, 1, 2, ..."""
  left = np.sqrt(np.cumsum((s**2)[::-1])[::-1])
  return left / max(left[0], np.finfo(s.dtype).tiny)


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
