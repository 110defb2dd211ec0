"""The round from which a run resumes: the newest that is undamaged.

`newest` restores its checkpoint and opens its client states.
"""

from collections.abc import Callable
from typing import Any

from fedjax_llm.clients.store import Store
from fedjax_llm.run.checkpoint import Checkpointer, Restored
from fedjax_llm.types import Error


def newest(
  saver: Checkpointer,
  template: Any,
  open_store: Callable[[int, bool], Store],
  check: Callable[[Restored], None] = lambda restored: None,
  *,
  up_to: int | None = None,
) -> tuple[Restored | None, Store]:
  """Restores the newest round whose checkpoint and client states are intact.

  A checkpoint with damaged client states is skipped like a damaged checkpoint,
  and named in the notices.

  Args:
    saver: the checkpoints.
    template: a state, or its shapes.
    open_store: opens the client states of a round, 0 for the start; True as
      the second argument: an earlier version may have kept none.
    check: raises `Error` if the run is another one.
    up_to: the newest round that may be restored; None: any.

  Returns:
    The checkpoint, None if there is none; and the client states of its round.

  Raises:
    Error: no round is undamaged, or `check` raises.
  """
  while True:
    restored = saver.restore(template, newest=up_to)
    if restored is None:
      return None, open_store(0, False)
    check(restored)
    try:
      return restored, open_store(restored.round, restored.earlier)
    except Error as error:
      saver.fail(restored.round, str(error))
