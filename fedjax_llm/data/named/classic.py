"""Data sets of the papers of federated methods, most for classification."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import READ
from fedjax_llm.data.named.medicine import CATALOG
from fedjax_llm.data.named.spec import Named

_CARDS = (
  'https://github.com/huggingface/datasets/blob/'
  '040102f100964a33fd334e2695f1c493fa6b92db/datasets/'
)
_OLDER = (
  'https://github.com/tensorflow/datasets/blob/'
  'ba6aa00798ad798926703b385bf887f0262422b9/docs/community_catalog/huggingface/'
)


def _glue(
  task: str,
  title: str,
  text: str,
  pair: str | None,
  classes: tuple[str, ...],
  **sizes: int,
) -> Named:
  return Named(
    f'{title} (GLUE)',
    'nyu-mll/glue',
    'other',
    _CARDS + 'glue/README.md',
    READ,
    text=text,
    pair=pair,
    label='label',
    classes=classes,
    others=('idx',),
    subset=task,
    sizes=sizes,
  )


_ENTAILED = ('entailment', 'not_entailment')

SETS: Mapping[str, Named] = {
  'glue_cola': _glue(
    'cola',
    'Acceptability of sentences',
    '{sentence}',
    None,
    ('unacceptable', 'acceptable'),
    train=8_551,
    validation=1_043,
    test=1_063,
  ),
  'glue_sst2': _glue(
    'sst2',
    'Sentiment of film reviews',
    '{sentence}',
    None,
    ('negative', 'positive'),
    train=67_349,
    validation=872,
    test=1_821,
  ),
  'glue_mrpc': _glue(
    'mrpc',
    'Paraphrases in news',
    '{sentence1}',
    '{sentence2}',
    ('not_equivalent', 'equivalent'),
    train=3_668,
    validation=408,
    test=1_725,
  ),
  'glue_qqp': _glue(
    'qqp',
    'Questions asked twice',
    '{question1}',
    '{question2}',
    ('not_duplicate', 'duplicate'),
    train=363_846,
    validation=40_430,
    test=390_965,
  ),
  'glue_mnli': _glue(
    'mnli',
    'Entailment in ten genres',
    '{premise}',
    '{hypothesis}',
    ('entailment', 'neutral', 'contradiction'),
    train=392_702,
    validation_matched=9_815,
    validation_mismatched=9_832,
  ),
  'glue_qnli': _glue(
    'qnli',
    'Sentences that answer a question',
    '{question}',
    '{sentence}',
    _ENTAILED,
    train=104_743,
    validation=5_463,
    test=5_463,
  ),
  'glue_rte': _glue(
    'rte',
    'Entailment in news and Wikipedia',
    '{sentence1}',
    '{sentence2}',
    _ENTAILED,
    train=2_490,
    validation=277,
    test=3_000,
  ),
  'glue_wnli': _glue(
    'wnli',
    'Entailment by what a pronoun means',
    '{sentence1}',
    '{sentence2}',
    ('not_entailment', 'entailment'),
    train=635,
    validation=71,
    test=146,
  ),
  '20newsgroups': Named(
    'Posts of 20 newsgroups',
    'SetFit/20_newsgroups',
    None,
    'https://www.unitxt.ai/en/1.15.0/catalog/catalog.cards.20_newsgroups.html',
    READ,
    text='{text}',
    label='label_text',
  ),
  'ag_news': Named(
    'News in four subjects',
    'fancyzhx/ag_news',
    None,
    _CARDS + 'ag_news/README.md',
    READ,
    text='{text}',
    label='label',
    classes=('World', 'Sports', 'Business', 'Sci/Tech'),
    sizes={'train': 120_000, 'test': 7_600},
  ),
  'banking77': Named(
    'Questions to a bank, 77 intents',
    'PolyAI/banking77',
    'cc-by-4.0',
    _CARDS + 'banking77/README.md',
    READ,
    text='{text}',
    label='label',
    sizes={'train': 10_003, 'test': 3_080},
  ),
  'yelp_polarity': Named(
    'Sentiment of reviews of businesses',
    'yelp_polarity',
    None,
    _CARDS + 'yelp_polarity/README.md',
    READ,
    text='{text}',
    label='label',
    classes=('negative', 'positive'),
    sizes={'train': 560_000, 'test': 38_000},
  ),
  'yahoo_answers': Named(
    'Questions in ten topics',
    'community-datasets/yahoo_answers_topics',
    None,
    'https://github.com/tensorflow/datasets/blob/'
    '8861fc78cd44d2d490e5a5733cdc8a98f9999693/docs/community_catalog/'
    'huggingface/yahoo_answers_topics.md',
    READ,
    text='{question_title}\n\n{question_content}\n\n{best_answer}',
    label='topic',
    classes=(
      *('Society & Culture', 'Science & Mathematics', 'Health'),
      *('Education & Reference', 'Computers & Internet', 'Sports'),
      *('Business & Finance', 'Entertainment & Music'),
      *('Family & Relationships', 'Politics & Government'),
    ),
    sizes={'train': 1_400_000, 'test': 60_000},
  ),
  'e2e_nlg': Named(
    'Descriptions of restaurants from attributes',
    'e2e_nlg',
    'cc-by-sa-4.0',
    _CARDS + 'e2e_nlg/README.md',
    READ,
    prompt='Describe the restaurant.\n\n{meaning_representation}',
    response='{human_reference}',
    sizes={'train': 42_061, 'validation': 4_672, 'test': 4_693},
  ),
  'samsum': Named(
    'Summaries of chats',
    'Samsung/samsum',
    'cc-by-nc-nd-4.0',
    CATALOG + 'samsum.md',
    READ,
    prompt='Summarise this dialogue.\n\n{dialogue}',
    response='{summary}',
    sizes={'train': 14_732, 'validation': 818, 'test': 819},
  ),
  'imdb': Named(
    'Sentiment of film reviews',
    'stanfordnlp/imdb',
    None,
    _OLDER + 'imdb.md',
    READ,
    text='{text}',
    label='label',
    classes=('neg', 'pos'),
    sizes={'train': 25_000, 'test': 25_000, 'unsupervised': 50_000},
  ),
  'dbpedia_14': Named(
    'Articles of Wikipedia in 14 classes',
    'fancyzhx/dbpedia_14',
    'cc-by-sa-3.0',
    _OLDER + 'dbpedia_14.md',
    READ,
    text='{title}\n\n{content}',
    label='label',
    classes=(
      *('Company', 'EducationalInstitution', 'Artist', 'Athlete'),
      *('OfficeHolder', 'MeanOfTransportation', 'Building', 'NaturalPlace'),
      *('Village', 'Animal', 'Plant', 'Album', 'Film', 'WrittenWork'),
    ),
    sizes={'train': 560_000, 'test': 70_000},
  ),
  'clinc150': Named(
    'Requests to an assistant, 150 intents and none of them',
    'clinc/clinc_oos',
    'cc-by-3.0',  # from the table of cards in github.com/sileod/tasksource
    'https://github.com/tensorflow/datasets/blob/'
    '31f1255e57e519a6c004f0b097a2f5cfcf0dde7d/docs/community_catalog/'
    'huggingface/clinc_oos.md',
    READ,
    text='{text}',
    label='intent',
    subset='plus',
    sizes={'train': 15_250, 'validation': 3_100, 'test': 5_500},
  ),
}
