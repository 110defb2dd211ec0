"""Parameters made of two parts that have the structure of an adapter's."""

from typing import Any, NamedTuple


class Controlled(NamedTuple):
  """Parameters with the server's control variate c (SCAFFOLD).

  In an update: the client's update, and the change of its own c_k.
  """

  params: Any  # those of the adapter
  control: Any  # c, None where nothing is trained


class Dual(NamedTuple):
  """Two sets of parameters at one base: everybody's, and a client's own.

  A scope keeps `personal` with the client. What is served is a view of both.
  """

  shared: Any  # everybody's: sent and averaged
  personal: Any  # a client's own: it stays there
