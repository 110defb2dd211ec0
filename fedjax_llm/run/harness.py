"""Evaluates models on the tasks of lm-eval (extra `lm-eval`).

`model` returns an `lm_eval.api.model.LM` of a network with an adapter, and
`evaluate` its results on tasks by name or from local YAML files.
"""

import difflib
import importlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_llm import data, local, models
from fedjax_llm.data import collate
from fedjax_llm.data.tokenizers import Tokenizer
from fedjax_llm.models import LoadedModel
from fedjax_llm.types import Base, Error, Example, Params


def _package(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise Error(
      "tasks of lm-eval need the package: pip install 'fedjax_llm[lm-eval]'."
    ) from error


def model(
  loaded: LoadedModel,
  tokenizer: Tokenizer,
  base: Base,
  params: Params,
  *,
  stops: Sequence[int],
  batch_size: int = 16,
) -> Any:
  """Returns lm-eval's `LM` of a network with an adapter.

  Texts longer than the model's positions lose tokens on their left.

  Args:
    loaded: the network.
    tokenizer: its tokenizer.
    base: the weights.
    params: the adapter, with all changes of the base folded in.
    stops: tokens that end a reply.
    batch_size: texts at a time.

  Raises:
    Error: lm-eval is not installed.
  """
  api, utils = _package('lm_eval.api.model'), _package('lm_eval.utils')
  nats = jax.jit(local.causal_lm(loaded.model, per_row=True))
  most = min(loaded.config.max_positions, 4096)
  begin = data.tokenizers.start(tokenizer)

  def score(pairs: Sequence[tuple[list[int], list[int]]]) -> list[Any]:
    """Returns (log p(continuation | context), is it greedy) of each pair."""
    texts = []
    for context, continuation in pairs:
      tokens = [*context, *continuation][-most:]
      start = max(1, len(tokens) - len(continuation))
      learned = np.arange(len(tokens)) >= start
      texts.append(Example(np.array(tokens, np.int32), learned))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
    results: list[Any] = [None] * len(texts)
    for first in range(0, len(order), batch_size):
      places = order[first : first + batch_size]
      longest = len(texts[places[-1]].tokens)
      width = 8 * 2 ** max(0, int(np.ceil(np.log2(longest / 8))))
      rows = [[texts[i]] for i in places] + [[]] * (batch_size - len(places))
      batch = collate.texts(texts, width, tokenizer.pad_id)(rows)
      sums = nats(base, params, batch, jax.random.key(0))
      total, count, correct = (np.asarray(x) for x in sums)
      for row, i in enumerate(places):
        greedy = bool(correct[row] == count[row])
        results[i] = (-float(total[row]), greedy)
    return results

  class Network(api.TemplateLM):
    """The model of a run, for lm-eval."""

    @property
    def eot_token_id(self) -> int:
      return tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
      return begin[0] if begin else tokenizer.eos_id

    @property
    def max_length(self) -> int:
      return most

    def tok_encode(self, string, add_special_tokens=None, **_) -> list[int]:
      plain = list(tokenizer.encode(string))
      return plain if add_special_tokens is False else [*begin, *plain]

    def _loglikelihood_tokens(self, requests, **_):
      return score([(context, reply) for _, context, reply in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      values = []
      for request in requests:
        windows = utils.get_rolling_token_windows(
          token_list=list(tokenizer.encode(request.args[0])),
          prefix_token=self.prefix_token_id,
          max_seq_len=most - 1,
          context_len=1,
        )
        pairs = [utils.make_disjoint_window(window) for window in windows]
        values.append(sum(value for value, _ in score(pairs)))
      return values

    def generate_until(self, requests, disable_tqdm=False):
      results: list[str] = [''] * len(requests)
      groups: dict[Any, list[int]] = {}
      for i, request in enumerate(requests):
        settings = dict(request.args[1])
        heat = settings.get('temperature', 0.0)
        heat = heat if settings.get('do_sample', heat > 0) else 0.0
        size = int(settings.get('max_gen_toks', 256))
        groups.setdefault((heat, size), []).append(i)
      for (heat, size), places in groups.items():
        encode = lambda i: self.tok_encode(requests[i].args[0])
        room = loaded.config.max_positions - size
        places = sorted(places, key=lambda i: len(encode(i)))
        replies = models.generate(
          loaded,
          base,
          params,
          [encode(i)[-room:] for i in places],
          max_new_tokens=size,
          temperature=heat,
          eos_id=stops,
          seeds=places,
          batch_size=batch_size,
        )
        for i, reply in zip(places, replies, strict=True):
          text = tokenizer.decode(reply)
          ends = requests[i].args[1].get('until') or []
          for end in [ends] if isinstance(ends, str) else ends:
            text = text.split(end)[0] if end else text
          results[i] = text
      return results

  return Network()


def evaluate(
  network: Any,
  tasks: Sequence[str],
  *,
  limit: int | None = None,
  num_fewshot: int | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns lm-eval's results of a model: metrics, versions and examples.

  Args:
    network: from `model`.
    tasks: names of lm-eval's tasks, or files NAME.yaml of tasks; their folders
      are searched, too. lm-eval itself loads the data of a task.
    limit: the first examples of each task only.
    num_fewshot: examples before a question; None: those of the task.
    seed: of the examples before questions.

  Returns:
    'results' by task and metric, 'versions' of tasks and 'num_examples'.

  Raises:
    Error: an unknown task, a file that is missing or no task; lm-eval is not
      installed, or fails.
  """
  harness = _package('lm_eval')
  manager = _package('lm_eval.tasks').TaskManager
  files = [pathlib.Path(x) for x in tasks if x.endswith(('.yaml', '.yml'))]
  for file in files:
    if not file.is_file():
      raise Error(f'--tasks {file}: there is no such file.')
  folders = sorted({str(file.parent) for file in files})
  known = manager(include_path=folders or None)
  names = []
  for task in tasks:
    name = task
    if task.endswith(('.yaml', '.yml')):
      name = _name_of(pathlib.Path(task))
    if name not in known.all_tasks:
      near = difflib.get_close_matches(name, known.all_tasks, 1, 0.4)
      hint = f'; the nearest is {near[0]!r}' if near else ''
      raise Error(
        f'--tasks: lm-eval has no task {name!r}{hint} (there are '
        f'{len(known.all_tasks)}, and local files NAME.yaml).'
      )
    names.append(name)
  level = logging.getLogger('lm_eval').level
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  try:
    output = harness.simple_evaluate(
      network,
      tasks=names,
      limit=limit,
      num_fewshot=num_fewshot,
      task_manager=known,
      log_samples=False,
      bootstrap_iters=1000,
      fewshot_random_seed=seed,
      random_seed=seed,
    )
  except Error:
    raise
  except Exception as error:  # of the task's data or code
    text = str(error).strip().splitlines() or [type(error).__name__]
    raise Error(
      f'--tasks {",".join(names)}: lm-eval cannot run this: {text[0]:.200}'
    ) from error
  finally:
    logging.getLogger('lm_eval').setLevel(level)
  counts = output.get('n-samples') or {}
  return {
    'results': output['results'],
    'versions': output.get('versions') or {},
    'num_examples': {
      name: count.get('effective') for name, count in counts.items()
    },
  }


def _name_of(file: pathlib.Path) -> str:
  """Returns the name of the task in a YAML file."""
  for line in file.read_text().splitlines():
    key, colon, value = line.partition(':')
    if key.strip() in ('task', 'group') and colon and value.strip():
      return value.strip().strip('\'"')
  raise Error(f"--tasks {file}: there is no field 'task' with a name in it.")
