"""Golden networks of images, and what PEFT computes on them.

For `scripts/model_table`; `in_peft` needs torch and peft.
"""

import importlib
import importlib.util
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import references_peft

from fedjax_llm import models
from fedjax_llm.adapters import peft
from fedjax_llm.models import config as config_lib
from fedjax_llm.models import families
from fedjax_llm.types import Images

GOLDEN = references_peft.GOLDEN / 'images'


def outputs(loaded: Any, base: Any, params: Any, data: Any) -> Any:
  """Returns logits, states of the class, or a dual encoder's scores."""
  pixels = data['pixels']
  if loaded.dual is not None:
    text = loaded.dual.text(base, params, data['tokens'])
    image, _ = loaded.dual.image(base, params, pixels)
    scale = loaded.dual.scale(base, params)
    return scale * models.dual.cosine(image, text)
  batch: Any = Images(pixels, None, None)
  hidden = loaded.model.hidden(base, params, batch)
  if loaded.config.head == 'none':
    return hidden
  return loaded.model.logits(base, params, hidden)


def random_adapter(config: config_lib.Config) -> dict[str, Any]:
  """Factors on every matrix of the layers, of both towers of a dual encoder."""
  if config.vision is None:
    return references_peft.random_adapter(config)
  return {
    name: references_peft.random_adapter(config_lib.tower(config, name))
    for name in config_lib.TOWERS
  }


def in_peft(directory: pathlib.Path, adapter: str, data: Any) -> np.ndarray:
  """Returns what PEFT computes with an adapter: as `outputs`."""
  import peft as theirs  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]

  sys.path.insert(0, str(GOLDEN.parent))
  make_images = importlib.import_module('make_images')
  plain = references_peft.generator('make_training').load(directory)
  name = type(plain).__name__
  adapted = theirs.PeftModel.from_pretrained(plain, adapter).eval()
  inputs = {'pixel_values': make_images.normalised(data['pixels'], name)}
  if name == 'CLIPModel':
    inputs['input_ids'] = torch.tensor(data['tokens']).long()
  with torch.no_grad():
    out = adapted(**inputs)
  if 'logits_per_image' in out:
    return out.logits_per_image.numpy()
  if 'logits' in out:
    return out.logits.numpy()
  return out.last_hidden_state[:, 0].numpy()


def differences(directory: pathlib.Path) -> tuple[float, float | None]:
  """Returns the largest relative differences to torch, and through peft."""
  loaded = models.pretrained(directory)
  data = dict(np.load(directory / 'outputs.npz'))
  wanted = data.get('logits')
  wanted = data['states'][:, 0] if wanted is None else wanted
  relative = lambda x, y: float(np.abs(x - y).max() / np.abs(y).max())
  run = jax.jit(lambda base, params: outputs(loaded, base, params, data))
  plain = relative(run(loaded.base, {}), wanted)
  if not all(map(importlib.util.find_spec, ('torch', 'peft'))):
    return plain, None
  # In memory transformers 5 names the modules of ViT and DINOv2 otherwise than
  # in files, and PEFT looks for those in memory.
  if loaded.dual is None:
    return plain, None
  params, config = random_adapter(loaded.config), loaded.config
  with tempfile.TemporaryDirectory() as out:
    peft.save(
      out,
      params,
      module_name=lambda path, layer: families.hf_module_name(
        path, layer, config, part=True
      ),
      base_model=str(directory),
      task_type=None,
    )
    theirs = in_peft(directory, out, data)
  return plain, relative(run(loaded.base, params), theirs)
