"""Models: frozen networks as plain functions over stacked-layer pytrees.

Builders return a `LoadedModel`. A config may use the names in `__all__`.
"""

from fedjax_llm.models import families as families
from fedjax_llm.models.files.load import LoadedModel as LoadedModel
from fedjax_llm.models.files.load import pretrained as pretrained
from fedjax_llm.models.files.load import random as random
from fedjax_llm.models.files.load import save as save
from fedjax_llm.models.generate import generate as generate
from fedjax_llm.models.generate import sampler as sampler
from fedjax_llm.models.joined import joined as joined
from fedjax_llm.models.network import dual as dual
from fedjax_llm.models.network import layers as layers
from fedjax_llm.models.network import transformer as transformer
from fedjax_llm.models.own import Own as Own
from fedjax_llm.models.own import own as own
from fedjax_llm.models.quantised import num_bytes as num_bytes
from fedjax_llm.models.random_encoder import random_encoder as random_encoder
from fedjax_llm.models.random_images import random_clip as random_clip
from fedjax_llm.models.random_images import random_vit as random_vit

__all__ = [
  'joined',
  'pretrained',
  'random',
  'random_clip',
  'random_encoder',
  'random_vit',
]
