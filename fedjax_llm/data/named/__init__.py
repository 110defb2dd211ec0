"""Named data sets: `--config.data.name=hub --config.data.dataset=dolly`.

Each domain has a file with its data sets. The fields of each were read from a
data card, a loader or other public code, whose address and day stand in its
entry; where no such source was found, a data set is left out.
"""

from fedjax_llm.data.named.files import hub
from fedjax_llm.data.named.spec import Named
from fedjax_llm.data.named.table import DOMAINS, TABLE, find

__all__ = ['DOMAINS', 'Named', 'TABLE', 'find', 'hub']
