"""The same rounds in PyTorch and PEFT: loops over clients, Trainer, vmap.

Weights are random and in bf16, the factors and AdamW's moments too, which is
less work than ours, where they are float32. Losses are computed where they are
needed, except by the Trainer, which computes all logits as libraries do. A loop
over clients is measured on eight of them.
"""

import gc
import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import shapes
import torch
from clock import median
from stages import Points, attempt
from torch_client import Client, zeros

LOOP, VMAP = 'torch, loop', 'torch, vmap'
_ROWS = 16384  # rows of a block of clients under vmap, as in ours


def main_points(dry: bool, have: frozenset[str]) -> Points:
  """All loops on short rows, then the fastest ones on long rows."""
  short, long = shapes.main(dry)
  yield from point(short, f'{LOOP}, eager', have, loop)
  yield from point(short, f'{LOOP}, CUDA graphs', have, loop, 'reduce-overhead')
  yield from point(short, f'{LOOP}, Trainer', have, trainer)
  yield from point(short, VMAP, have, stacked)
  yield from point(long, f'{LOOP}, eager', have, loop)
  yield from point(long, f'{LOOP}, compiled', have, loop, 'default')
  yield from point(long, VMAP, have, stacked)
  yield from point(long, f'{LOOP}, Trainer', have, trainer)


def other_points(dry: bool, have: frozenset[str]) -> Points:
  """The other cohorts under vmap; a loop's speed needs no other cohort."""
  for work in shapes.others(dry):
    yield from point(work, VMAP, have, stacked)
  short = shapes.main(dry)[0]
  yield from point(short, f'{LOOP}, compiled', have, loop, 'default')


def billion_points(dry: bool, have: frozenset[str]) -> Points:
  work = shapes.billion(dry)
  yield from point(work, f'{LOOP}, eager', have, loop)
  yield from point(work, f'{LOOP}, compiled', have, loop, 'default')
  yield from point(work, f'{LOOP}, Trainer', have, trainer)


def point(
  work: shapes.Work,
  label: str,
  have: frozenset[str],
  measure: Callable[..., dict[str, Any]],
  *more: Any,
) -> Points:
  def measured() -> dict[str, Any]:
    result = measure(work, *more)
    gc.collect()
    if on_gpu():
      torch.cuda.empty_cache()
    return result

  yield from attempt(f'{work.name}, {label}', have, measured)


def on_gpu() -> bool:
  return torch.cuda.is_available()


class Drawn(Client):
  """A client on a model with random weights, drawn on the device."""

  def __init__(self, work: shapes.Work, attention: str = 'sdpa'):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = work.model
    config = LlamaConfig(
      vocab_size=shape['vocab_size'],
      hidden_size=shape['hidden_size'],
      intermediate_size=shape['intermediate_size'],
      num_hidden_layers=shape['num_layers'],
      num_attention_heads=shape['num_heads'],
      num_key_value_heads=shape['num_kv_heads'],
      max_position_embeddings=max(work.length, 128),
      tie_word_embeddings=shape.get('tied', False),
      attn_implementation=attention,
      use_cache=False,
    )
    device = 'cuda' if on_gpu() else 'cpu'
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
      with torch.device(device):
        model = LlamaForCausalLM(config)
    finally:
      torch.set_default_dtype(before)
    lora = LoraConfig(
      r=shapes.RANK,
      lora_alpha=shapes.ALPHA,
      target_modules=['q_proj', 'v_proj'],
      lora_dropout=0.0,
    )
    self.model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    self.model.to(device, torch.bfloat16)
    self.model.train()
    named = list(self.model.named_parameters())
    self.names = [n for n, p in named if p.requires_grad]
    self.params = [p for _, p in named if p.requires_grad]
    self.optimizer, self.rate = 'adamw', 1e-3
    rng = np.random.default_rng(0)
    sizes = (work.clients, work.steps, work.batch, work.length)
    tokens = rng.integers(0, shape['vocab_size'], sizes)
    places = np.arange(work.length) >= work.length - work.length // 2
    self.tokens = torch.from_numpy(tokens).to(device)
    self.mask = torch.from_numpy(np.broadcast_to(places, sizes).copy())
    self.mask = self.mask.to(device)
    self.num_clients, self.num_steps = sizes[:2]
    self.index = self.mask[0, 0, :, 1:].reshape(-1).nonzero()[:, 0]
    self.loss = self.needed_loss


def of_files(args: Any, device: str) -> Client:
  """Returns the client of a workload in files, in float32."""
  client = Client(args, torch.float32, device)
  client.loss = client.needed_loss
  return client


def timed(work: shapes.Work, one_round: Callable[[], Any]) -> dict[str, Any]:
  """Returns the numbers of a round, with the seconds of the first one."""
  wait = torch.cuda.synchronize if on_gpu() else lambda: None

  def run() -> None:
    one_round()
    wait()

  if on_gpu():
    torch.cuda.reset_peak_memory_stats()
  began = time.perf_counter()
  run()
  first = time.perf_counter() - began
  result = {**work.result(median(run)), 'first_seconds': first}
  if on_gpu():
    result['peak_bytes'] = torch.cuda.max_memory_allocated()
  return result


