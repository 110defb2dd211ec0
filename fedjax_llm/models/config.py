"""The configuration of a network, the shapes of its weights, a random base.

The tree of weights has the same names in every family, so that targets of
adapters have the same names too:

    embed_tokens, embed_positions, embed_types, embed_norm
    layers/  input_layernorm, self_attn/{q,k,v,o}_proj, self_attn/{q,k}_norm,
             post_attention_layernorm, mlp/{gate,up,down}_proj, ...
    norm, head_dense, head_norm, lm_head    or    pooler, classifier
    or    norm, score (a causal network with scores of whole texts)

A network of images has `embed_patches` and `embed_class` in place of
`embed_tokens`, and `attention_scale` and `mlp_scale` in layers with a layer
scale. A dual encoder has two such trees:

    text/..., vision/..., text_projection, visual_projection, logit_scale
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.models.network import rope as rope_lib
from fedjax_llm.models.network.rope import Rope
from fedjax_llm.types import Base, Key


class Patches(NamedTuple):
  """How a network of images cuts pictures [H, W, C] into patches.

  A picture becomes (H / patch) (W / patch) rows behind the row of its class.
  Pixels x in 0..1 enter as (x - mean) / std, channel by channel.
  """

  size: int  # H = W of the learned positions
  patch: int
  channels: int = 3
  bias: bool = True
  resized: bool = False  # positions are interpolated to pictures of other sizes
  with_mean: bool = False  # the mean of the patches belongs to the features
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)

  @property
  def count(self) -> int:
    return (self.size // self.patch) ** 2


class Config(NamedTuple):
  """The configuration of a network; static and hashable.

  `windows[l]` is the number of places that a token of layer l attends to, its
  own included (0: the whole text; an empty tuple: the whole text in every
  layer), and `layer_ropes[l]` its rotation (an empty tuple: `rope` in every
  layer).

  `residual` names the order of norms and additions in a block:

      pre        x += attention(norm x);  x += mlp(norm x)
      post       x = norm(x + attention(x));  x = norm(x + mlp(x))
      sandwich   x += norm(attention(norm x));  x += norm(mlp(norm x))
      parallel   x += attention(norm x) + mlp(norm' x)
      shared     x += attention(y) + mlp(y),  y = norm x
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  # Blocks.
  activation: str = 'silu'
  gated: bool = True
  residual: str = 'pre'
  norm: str = 'rms'
  norm_eps: float = 1e-6
  final_norm: bool = True
  # Attention.
  causal: bool = True
  rope: Rope = Rope()
  layer_ropes: tuple[Rope, ...] = ()
  partial_rotary: float = 1.0  # the part of a head that is rotated
  windows: tuple[int, ...] = ()
  qk_norm: bool = False
  score_scale: float | None = None  # None: 1 / sqrt(head_dim)
  score_cap: float = 0.0
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  layer_scale: bool = False  # the outputs of both modules times a vector
  # Buckets of distances, each with a learned score a head; 0: there are none.
  relative_buckets: int = 0
  # Embedding.
  embedding_scale: float = 1.0
  num_learned_positions: int = 0  # rows of the table; 0: there is none
  first_position: int = 0  # the row of a text's first token
  num_token_types: int = 0  # `Batch.types`; None there means type 0
  embedding_norm: bool = False
  # Head.
  head: str = 'lm'  # 'lm' | 'masked_lm' | 'classifier' | 'score' | 'none'
  tied: bool = False
  head_bias: bool = False
  head_activation: str = ''
  logit_cap: float = 0.0
  labels: tuple[str, ...] = ()  # names of classes, or of scores
  # Tokens.
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  # Images.
  image: Patches | None = None  # None: a network of texts
  # A dual encoder: these fields describe its text tower, `vision` the other,
  # and both are projected to `projection` features.
  vision: Any = None  # a `Config`
  projection: int = 0
  projection_bias: bool = False
  pooling: str = 'end'  # a text's state: 'end', or 'mean' of its tokens

  @property
  def reads_images(self) -> bool:
    return self.image is not None or self.vision is not None

  @property
  def writes(self) -> bool:
    """Returns True for a network that continues texts."""
    return self.causal and not self.reads_images and self.head != 'score'

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.partial_rotary)


TOWERS = ('text', 'vision')


def tower(config: Config, name: str) -> Config:
  """Returns the `Config` of one tower of a dual encoder.

  >>> from fedjax_llm import models
  >>> tower(models.random_clip().config, 'vision').image.patch
  4
  """
  if name == 'vision':
    return config.vision
  return config._replace(vision=None, projection=0, head='none', labels=())


def num_layers(config: Config, path: tuple[str, ...]) -> int:
  """Returns L of the stacked layers in which a path of the base lies.

  >>> from fedjax_llm import models
  >>> num_layers(models.random().config, ('layers', 'mlp', 'up_proj'))
  2
  """
  if config.vision is not None and path[0] in TOWERS:
    return tower(config, path[0]).num_layers
  return config.num_layers


def longest_text(config: Config) -> int:
  """Returns the largest number of tokens that a text may have."""
  ropes = (config.rope, *config.layer_ropes)
  bounds = [rope_lib.longest_text(r, config.max_positions) for r in ropes]
  return min([config.max_positions, *(b for b in bounds if b is not None)])


