"""Writes smollm2_logits.npz: logits of SmolLM2-135M-Instruct by transformers.

    python tests/golden/make_smollm2.py DIRECTORY      (needs torch)

DIRECTORY is what scripts/fetch_smollm2 wrote. For every prompt the file keeps
its tokens, and at its last positions the 20 largest logits with their ids and
the log-sum-exp over the vocabulary; and the greedy continuation of the first.
"""

import pathlib
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

PROMPTS = [
  'The capital of France is',
  'In 1984, we counted 12345 sheep; none said "Oui, ça va" - 42 % slept.',
]
QUESTION = 'What is the capital of France?'
POSITIONS, TOP = 8, 20


def main(directory: str) -> None:
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  )
  chat = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': QUESTION}],
    add_generation_prompt=True,
    tokenize=False,
  )
  out = {}
  for i, prompt in enumerate([*PROMPTS, chat]):
    tokens = tokenizer(prompt, return_tensors='pt').input_ids
    with torch.no_grad():
      logits = model(tokens).logits[0]
    last = logits[-POSITIONS:]
    values, ids = last.topk(TOP)
    out[f'prompt_{i}'] = np.array(prompt)
    out[f'tokens_{i}'] = tokens[0].numpy().astype(np.int32)
    out[f'ids_{i}'] = ids.numpy().astype(np.int32)
    out[f'logits_{i}'] = values.numpy()
    out[f'logsumexp_{i}'] = logits.logsumexp(-1)[-POSITIONS:].numpy()
    reply = model.generate(tokens, max_new_tokens=12, do_sample=False)
    out[f'reply_{i}'] = reply[0, tokens.shape[1] :].numpy().astype(np.int32)
    print(repr(prompt), '->', repr(tokenizer.decode(out[f'reply_{i}'])))
  path = pathlib.Path(__file__).with_name('smollm2_logits.npz')
  np.savez_compressed(path, **out)
  print(path, path.stat().st_size, 'bytes')


if __name__ == '__main__':
  main(sys.argv[1])
