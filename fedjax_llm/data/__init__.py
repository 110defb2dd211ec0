"""Reads texts and deals them to clients; as a program, shows a data set.

Sources return records, tokenizers and templates turn them into examples, a
partition assigns records to clients, and `build` returns a `Population`.
"""

from fedjax_llm.data import (
  alignment,
  collate,
  drift,
  encoding,
  named,
  partition,
  pictures,
  population,
  preferences,
  selection,
  skew,
  sources,
  stages,
  text,
  tokenizers,
)
from fedjax_llm.data.encoding import Encoding
from fedjax_llm.data.partition import (
  Partition,
  dirichlet,
  histogram,
  iid,
  natural,
  one_label,
  quantity,
)
from fedjax_llm.data.population import build
from fedjax_llm.data.sources import Record, hf, jsonl, packaged
from fedjax_llm.data.text import TEMPLATES, Encoded, encode, prompt
from fedjax_llm.data.tokenizers import Tokenizer, bytes, pairs, pretrained

__all__ = [
  'Encoded',
  'Encoding',
  'Partition',
  'Record',
  'TEMPLATES',
  'Tokenizer',
  'build',
  'alignment',
  'bytes',
  'pairs',
  'collate',
  'dirichlet',
  'drift',
  'encode',
  'encoding',
  'hf',
  'histogram',
  'iid',
  'jsonl',
  'named',
  'natural',
  'one_label',
  'packaged',
  'partition',
  'pictures',
  'population',
  'preferences',
  'pretrained',
  'prompt',
  'quantity',
  'skew',
  'selection',
  'sources',
  'stages',
  'text',
  'tokenizers',
]
