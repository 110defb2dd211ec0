"""Writes the golden reward models: tiny networks and the scores of torch.

    python tests/golden/make_rewards.py

Needs torch and transformers; the tests that read the files need neither. Each
directory of `tests/golden/rewards` is an ordinary Hugging Face model in
bfloat16 with `logits.npz` beside it, as `make_models.py` writes it: the scores
[B, labels] of whole texts. `gpt2` pads with the token that ends its first text.
"""

import make_models  # pyright: ignore[reportMissingImports]

make_models.HERE = make_models.HERE.with_name('rewards')
ONE = {'id2label': {0: 'reward'}, 'pad_token_id': 0}
make_models.MODELS = {
  'llama': ('LlamaForSequenceClassification', dict(make_models.TINY, **ONE)),
  'gpt2': (
    'GPT2ForSequenceClassification',
    dict(make_models.GPT2, **make_models.CLASSES, pad_token_id=2),
  ),
}

if __name__ == '__main__':
  for name in make_models.MODELS:
    make_models.make(name)
