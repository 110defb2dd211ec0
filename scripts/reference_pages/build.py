"""Builds the API reference with pdoc, and refuses names that lead nowhere.

A page a module. A room's page has what `fl.room.name` offers, wherever it is
written down. Names in docstrings, `aggregators.fedex`, become links; those that
begin with a room and name nothing are told, and so are pdoc's own warnings.
"""

import argparse
import ast
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jinja2
import pdoc
import pdoc.render

import fedjax_llm

ROOT = pathlib.Path(__file__).parents[2]
NAME = fedjax_llm.__name__
REFERENCE = re.compile(r'<code>([a-z_]\w*(?:\.\w+)*)(\(\))?</code>')


def modules() -> dict[str, object]:
  """All that is not private, imported, by full name; `__main__` runs."""
  found = pkgutil.walk_packages(fedjax_llm.__path__, f'{NAME}.')
  hidden = lambda name: any(part[0] == '_' for part in name.split('.')[1:])
  names = [NAME, *(m.name for m in found if not hidden(m.name))]
  return {name: importlib.import_module(name) for name in names}


def offer_all(found: dict[str, object]) -> None:
  """Makes a package's page tell all that its `__init__` brings together."""
  for name, module in found.items():
    if not hasattr(module, '__path__'):
      continue
    source = ast.parse(pathlib.Path(inspect.getfile(module)).read_text())
    names = [
      alias.asname or alias.name
      for node in source.body
      if isinstance(node, ast.ImportFrom)
      and (node.module or '').startswith(NAME)
      for alias in node.names
      if alias.asname or alias.name in getattr(module, '__all__', ())
    ]
    own = [
      key
      for key, x in vars(module).items()
      if getattr(x, '__module__', None) == name and key[0] != '_'
    ]
    below = [
      n.rpartition('.')[2] for n in found if n.rpartition('.')[0] == name
    ]
    # A function may have the name of the file it is written in.
    below = [n for n in below if inspect.ismodule(getattr(module, n, None))]
    module.__all__ = list(dict.fromkeys([*names, *own, *below]))


def tell_fields(module: object) -> None:
  """Makes the comment beside a field of a named tuple its docstring."""
  lines = inspect.getsource(module).splitlines()
  for node in ast.parse('\n'.join(lines)).body:
    kind = isinstance(node, ast.ClassDef) and getattr(module, node.name)
    if not kind or not hasattr(kind, '_fields'):
      continue
    kind.__new__.__doc__ = ''
    for item in node.body:
      if isinstance(item, ast.AnnAssign):
        field = getattr(kind, ast.unparse(item.target))
        comment = lines[item.end_lineno - 1][item.end_col_offset :].strip()
        field.__doc__ = comment.removeprefix('#').strip()


def resolve(name: str, found: dict[str, object]) -> str | None:
  """The address of `room.name` or `room.module.name`, from the top."""
  parts = name.split('.')
  for cut in range(len(parts), 0, -1):
    module = '.'.join([NAME, *parts[:cut]])
    if module not in found:
      continue
    page, rest = module.replace('.', '/') + '.html', parts[cut:]
    thing = found[module]
    for part in rest:
      if not hasattr(thing, part) and part not in getattr(
        thing, '__annotations__', ()
      ):
        return None
      thing = getattr(thing, part, None)
    return page + ('#' + '.'.join(rest) if rest else '')
  return None


def linked(
  found: dict[str, object], missing: dict[str, set[str]]
) -> Callable[..., str]:
  """pdoc's links, and those from the top of the package."""
  inner = pdoc.render.env.filters['linkify']

  @jinja2.pass_context
  def linkify(context, code, *args, **settings):
    here = context['module'].modulename

    def link(match: re.Match) -> str:
      name, call = match[1], match[2] or ''
      is_file = name.endswith(('.json', '.jsonl'))
      is_word = '.' not in name and here != NAME
      top = f'{NAME}.{name.split(".")[0]}'
      if is_file or is_word or top not in found:
        return match[0]
      address = resolve(name, found)
      if address is None:
        missing.setdefault(name, set()).add(here)
        return match[0]
      up = '../' * here.count('.')
      return f'<code><a href="{up}{address}">{name}{call}</a></code>'

    text = inner(context, code, *args, **settings)
    return type(text)(REFERENCE.sub(link, text))

  return linkify


def dead_links(out: pathlib.Path) -> list[str]:
  """Links of the pages to pages or places that are not there."""
  script = re.compile(r'<script.*?</script>', re.DOTALL)
  pages = {
    page: script.sub('', page.read_text()) for page in out.rglob('*.html')
  }
  places = {
    page: set(re.findall(r' id="([^"]+)"', x)) for page, x in pages.items()
  }
  dead = []
  for page, text in pages.items():
    for address in set(re.findall(r'<a[^>]* href="([^":]*)"', text)):
      file, _, place = address.partition('#')
      target = (page.parent / file).resolve() if file else page
      there = target in pages and (not place or place in places[target])
      if not there:
        dead.append(f'{page.relative_to(out)}: {address}')
  return dead


def build(out: pathlib.Path) -> list[str]:
  """Writes the pages; what is wrong with them, a sentence each."""
  found, missing = modules(), {}
  offer_all(found)
  for module in found.values():
    tell_fields(module)
  pdoc.render.configure(docformat='google', footer_text=NAME, show_source=False)
  pdoc.render.env.filters['linkify'] = linked(found, missing)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    pdoc.pdoc(NAME, output_directory=out)
  trouble = sorted({str(each.message) for each in told})
  trouble += [
    f'{", ".join(sorted(where))}: `{name}` is nowhere'
    for name, where in sorted(missing.items())
  ]
  return trouble + dead_links(out.resolve())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--out', type=pathlib.Path, default=ROOT / 'build/reference'
  )
  args = parser.parse_args()
  trouble = build(args.out)
  for sentence in trouble:
    print(sentence, file=sys.stderr)
  print(f'{args.out / "index.html"}')
  return 1 if trouble else 0


if __name__ == '__main__':
  sys.exit(main())
