"""P7: torch.func, vmap(grad(loss)) over stacked adapters with one base."""

import peer
import torch
from torch.func import functional_call, grad, vmap
from torch_client import Client


def main() -> None:
  args = peer.arguments()
  torch.set_num_threads(args.threads)
  client = Client(args)
  inner = client.model.base_model.model
  inner.config._attn_implementation = 'eager'
  named = dict(zip(client.names, client.start(), strict=True))
  length = client.tokens.shape[-1]
  # Its own mask: the library's looks at values, which vmap cannot.
  seen = torch.full((length, length), float('-inf')).triu(1)
  seen = seen.expand(client.tokens.shape[2], 1, length, length)
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
        position_ids=torch.arange(length)[None],
        use_cache=False,
      ).last_hidden_state[:, :-1]
      hidden = hidden.reshape(-1, hidden.shape[-1])[client.index]
      targets = tokens[:, 1:].reshape(-1)[client.index]
      return torch.nn.functional.cross_entropy(inner.lm_head(hidden), targets)

  net = Loss()
  at = lambda tree: {f'net.{n}': v for n, v in tree.items()}
  base = at(fixed)
  loss = lambda params, tokens: functional_call(
    net, (at(params), base), (tokens,)
  )
  gradients = vmap(grad(loss), in_dims=(0, 0), randomness='different')
  beta1, beta2, eps = 0.9, 0.999, 1e-8

  def one_round():
    k = client.num_clients
    stack = {n: p.expand(k, *p.shape).clone() for n, p in named.items()}
    first = {n: torch.zeros_like(p) for n, p in stack.items()}
    second = {n: torch.zeros_like(p) for n, p in stack.items()}
    for step in range(client.num_steps):
      grads = gradients(stack, client.tokens[:, step])
      for n, g in grads.items():
        if args.optimizer == 'sgd':
          stack[n].sub_(g, alpha=args.rate)
          continue
        first[n].lerp_(g, 1 - beta1)
        second[n].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = second[n] / (1 - beta2 ** (step + 1))
        stack[n].addcdiv_(
          first[n], size.sqrt_().add_(eps),
          value=-args.rate / (1 - beta1 ** (step + 1)),
        )  # fmt: skip
    for n, p in named.items():
      p.copy_(stack[n].mean(0))

  with torch.no_grad():
    peer.measure(args, one_round)
  peer.save(args, client.named(list(named.values())))


if __name__ == '__main__':
  main()
