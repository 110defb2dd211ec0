"""Selections of rows by their loss or gradient under the served model."""

from fedjax_llm.data.selection.types import Scored, Selection
from fedjax_llm.types import Error


def by_loss(pool: int = 2) -> Selection:
  """Returns a selection of the rows with the largest loss.

  A client draws `pool` candidates for each row that it trains on, and keeps
  those of the largest token mean of the loss under the parameters that the
  server sends: the losers that selective backpropagation prefers (Jiang et al.
  2019, arXiv 1910.00762), without its random choice. One forward pass of all
  candidates more a round; no byte more travels.

  Args:
    pool: candidates for each row.

  Raises:
    Error: fewer than two candidates a row: nothing would be left out.

  >>> by_loss(3).scored
  Scored(by='loss', pool=3)
  """
  return Selection(scored=Scored('loss', _candidates(pool)))


def by_gradient(pool: int = 2) -> Selection:
  """Returns a selection of the rows with the largest gradients.

  As `by_loss`, with the norm of the gradient of a row's token mean with respect
  to the adapter: the distribution of least variance is proportional to it
  (Katharopoulos and Fleuret 2018, arXiv 1803.00942, section 3.1); here the
  largest are taken. The norm is exact and costs a backward pass a candidate.

  Args and errors as in `by_loss`.

  >>> by_gradient().scored.by
  'gradient'
  """
  return Selection(scored=Scored('gradient', _candidates(pool)))


def _candidates(pool: int) -> int:
  if pool < 2:
    raise Error(f'selection.pool is {pool}; it must be at least 2.')
  return pool
