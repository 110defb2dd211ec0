"""Word problems and their solutions."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import LLAMA_FACTORY, OPENFEDLLM, READ
from fedjax_llm.data.named.spec import Named

_CATALOG = (
  'https://github.com/tensorflow/datasets/blob/'
  '8861fc78cd44d2d490e5a5733cdc8a98f9999693/docs/community_catalog/huggingface/'
)

SETS: Mapping[str, Named] = {
  'gsm8k': Named(
    'Word problems of primary school, with working',
    'openai/gsm8k',
    'mit',
    'https://github.com/huggingface/datasets/blob/'
    '003b040e7a4c30aab0db802c0655496e70edb19a/datasets/gsm8k/README.md',
    READ,
    prompt='{question}',
    response='{answer}',
    subset='main',
    sizes={'train': 7_473, 'test': 1_319},
  ),
  'gsm8k_socratic': Named(
    'Word problems of primary school, with working in questions',
    'openai/gsm8k',
    'mit',
    'https://github.com/huggingface/datasets/blob/'
    '003b040e7a4c30aab0db802c0655496e70edb19a/datasets/gsm8k/README.md',
    READ,
    prompt='{question}',
    response='{answer}',
    subset='socratic',
    sizes={'train': 7_473, 'test': 1_319},
  ),
  'math_instruct': Named(
    'Problems with solutions in words or programs, by source',
    'TIGER-Lab/MathInstruct',
    None,
    OPENFEDLLM,
    READ,
    prompt='{instruction}',
    response='{output}',
    label='source',
    client='source',
  ),
  'math': Named(
    'Problems of competitions, by field and level',
    'lighteval/MATH',
    None,
    OPENFEDLLM,
    READ,
    prompt='{problem}',
    response='{solution}',
    label='type',
    client='type',
    others=('level',),
    subset='all',
  ),
  'metamath_qa': Named(
    'Problems of GSM8K and MATH, rewritten in several ways',
    'meta-math/MetaMathQA',
    'mit',  # https://huggingface.co/datasets/meta-math/MetaMathQA/tree/main
    'https://github.com/huggingface/peft/blob/'
    '03be25e348beb51282dd8e39b0edceeb8e6a104f/method_comparison/MetaMathQA/'
    'data.py',
    READ,
    prompt='{query}',
    response='{response}',
    label='type',
    client='type',
  ),
  'aqua_rat': Named(
    'Algebraic word problems with rationales',
    'aqua_rat',
    'apache-2.0',
    _CATALOG + 'aqua_rat.md',
    READ,
    prompt='{question}',
    response='{rationale}',
    label='correct',
    subset='raw',
    sizes={'train': 97_467, 'validation': 254, 'test': 254},
  ),
  'math_qa': Named(
    'Word problems by field with rationales',
    'allenai/math_qa',
    'apache-2.0',  # from the table of cards in github.com/sileod/tasksource
    'https://github.com/tensorflow/datasets/blob/master/docs/'
    'community_catalog/huggingface/math_qa.md',
    READ,
    prompt='{Problem}\n\n{options}',
    response='{Rationale}',
    label='category',
    client='category',
    sizes={'train': 29_837, 'validation': 4_475, 'test': 2_985},
  ),
  'orca_math': Named(
    '200,000 word problems with generated solutions',
    'microsoft/orca-math-word-problems-200k',
    None,
    'https://github.com/tyfeng1997/qwen3-finetune/blob/main/scripts/'
    'convert_dataset.py',
    READ,
    prompt='{question}',
    response='{answer}',
  ),
  'open_math_instruct_2': Named(
    'Problems after GSM8K and MATH with generated solutions',
    'nvidia/OpenMathInstruct-2',
    None,
    'https://github.com/harshad317/LocalGPT/blob/main/tasks/'
    'open_math_instruct.py',
    READ,
    prompt='{problem}',
    response='{generated_solution}',
    others=('expected_answer',),
  ),
  'belle_school_math': Named(
    '250,000 Chinese problems of schools',
    'BelleGroup/school_math_0.25M',
    None,
    LLAMA_FACTORY,
    READ,
    prompt='{instruction}\n\n{input}',
    response='{output}',
  ),
}
