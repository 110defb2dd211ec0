"""NumPy float64 references of the losses on pairs and of GRPO.

Written from the papers, one pair or one token after the other.
"""

import numpy as np


def _log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def dpo(rows, beta=0.1):
  """Rafailov et al. 2023, equation 7."""
  return [
    -_log_sigmoid(
      beta * (np.float64(r['c'] - r['rc']) - np.float64(r['r'] - r['rr']))
    )
    for r in rows
  ]


def ipo(rows, beta=0.1):
  """Azar et al. 2023, equation 17, of means over tokens."""
  return [
    ((r['c'] - r['rc']) / r['nc'] - (r['r'] - r['rr']) / r['nr'] - 0.5 / beta)
    ** 2
    for r in rows
  ]


def kto(rows, beta=0.1, desirable=1.0, undesirable=1.0):
  """Ethayarajh et al. 2024, equation 8."""
  z = max(0.0, float(np.mean([r['m'] - r['rm'] for r in rows])))
  terms = []
  for r in rows:
    liked = desirable * (1 - _sigmoid(beta * (r['c'] - r['rc'] - z)))
    other = undesirable * (1 - _sigmoid(beta * (z - (r['r'] - r['rr']))))
    terms.append((liked + other) / 2)
  return terms


def orpo(rows, beta=0.1):
  """Hong et al. 2024, equations 4 to 7."""
  terms = []
  for r in rows:
    p, q = np.exp(r['c'] / r['nc']), np.exp(r['r'] / r['nr'])
    odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    terms.append(-np.log(p) - beta * _log_sigmoid(odds))
  return terms


def simpo(rows, beta=2.0, gamma=1.0, nll=0.0):
  """Meng et al. 2024, equation 6."""
  return [
    -_log_sigmoid(beta * (r['c'] / r['nc'] - r['r'] / r['nr']) - gamma)
    - nll * r['c'] / r['nc']
    for r in rows
  ]


def advantages(reward, group_size, scale='group'):
  """Shao et al. 2024, section 4.1.2, with the eps of 1e-4 of TRL."""
  out = []
  for start in range(0, len(reward), group_size):
    group = np.asarray(reward[start : start + group_size], np.float64)
    spread = {
      'group': np.std(group, ddof=1) + 1e-4,
      'batch': np.std(np.asarray(reward, np.float64), ddof=1) + 1e-4,
      'none': 1.0,
    }[scale]
    out += list((group - group.mean()) / spread)
  return np.array(out)


def grpo(new, old, reference, advantage, sizes, *, low, high, kl, reduction):
  """Shao et al. 2024, equations 3 and 4, token by token: the mean loss."""
  sequences, total, tokens = [], 0.0, 0
  for i, size in enumerate(sizes):
    terms = []
    for t in range(size):
      ratio = np.exp(new[i][t] - old[i][t])
      bound = min(max(ratio, 1 - low), 1 + high)
      gain = min(ratio * advantage[i], bound * advantage[i])
      apart = reference[i][t] - new[i][t]
      terms.append(-gain + kl * (np.exp(apart) - apart - 1))
    if size:
      sequences.append(terms)
    total += sum(terms)
    tokens += size
  if reduction == 'bnpo':
    return total / tokens
  if reduction == 'dr_grpo':
    return np.mean([sum(x) / np.shape(new)[1] for x in sequences])
  return np.mean([np.mean(x) for x in sequences])


def bradley_terry(chosen, rejected, centre=0.0):
  """-log sigmoid(r_c - r_r) + centre (r_c + r_r)^2, a pair a row."""
  chosen, rejected = np.asarray(chosen), np.asarray(rejected)
  likely = 1 / (1 + np.exp(rejected - chosen))  # P(chosen > rejected)
  return -np.log(likely) + centre * (chosen + rejected) ** 2
