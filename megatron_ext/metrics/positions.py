"""Loss by position in the sequence, so that curves of runs at different lengths compare.

A token late in a sequence has more context than one near its beginning and is easier to predict. The mean loss of short
sequences is therefore higher than that of long ones under the same weights; the mean over the same positions is not.
"""

from itertools import chain, takewhile
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    # Reading a metrics file needs this module, and no config.
    from megatron_ext.config.run import RunConfig
    from megatron_ext.curriculum.plan import TrainingPlan

FIRST_EDGE = 8
"""End of the first bucket; each further one is as long as all before it."""


def bucket_edges(seq_len: int) -> tuple[int, ...]:
    """Edges of the buckets [0, 8), [8, 16), [16, 32), ... that cover ``seq_len`` positions; the last may be short."""
    doubled = takewhile(lambda edge: edge < seq_len, (FIRST_EDGE << power for power in range(64)))
    return tuple(chain((0,), doubled, (seq_len,)))


def bucket_means(losses: npt.NDArray[np.float64], edges: tuple[int, ...]) -> tuple[float, ...]:
    """Mean of ``losses`` ([positions]) in each bucket [edges[i], edges[i + 1]).

    Weighted by the buckets' widths, the means average to the mean of all positions.
    """
    assert edges[0] == 0
    assert edges[-1] == len(losses)
    means = np.add.reduceat(losses, edges[:-1]) / np.diff(edges)
    return tuple(means.tolist())


def prefix_length(config: "RunConfig", plan: "TrainingPlan") -> int:
    """Positions over which the training loss is also averaged: ``metrics.prefix``, by default the first length."""
    return plan[0].seq_len if config.metrics.prefix is None else config.metrics.prefix
