"""Which device a rank computes on, and through which backend it talks to the others."""

import resource
import time
from dataclasses import dataclass

import torch

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Device:
    """A rank's device: ``cuda`` with NCCL where there is a GPU, else ``cpu`` with gloo."""

    torch_device: torch.device
    backend: str
    accelerator: str

    @property
    def is_gpu(self) -> bool:
        """Whether the rank computes on a GPU."""
        return self.accelerator == "cuda"

    @property
    def pin_memory(self) -> bool:
        """Whether host tensors should be page-locked so that copies to the device overlap with compute."""
        return self.is_gpu

    def wait(self) -> None:
        """Wait until the device has done everything that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)

    def peak_memory(self) -> int:
        """Bytes held at most since the last call: on a GPU by tensors; on a CPU by the process since its start.

        The host waits for nothing: both are counted where memory is allocated.
        """
        if not self.is_gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak


def select_device(local_rank: int) -> Device:
    """Return this rank's device and make it the current one.

    Raises:
        UserError: more ranks than GPUs on this machine.
    """
    if not torch.cuda.is_available():
        return Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {count}; start at most {count} ranks here"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Device(torch_device=device, backend="nccl", accelerator="cuda")


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees; empty without a GPU or with a CPU build of torch."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def compute_capabilities() -> list[tuple[int, int]]:
    """Compute capability (major, minor) of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def device_title(device: Device) -> str:
    """A name that is equal for equal devices: of a GPU its model and memory."""
    if not device.is_gpu:
        return "CPU"
    properties = torch.cuda.get_device_properties(device.torch_device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


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
