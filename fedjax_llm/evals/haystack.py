"""Long texts with one fact in them, to test what a model finds again."""

import random
from typing import NamedTuple

# Sentences without numbers, of our own.
FILLER = (
  'The path follows the river as far as the old mill.',
  'Rain had softened the ground, and the field was quiet.',
  'A cart stood under the trees with its wheels in the grass.',
  'In the evening the lamps of the village were lit one by one.',
  'Somebody had left a book on the bench beside the door.',
  'The wind came from the sea and carried the sound of bells.',
)


class Needle(NamedTuple):
  """A text that ends with a question about its fact, and the answer.

  >>> Needle('The code is 7. What is the code?', '7', 0.5).depth
  0.5
  """

  prompt: str
  answer: str
  depth: float  # of the fact: 0 at the start of the text, 1 at its end


def needle(num_sentences: int, depth: float, seed: int) -> Needle:
  """Returns a text of `num_sentences` sentences and one fact among them.

  >>> one = needle(2, depth=1.0, seed=0)
  >>> one.prompt.count('.'), one.answer in one.prompt
  (3, True)
  >>> one == needle(2, depth=1.0, seed=0)
  True
  """
  rng = random.Random(f'{num_sentences} {depth} {seed}')
  answer = str(rng.randrange(10_000, 100_000))
  sentences = [rng.choice(FILLER) for _ in range(num_sentences)]
  place = round(depth * num_sentences)
  sentences.insert(place, f'The number of the house is {answer}.')
  question = 'What is the number of the house? The number of the house is'
  return Needle(f'{" ".join(sentences)}\n{question}', answer, depth)


def is_hit(reply: str, answer: str) -> bool:
  """Returns True if a reply begins with the number, and not with a longer one.

  >>> is_hit(' 12345. The', '12345'), is_hit('123456', '12345')
  (True, False)
  """
  reply = reply.strip()
  return reply.startswith(answer) and not reply[len(answer) :][:1].isdigit()
