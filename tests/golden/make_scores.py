"""Writes scores.json: classes by scikit-learn, texts by sacrebleu, rouge-score.

python tests/golden/make_scores.py
"""

import json
import pathlib

import numpy as np
import rouge_score  # pyright: ignore
import sacrebleu  # pyright: ignore
import sklearn  # pyright: ignore
from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore
from sacrebleu.metrics import BLEU, CHRF  # pyright: ignore
from sklearn.metrics import f1_score, matthews_corrcoef  # pyright: ignore

HERE = pathlib.Path(__file__).parent
REPLIES = [
  *('the cat sat on the mat', 'a dog barks', 'no idea at all'),
  *('Guten Tag, Welt!', '', 'one two three four five six'),
]
REFERENCES = [
  *('the cat is on the mat', 'the dog barked loudly', 'no idea'),
  *('Guten Morgen, Welt.', 'nothing', 'one two three four five six seven'),
]


def main() -> None:
  rng = np.random.default_rng(3)
  true = rng.integers(0, 4, 60)
  said = np.where(rng.random(60) < 0.6, true, rng.integers(0, 4, 60))
  scorer = RougeScorer(['rougeL'], use_stemmer=True)
  rouge = [
    scorer.score(b, a)['rougeL'].fmeasure for a, b in zip(REPLIES, REFERENCES)
  ]
  packages = (rouge_score, sacrebleu, sklearn)
  out = {
    'versions': {
      x.__name__: getattr(x, '__version__', '0.1.2') for x in packages
    },
    'true': true.tolist(),
    'predicted': said.tolist(),
    'macro_f1': f1_score(true, said, average='macro'),
    'micro_f1': f1_score(true, said, average='micro'),
    'mcc': matthews_corrcoef(true, said),
    'replies': REPLIES,
    'references': REFERENCES,
    'chrf': CHRF().corpus_score(REPLIES, [REFERENCES]).score,
    'bleu': BLEU().corpus_score(REPLIES, [REFERENCES]).score,
    'rouge_l': float(np.mean(rouge)),
  }
  (HERE / 'scores.json').write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
  main()
