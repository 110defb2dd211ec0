"""Text of clients: sources, tokenizers, templates, partitions, populations."""

from fedjax_llm.data import partition, population, sources, text, tokenizers
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
from fedjax_llm.data.text import TEMPLATES, encode, prompt
from fedjax_llm.data.tokenizers import Tokenizer, bytes, pretrained

__all__ = [
  'Partition',
  'Record',
  'TEMPLATES',
  'Tokenizer',
  'build',
  'bytes',
  'dirichlet',
  'encode',
  'hf',
  'histogram',
  'iid',
  'jsonl',
  'natural',
  'one_label',
  'packaged',
  'partition',
  'population',
  'pretrained',
  'prompt',
  'quantity',
  'sources',
  'text',
  'tokenizers',
]
