"""What the launcher says about this process, and what must be set before DeepSpeed is imported."""

import os
from dataclasses import dataclass

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the job, as the deepspeed launcher (or torchrun) sets it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs and metrics."""
        return self.rank == 0


def rank_info() -> RankInfo:
    """Read the launcher's variables.

    Returns:
        The place of this process; a process started by no launcher is a job of one rank on a free port.

    Raises:
        UserError: a variable is missing or is no number.
    """
    if "RANK" not in os.environ:
        return RankInfo(
            rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="127.0.0.1", master_port=0
        )
    local_world_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    return RankInfo(
        rank=_number("RANK"),
        local_rank=_number("LOCAL_RANK"),
        world_size=_number("WORLD_SIZE"),
        local_world_size=_number(local_world_size),
        master_address=_text("MASTER_ADDR"),
        master_port=_number("MASTER_PORT"),
    )


SUPERVISOR = "MEGATRON_EXT_SUPERVISOR"
"""Variable with the process id of the command that started the ranks of this machine."""


def supervisor() -> int | None:
    """Process id of the command that started this rank, or None where a launcher was called by hand."""
    return _number(SUPERVISOR) if SUPERVISOR in os.environ else None


def prepare_deepspeed(info: RankInfo, accelerator: str) -> None:
    """Set what DeepSpeed reads from the environment; call before anything imports it.

    Args:
        info: Place of this process, for one that no launcher started.
        accelerator: "cpu" or "cuda". DeepSpeed probes for devices at import and, where it finds none, falls back in
            ways that differ between releases. A choice that the user made in the environment stays.
    """
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    os.environ.setdefault("LOCAL_RANK", str(info.local_rank))


def _text(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise UserError(f"environment variable {name} is not set although RANK is; start through `megatron-ext train`")
    return value


def _number(name: str) -> int:
    text = _text(name)
    if not text.isdigit():
        raise UserError(f"environment variable {name} is {text!r}, not a number; start through `megatron-ext train`")
    return int(text)
