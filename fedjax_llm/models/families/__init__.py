"""Translates Hugging Face checkpoints to this project's networks and back.

A family converts its `config.json` to a `Config` and back, and maps the tensors
of a checkpoint to leaves of the base.
"""

from fedjax_llm.models.families.config_json import from_hf as from_hf
from fedjax_llm.models.families.config_json import read_config as read_config
from fedjax_llm.models.families.config_json import to_hf as to_hf
from fedjax_llm.models.families.leaves import from_checkpoint as from_checkpoint
from fedjax_llm.models.families.leaves import to_checkpoint as to_checkpoint
from fedjax_llm.models.families.names import FAMILIES as FAMILIES
from fedjax_llm.models.families.names import OWN as OWN
from fedjax_llm.models.families.names import Tensor as Tensor
from fedjax_llm.models.families.names import copies as copies
from fedjax_llm.models.families.names import family as family
from fedjax_llm.models.families.names import fused_rows as fused_rows
from fedjax_llm.models.families.names import hf_module_name as hf_module_name
from fedjax_llm.models.families.names import modules as modules
from fedjax_llm.models.families.names import our_path as our_path
from fedjax_llm.models.families.names import our_paths as our_paths
from fedjax_llm.models.families.names import ours as ours
from fedjax_llm.models.families.names import put as put
from fedjax_llm.models.families.names import says_nothing as says_nothing
from fedjax_llm.models.families.names import spellings as spellings
from fedjax_llm.models.families.names import tensors as tensors
from fedjax_llm.models.families.tables import Family as Family
from fedjax_llm.models.families.tables import Module as Module
from fedjax_llm.models.families.tables import Path as Path
