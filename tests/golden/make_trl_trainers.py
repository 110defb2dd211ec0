"""Writes trl_trainers.npz: losses and gradients of TRL's trainers.

    python tests/golden/make_trl_trainers.py

It needs trl 1.16 with torch. The methods of the trainers of DPO, KTO and GRPO
that compute a loss run with a model whose log-probabilities a token come from
NumPy; the gradient is by these. Advantages come from the lines of GRPO's
trainer that compute them from rewards. IPO is a loss of DPO's trainer. GRPO's
divergence is that without TRL's factor rho (`use_bias_correction_kl`), as in
the paper.
"""

import collections
import inspect
import pathlib
import textwrap
from types import SimpleNamespace as Namespace
from unittest import mock

import numpy as np
import torch  # pyright: ignore
from trl.trainer import (  # pyright: ignore
  dpo_trainer,
  grpo_trainer,
  kto_trainer,
)

HERE = pathlib.Path(__file__).parent
PAIRS, TOKENS, PROMPT = 5, 9, 2


def draws(rng, sizes, width):
  """Log-probabilities and masks of replies of these sizes, [n, width]."""
  mask = np.arange(width) < np.asarray(sizes)[:, None]
  values = -rng.uniform(0.1, 3.0, mask.shape)
  return np.where(mask, values, 0.0).astype(np.float32), mask


def trainer(**fields):
  """Returns a stand-in for a trainer, with these fields."""
  same = lambda x, **_: x
  accelerator = Namespace(
    device='cpu', gather=same, gather_for_metrics=same, reduce=same,
    num_processes=1, process_index=0, sync_gradients=True,
  )  # fmt: skip
  metrics = collections.defaultdict(lambda: collections.defaultdict(list))
  self = mock.MagicMock()
  for name, value in dict(
    accelerator=accelerator, model=Namespace(training=False),
    _metrics=metrics, aux_loss_enabled=False, _total_train_tokens=0, **fields,
  ).items():  # fmt: skip
    setattr(self, name, value)
  return self


def outputs(log_probs):
  zero = torch.zeros_like(log_probs).detach()
  return Namespace(
    log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero > 1
  )


def texts(mask):
  """The inputs of texts whose replies begin after PROMPT tokens."""
  lead = torch.zeros(len(mask), PROMPT, dtype=torch.long)
  inside = torch.cat([lead, torch.as_tensor(mask).long()], 1)
  return {'input_ids': torch.ones_like(inside), 'completion_mask': inside}


def padded(values):
  """Log-probabilities [n, PROMPT - 1 + N], of all positions but the first."""
  lead = torch.zeros(len(values), PROMPT - 1)
  return torch.cat([lead, torch.as_tensor(values)], 1)


def dpo(out, rng, name, loss_type, beta):
  sizes = rng.integers(2, TOKENS + 1, 2 * PAIRS)
  values, mask = draws(rng, sizes, TOKENS)
  first, _ = draws(rng, sizes, TOKENS)
  leaf = torch.tensor(values, requires_grad=True)
  reference = torch.as_tensor(first.sum(1))
  self = trainer(
    ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl',
    loss_types=[loss_type], loss_weights=[1.0], beta=beta, use_weighting=False,
  )  # fmt: skip
  inputs = {
    **texts(mask),
    'ref_chosen_logps': reference[:PAIRS],
    'ref_rejected_logps': reference[PAIRS:],
  }
  model = lambda **_: outputs(padded(leaf * torch.as_tensor(mask)))
  loss = dpo_trainer.DPOTrainer._compute_loss(self, model, inputs, False)
  loss.backward()
  out |= {
    f'{name}/beta': beta, f'{name}/log_p': values, f'{name}/mask': mask,
    f'{name}/reference': first, f'{name}/loss': loss.detach().numpy(),
    f'{name}/slope': leaf.grad.numpy(),  # pyright: ignore
  }  # fmt: skip


