"""Generates replies of a model with any number of adapters, side by side.

    python -m fedjax_llm.generate --model DIR [--adapter DIR ...]
        --prompt "..." [--prompt "..." ...] [--chat]
    python -m fedjax_llm.generate --workdir DIR [--client NAME] --prompt "..."

It generates one reply for each prompt and adapter, all of them in one batch.
Adapters are PEFT directories, of runs or of PEFT itself; `--adapter none` is
the model without an adapter. `--workdir` is what a run has made so far, beside
the model that it began with; prompts then have the form of its training unless
another is asked for. A reply depends only on its prompt, its adapter, the
`--seed` and the place of its prompt, not on the rest of the batch.
"""

import argparse
import pathlib
import sys

from fedjax_llm import adapters, data, models
from fedjax_llm.data import windows
from fedjax_llm.data.sources import Record
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.models.files.load import DTYPES
from fedjax_llm.run import command, rebuild, workdir
from fedjax_llm.run.ends import ends
from fedjax_llm.types import Error

_NONE = 'none'


def run(argv: list[str]) -> None:
  args = _arguments(argv)
  if args.workdir is not None:
    return _of_run(args)
  names = list(dict.fromkeys(args.adapter or [_NONE]))
  folders = [name for name in names if name != _NONE]
  loaded = models.pretrained(args.model, dtype=args.dtype)
  if args.tokenizer == 'bytes':
    tokenizer = data.tokenizers.bytes()
  else:
    tokenizer = data.tokenizers.pretrained(
      args.tokenizer or str(loaded.directory)
    )
  changes = [rebuild.load_adapter(pathlib.Path(x), loaded) for x in folders]
  template = 'chat' if args.chat else args.template
  prompts = [_encode(text, tokenizer, template) for text in args.prompt]
  pairs = [(i, name) for i in range(len(prompts)) for name in names]
  replies = models.generate(
    loaded,
    loaded.base,
    {},
    [prompts[i] for i, _ in pairs],
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
    eos_id=ends(loaded, tokenizer, template),
    # All adapters use the same random numbers for a prompt.
    seeds=[(args.seed + i) % 2**32 for i, _ in pairs],
    adapters=changes,
    which=[folders.index(x) if x != _NONE else -1 for _, x in pairs],
    batch_size=args.batch_size,
  )
  _show(args.prompt, names, [tokenizer.decode(reply) for reply in replies])


def _of_run(args: argparse.Namespace) -> None:
  """Replies before and after a run, of what its newest checkpoint holds."""
  made = rebuild.open(args.workdir, client=args.client)
  loaded = made.loaded
  if not loaded.config.writes:
    raise Error(f'--workdir {args.workdir}: this run trained no model of text.')
  tokenizer = data.tokenizers.bytes()
  if loaded.directory is not None:
    tokenizer = data.tokenizers.pretrained(str(loaded.directory))
  template = 'chat' if args.chat else args.template
  if template is None:
    template = made.config['population'].get('template', 'chat')
  prompts = [_encode(text, tokenizer, template) for text in args.prompt]
  base, params = adapters.fold(loaded.base, made.params)
  replies = [
    models.generate(
      loaded,
      weights,
      change,
      prompts,
      max_new_tokens=args.max_new_tokens,
      temperature=args.temperature,
      top_p=args.top_p,
      eos_id=ends(loaded, tokenizer, template),
      seeds=[(args.seed + i) % 2**32 for i in range(len(prompts))],
      batch_size=args.batch_size,
    )
    for weights, change in ((loaded.base, {}), (base, params))
  ]
  print('\n'.join([*made.notes, f'{args.workdir}: {made.what}', '']))
  both = [tokenizer.decode(reply) for pair in zip(*replies) for reply in pair]
  _show(args.prompt, ['before', 'after'], both)


def _show(prompts: list[str], names: list[str], replies: list[str]) -> None:
  """Prints each prompt with a reply for each name."""
  width = max(map(len, [*names, 'prompt']))
  for number, reply in enumerate(replies):
    i, which = divmod(number, len(names))
    if which == 0:
      print(('\n' if i else '') + _row('prompt', prompts[i], width))
    print(_row(names[which], reply, width))


def _arguments(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='fedjax_llm.generate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  many = {'action': 'append', 'default': []}
  add('--model', help='a Hugging Face directory, or a hub name')
  add('--adapter', **many, metavar='DIR', help="a PEFT directory, or 'none'")
  add('--workdir', metavar='DIR', help='of a run, in place of a model')
  add('--client', metavar='NAME', help="with --workdir: that client's model")
  add('--prompt', **many, required=True, metavar='TEXT')
  add('--max-new-tokens', type=int, default=128, metavar='N')
  add('--temperature', type=float, default=0.0, help='0: the likeliest token')
  add('--top-p', type=float, default=1.0, metavar='P', help='nucleus sampling')
  add('--seed', type=int, default=0)
  how = parser.add_mutually_exclusive_group()
  how.add_argument(
    '--template',
    choices=list(data.text.TEMPLATES),
    help='the form of the training; without one the prompt is as it is',
  )
  how.add_argument('--chat', action='store_true', help='--template chat')
  add('--tokenizer', metavar='DIR', help="another than the model's, or 'bytes'")
  add('--dtype', default='float32', choices=list(DTYPES))
  add('--batch-size', type=int, default=32, metavar='N')
  args = command.parse(parser, argv)
  if (args.model is None) == (args.workdir is None):
    raise Error('give one of --model DIR and --workdir DIR.')
  if args.workdir is not None and (args.adapter or args.tokenizer):
    raise Error('--workdir has its own adapter and tokenizer: leave them out.')
  if args.client is not None and args.workdir is None:
    raise Error('--client is of a run: it needs --workdir DIR.')
  return args


def _encode(text: str, tokenizer: Tokenizer, template: str | None) -> list[int]:
  if template is not None:
    record = Record(messages=({'role': 'user', 'content': text},))
    return data.text.prompt(record, tokenizer, template)
  return windows.with_start(tokenizer.encode(text), tokenizer)


def _row(title: str, text: str, width: int) -> str:
  """Returns the lines of a text beside its title."""
  gap = '\n' + ' ' * (width + 2)
  return f'{title:{width}}  {gap.join(text.strip().splitlines())}'


def main(argv: list[str] | None = None) -> int:
  return workdir.status(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
