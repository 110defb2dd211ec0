"""Adapters in front of the text: every builder returns an `Adapter`.

They change no weight, so nothing of them can be merged or folded.
"""

from fedjax_llm.adapters.prompts.classes import context as context
from fedjax_llm.adapters.prompts.classes import domain_context as domain_context
from fedjax_llm.adapters.prompts.classes import (
  feature_attention as feature_attention,
)
from fedjax_llm.adapters.prompts.classes import gated_context as gated_context
from fedjax_llm.adapters.prompts.classes import (
  generated_context as generated_context,
)
from fedjax_llm.adapters.prompts.classes import growing_pool as growing_pool
from fedjax_llm.adapters.prompts.classes import prompt_groups as prompt_groups
from fedjax_llm.adapters.prompts.classes import visual_pool as visual_pool
from fedjax_llm.adapters.prompts.classes import visual_prompt as visual_prompt
from fedjax_llm.adapters.prompts.encoded import p_tuning as p_tuning
from fedjax_llm.adapters.prompts.made import (
  generated_prompt as generated_prompt,
)
from fedjax_llm.adapters.prompts.made import grouped_prompt as grouped_prompt
from fedjax_llm.adapters.prompts.made import (
  projected_prompt as projected_prompt,
)
from fedjax_llm.adapters.prompts.made import prompt_pool as prompt_pool
from fedjax_llm.adapters.prompts.rows import prefix as prefix
from fedjax_llm.adapters.prompts.rows import soft_prompt as soft_prompt
