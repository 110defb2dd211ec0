"""Builds the API reference with pdoc, and fails for unresolved names.

Every module has a page. A package's page has all names of its `__init__`,
wherever they are defined. Names in docstrings such as `aggregators.fedex`
become links; names that begin with a package but do not exist are errors, and
so are pdoc's own warnings.
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
  """Imports all public modules, by full name; `__main__` would run."""
  walked = pkgutil.walk_packages(fedjax_llm.__path__, f'{NAME}.')
  hidden = lambda name: any(part[0] == '_' for part in name.split('.')[1:])
  names = [NAME, *(m.name for m in walked if not hidden(m.name))]
  return {name: importlib.import_module(name) for name in names}


def offer_all(pages: dict[str, object]) -> None:
  """Sets `__all__` of packages to all names that their `__init__` imports."""
  for name, module in pages.items():
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
      n.rpartition('.')[2] for n in pages if n.rpartition('.')[0] == name
    ]
    # A function may have the same name as its file.
    below = [n for n in below if inspect.ismodule(getattr(module, n, None))]
    module.__all__ = list(dict.fromkeys([*names, *own, *below]))


def tell_fields(module: object) -> None:
  """Uses the comment after a field of a named tuple as its docstring."""
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


def resolve(name: str, pages: dict[str, object]) -> str | None:
  """Returns the address of `package.name` or `package.module.name`, or None."""
  parts = name.split('.')
  for cut in range(len(parts), 0, -1):
    module = '.'.join([NAME, *parts[:cut]])
    if module not in pages:
      continue
    page, rest = module.replace('.', '/') + '.html', parts[cut:]
    thing = pages[module]
    for part in rest:
      if not hasattr(thing, part) and part not in getattr(
        thing, '__annotations__', ()
      ):
        return None
      thing = getattr(thing, part, None)
    return page + ('#' + '.'.join(rest) if rest else '')
  return None


def linked(
  pages: dict[str, object], missing: dict[str, set[str]]
) -> Callable[..., str]:
  """Returns pdoc's link filter with links for names from the top package."""
  inner = pdoc.render.env.filters['linkify']

  @jinja2.pass_context
  def linkify(context, code, *args, **settings):
    here = context['module'].modulename

    def link(match: re.Match) -> str:
      name, call = match[1], match[2] or ''
      is_file = name.endswith(('.json', '.jsonl'))
      is_word = '.' not in name and here != NAME
      top = f'{NAME}.{name.split(".")[0]}'
      if is_file or is_word or top not in pages:
        return match[0]
      address = resolve(name, pages)
      if address is None:
        missing.setdefault(name, set()).add(here)
        return match[0]
      up = '../' * here.count('.')
      return f'<code><a href="{up}{address}">{name}{call}</a></code>'

    text = inner(context, code, *args, **settings)
    return type(text)(REFERENCE.sub(link, text))

  return linkify


def dead_links(out: pathlib.Path) -> list[str]:
  """Returns the links of the pages to missing pages or anchors."""
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
  """Writes the pages and returns their problems, one sentence each."""
  pages, missing = modules(), {}
  offer_all(pages)
  for module in pages.values():
    tell_fields(module)
  pdoc.render.configure(docformat='google', footer_text=NAME, show_source=False)
  pdoc.render.env.filters['linkify'] = linked(pages, missing)
  with warnings.catch_warnings(record=True) as messages:
    warnings.simplefilter('always')
    pdoc.pdoc(NAME, output_directory=out)
  trouble = sorted({str(each.message) for each in messages})
  trouble += [
    f'{", ".join(sorted(where))}: `{name}` does not exist'
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
