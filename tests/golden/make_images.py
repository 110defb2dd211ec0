"""Writes the golden networks of images: tiny random ones and torch's outputs.

    python tests/golden/make_images.py [NAME ...]

Needs torch and transformers; the tests that read the files need neither. Each
directory of `tests/golden/images` is an ordinary Hugging Face model in bfloat16
with `outputs.npz` beside it, computed in float32: `pixels` [B, H, W, C] uint8
and `logits` [B, labels] or `states` [B, 1 + N, D]; where the family reads
pictures of other sizes also `wide` [B, H, W, C] and `wide_states`. A dual
encoder has `tokens` [B, T] and `text`, `image`, `logits` [B, B] in place.
"""

import pathlib
import shutil
import sys

import make_models
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = pathlib.Path(__file__).parent / 'images'
SIZES = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
)
PICTURE = dict(image_size=12, patch_size=4)
DINOV2 = {k: v for k, v in SIZES.items() if k != 'intermediate_size'}
CLASSES = make_models.CLASSES
TEXT = dict(
  SIZES,
  vocab_size=97,
  max_position_embeddings=12,
  bos_token_id=95,
  eos_token_id=96,
  pad_token_id=1,
)

MODELS = {
  'vit': ('ViTModel', dict(SIZES, **PICTURE)),
  'vit_classifier': (
    'ViTForImageClassification',
    dict(SIZES, **PICTURE, **CLASSES, qkv_bias=False),
  ),
  'dinov2': ('Dinov2Model', dict(DINOV2, **PICTURE, mlp_ratio=2)),
  'dinov2_classifier': (
    'Dinov2ForImageClassification',
    dict(DINOV2, **PICTURE, **CLASSES, mlp_ratio=2),
  ),
  'clip': (
    'CLIPModel',
    dict(
      text_config=TEXT,
      vision_config=dict(SIZES, **PICTURE, num_hidden_layers=3),
      projection_dim=16,
    ),
  ),
  # As the first files of CLIP: the end of a text is its largest token.
  'clip_first': (
    'CLIPModel',
    dict(
      text_config=dict(TEXT, bos_token_id=0, eos_token_id=2),
      vision_config=dict(SIZES, **PICTURE, hidden_size=24, num_channels=1),
      projection_dim=16,
    ),
  ),
}


def normalised(pixels, architecture):
  """Pixels [B, C, H, W] as the family's own preprocessor makes them."""
  x = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
  mean = std = [0.5] * x.shape[1]
  if x.shape[1] == 3 and architecture.startswith('CLIP'):
    mean = [0.48145466, 0.4578275, 0.40821073]
    std = [0.26862954, 0.26130258, 0.27577711]
  elif architecture.startswith('Dinov2'):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
  cast = lambda v: torch.tensor(v)[None, :, None, None]
  return (x - cast(mean)) / cast(std)


def outputs(model, architecture, rng, channels):
  """Inputs and outputs of a model, by name."""
  pixels = rng.integers(0, 256, (2, 12, 12, channels)).astype(np.uint8)
  out = {'pixels': pixels}
  x = normalised(pixels, architecture)
  if architecture == 'CLIPModel':
    tokens = rng.integers(3, 95, (2, 9))
    tokens[:, 0] = 95
    for row, end in zip(tokens, (8, 5)):
      row[end] = 96
      row[end + 1 :] = 1
    found = model(input_ids=torch.tensor(tokens), pixel_values=x)
    text = model.text_projection(
      model.text_model(torch.tensor(tokens)).pooler_output
    )
    states = model.vision_model(x).last_hidden_state
    states = model.vision_model.post_layernorm(states)
    return {
      **out,
      'tokens': tokens.astype(np.int32),
      'logits': found.logits_per_image.numpy(),
      'text': text.numpy(),
      'states': model.visual_projection(states).numpy(),
    }
  found = model(x)
  if 'logits' in found:
    return {**out, 'logits': found.logits.numpy()}
  out['states'] = found.last_hidden_state.numpy()
  if architecture.startswith('Dinov2'):
    out['wide'] = rng.integers(0, 256, (1, 8, 20, channels)).astype(np.uint8)
    wide = model(normalised(out['wide'], architecture))
    out['wide_states'] = wide.last_hidden_state.numpy()
  return out


def make(name):
  architecture, settings = MODELS[name]
  family = getattr(transformers, architecture)
  config = family.config_class(**settings)
  generator = torch.Generator().manual_seed(sum(name.encode()))
  model = family(config).eval()
  make_models.randomise(model, generator)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if key == 'logit_scale':
        parameter.fill_(1.5)
      elif key.endswith(('position_embeddings', 'cls_token', 'mask_token')):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
      elif 'patch_embedding' in key and parameter.ndim == 4:
        parameter.div_(parameter[0, 0].numel() ** 0.5)
  model = model.to(torch.bfloat16)
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  model.save_pretrained(directory)
  model = family.from_pretrained(directory, dtype=torch.float32).eval()
  rng = np.random.default_rng(sum(name.encode()))
  vision = getattr(config, 'vision_config', config)
  with torch.no_grad():
    out = outputs(model, architecture, rng, vision.num_channels)
  np.savez_compressed(directory / 'outputs.npz', **out)  # pyright: ignore


if __name__ == '__main__':
  for name in sys.argv[1:] or MODELS:
    make(name)
