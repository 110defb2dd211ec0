"""Parameters of two parts, each with the structure of an adapter's tree."""

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
