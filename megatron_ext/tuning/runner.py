"""Where probes are trained: what a search needs of a machine, and this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_ext.runtime.launcher import LaunchOptions, start_ranks


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it goes on."""

    def ask_to_stop(self) -> bool:
        """Ask it to finish its step, save and exit; whether it could be asked yet. May be asked again."""

    def close(self) -> None:
        """Leave nothing of it behind."""


class Runner(Protocol):
    """Starts runs. Their directories are visible to the process that searches."""

    def start(self, config: Path, *, output: Path) -> Job:
        """Start the run in the file ``config``; what it prints is appended to ``output``.

        Raises:
            UserError: it cannot be started.
        """


@dataclass(frozen=True)
class LocalRunner:
    """Runs on this machine through the deepspeed launcher."""

    options: LaunchOptions

    def start(self, config: Path, *, output: Path) -> Job:
        """Start the run's ranks."""
        return start_ranks(self.options, [str(config)], output=output)
