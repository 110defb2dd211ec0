"""Instructions and chats of general content."""

from collections.abc import Mapping

from fedjax_llm.data.named.spec import Named

READ = '2026-11-28'
OPENFEDLLM = (
  'https://github.com/rui-ye/OpenFedLLM/blob/'
  '9ee5d047a2973d37504ba672077a5826f4d5a45f/utils/process_dataset.py'
)
# Its `data/README.md` names the fields of an entry without columns.
LLAMA_FACTORY = (
  'https://github.com/hiyouga/LLaMA-Factory/blob/'
  '00577a85775a2a78b14641ff8f68c58c6f46b027/data/dataset_info.json'
)
SWIFT = (  # as of version 4.6.0
  'https://github.com/modelscope/ms-swift/blob/main/swift/dataset/dataset/llm.py'
)
SWIFT_TABLE = (  # as of version 4.6.0
  'https://github.com/modelscope/ms-swift/blob/main/swift/dataset/data/'
  'dataset_info.json'
)
BAGEL = (
  'https://github.com/jondurbin/bagel/blob/'
  '03fc580d81fe74bb32b54b12d14a61e24614efac/bagel/data_sources/'
)

_INPUT = '{instruction}\n\n{input}'


def _alpaca(title: str, hub: str, source: str, **more) -> Named:
  return Named(
    title, hub, None, source, READ, prompt=_INPUT, response='{output}', **more
  )


SETS: Mapping[str, Named] = {
  'alpaca': _alpaca(
    '52,000 instructions made by self-instruct', 'tatsu-lab/alpaca', OPENFEDLLM
  ),
  'alpaca_gpt4': _alpaca(
    "Alpaca's instructions with replies of GPT-4",
    'vicgalle/alpaca-gpt4',
    OPENFEDLLM,
  ),
  'alpaca_cleaned': _alpaca(
    'Alpaca without its faulty entries', 'yahma/alpaca-cleaned', OPENFEDLLM
  ),
  'dolly': Named(
    'Instructions written by people, in 8 categories',
    'databricks/databricks-dolly-15k',
    'cc-by-sa-3.0',
    'https://www.tensorflow.org/datasets/catalog/databricks_dolly',
    READ,
    prompt='{instruction}\n\n{context}',
    response='{response}',
    label='category',
    client='category',
    sizes={'train': 15_014},
  ),
  'wizardlm_70k': Named(
    'Instructions made harder step by step (Evol-Instruct)',
    'WizardLM/WizardLM_evol_instruct_70k',
    None,
    OPENFEDLLM,
    READ,
    prompt='{instruction}',
    response='{output}',
  ),
  'wizardlm_v2': Named(
    'The second version of Evol-Instruct, as chats',
    'WizardLM/WizardLM_evol_instruct_V2_196k',
    None,
    LLAMA_FACTORY,
    READ,
    messages='conversations',
  ),
  'ultrachat_200k': Named(
    'Filtered chats between models',
    'HuggingFaceH4/ultrachat_200k',
    None,
    LLAMA_FACTORY,
    READ,
    messages='messages',
    split='train_sft',
  ),
  'openorca': Named(
    'FLAN questions with explained replies',
    'Open-Orca/OpenOrca',
    None,
    LLAMA_FACTORY,
    READ,
    prompt='{system_prompt}\n\n{question}',
    response='{response}',
  ),
  'slimorca': Named(
    'A smaller, filtered OpenOrca, as chats',
    'Open-Orca/SlimOrca',
    None,
    LLAMA_FACTORY,
    READ,
    messages='conversations',
  ),
  'open_platypus': _alpaca(
    'Questions of science and logic',
    'garage-bAInd/Open-Platypus',
    LLAMA_FACTORY,
  ),
  'guanaco': _alpaca(
    'Multilingual instructions after Alpaca',
    'JosephusCheung/GuanacoDataset',
    SWIFT,
  ),
  'alpaca_zh': Named(
    "Alpaca's instructions in Chinese, with replies of GPT-4",
    'llamafactory/alpaca_gpt4_zh',
    None,
    LLAMA_FACTORY,
    READ,
    prompt=_INPUT,
    response='{output}',
  ),
  'belle_0.5m': _alpaca(
    '519,000 Chinese instructions', 'BelleGroup/train_0.5M_CN', LLAMA_FACTORY
  ),
  'belle_1m': _alpaca(
    '917,000 Chinese instructions', 'BelleGroup/train_1M_CN', LLAMA_FACTORY
  ),
  'belle_2m': _alpaca(
    '2 million Chinese instructions', 'BelleGroup/train_2M_CN', LLAMA_FACTORY
  ),
  'firefly': Named(
    'Chinese instructions of 23 tasks',
    'YeungNLP/firefly-train-1.1M',
    None,
    LLAMA_FACTORY,  # `kind`: SWIFT, FireflyPreprocessor
    READ,
    prompt='{input}',
    response='{target}',
    label='kind',
    client='kind',
  ),
  'web_instruct': Named(
    'Questions and answers from the web',
    'TIGER-Lab/WebInstructSub',
    None,
    LLAMA_FACTORY,
    READ,
    prompt='{question}',
    response='{answer}',
  ),
  'natural_instructions': Named(
    'Super-NaturalInstructions: tasks with definitions, one a client',
    'Muennighoff/natural-instructions',
    None,
    BAGEL + 'natural_instructions.py',
    READ,
    prompt='{definition}\n\n{inputs}',
    response='{targets}',
    label='task_name',
    client='task_name',
  ),
}
