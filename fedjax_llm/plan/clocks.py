"""The simulated seconds of a client's round, for each kind of device and link.

`rows` returns lines of the plan's table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_llm.clients import system as systems
from fedjax_llm.clients.system import Job
from fedjax_llm.run import builders
from fedjax_llm.run.sections import SPEC


def rows(conf: Mapping[str, Any], job: Job) -> list[tuple[str, str]]:
  """Returns the seconds of a client's round under the section `system`.

  A fleet has one line for each pair of a device and a link, a table of one's
  own the fastest, the middle and the slowest client. Empty without a system.

  >>> fleet = dict(name='fleet', devices=('h100',), links=('ethernet',))
  >>> rows({'system': fleet}, Job(2.27e14, 1.25e8, 0.0, 1))[-1]
  ('h100, ethernet', '2 s (1 s of links), 350 J')
  """
  section = conf.get('system')
  if not section:
    return []
  table = [('', ''), ("a client's round, simulated", '')]
  if builders.named(section) != 'fleet':
    fleet = builders.build(
      section, SPEC.sections['system'], num_clients=_NUM, seed=0
    )
    total = systems.duration(fleet, job).total
    order = np.argsort(total)
    places = zip(('fastest', 'middle', 'slowest'), (0, len(order) // 2, -1))
    return table + [
      (name, _words(fleet, job, int(order[at]))) for name, at in places
    ]
  keywords = builders.keywords_of(section, SPEC.sections['system'])
  kinds = builders.parameters(systems.fleet)
  value = lambda field: keywords.get(field, kinds[field].default)
  for device in value('devices'):
    for link in value('links'):
      fleet = systems.fleet(
        num_clients=1,
        devices=(device,),
        links=(link,),
        utilisation=value('utilisation'),
        joules_per_byte=value('joules_per_byte'),
      )
      table.append((f'{device}, {link}', _words(fleet, job, 0)))
  return table


_NUM = 1000  # clients drawn from a table, for its spread


def _words(fleet: systems.System, job: Job, client: int) -> str:
  parts = systems.duration(fleet, job)
  links = parts.down[client] + parts.up[client]
  device, network = systems.energy(fleet, job)[client]
  energy = '' if np.isnan(device) else f', {device:,.3g} J'
  energy += '' if np.isnan(network) else f', {network:,.3g} J of the network'
  return f'{parts.total[client]:,.3g} s ({links:,.3g} s of links){energy}'
