"""P1: a Hugging Face Trainer for each client and round.

OpenFedLLM and Shepherd are built so.
"""

import logging
import tempfile

import peer
import torch
from torch_client import Client, zeros
from transformers import Trainer, TrainingArguments


def main() -> None:
  args = peer.arguments()
  torch.set_num_threads(args.threads)
  logging.disable(logging.WARNING)
  client = Client(args)
  params, batch = client.start(), client.tokens.shape[2]
  settings = TrainingArguments(
    tempfile.mkdtemp(),
    max_steps=client.num_steps,
    per_device_train_batch_size=batch,
    lr_scheduler_type='constant',
    learning_rate=args.rate,
    weight_decay=0.0,
    max_grad_norm=0.0,
    optim='adamw_torch' if args.optimizer == 'adamw' else 'sgd',
    report_to='none',
    save_strategy='no',
    logging_strategy='no',
    use_cpu=True,
    disable_tqdm=True,
    log_level='error',
  )

  class InOrder(Trainer):
    """Returns the batches in the same order as all other runners."""

    def _get_train_sampler(self, dataset=None):
      return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

  def one_round():
    sums = zeros(params)
    for k in range(client.num_clients):
      with torch.no_grad():
        torch._foreach_copy_(client.params, params)
      rows = [
        {'input_ids': t, 'labels': torch.where(m, t, -100)}
        for tokens, mask in zip(client.tokens[k], client.mask[k], strict=True)
        for t, m in zip(tokens, mask, strict=True)
      ]
      InOrder(client.model, settings, train_dataset=rows).train()
      client.add_to(sums)
    for p, total in zip(params, sums, strict=True):
      p.copy_(total / client.num_clients)

  peer.measure(args, one_round)
  peer.save(args, client.named(params))


if __name__ == '__main__':
  main()
