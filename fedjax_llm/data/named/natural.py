"""Data sets whose clients are real people, and multilingual ones."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import LLAMA_FACTORY, READ
from fedjax_llm.data.named.spec import Named

_BENCH = (
  'https://github.com/rui-ye/FedLLM-Bench/blob/'
  '02cc26868c288165f82306b51d8d1afff76a2688/'
)
# Named by the README of the benchmark.
_PLACE = 'https://drive.google.com/file/d/1hKv5A0ROmTQQkcsTcYogCUIeF7Ux1pmy'


def _bench(title: str, source: str, **form: str) -> Named:
  """Returns an entry of FedLLM-Bench: one file with a list a client."""
  return Named(
    title,
    None,
    None,
    source,
    READ,
    client='client',
    grouped=True,
    place=_PLACE,
    **form,  # pyright: ignore[reportArgumentType]
  )


SETS: Mapping[str, Named] = {
  'aya': Named(
    'Instructions by people in 65 languages, one annotator a client',
    'CohereForAI/aya_dataset',
    'apache-2.0',
    'https://github.com/SEACrowd/seacrowd-datahub/blob/'
    '2e7509b8ff3a338d06682a8b91f4200a62765ab6/seacrowd/sea_datasets/'
    'aya_dataset/aya_dataset.py',
    READ,
    prompt='{inputs}',
    response='{targets}',
    label='language',
    client='user_id',
    others=('language_code', 'annotation_type'),
    revision='f9ea04583f02a8f86404ff6c58bf75fe637df8a2',
  ),
  'fed_aya': _bench(
    'Fed-Aya: annotators of Aya (FedLLM-Bench)',
    _BENCH + 'utils/template.py',
    prompt='{instruction}',
    response='{response}',
  ),
  'fed_chatbot_it': _bench(
    "Fed-ChatbotIT: users' single turns in the chatbot arena (FedLLM-Bench)",
    _BENCH + 'utils/template.py',
    prompt='{instruction}',
    response='{response}',
  ),
  'fed_wildchat': _bench(
    "Fed-WildChat, single turns of a chatbot's users (FedLLM-Bench)",
    _BENCH + 'utils/template.py',
    prompt='{instruction}',
    response='{response}',
  ),
  'fed_wildchat_multi': _bench(
    "Fed-WildChat, whole chats of a chatbot's users (FedLLM-Bench)",
    'https://github.com/rui-ye/FedLLM-Bench/blob/'
    '57c789fe50ca8b98169a600fed5848e867b7a4eb/data_module.py',
    messages='conversations',
  ),
  'wildchat': Named(
    "Chats of a chatbot's users in many languages",
    'allenai/WildChat',
    None,
    'https://huggingface.co/datasets/allenai/WildChat/blob/'
    'c9c9f4d7a1ed6b5b7f3ac7dbe410332e154f4f4e/README.md',
    READ,
    messages='conversation',
    label='language',
    client='language',
    others=('timestamp', 'model'),
  ),
  'lmsys_chat': Named(
    'A million chats of users with 25 models',
    'lmsys/lmsys-chat-1m',
    None,
    LLAMA_FACTORY,
    READ,
    messages='conversation',
  ),
  'amazon_reviews_multi': Named(
    'Product reviews in six languages, one reviewer a client',
    'amazon_reviews_multi',
    'for academic research only',
    'https://github.com/tensorflow/datasets/blob/'
    '31f1255e57e519a6c004f0b097a2f5cfcf0dde7d/docs/community_catalog/'
    'huggingface/amazon_reviews_multi.md',
    READ,
    text='{review_title}\n\n{review_body}',
    label='stars',
    client='reviewer_id',
    others=('language', 'product_category', 'product_id'),
    subset='all_languages',
    sizes={'train': 1_200_000, 'validation': 30_000, 'test': 30_000},
  ),
}
