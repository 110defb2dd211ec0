"""Nodes: the kinds of changes of a network, with one small protocol.

`protocol` defines the methods of a node; every other file holds one kind. A
user's own `NamedTuple` with these methods works wherever the nodes here do.
"""

from fedjax_llm.nodes import protocol as protocol
from fedjax_llm.nodes.bottleneck import Activation as Activation
from fedjax_llm.nodes.bottleneck import Bottleneck as Bottleneck
from fedjax_llm.nodes.bottleneck import Parallel as Parallel
from fedjax_llm.nodes.chosen import Chosen as Chosen
from fedjax_llm.nodes.core import Core as Core
from fedjax_llm.nodes.customised import Contextual as Contextual
from fedjax_llm.nodes.customised import Customised as Customised
from fedjax_llm.nodes.dense import Added as Added
from fedjax_llm.nodes.dense import Amended as Amended
from fedjax_llm.nodes.dense import Dense as Dense
from fedjax_llm.nodes.dora import Dora as Dora
from fedjax_llm.nodes.dropped import Dropped as Dropped
from fedjax_llm.nodes.encoded import Affine as Affine
from fedjax_llm.nodes.encoded import Direction as Direction
from fedjax_llm.nodes.encoded import Encoded as Encoded
from fedjax_llm.nodes.encoded import Projected as Projected
from fedjax_llm.nodes.experts import Experts as Experts
from fedjax_llm.nodes.experts import Routing as Routing
from fedjax_llm.nodes.gate import Gate as Gate
from fedjax_llm.nodes.gram import Gram as Gram
from fedjax_llm.nodes.grouped import Grouped as Grouped
from fedjax_llm.nodes.leased import Leased as Leased
from fedjax_llm.nodes.low_rank import LowRank as LowRank
from fedjax_llm.nodes.made import Attended as Attended
from fedjax_llm.nodes.made import Factored as Factored
from fedjax_llm.nodes.made import Hyper as Hyper
from fedjax_llm.nodes.made import Kronecker as Kronecker
from fedjax_llm.nodes.made import LowDimensional as LowDimensional
from fedjax_llm.nodes.parts import Controlled as Controlled
from fedjax_llm.nodes.parts import Dual as Dual
from fedjax_llm.nodes.parts import Halves as Halves
from fedjax_llm.nodes.parts import Seeded as Seeded
from fedjax_llm.nodes.pool import Choice as Choice
from fedjax_llm.nodes.pool import Pool as Pool
from fedjax_llm.nodes.prompt import Prefix as Prefix
from fedjax_llm.nodes.prompt import Prompt as Prompt
from fedjax_llm.nodes.prompt_experts import Heads as Heads
from fedjax_llm.nodes.prompt_experts import PromptExperts as PromptExperts
from fedjax_llm.nodes.prompt_groups import PromptGroups as PromptGroups
from fedjax_llm.nodes.protocol import is_node as is_node
from fedjax_llm.nodes.scaled import Scaled as Scaled
from fedjax_llm.nodes.scores import Context as Context
from fedjax_llm.nodes.scores import Domains as Domains
from fedjax_llm.nodes.scores import Generated as Generated
from fedjax_llm.nodes.scores import Pictures as Pictures
from fedjax_llm.nodes.scores import Reweighted as Reweighted
from fedjax_llm.nodes.scores import Towers as Towers
from fedjax_llm.nodes.scores import Transported as Transported
from fedjax_llm.nodes.scores import Visual as Visual
from fedjax_llm.nodes.swayed import Swayed as Swayed
from fedjax_llm.nodes.tensor_train import TensorTrain as TensorTrain
from fedjax_llm.nodes.tiers import Tiers as Tiers
from fedjax_llm.nodes.vera import Vera as Vera
from fedjax_llm.nodes.visual_pool import GrowingPool as GrowingPool
from fedjax_llm.nodes.visual_pool import VisualPool as VisualPool
