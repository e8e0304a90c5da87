"""Losses fetched from the device in batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.engine.engine import StepResult
from megatron_ext.metrics.step_log import FetchedStep, FinishedStep, PendingSteps
from megatron_ext.runtime.device import Mark

doubles = st.floats(width=64, allow_nan=False)
tensors = doubles.map(lambda value: torch.tensor(value, dtype=torch.float64)) | st.floats(
    width=32, allow_nan=False
).map(lambda value: torch.tensor([value], dtype=torch.float32))
values_strategy = st.lists(st.tuples(doubles | tensors, st.none() | doubles | tensors))


def finished(step: int) -> FinishedStep:
    planned = PlannedStep(step, 4, 8, 1e-3, 32, 32 * step, 4 * step)
    return FinishedStep(planned, (4,), start=Mark(0.0), end=Mark(1.0))


def result(loss: Tensor | float, grad_norm: Tensor | float | None) -> StepResult:
    return StepResult(loss=loss, grad_norm=grad_norm, skipped=False)  # type: ignore[arg-type]


def number(value: Tensor | float | None) -> float | None:
    return value.item() if isinstance(value, Tensor) else value


@given(values_strategy)
def test_a_drain_keeps_values_and_order(values: list[tuple[Tensor | float, Tensor | float | None]]) -> None:
    pending = PendingSteps()
    for step, (loss, norm) in enumerate(values):
        pending.add(finished(step), result(loss, norm))
    found = [(step.loss, step.grad_norm) for step in pending.drain()]
    assert found == [(number(loss), number(norm)) for loss, norm in values]


def test_tensors_of_a_drain_are_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    to_list = Tensor.tolist

    def counted(tensor: Tensor) -> object:
        copies.append(tensor.shape)
        return to_list(tensor)

    def refused(_tensor: Tensor) -> object:
        raise AssertionError("a value was fetched alone")

    monkeypatch.setattr(Tensor, "tolist", counted)
    monkeypatch.setattr(Tensor, "item", refused)
    monkeypatch.setattr(Tensor, "__float__", refused)
    pending = PendingSteps()
    vectors = {1: [1.0, math.inf, 3.0], 3: [0.1]}
    for step in range(5):
        vector = torch.tensor(vectors[step], dtype=torch.float64) if step in vectors else None
        norm = torch.tensor(0.5, dtype=torch.bfloat16)
        pending.add(finished(step), result(torch.tensor(float(step)), norm), adam_variance=vector)
    assert copies == []
    steps = pending.drain()
    assert [step.loss for step in steps] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [step.adam_variance for step in steps] == [None, (1.0, math.inf, 3.0), None, (0.1,), None]
    assert copies == [(14,)]


def test_drain_returns_steps_once_and_in_order() -> None:
    pending = PendingSteps()
    pending.add(finished(0), result(torch.tensor(2.0, requires_grad=True), 1.5))
    pending.add(finished(1), result(torch.tensor(math.inf), None))
    assert len(pending) == 2
    assert pending.drain() == [FetchedStep(finished(0), 2.0, 1.5), FetchedStep(finished(1), math.inf, None)]
    assert len(pending) == 0
    assert pending.drain() == []


def test_a_buffer_that_is_used_again_does_not_change_what_was_added() -> None:
    buffer = torch.tensor(1.0)
    pending = PendingSteps()
    for step in range(3):
        pending.add(finished(step), result(buffer, buffer))
        buffer += 1
    assert [(step.loss, step.grad_norm) for step in pending.drain()] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
