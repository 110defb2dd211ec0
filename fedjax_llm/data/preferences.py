"""Sources of preferences: prompts with a chosen and a rejected reply."""

from collections.abc import Sequence
from typing import Any

from fedjax_llm.data import files, sources
from fedjax_llm.data import messages as messages_lib
from fedjax_llm.data.dealing import keyed
from fedjax_llm.data.sources import Record, field_of, text_of
from fedjax_llm.reading import short
from fedjax_llm.types import Error

__all__ = ['contrasted', 'preferences']


def preferences(
  path: str | Sequence[str],
  client_key: str | None,
  prompt_key: str = 'prompt',
  chosen_key: str = 'chosen',
  rejected_key: str = 'rejected',
  label_key: str | None = None,
) -> list[Record]:
  """Reads pairs of replies from files with one JSON object per line.

  Replies are strings, and the prompt is a string or a list of messages; or both
  replies are whole conversations, lists of messages that differ in their last
  turn only, the form of many data sets on the hub. The prompt field is then not
  read. `path`, `client_key` and `label_key` are those of `sources.jsonl`.

  Raises:
    Error: a missing file; a field that is missing or of the wrong type; two
      conversations that differ before their last turn; equal replies.

  >>> import json, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), 'pairs.jsonl')
  >>> row = {'who': 'ann', 'prompt': '2+2', 'chosen': '4', 'rejected': '5'}
  >>> with open(path, 'w') as f:
  ...   _ = f.write(json.dumps(row))
  >>> record = preferences(path, client_key='who')[0]
  >>> record.prompt, record.chosen, record.rejected
  ('2+2', '4', '5')
  """
  keys = (client_key, prompt_key, chosen_key, rejected_key, label_key)
  return [
    _record(row, *keys, where)
    for file in files.matching(path)
    for where, row in files.rows(file, 'jsonl')
  ]


def _record(
  row, client_key, prompt_key, chosen_key, rejected_key, label, where
):
  if not isinstance(row, dict):
    raise Error(f'{where}: this line is no JSON object: {short(row)}.')
  client = label_text = prompt = messages = None
  if client_key:
    client = text_of(row, client_key, where, numbers=True)
  if label:
    label_text = text_of(row, label, where, numbers=True)
  sides = [field_of(row, key, where) for key in (chosen_key, rejected_key)]
  if all(isinstance(side, list) for side in sides):
    named = zip((chosen_key, rejected_key), sides)
    chosen, rejected = (messages_lib.read(x, key, where) for key, x in named)
    if chosen[:-1] != rejected[:-1]:
      raise Error(
        f'{where}: {chosen_key!r} and {rejected_key!r} differ before their '
        'last turn: they must be two replies to the same messages.'
      )
    for key, turns in ((chosen_key, chosen), (rejected_key, rejected)):
      if turns[-1]['role'] != 'assistant':
        role = turns[-1]['role']
        raise Error(
          f"{where}: {key!r} ends with a turn of {role!r}, not of 'assistant'."
        )
    messages = chosen[:-1]
    replies = [str(turns[-1].get('content')) for turns in (chosen, rejected)]
  else:
    replies = [text_of(row, key, where) for key in (chosen_key, rejected_key)]
    start = field_of(row, prompt_key, where)
    if isinstance(start, list):
      messages = messages_lib.read(start, prompt_key, where)
    else:
      prompt = text_of(row, prompt_key, where)
  if replies[0] == replies[1]:
    raise Error(
      f'{where}: {chosen_key!r} and {rejected_key!r} are the same, '
      f'{short(replies[0])}; nothing is preferred.'
    )
  return Record(
    client=client,
    prompt=prompt,
    messages=messages,
    label=label_text,
    chosen=replies[0],
    rejected=replies[1],
    where=where,
  )


def contrasted(
  dataset: str = 'shakespeare_mini', seed: int = 0
) -> list[Record]:
  """Returns made-up preferences: a client's own reply over another client's.

  Of each prompt of `sources.packaged` the recorded reply is chosen, and a reply
  of another client to another prompt is rejected. They need no network, and
  show that a loss of preferences learns; people's preferences they are not.

  >>> record = contrasted()[0]
  >>> record.client, record.chosen == record.rejected
  ('hamlet/HAMLET', False)
  """
  records: list[Any] = sources.packaged(dataset)
  order = sorted(
    range(len(records)),
    key=lambda i: keyed(seed, 'contrasted', records[i].response or '', i),
  )
  result: dict[int, Record] = {}
  for place, i in enumerate(order):
    own = records[i]
    following = (*order[place + 1 :], *order[:place])
    rejected = next(
      records[j].response
      for j in following
      if records[j].client != own.client and records[j].response != own.response
    )
    result[i] = own._replace(
      response=None, chosen=own.response, rejected=rejected
    )
  return [result[i] for i in range(len(records))]
