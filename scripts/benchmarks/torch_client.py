"""One client in PyTorch and PEFT, with as little overhead as possible."""

from typing import Any

import peer
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Client:
  """A model with an adapter, and local training on one client's batches."""

  def __init__(
    self, args: Any, dtype: Any = torch.float32, device: str = 'cpu'
  ):
    model: Any = AutoModelForCausalLM.from_pretrained(
      str(args.work / 'model'), dtype=dtype, attn_implementation='sdpa'
    )
    model.config.use_cache = False
    self.model: Any = PeftModel.from_pretrained(
      model, str(args.work / 'adapter'), is_trainable=True
    )
    self.model.to(device, dtype)  # PEFT keeps its factors in float32
    self.model.train()  # the adapter has no dropout
    self.names = [
      n for n, p in self.model.named_parameters() if p.requires_grad
    ]
    self.params = [p for p in self.model.parameters() if p.requires_grad]
    self.optimizer, self.rate = args.optimizer, args.rate
    tokens, mask = (
      torch.from_numpy(x).to(device) for x in peer.data(args.work)
    )
    self.tokens, self.mask = tokens.long(), mask
    self.num_clients, self.num_steps = tokens.shape[:2]
    # The places of the reply are the same in every batch.
    self.index = mask[0, 0, :, 1:].reshape(-1).nonzero()[:, 0]
    self.loss = self.full_loss

  def start(self) -> list[torch.Tensor]:
    return [p.detach().clone() for p in self.params]

  def full_loss(self, tokens, mask):
    """Computes the loss as libraries do: all logits, labels of -100."""
    labels = torch.where(mask, tokens, -100)
    logits = self.model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
      logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    )

  def needed_loss(self, tokens, mask):
    """Computes the loss with logits only where the mask is set."""
    inner = self.model.base_model.model
    hidden = inner.model(input_ids=tokens).last_hidden_state[:, :-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])[self.index]
    targets = tokens[:, 1:].reshape(-1)[self.index]
    logits = inner.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits, targets)

  def train(self, start: list[torch.Tensor], client: int) -> None:
    """Runs local steps from `start`; the result is in `self.params`."""
    with torch.no_grad():
      torch._foreach_copy_(self.params, start)
    if self.optimizer == 'adamw':
      optimizer = torch.optim.AdamW(
        self.params, lr=self.rate, weight_decay=0.0, fused=True
      )
    else:
      optimizer = torch.optim.SGD(self.params, lr=self.rate, foreach=True)
    for step in range(self.num_steps):
      optimizer.zero_grad(set_to_none=True)
      self.loss(self.tokens[client, step], self.mask[client, step]).backward()
      optimizer.step()

  def add_to(self, sums: list[torch.Tensor]) -> None:
    with torch.no_grad():
      torch._foreach_add_(sums, self.params)

  def named(self, values: list[torch.Tensor]) -> dict[str, Any]:
    return {
      name.replace('.default', ''): value.detach().cpu().numpy()
      for name, value in zip(self.names, values, strict=True)
    }


def zeros(start: list[torch.Tensor]) -> list[torch.Tensor]:
  return [torch.zeros_like(p) for p in start]
