"""Parameters of several parts, with the structure of an adapter's tree."""

from typing import Any, NamedTuple


class Controlled(NamedTuple):
  """Parameters with the server's control variate c (SCAFFOLD).

  In an update, `params` is the client's update and `control` the change of its
  own c_k.

  >>> Controlled({'w': 1.0}, control={'w': 0.5}).control
  {'w': 0.5}
  """

  params: Any  # those of the adapter
  control: Any  # c, None where nothing is trained


class Dual(NamedTuple):
  """Two sets of parameters of one base: shared, and a client's own.

  A scope keeps `personal` on the client. The served parameters are computed
  from both.

  >>> Dual(shared={'w': 1.0}, personal={'w': 2.0}).personal
  {'w': 2.0}
  """

  shared: Any  # sent and averaged
  personal: Any  # stays on the client


class Seeded(NamedTuple):
  """Parameters with coefficients in a basis that is drawn from a seed.

  Clients send `coefficients` alone. A method defines the parameters that it
  serves by both, for example `params` + sum_j coefficients_j z_j.

  >>> Seeded({'w': 1.0}, coefficients=[0.0, 0.5], seed=7).coefficients
  [0.0, 0.5]
  """

  params: Any  # those of the adapter; frozen in updates
  coefficients: Any  # [...] float32
  seed: Any = None  # [] uint32, of the basis
  mask: Any = None  # the entries that the basis has, uint8; None: all
  log: Any = None  # earlier coefficients, for clients that missed rounds


class Halves(NamedTuple):
  """The parameters of a network that is cut between clients and the server.

  >>> Halves(client={'w': 1.0}, server={'w': 2.0}).server
  {'w': 2.0}
  """

  client: Any  # of the layers below the cut
  server: Any  # of the layers above it
