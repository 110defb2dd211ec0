"""Programs, with instructions, descriptions or repairs."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import (
  BAGEL,
  LLAMA_FACTORY,
  OPENFEDLLM,
  READ,
  SWIFT,
)
from fedjax_llm.data.named.medicine import HARNESS
from fedjax_llm.data.named.spec import Named

_REFINEMENT = (
  'https://github.com/tensorflow/datasets/blob/'
  'ba6aa00798ad798926703b385bf887f0262422b9/docs/community_catalog/huggingface/'
  'code_x_glue_cc_code_refinement.md'
)


def _refinement(subset: str, **sizes: int) -> Named:
  return Named(
    f'Java functions with bugs and their repairs ({subset} functions)',
    'code_x_glue_cc_code_refinement',
    None,
    _REFINEMENT,
    READ,
    prompt='Repair this function.\n\n{buggy}',
    response='{fixed}',
    subset=subset,
    sizes=sizes,
  )


SETS: Mapping[str, Named] = {
  'code_alpaca': Named(
    '20,000 instructions for programs',
    'sahil2801/CodeAlpaca-20k',
    None,
    LLAMA_FACTORY,
    READ,
    prompt='{instruction}\n\n{input}',
    response='{output}',
  ),
  'code_alpaca_openfedllm': Named(
    'CodeAlpaca as OpenFedLLM reads it',
    'lucasmccabe-lmi/CodeAlpaca-20k',
    None,
    OPENFEDLLM,
    READ,
    prompt='{instruction}\n\n{input}',
    response='{output}',
  ),
  'code_search_net': Named(
    'Functions of six languages with their documentation',
    'code-search-net/code_search_net',
    'various (of each repository)',
    'https://github.com/huggingface/datasets/blob/'
    '1a9e845bf4f91c7a5c4454063f4abfbc8923c166/datasets/code_search_net/'
    'code_search_net.py',
    READ,
    prompt='Write a function in {language}.\n\n{func_documentation_string}',
    response='{func_code_string}',
    label='language',
    client='language',
    others=('repository_name',),
    subset='all',
  ),
  'rosetta_code': Named(
    'Solutions of the same tasks in many languages',
    'cakiki/rosetta-code',
    None,
    BAGEL + 'rosetta_code.py',
    READ,
    prompt='Write a program in {language_name}.\n\n{task_description}',
    response='{code}',
    label='language_name',
    client='language_name',
  ),
  'code_refinement': _refinement(
    'small', train=46_680, validation=5_835, test=5_835
  ),
  'code_refinement_medium': _refinement(
    'medium', train=52_364, validation=6_546, test=6_545
  ),
  'sql_create_context': Named(
    'Questions about tables, answered in SQL',
    'b-mc2/sql-create-context',
    None,
    SWIFT,
    READ,
    prompt='{question}\n\n{context}',
    response='{answer}',
  ),
  'synthetic_text_to_sql': Named(
    'Generated questions about tables, with SQL and explanation',
    'gretelai/synthetic_text_to_sql',
    None,
    SWIFT,
    READ,
    prompt='{sql_prompt}\n\n{sql_context}',
    response='{sql_explanation}\n\n{sql}',
  ),
  'mbpp': Named(
    'Tasks for beginners in Python, each with tests',
    'google-research-datasets/mbpp',
    None,
    HARNESS + 'mbpp/mbpp.yaml',
    READ,
    prompt='{text}\n\n{test_list[0]}',
    response='{code}',
    subset='full',
  ),
}
