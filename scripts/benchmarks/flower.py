"""P2: Flower's simulation (Ray), with the model kept in each actor."""

import os

os.environ.setdefault('FLWR_TELEMETRY_ENABLED', '0')
os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import logging
import sys
import time

import flwr
import numpy as np
import peer
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

KEPT = {}  # one model an actor, the kind variant: FlowerTune rebuilds it


def client_app(args):
  app = flwr.clientapp.ClientApp()

  @app.train()
  def train(message, context):
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from torch_client import Client

    if 'client' not in KEPT:
      torch.set_num_threads(1)
      KEPT['client'] = Client(args)
    client = KEPT['client']
    got = message.content['arrays'].to_torch_state_dict()
    client.train(list(got.values()), int(context.node_config['partition-id']))
    named = {str(i): p.detach().clone() for i, p in enumerate(client.params)}
    content = RecordDict(
      {
        'arrays': ArrayRecord(named),
        'metrics': MetricRecord({'num-examples': 1}),
      }
    )
    return flwr.app.Message(content=content, reply_to=message)

  return app


def main() -> None:
  args = peer.arguments()
  from torch_client import Client

  client = Client(args)
  start = {str(i): p for i, p in enumerate(client.start())}
  stamps, server = [], flwr.serverapp.ServerApp()

  class Timed(FedAvg):
    def configure_train(self, *args, **keywords):
      stamps.append(time.perf_counter())
      return super().configure_train(*args, **keywords)

  final = {}

  @server.main()
  def run(grid, context):
    number = client.num_clients
    strategy = Timed(
      fraction_train=1.0,
      fraction_evaluate=0.0,
      min_train_nodes=number,
      min_available_nodes=number,
    )
    result = strategy.start(
      grid=grid,
      initial_arrays=ArrayRecord(start),
      num_rounds=args.rounds,
    )
    stamps.append(time.perf_counter())
    final.update(result.arrays.to_torch_state_dict())

  logging.getLogger('flwr').setLevel(logging.ERROR)
  setup = time.perf_counter() - args.began
  run_simulation(
    server,
    client_app(args),
    num_supernodes=client.num_clients,
    backend_config={
      'client_resources': {'num_cpus': 1, 'num_gpus': 0.0},
      'init_args': {'num_cpus': args.threads},
    },
  )
  peer.write(args, setup, list(np.diff(stamps)))
  peer.save(args, client.named([final[name] for name in start]))


if __name__ == '__main__':
  main()
