"""Writes trl_losses.json: losses and slopes of ORPO and SimPO, by TRL.

    python tests/golden/make_trl.py

It needs trl 1.16 with torch. The functions get log-probabilities from NumPy;
each loss and its derivative by log pi(chosen) is written for every pair.
"""

import json
import pathlib
from types import SimpleNamespace as Namespace

import numpy as np
import torch  # pyright: ignore
import trl  # pyright: ignore
from trl.experimental.cpo import CPOTrainer  # pyright: ignore
from trl.experimental.orpo import ORPOTrainer  # pyright: ignore

HERE = pathlib.Path(__file__).parent


def pairs(num: int = 6) -> list[dict]:
  rng = np.random.default_rng(7)
  rows = []
  for _ in range(num):
    nc, nr = (int(n) for n in rng.integers(2, 12, 2))
    draw = lambda n: -float(rng.uniform(0.1, 3.0, n).sum())
    row = {'c': draw(nc), 'rc': draw(nc), 'r': draw(nr), 'rr': draw(nr)}
    rows.append({**row, 'm': draw(nc), 'rm': draw(nc), 'nc': nc, 'nr': nr})
  return rows


def orpo(chosen, rejected, *, beta):
  self = Namespace(beta=beta, accelerator=Namespace(device='cpu'))
  losses, *_ = ORPOTrainer.odds_ratio_loss(self, chosen, rejected)
  return -chosen - losses


def simpo(chosen, rejected, *, beta, gamma):
  self = Namespace(
    beta=beta,
    simpo_gamma=gamma,
    alpha=0.0,
    label_smoothing=0.0,
    loss_type='simpo',
    accelerator=Namespace(device='cpu'),
  )
  losses, *_ = CPOTrainer.cpo_loss(self, chosen, rejected)
  return losses


def main() -> None:
  rows = pairs()
  out = {'trl': trl.__version__, 'torch': torch.__version__, 'rows': rows}
  for loss, settings in (
    (orpo, {'beta': 0.1}),
    (simpo, {'beta': 2.0, 'gamma': 0.5}),
  ):
    total = torch.tensor([r['c'] for r in rows], requires_grad=True)
    sizes = torch.tensor([r['nc'] for r in rows])
    other = torch.tensor([r['r'] / r['nr'] for r in rows])
    losses = loss(total / sizes, other, **settings)
    losses.sum().backward()
    out[loss.__name__] = {
      'settings': settings,
      'losses': losses.tolist(),
      'slopes': total.grad.tolist(),  # pyright: ignore[reportOptionalMemberAccess]
    }
  file = HERE / 'trl_losses.json'
  file.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
  main()
