"""Models: frozen networks as plain functions over stacked-layer pytrees.

The names in `__all__` are those that a config may use.
"""

from fedjax_llm.models import families as families
from fedjax_llm.models import layers as layers
from fedjax_llm.models import transformer as transformer
from fedjax_llm.models.generate import generate as generate
from fedjax_llm.models.load import LoadedModel as LoadedModel
from fedjax_llm.models.load import pretrained as pretrained
from fedjax_llm.models.load import random as random
from fedjax_llm.models.load import save as save

__all__ = ['pretrained', 'random']
