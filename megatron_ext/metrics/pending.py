"""Steps whose losses are still on the device.

Reading a loss makes the host wait for the device. The loop therefore adds each finished step here with its tensors as
they are, and drains the steps every few of them: one copy from the device then serves them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


class PendingSteps(Generic[Info]):
    """Collects finished steps in order, without waiting for the device, until they are drained.

    `Info` is whatever the caller wants back with a step: its planned step, its time.
    """

    def __init__(self) -> None:
        self._infos: list[Info] = []
        self._values: list[Tensor | float | None] = []

    def __len__(self) -> int:
        return len(self._infos)

    def add(
        self,
        info: Info,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float | None,
        prefix_loss: Tensor | float | None = None,
    ) -> None:
        """Add a finished step; tensors hold one element each, and are copied, for an engine may reuse its buffers."""
        self._infos.append(info)
        self._values += [_keep(loss), _keep(grad_norm), _keep(prefix_loss)]

    def drain(self) -> list[FetchedStep[Info]]:
        """All steps added since the last drain, in order; waits for the device once."""
        values = fetch(self._values)
        steps = []
        for index, info in enumerate(self._infos):
            loss, grad_norm, prefix_loss = values[3 * index : 3 * index + 3]
            assert loss is not None, "a step is added with a loss"
            steps.append(FetchedStep(info, loss, grad_norm, prefix_loss))
        self._infos, self._values = [], []
        return steps


def fetch(values: Sequence[Tensor | float | None]) -> list[float | None]:
    """The values as Python floats, all tensors (one element each, on one device) in a single copy to the host."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [None if value is None else float(value) for value in values if not isinstance(value, Tensor)]
    # float64 holds every element type exactly, and lets tensors of different types share the copy.
    on_host = iter(torch.stack([tensor.detach().reshape(()).to(torch.float64) for tensor in tensors]).tolist())
    fetched: list[float | None] = []
    for value in values:
        if isinstance(value, Tensor):
            fetched.append(next(on_host))
        else:
            fetched.append(None if value is None else float(value))
    return fetched


def _keep(value: Tensor | float | None) -> Tensor | float | None:
    return value.detach().clone() if isinstance(value, Tensor) else value
