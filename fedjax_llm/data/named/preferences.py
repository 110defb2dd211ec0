"""Pairs of a preferred reply and another one, for alignment."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import (
  BAGEL,
  LLAMA_FACTORY,
  OPENFEDLLM,
  READ,
)
from fedjax_llm.data.named.spec import Named

SETS: Mapping[str, Named] = {
  'ultrafeedback': Named(
    'Replies of models, the best and another by the marks of GPT-4',
    'HuggingFaceH4/ultrafeedback_binarized',
    None,
    OPENFEDLLM,
    READ,
    prompt='{prompt}',
    chosen='{chosen[1][content]}',
    rejected='{rejected[1][content]}',
    split='train_sft',
  ),
  'ultrafeedback_cleaned': Named(
    'UltraFeedback without entries of benchmarks',
    'allenai/ultrafeedback_binarized_cleaned',
    None,
    BAGEL + 'ultrafeedback.py',
    READ,
    prompt='{prompt}',
    chosen='{chosen[1][content]}',
    rejected='{rejected[1][content]}',
    split='train_gen',
  ),
  'orca_dpo_pairs': Named(
    "OpenOrca's questions with replies of a larger and a smaller model",
    'Intel/orca_dpo_pairs',
    None,
    LLAMA_FACTORY,
    READ,
    prompt='{system}\n\n{question}',
    chosen='{chosen}',
    rejected='{rejected}',
  ),
  'stack_exchange_paired': Named(
    'Questions of Stack Exchange with a better and a worse answer',
    'lvwerra/stack-exchange-paired',
    None,
    'https://github.com/pytorch/torchtune/blob/v0.6.1/torchtune/datasets/'
    '_stack_exchange_paired.py',
    READ,
    prompt='{question}',
    chosen='{response_j}',
    rejected='{response_k}',
  ),
}