def kto(out, rng, beta):
  """Pairs as examples: the chosen replies first; their shifted prompts."""
  sizes = rng.integers(2, TOKENS + 1, 2 * PAIRS)
  values, mask = draws(rng, sizes, TOKENS)
  first, _ = draws(rng, sizes, TOKENS)
  other, _ = draws(rng, sizes[:PAIRS], TOKENS)
  other_first, _ = draws(rng, sizes[:PAIRS], TOKENS)
  leaf = torch.tensor(values, requires_grad=True)
  self = trainer(
    loss_type='kto', beta=beta, calculate_KL=True, precompute_ref_logps=True,
    desirable_weight=1.0, undesirable_weight=0.7,
  )  # fmt: skip
  self._compute_kl_logps = lambda *_: torch.as_tensor(other.sum(1))
  inputs = {
    **texts(mask),
    'label': torch.arange(2 * PAIRS) < PAIRS,
    'ref_logps': torch.as_tensor(first.sum(1)),
    'ref_KL_logps': torch.as_tensor(other_first.sum(1)),
  }
  model = lambda **_: outputs(padded(leaf * torch.as_tensor(mask)))
  loss = kto_trainer.KTOTrainer._compute_loss(self, model, inputs, False)
  loss.backward()
  out |= {
    'kto/beta': beta, 'kto/undesirable_weight': 0.7, 'kto/log_p': values,
    'kto/mask': mask, 'kto/reference': first, 'kto/mismatched': other,
    'kto/reference_mismatched': other_first,
    'kto/loss': loss.detach().numpy(),
    'kto/slope': leaf.grad.numpy(),  # pyright: ignore
  }  # fmt: skip


def advantages(reward, group_size, scale):
  """Runs the lines of GRPO's trainer from rewards to advantages."""
  method = grpo_trainer.GRPOTrainer._generate_and_score_completions
  text = inspect.getsource(method)
  start = text.index('        unscorable_mask = ')
  stop = text.index('        # Slice to keep only the local part')
  names = {
    **vars(grpo_trainer),
    'self': trainer(
      multi_objective_aggregation='sum_then_normalize',
      scale_rewards=scale, reward_weights=torch.ones(1),
    ),
    'rewards_per_func': torch.as_tensor(reward)[:, None],
    'num_generations': group_size,
    'device': 'cpu',
  }  # fmt: skip
  exec(textwrap.dedent(text[start:stop]), names)
  return names['advantages'].numpy()


def grpo(out, rng, reduction, group_size):
  num = 2 * group_size
  sizes = rng.integers(1, TOKENS + 1, num)
  values, mask = draws(rng, sizes, TOKENS)
  near = lambda: np.where(mask, values + rng.normal(0, 0.4, mask.shape), 0.0)
  old, first = near().astype(np.float32), near().astype(np.float32)
  gain = rng.normal(size=num).astype(np.float32)
  leaf = torch.tensor(values, requires_grad=True)
  self = trainer(
    beta=0.04, epsilon_low=0.2, epsilon_high=0.28, loss_type=reduction,
    importance_sampling_level='token', off_policy_mask_threshold=None,
    top_entropy_quantile=1.0, use_vllm=False, max_completion_length=TOKENS,
    _entropy_bonus_enabled=False,
    args=Namespace(use_bias_correction_kl=False, delta=None),
  )  # fmt: skip
  zero = torch.zeros(num, TOKENS)
  self._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, zero, None)
  ids = torch.ones(num, PROMPT, dtype=torch.long)
  inputs = {
    'prompt_ids': ids, 'prompt_mask': ids,
    'completion_ids': torch.ones(num, TOKENS, dtype=torch.long),
    'completion_mask': torch.as_tensor(mask).long(),
    'advantages': torch.as_tensor(gain),
    'old_per_token_logps': torch.as_tensor(old),
    'ref_per_token_logps': torch.as_tensor(first),
  }  # fmt: skip
  loss = grpo_trainer.GRPOTrainer._compute_loss(self, None, inputs)
  loss.backward()
  out |= {
    f'{reduction}/log_p': values, f'{reduction}/mask': mask,
    f'{reduction}/old': old, f'{reduction}/reference': first,
    f'{reduction}/advantage': gain,
    f'{reduction}/loss': loss.detach().numpy(),
    f'{reduction}/slope': leaf.grad.numpy(),  # pyright: ignore
  }  # fmt: skip


def main() -> None:
  rng, out = np.random.default_rng(11), {}
  dpo(out, rng, 'dpo', 'sigmoid', 0.1)
  dpo(out, rng, 'ipo', 'ipo', 0.2)
  kto(out, rng, 0.3)
  for reduction in ('grpo', 'bnpo', 'dr_grpo'):
    grpo(out, rng, reduction, 4)
  reward = np.array([1, 0, 0, 1, 2, 2, 2, 2, 0, 0.5, 1, 3], np.float32)
  out['reward'] = reward
  for scale in ('group', 'batch', 'none'):
    out[f'advantages/{scale}'] = advantages(reward, 4, scale)
  np.savez(HERE / 'trl_trainers.npz', **out)


if __name__ == '__main__':
  main()
