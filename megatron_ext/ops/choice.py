"""Which kernels a run uses: decided once at its start, the same on every rank, and said once."""

from typing import Literal

from megatron_ext.errors import UserError
from megatron_ext.ops.kernels import Kernels
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes

Wanted = Literal["auto", "fused", "reference"]
"""``model.kernels``."""


def choose_kernels(wanted: Wanted, *, device: Device, processes: Processes) -> Kernels:
    """What ``model.kernels`` comes to here; called by all ranks, which all get the same.

    The first use on a machine may compile, which takes a minute; the other processes wait for it. Raises UserError if
    "fused" was asked for, and a rank cannot have it.
    """
    if wanted == "reference":
        LOGGER.info("kernels: reference (PyTorch's own operations), as model.kernels says")
        return "reference"
    found, reason = _load(device)
    reasons = processes.gather(reason)
    missing = next((f"{text} (rank {rank})" for rank, text in enumerate(reasons) if text is not None), None)
    if missing is None:
        LOGGER.info("kernels: fused (%s)", found)
        return "fused"
    if wanted == "fused":
        raise UserError(f'model.kernels is "fused" and they cannot be had: {missing}; or write "auto"')
    LOGGER.warning("kernels: reference (PyTorch's own operations): %s", missing)
    return "reference"


def _load(device: Device) -> tuple[str, str | None]:
    """The fused kernels' library, or why this process cannot have them for its device."""
    # The only way from the model to the build: a run on the reference imports none of it.
    from megatron_ext.ops.loading import load_operators

    try:
        return str(load_operators("cuda" if device.is_gpu else "cpu").path), None
    except UserError as error:
        return "", str(error)
