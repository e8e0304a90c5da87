"""Steps whose losses are still on the device.

Reading a loss makes the host wait for the device. The loop therefore adds each finished step here with its tensors as
they are, and drains the steps every few of them: one copy from the device then serves them all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

Info = TypeVar("Info")


@dataclass(frozen=True, slots=True)
class FetchedStep(Generic[Info]):
    """A finished step with its values on the host."""

    info: Info
    """What was added with it."""
    loss: float
    """Mean loss, nats per token."""
    grad_norm: float | None
    """Global l2 norm of the gradient; None where it is not known."""
    prefix_loss: float | None = None
    """Mean loss over the first positions of every sequence; None where it was not measured."""
    adam_variance: tuple[float, ...] | None = None
    """What ``AdamVariance.measure`` returned; None where it was not measured."""


class PendingSteps(Generic[Info]):
    """Collects finished steps in order, without waiting for the device, until they are drained.

    `Info` is whatever the caller wants back with a step: its planned step, its time.
    """

    def __init__(self) -> None:
        self._infos: list[Info] = []
        self._values: list[Tensor | float | None] = []
        self._vectors: list[Tensor | None] = []

    def __len__(self) -> int:
        return len(self._infos)

    def add(
        self,
        info: Info,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float | None,
        prefix_loss: Tensor | float | None = None,
        adam_variance: Tensor | None = None,
    ) -> None:
        """Add a finished step. Tensors are copied, for an engine may reuse its buffers.

        All hold one element each but ``adam_variance`` [n], which is kept as it is.
        """
        self._infos.append(info)
        self._values += [_keep(loss), _keep(grad_norm), _keep(prefix_loss)]
        self._vectors.append(adam_variance)

    def drain(self) -> list[FetchedStep[Info]]:
        """All steps added since the last drain, in order; waits for the device once."""
        values, vectors = _fetch(self._values, self._vectors)
        steps = []
        for index, info in enumerate(self._infos):
            loss, grad_norm, prefix_loss = values[3 * index : 3 * index + 3]
            assert loss is not None, "a step is added with a loss"
            steps.append(FetchedStep(info, loss, grad_norm, prefix_loss, vectors[index]))
        self._infos, self._values, self._vectors = [], [], []
        return steps


def fetch(values: Sequence[Tensor | float | None]) -> list[float | None]:
    """The values as Python floats, all tensors (one element each, on one device) in a single copy to the host."""
    return _fetch(values, [])[0]


def _fetch(
    values: Sequence[Tensor | float | None], vectors: Sequence[Tensor | None]
) -> tuple[list[float | None], list[tuple[float, ...] | None]]:
    tensors = [value for value in [*values, *vectors] if isinstance(value, Tensor)]
    on_host: Iterator[float] = iter(())
    if tensors:
        # float64 holds every element type exactly, and lets tensors of different types share the copy.
        on_host = iter(torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors]).tolist())
    return (
        [next(on_host) if isinstance(value, Tensor) else None if value is None else float(value) for value in values],
        [None if vector is None else tuple(islice(on_host, vector.numel())) for vector in vectors],
    )


def _keep(value: Tensor | float | None) -> Tensor | float | None:
    return value.detach().clone() if isinstance(value, Tensor) else value
