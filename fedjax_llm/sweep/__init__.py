"""Trains every setting of a grid with every seed and prints a table.

    python -m fedjax_llm.sweep --config C --workdir DIR
        --grid aggregator.name=mean,trimmed_mean local.learning_rate=1e-4,3e-4
        [--seeds 5] [--baseline aggregator.name=mean] [--metric NAME]
        [--config.section.field=value ...]

Every value of a field of the grid meets every value of the others, with every
seed. Runs that differ only in numbers are trained together, as one compiled
program; the same command goes on where it was interrupted. In the end there is
a table: means with 95 % intervals over seeds, and differences from a baseline,
paired by seed. `run` is the same for notebooks.
"""

from fedjax_llm.sweep.program import Comparison, main, run

__all__ = ['Comparison', 'main', 'run']
