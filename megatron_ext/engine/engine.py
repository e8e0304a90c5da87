"""What a trainer asks of an engine: one optimizer step over a list of micro-batches, evaluation, saving and loading."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_ext.engine.second_moments import SecondMoment


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


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors are 0-d and still on the device, so that the step waits for nothing."""

    loss: torch.Tensor
    """Mean over all tokens of the global batch."""

    grad_norm: torch.Tensor | float
    """Global gradient norm before clipping; inf where the gradient is not finite on any rank."""

    skipped: torch.Tensor | bool
    """Whether the weights were left alone: the gradient was not finite, or the policy refused the update. The same on
    every rank."""

    prefix_loss: torch.Tensor | None = None
    """Mean over the first ``prefix`` tokens of every sequence of the global batch; None where it is not measured."""


class UpdatePolicy(Protocol):
    """Decides whether an update is made. Every rank asks its own, with the same values, and gets the same answer."""

    def admits(self, *, loss: float, grad_norm: float | None) -> bool:
        """Whether the step with this loss and gradient norm may change the weights. Called once a step.

        Args:
            loss: Mean loss of the step; inf where any rank's is not finite.
            grad_norm: Norm before clipping; inf where the gradient is not finite on any rank; None for an overflow of
                fp16, with which the loss scale deals.
        """


class Engine(Protocol):
    """A model that trains. Every method is called by all ranks together."""

    @property
    def module(self) -> torch.nn.Module:
        """The model, in the dtype and with the partitioning in which it trains."""

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        global_tokens: int,
        lr: float,
        policy: UpdatePolicy | None = None,
    ) -> StepResult:
        """Forward and backward over the micro-batches, then one update at ``lr``.

        Args:
            micro_batches: This rank's sequences; as many micro-batches as every other rank has.
            global_tokens: Tokens of the global batch, over which the loss is the mean.
            lr: Learning rate of this step.
            policy: Is asked before the update, which makes the host wait for the device; a refused one leaves weights
                and optimizer state as they were, though random streams have moved on.
        """

    def evaluate(self, batches: Iterable[tuple[MicroBatch, torch.Tensor]]) -> torch.Tensor:
        """Mean loss over weighted sequences at each position, the same on every rank.

        Args:
            batches: Micro-batches of one length, as many as on every other rank, each with float weights [sequences]
                (0: padding).

        Returns:
            float64 [seq_len] on the CPU; its mean is the mean loss over all tokens.
        """

    def second_moments(self) -> list[SecondMoment]:
        """The elements of Adam's second moment that this rank counts."""

    def weights_finite(self) -> bool:
        """Whether no weight on any rank is NaN or infinite; waits for the device."""

    def checksums(self) -> dict[tuple[str, str], int]:
        """(Parameter, which part of it) -> checksum of the bits of what this rank holds: equal for equal copies."""

    def save(self, directory: Path, tag: str) -> None:
        """Write weights, optimizer state and loss scale of every rank to ``directory/tag``."""

    def load(self, directory: Path, tag: str) -> None:
        """Read what ``save`` wrote, on the same layout.

        Raises:
            UserError: the checkpoint does not hold this layout's files.
        """
