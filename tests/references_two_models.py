"""Emulators in NumPy float64, written from the papers."""

from fractions import Fraction

import numpy as np


def kept(num_layers, drop):
  """Layers of a uniform drop: int(i stride), stride = (L - 1) / (L' - 1)."""
  number = max(round((1 - drop) * num_layers), 1)
  if number == 1:
    return [0]
  stride = Fraction(num_layers - 1, number - 1)
  return [int(i * stride) for i in range(number)]


def log_softmax(logits):
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def gap(states, emulated, teacher, student, here, places, weight):
  """FedBiOT's distance of an emulator from the layers that it stands for.

  states, emulated [B, T, D]; teacher, student [B, T, V] logits; here [B, T]:
  tokens; places [B, T]: those whose prediction counts.
  """
  states, emulated = states[here].astype(float), emulated[here].astype(float)
  rms = np.sqrt(np.mean(states**2))
  distance = np.mean(((states - emulated) / rms) ** 2)
  log_q = log_softmax(teacher[places].astype(float))
  log_p = log_softmax(student[places].astype(float))
  nats = np.mean(np.sum(np.exp(log_q) * (log_q - log_p), -1))
  return distance + weight * nats
