"""Questions and answers of medicine."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import OPENFEDLLM, READ
from fedjax_llm.data.named.spec import Named

HARNESS = (  # as of version 0.4.13
  'https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/'
)
CATALOG = (
  'https://github.com/tensorflow/datasets/blob/'
  'c3f151a92a3559601917985619dc64d77f150aff/docs/community_catalog/huggingface/'
)
_PUBMED = (
  'https://github.com/tensorflow/datasets/blob/'
  '31f1255e57e519a6c004f0b097a2f5cfcf0dde7d/docs/community_catalog/huggingface/'
  'pubmed_qa.md'
)


def _pubmed(how: str, subset: str, size: int, decided: bool = True) -> Named:
  return Named(
    f'Questions of research with answers from the abstract, {how}',
    'qiaojin/PubMedQA',
    'mit',
    _PUBMED,
    READ,
    prompt='{question}',
    response='{long_answer}',
    label='final_decision' if decided else None,
    subset=subset,
    sizes={'train': size},
  )


def _headqa(language: str, subset: str) -> Named:
  return Named(
    f'Exams for specialists of the Spanish health system, in {language}',
    'EleutherAI/headqa',
    'mit',
    CATALOG + 'head_qa.md',
    READ,
    prompt='{qtext}',
    choices='answers',
    choice='atext',
    answer='ra',
    first=1,
    label='category',
    client='category',
    others=('year', 'name'),
    subset=subset,
    sizes={'train': 2657, 'validation': 1366, 'test': 2742},
  )


SETS: Mapping[str, Named] = {
  'medical_flashcards': Named(
    'Questions and answers of flashcards for students',
    'medalpaca/medical_meadow_medical_flashcards',
    None,
    OPENFEDLLM,
    READ,
    prompt='{input}',
    response='{output}',
  ),
  'medmcqa': Named(
    'Entrance exams of Indian medical schools, four choices',
    'openlifescienceai/medmcqa',
    'apache-2.0',  # from the table of cards in github.com/sileod/tasksource
    HARNESS + 'medmcqa/utils_medmcqa.py',
    READ,
    prompt='{question}',
    choices=('{opa}', '{opb}', '{opc}', '{opd}'),
    answer='cop',
  ),
  'medqa': Named(
    'Licensing exams of the USA, four choices',
    'GBaker/MedQA-USMLE-4-options-hf',
    'cc-by-sa-4.0',  # from the table of cards in github.com/sileod/tasksource
    HARNESS + 'medqa/preprocess_medqa.py',
    READ,
    prompt='{sent1}',
    choices=('{ending0}', '{ending1}', '{ending2}', '{ending3}'),
    answer='label',
  ),
  'pubmed_qa': _pubmed('labelled by experts', 'pqa_labeled', 1_000),
  'pubmed_qa_artificial': _pubmed('generated', 'pqa_artificial', 211_269),
  'pubmed_qa_unlabeled': _pubmed(
    'without decisions', 'pqa_unlabeled', 61_249, decided=False
  ),
  'head_qa': _headqa('English', 'en'),
  'head_qa_es': _headqa('Spanish', 'es'),
  'medical_questions_pairs': Named(
    'Pairs of questions, similar or not, written by doctors (the clients)',
    'curaihealth/medical_questions_pairs',
    None,
    CATALOG + 'medical_questions_pairs.md',
    READ,
    text='{question_1}',
    pair='{question_2}',
    label='label',
    classes=('not similar', 'similar'),
    client='dr_id',
    sizes={'train': 3_048},
  ),
}
