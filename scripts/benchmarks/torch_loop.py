"""P0: trains one client after another in PyTorch and PEFT.

`--loss full` computes all logits, as libraries do, `--loss needed` only those
of the reply (P0+); `--compile 1` uses torch.compile for the loss;
`--processes 2` runs one process per core, each with half of the clients;
`--dtype float64` is the reference of the correctness check.
"""

import peer
import torch
import torch.multiprocessing as mp
from torch_client import Client, zeros


def make(args, threads: int) -> Client:
  torch.set_num_threads(threads)
  client = Client(args, getattr(torch, args.dtype or 'float32'))
  if args.loss == 'needed':
    client.loss = client.needed_loss
  if args.compile:
    client.loss = torch.compile(client.loss)
  return client


def alone(args) -> None:
  client = make(args, args.threads)
  params = client.start()

  def one_round():
    sums = zeros(params)
    for k in range(client.num_clients):
      client.train(params, k)
      client.add_to(sums)
    for p, total in zip(params, sums, strict=True):
      p.copy_(total / client.num_clients)

  peer.measure(args, one_round)
  peer.save(args, client.named(params))


def worker(args, rank, number, params, sums, ready) -> None:
  client = make(args, max(1, args.threads // number))
  while True:
    ready.wait()  # the round begins
    if params[0].isnan().all():  # the last one is over
      return
    for total in sums[rank]:
      total.zero_()
    for k in range(rank, client.num_clients, number):
      client.train(params, k)
      client.add_to(sums[rank])
    ready.wait()


def several(args, number: int) -> None:
  client = make(args, 1)
  params = [p.share_memory_() for p in client.start()]
  context = mp.get_context('spawn')
  sums = [[p.share_memory_() for p in zeros(params)] for _ in range(number)]
  ready = context.Barrier(number + 1)
  workers = [
    context.Process(target=worker, args=(args, r, number, params, sums, ready))
    for r in range(number)
  ]
  for process in workers:
    process.start()

  def one_round():
    ready.wait()
    ready.wait()
    for i, p in enumerate(params):
      p.copy_(sum(part[i] for part in sums) / client.num_clients)

  peer.measure(args, one_round)
  peer.save(args, client.named([p.clone() for p in params]))
  params[0].fill_(float('nan'))
  ready.wait()
  for process in workers:
    process.join()


def main() -> None:
  args = peer.arguments('loss', 'compile', 'processes', 'dtype')
  number = int(args.processes or 1)
  alone(args) if number == 1 else several(args, number)


if __name__ == '__main__':
  main()
