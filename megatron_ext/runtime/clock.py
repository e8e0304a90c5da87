"""Times of steps without making the step wait for the device."""

import time
from dataclasses import dataclass

import torch

from megatron_ext.runtime.device import Device


@dataclass(frozen=True)
class Mark:
    """A point in the device's queue (GPU) or in time (CPU)."""

    at: float
    event: torch.cuda.Event | None = None


def mark(device: Device) -> Mark:
    """Put a mark behind everything that has been queued so far."""
    if not device.is_gpu:
        return Mark(at=time.perf_counter())
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return Mark(at=time.perf_counter(), event=event)


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from ``start`` to ``end``. On a GPU both must have been reached: call it after a host sync."""
    if start.event is None or end.event is None:
        return end.at - start.at
    return float(start.event.elapsed_time(end.event)) / 1000.0
