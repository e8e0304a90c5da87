"""Cuts one rank's part of a step into micro-batches."""

from collections.abc import Sequence

import torch

from megatron_ext.engine.engine import MicroBatch


def cut_micro_batches(tokens: torch.Tensor, labels: torch.Tensor, sizes: Sequence[int]) -> list[MicroBatch]:
    """Views of ``tokens`` and ``labels`` [sequences, seq_len], ``sizes`` sequences each, in order."""
    assert sum(sizes) == tokens.shape[0], "every sequence belongs to exactly one micro-batch"
    sizes = list(sizes)
    return [MicroBatch(t, y) for t, y in zip(tokens.split(sizes), labels.split(sizes), strict=True)]