def shapes(config: Config) -> dict[str, Any]:
  """Returns the shape of every weight, in the structure of the base.

  >>> from fedjax_llm import models
  >>> shapes(models.random().config)['norm']
  {'scale': (64,)}
  """
  c = config
  if c.vision is not None:
    seen = c.vision.hidden_size * (1 + c.vision.image.with_mean)
    tree = {
      'text': shapes(tower(c, 'text')),
      'vision': shapes(tower(c, 'vision')),
      'text_projection': {'kernel': (c.hidden_size, c.projection)},
      'visual_projection': {'kernel': (seen, c.projection)},
      'logit_scale': {'value': ()},
    }
    for name in ('text_projection', 'visual_projection'):
      if c.projection_bias:
        tree[name]['bias'] = (c.projection,)
    return tree
  width, inner = c.hidden_size, c.intermediate_size
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

  def matrix(d, f, bias, *lead):
    kernel = {'kernel': (*lead, d, f)}
    return {**kernel, 'bias': (*lead, f)} if bias else kernel

  def norm(d, *lead):
    return {k: (*lead, d) for k in ('scale', 'bias')[: 1 + (c.norm == 'layer')]}

  n = c.num_layers
  attention = {
    'q_proj': matrix(width, heads, c.qkv_bias, n),
    'k_proj': matrix(width, kv_heads, c.qkv_bias, n),
    'v_proj': matrix(width, kv_heads, c.qkv_bias, n),
    'o_proj': matrix(heads, width, c.output_bias, n),
  }
  if c.qk_norm:
    attention.update(q_norm=norm(c.head_dim, n), k_norm=norm(c.head_dim, n))
  mlp = {
    'up_proj': matrix(width, inner, c.mlp_bias, n),
    'down_proj': matrix(inner, width, c.mlp_bias, n),
  }
  if c.gated:
    mlp['gate_proj'] = matrix(width, inner, c.mlp_bias, n)
  norms = NORMS_OF[c.residual]
  tree: dict[str, Any] = {
    'layers': {
      'self_attn': attention,
      'mlp': mlp,
      **{name: norm(width, n) for name in norms},
    },
  }
  if c.layer_scale:
    for name in ('attention_scale', 'mlp_scale'):
      tree['layers'][name] = {'gain': (n, width)}
  if c.relative_buckets:
    tree['embed_distances'] = {'embedding': (c.relative_buckets, c.num_heads)}
  if c.image is None:
    tree['embed_tokens'] = {'embedding': (c.vocab_size, width)}
  else:
    size = c.image.channels * c.image.patch**2
    tree['embed_patches'] = matrix(size, width, c.image.bias)
    tree['embed_class'] = {'embedding': (1, width)}
  if c.num_learned_positions:
    tree['embed_positions'] = {'embedding': (c.num_learned_positions, width)}
  if c.num_token_types:
    tree['embed_types'] = {'embedding': (c.num_token_types, width)}
  if c.embedding_norm:
    tree['embed_norm'] = norm(width)
  if c.final_norm:
    tree['norm'] = norm(width)
  return {**tree, **_head_shapes(c, norm, matrix)}


# The names of the norms of one block, by `Config.residual`.
NORMS_OF = {
  'pre': ('input_layernorm', 'post_attention_layernorm'),
  'post': ('post_attention_layernorm', 'post_mlp_layernorm'),
  'sandwich': (
    *('input_layernorm', 'attention_output_norm'),
    *('post_attention_layernorm', 'mlp_output_norm'),
  ),
  'parallel': ('input_layernorm', 'post_attention_layernorm'),
  'shared': ('input_layernorm',),
}


def _head_shapes(c: Config, norm, matrix) -> dict[str, Any]:
  width = c.hidden_size
  if c.head == 'none':
    return {}
  if c.head == 'classifier' and c.image is not None:
    inputs = width * (1 + c.image.with_mean)
    return {'classifier': matrix(inputs, len(c.labels), True)}
  if c.head == 'classifier':
    return {
      'pooler': matrix(width, width, True),
      'classifier': matrix(width, len(c.labels), True),
    }
  if c.head == 'score':
    return {'score': matrix(width, len(c.labels), False)}
  tree: dict[str, Any] = {}
  if c.head == 'masked_lm':
    tree['head_dense'] = matrix(width, width, True)
    tree['head_norm'] = norm(width)
  whole = matrix(width, c.vocab_size, c.head_bias)
  if c.tied:
    del whole['kernel']
  if whole:
    tree['lm_head'] = whole
  return tree


def _is_shape(x: Any) -> bool:
  return isinstance(x, tuple)


def num_params(config: Config) -> int:
  """Returns the number of parameters of the base (tied weights once)."""
  leaves = jax.tree.leaves(shapes(config), is_leaf=_is_shape)
  return sum(math.prod(shape) for shape in leaves)


def init(config: Config, key: Key, dtype: Any = jnp.float32) -> Base:
  """Draws a random base: matrices ~ N(0, 1 / fan-in), norms 1, biases 0."""
  paths, structure = jax.tree.flatten_with_path(
    shapes(config), is_leaf=_is_shape
  )

  def leaf(index, path, shape):
    kind = path[-1].key
    if kind == 'value':  # of logit_scale: log(1 / 0.07), as in CLIP
      return jnp.asarray(math.log(1 / 0.07), dtype)
    if kind == 'gain':
      return jnp.ones(shape, dtype)
    if kind == 'scale' and config.norm != 'rms_plus_one':
      return jnp.ones(shape, dtype)
    if kind in ('scale', 'bias'):
      return jnp.zeros(shape, dtype)
    fan_in = shape[-1] if kind == 'embedding' else shape[-2]
    noise = jax.random.normal(jax.random.fold_in(key, index), shape)
    return (noise / math.sqrt(fan_in)).astype(dtype)

  return jax.tree.unflatten(
    structure, [leaf(i, path, shape) for i, (path, shape) in enumerate(paths)]
  )
