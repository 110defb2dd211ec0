"""Writes what torch makes of training batches: losses and gradients.

    python tests/golden/make_training.py [ADAPTER ...]

Needs torch, transformers and peft; the tests that read the files need none of
them. `batches.npz` holds two batches [B, T] that every golden model reads:
texts padded on the right, and several texts packed in a row. Labels are -100
where nothing is to be learned. `losses.json` is transformers' own mean loss of
them, float32, and `gradients.npz` beside an adapter that of the adapted model
and its gradient by every factor, under the names of the PEFT file.

Packed decoders get nothing but positions that restart, from which transformers
finds the texts by itself; those where it does not (encoders, OPT) get the mask
[B, 1, T, T].
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = pathlib.Path(__file__).parent
# Adapters of `adapters` and the models that they are of.
ADAPTERS = {
  'lora': 'llama',
  'gemma3': 'gemma3',
  'gpt2': 'gpt2',
  'roberta_masked_lm': 'roberta_masked_lm',
}


def batches() -> dict[str, Any]:
  """Tokens, segments, positions and labels of both batches, by 'kind/what'."""
  rng = np.random.default_rng(0)
  texts = {
    'padded': [[1] * 24, [1] * 15 + [0] * 9],
    'packed': [[1] * 11 + [2] * 13, [1] * 7 + [2] * 9 + [3] * 8],
  }
  out = {'classes': np.array([2, 0], np.int32)}
  for kind, segments in texts.items():
    segments = np.array(segments, np.int32)
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    places = np.broadcast_to(np.arange(24), segments.shape)
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    tokens = rng.integers(3, 97, segments.shape)
    learned = (segments > 0) & (rng.random(segments.shape) < 0.7)
    hidden = (segments > 0) & (rng.random(segments.shape) < 0.3)
    found = {
      'tokens': np.where(segments > 0, tokens, 0),
      'segments': segments,
      'positions': places - first,
      # The first token of a text has nothing before it.
      'next': np.where(learned & ~starts, tokens, -100),
      'masked': np.where(hidden, rng.integers(3, 97, segments.shape), -100),
    }
    out |= {f'{kind}/{k}': v.astype(np.int32) for k, v in found.items()}
  return out


def load(directory: pathlib.Path):
  found = transformers.AutoConfig.from_pretrained(directory)
  family = getattr(transformers, (found.architectures or [''])[0])
  return family.from_pretrained(directory, dtype=torch.float32).eval()


def loss(model, architecture: str, data, kind: str):
  """The mean loss as transformers computes it; None where it has none."""
  here = {
    what: torch.tensor(data[f'{kind}/{what}']).long()
    for what in ('tokens', 'segments', 'positions', 'next', 'masked')
  }
  decoder = architecture.endswith('ForCausalLM') or 'LMHead' in architecture
  inputs = {'input_ids': here['tokens'], 'attention_mask': here['segments']}
  if architecture.endswith('SequenceClassification'):
    if kind == 'packed':
      return None  # one class a row
    labels = torch.tensor(data['classes']).long()
  elif decoder or architecture.endswith('MaskedLM'):
    labels = here['next' if decoder else 'masked']
  else:
    return None
  if kind == 'packed':
    segments, offset = here['segments'], 0
    if architecture.startswith(('Roberta', 'MPNet')):
      offset = model.config.pad_token_id + 1
    inputs['position_ids'] = here['positions'] + offset
    inputs['attention_mask'] = None
    if not decoder or architecture.startswith('OPT'):
      seen = segments[:, None, :, None] == segments[:, None, None, :]
      if decoder:
        seen = seen.tril()
      inputs['attention_mask'] = torch.where(seen, 0.0, -1e30)
  if decoder:
    inputs['use_cache'] = False
  return model(**inputs, labels=labels).loss


def losses(data) -> dict[str, dict[str, float]]:
  out = {}
  for directory in sorted((HERE / 'models').iterdir()):
    model = load(directory)
    with torch.no_grad():
      found = {
        kind: loss(model, type(model).__name__, data, kind)
        for kind in ('padded', 'packed')
      }
    found = {k: x.item() for k, x in found.items() if x is not None}
    if found:
      out[directory.name] = found
  return out


def gradients(
  directory: pathlib.Path, of: pathlib.Path, data
) -> dict[str, Any]:
  """Losses and gradients of an adapter, by 'kind/loss' and 'kind/tensor'."""
  plain = load(of)
  architecture = type(plain).__name__
  model = peft.PeftModel.from_pretrained(
    plain, directory, is_trainable=True
  ).eval()
  out = {}
  for kind in ('padded', 'packed'):
    model.zero_grad()
    value = loss(model, architecture, data, kind)
    assert value is not None  # these models have a head
    value.backward()
    out[f'{kind}/loss'] = np.float32(value.item())
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        name = name.replace('.default.', '.')
        out[f'{kind}/{name}'] = parameter.grad.numpy().copy()
  return out


def main() -> None:
  data = batches()
  np.savez_compressed(HERE / 'batches.npz', **data)
  text = json.dumps(losses(data), indent=1)
  (HERE / 'losses.json').write_text(text + '\n')
  for name in sys.argv[1:] or ADAPTERS:
    directory = HERE / 'adapters' / name
    found = gradients(directory, HERE / 'models' / ADAPTERS[name], data)
    np.savez_compressed(directory / 'gradients.npz', **found)
    print(name, found['padded/loss'], found['packed/loss'])


if __name__ == '__main__':
  main()
