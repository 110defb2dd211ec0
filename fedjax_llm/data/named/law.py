"""Clauses of contracts, opinions of courts, questions of law."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import READ, SWIFT, SWIFT_TABLE
from fedjax_llm.data.named.medicine import CATALOG
from fedjax_llm.data.named.spec import Named

_LEX_GLUE = (
  'https://github.com/huggingface/datasets/blob/'
  '0129d93b38026ee51eb079480e77fd8202f6091a/datasets/lex_glue/README.md'
)

SETS: Mapping[str, Named] = {
  'ledgar': Named(
    'Provisions of contracts in 100 classes (LexGLUE)',
    'coastalcph/lex_glue',
    'cc-by-4.0',
    _LEX_GLUE,
    READ,
    text='{text}',
    label='label',
    subset='ledgar',
    sizes={'train': 60_000, 'validation': 10_000, 'test': 10_000},
  ),
  'scotus': Named(
    'Opinions of the Supreme Court of the USA in 13 areas (LexGLUE)',
    'coastalcph/lex_glue',
    'cc-by-4.0',
    _LEX_GLUE,
    READ,
    text='{text}',
    label='label',
    subset='scotus',
    sizes={'train': 5_000, 'validation': 1_400, 'test': 1_400},
  ),
  'case_hold': Named(
    'Holdings of cited cases, five choices (LexGLUE)',
    'coastalcph/lex_glue',
    'cc-by-4.0',
    _LEX_GLUE,
    READ,
    prompt='{context}',
    choices='endings',
    answer='label',
    subset='case_hold',
    sizes={'train': 45_000, 'validation': 3_900, 'test': 3_600},
  ),
  'cuad': Named(
    'Clauses of 41 kinds in 510 contracts (the clients)',
    'theatticusproject/cuad-qa',
    'cc-by-4.0',
    CATALOG + 'cuad.md',
    READ,
    prompt='{context}\n\n{question}',
    response='{answers[text][0]}',
    blank='There is no such clause.',
    client='title',
    sizes={'train': 22_450, 'test': 4_182},
  ),
  'tigerbot_law': Named(
    'Chinese statutes by kind of law',
    'TigerResearch/tigerbot-law-plugin',
    None,
    SWIFT,
    READ,
    text='{type}\n{title}\n\n{chapter1}\n\n{chapter2}\n\n{chapter3}\n\n{response}',
    label='type',
    client='type',
  ),
  'disc_law': Named(
    'Chinese questions of law, with answers',
    'ShengbinYue/DISC-Law-SFT',
    None,
    SWIFT_TABLE,
    READ,
    prompt='{input}',
    response='{output}',
  ),
  'lawyer_llama': Named(
    'Chinese consultations and exams of law',
    'Skepsun/lawyer_llama_data',
    None,
    SWIFT_TABLE,
    READ,
    prompt='{instruction}',
    response='{output}',
  ),
}
