"""Which kernels a run uses: decided once at its start, the same on every rank, and said once."""

from typing import Literal

from megatron_ext.errors import UserError
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.loading import load_operators
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes

Wanted = Literal["auto", "fused", "reference"]


def choose_kernels(wanted: Wanted, *, device: Device, processes: Processes) -> Kernels:
    """What ``model.kernels`` comes to here; called by all ranks, which all get the same.

    Rank 0's first use may compile, which takes a minute; the others wait for it.

    Raises:
        UserError: "fused" was asked for, and a rank cannot have it.
    """
    if wanted == "reference":
        LOGGER.info("kernels: reference (PyTorch's own operations), as model.kernels says")
        return "reference"
    problems = processes.gather(unavailable(device))
    problem = next((f"{text} (rank {rank})" for rank, text in enumerate(problems) if text is not None), None)
    if problem is None:
        LOGGER.info("kernels: fused (%s)", load_operators("cuda" if device.is_gpu else "cpu").path)
        return "fused"
    if wanted == "fused":
        raise UserError(f'model.kernels is "fused" and they cannot be had: {problem}; or write "auto"')
    LOGGER.warning("kernels: reference (PyTorch's own operations): %s", problem)
    return "reference"


def unavailable(device: Device) -> str | None:
    """Why this process cannot have the fused kernels for its device; None where it has them now."""
    try:
        load_operators("cuda" if device.is_gpu else "cpu")
    except UserError as error:
        return str(error)
    return None
