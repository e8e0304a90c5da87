"""One rank's part of a step, cut into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Part of a step that one rank holds at once: ``tokens`` and ``labels`` int64 [sequences, seq_len]."""

    tokens: torch.Tensor
    labels: torch.Tensor


def cut_micro_batches(tokens: torch.Tensor, labels: torch.Tensor, sizes: Sequence[int]) -> list[MicroBatch]:
    """Views of ``tokens`` and ``labels`` [sequences, seq_len], ``sizes`` sequences each, in order."""
    assert sum(sizes) == tokens.shape[0], "every sequence belongs to exactly one micro-batch"
    parts = zip(torch.split(tokens, list(sizes)), torch.split(labels, list(sizes)), strict=True)
    return [MicroBatch(*part) for part in parts]
