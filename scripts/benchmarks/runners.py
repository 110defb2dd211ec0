"""The compared frameworks: the program of each and its flags."""

from typing import NamedTuple


class Runner(NamedTuple):
  label: str
  program: str
  flags: tuple[str, ...] = ()
  slow: bool = False  # only where rounds are short


def _loop(label, *flags):
  return Runner(f'torch+peft, {label}', 'torch_loop.py', flags)


RUNNERS = {
  'ours': Runner('fedjax_llm', 'ours.py'),
  'oursx2': Runner('fedjax_llm, 2 devices', 'ours.py', ('--devices', '2')),
  'oursx2u': Runner(
    'fedjax_llm, 2 devices, unroll 4',
    'ours.py',
    ('--devices', '2', '--unroll', '4'),
  ),
  'p0': _loop('full logits', '--loss', 'full'),
  'p0+': _loop('needed logits', '--loss', 'needed'),
  'p0+x2': _loop('needed, 2 processes', '--loss', 'needed', '--processes', '2'),
  'p0+c': _loop('needed, compiled', '--loss', 'needed', '--compile', '1'),
  'p0+cx2': _loop(
    'needed, compiled, 2 processes',
    *('--loss', 'needed', '--compile', '1', '--processes', '2'),
  ),
  'p1': Runner('HF Trainer per client', 'hf_trainer.py'),
  'p2': Runner('Flower 1.41 (Ray)', 'flower.py'),
  'p3': Runner('pfl 0.6', 'pfl_users.py'),
  'p6': Runner('DrJAX 0.2.1', 'drjax_round.py'),
  'p7': Runner('torch.func vmap', 'torch_vmap.py'),
}
