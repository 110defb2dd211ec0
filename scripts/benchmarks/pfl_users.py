"""P3: pfl, one user after another in one process."""

import time

import numpy as np
import peer
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch_client import Client


class Net(torch.nn.Module):
  def __init__(self, client: Client):
    super().__init__()
    self.model, self.full = client.model, client.full_loss

  def loss(self, tokens, mask, eval=False):
    return self.full(tokens.long(), mask.bool())

  def metrics(self, tokens, mask):
    return {'loss': Weighted(0.0, 1)}


class Clock(TrainingProcessCallback):
  def __init__(self):
    self.stamps = [time.perf_counter()]

  def after_central_iteration(self, metrics, model, *, central_iteration):
    self.stamps.append(time.perf_counter())
    return False, Metrics()


def main() -> None:
  args = peer.arguments()
  torch.set_num_threads(args.threads)
  client = Client(args)
  net = Net(client)
  adam = lambda params, lr: torch.optim.AdamW(
    [p for p in params if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
  )
  sgd = lambda params, lr: torch.optim.SGD(
    [p for p in params if p.requires_grad], lr=lr
  )
  model = PyTorchModel(
    net,
    local_optimizer_create=adam if args.optimizer == 'adamw' else sgd,
    central_optimizer=torch.optim.SGD(client.params, 1.0),
  )
  tokens, mask = peer.data(args.work)
  number, batch = client.num_clients, tokens.shape[2]
  flat = lambda x: x.reshape(number, -1, x.shape[-1])
  users = FederatedDataset(
    lambda k: Dataset((flat(tokens)[k], flat(mask)[k]), user_id=str(k)),
    get_user_sampler('minimize_reuse', list(range(number))),
  )
  backend = SimulatedBackend(
    training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]
  )
  clock = Clock()
  setup = time.perf_counter() - args.began
  FederatedAveraging().run(
    NNAlgorithmParams(
      central_num_iterations=args.rounds,
      evaluation_frequency=10**9,
      train_cohort_size=number,
      val_cohort_size=0,
    ),
    backend,
    model,
    NNTrainHyperParams(
      local_num_epochs=1,
      local_learning_rate=args.rate,
      local_batch_size=batch,
    ),
    callbacks=[clock],
  )
  peer.write(args, setup, list(np.diff(clock.stamps)))
  peer.save(args, client.named(client.params))


if __name__ == '__main__':
  main()