def loop(work: shapes.Work, mode: str = '') -> dict[str, Any]:
  """Trains one client after another, eagerly or compiled in a mode."""
  work = shapes.loop(work)
  client = Drawn(work)
  if mode:
    torch._dynamo.reset()
    compiled = torch.compile(client.loss, mode=mode)

    def marked(tokens: Any, mask: Any) -> Any:
      torch.compiler.cudagraph_mark_step_begin()
      return compiled(tokens, mask)

    client.loss = marked
  params = client.start()

  def one_round() -> None:
    sums = zeros(params)
    for k in range(client.num_clients):
      client.train(params, k)
      client.add_to(sums)
    for p, total in zip(params, sums, strict=True):
      p.copy_(total / client.num_clients)

  return timed(work, one_round)


def trainer(work: shapes.Work) -> dict[str, Any]:
  """Trains one client after another, each with a Hugging Face Trainer."""
  from transformers import Trainer, TrainingArguments

  logging.disable(logging.WARNING)
  work = shapes.loop(work)
  client = Drawn(work)
  params = client.start()
  settings = TrainingArguments(
    tempfile.mkdtemp(),
    max_steps=client.num_steps,
    per_device_train_batch_size=work.batch,
    lr_scheduler_type='constant',
    learning_rate=client.rate,
    weight_decay=0.0,
    max_grad_norm=0.0,
    optim='adamw_torch_fused',
    report_to='none',
    save_strategy='no',
    logging_strategy='no',
    use_cpu=not on_gpu(),
    disable_tqdm=True,
    log_level='error',
  )
  tokens, mask = client.tokens.cpu(), client.mask.cpu()
  rows = [
    [
      {'input_ids': t, 'labels': torch.where(m, t, -100)}
      for t, m in zip(tokens[k].flatten(0, 1), mask[k].flatten(0, 1))
    ]
    for k in range(client.num_clients)
  ]

  def one_round() -> None:
    sums = zeros(params)
    for own in rows:
      with torch.no_grad():
        torch._foreach_copy_(client.params, params)
      data: Any = own
      Trainer(client.model, settings, train_dataset=data).train()
      client.add_to(sums)
    for p, total in zip(params, sums, strict=True):
      p.copy_(total / client.num_clients)

  return timed(work, one_round)


def stacked(work: shapes.Work) -> dict[str, Any]:
  """Trains blocks of clients with torch.func: vmap(grad(loss))."""
  from torch.func import functional_call, grad, vmap

  client = Drawn(work, attention='eager')
  inner = client.model.base_model.model
  named = dict(zip(client.names, client.start(), strict=True))
  length, device = work.length, client.tokens.device
  # Its own mask: the library's looks at values, which vmap cannot.
  seen = torch.full((length, length), float('-inf'), device=device).triu(1)
  seen = seen.to(torch.bfloat16).expand(work.batch, 1, length, length)
  places = torch.arange(length, device=device)[None]
  fixed = {
    n: p.detach() for n, p in client.model.named_parameters() if n not in named
  } | dict(client.model.named_buffers())

  class Loss(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.net = client.model

    def forward(self, tokens):
      hidden = inner.model(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=places,
        use_cache=False,
      ).last_hidden_state[:, :-1]
      hidden = hidden.reshape(-1, hidden.shape[-1])[client.index]
      targets = tokens[:, 1:].reshape(-1)[client.index]
      logits = inner.lm_head(hidden)
      return torch.nn.functional.cross_entropy(logits, targets)

  net = Loss()
  at = lambda tree: {f'net.{n}': v for n, v in tree.items()}
  base = at(fixed)
  loss = lambda params, tokens: functional_call(
    net, (at(params), base), (tokens,)
  )
  gradients = vmap(grad(loss), in_dims=(0, 0), randomness='different')
  block = max(1, min(work.clients, _ROWS // (work.batch * length)))
  beta1, beta2, eps = 0.9, 0.999, 1e-8

  def trained(some: slice) -> dict[str, Any]:
    num = len(client.tokens[some])
    stack = {n: p.expand(num, *p.shape).clone() for n, p in named.items()}
    first = {n: torch.zeros_like(p) for n, p in stack.items()}
    second = {n: torch.zeros_like(p) for n, p in stack.items()}
    for step in range(client.num_steps):
      grads = gradients(stack, client.tokens[some, step])
      for n, g in grads.items():
        first[n].lerp_(g, 1 - beta1)
        second[n].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = (second[n] / (1 - beta2 ** (step + 1))).sqrt_().add_(eps)
        rate = -client.rate / (1 - beta1 ** (step + 1))
        stack[n].addcdiv_(first[n], size, value=rate)
    return {n: p.sum(0) for n, p in stack.items()}

  def one_round() -> None:
    sums = {n: torch.zeros_like(p) for n, p in named.items()}
    for start in range(0, work.clients, block):
      for n, p in trained(slice(start, start + block)).items():
        sums[n] += p
    for n, p in named.items():
      p.copy_(sums[n] / work.clients)

  with torch.no_grad():
    return {**timed(work, one_round), 'block': block}
