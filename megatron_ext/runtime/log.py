"""Where log lines go: rank 0 to the console and the run's log.txt, the other ranks only warnings."""

import logging
import sys
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("megatron_ext")

# Libraries that print a page at start; what they warn about still comes through.
_CHATTY = ("DeepSpeed", "deepspeed", "torch.distributed", "megatron")


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a progress bar redirects it to keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(rank: int, *, log_file: Path | None = None) -> None:
    """Set up this process's log.

    Args:
        rank: Global rank; 0 logs from INFO on, the others from WARNING on with their rank in the line.
        log_file: File that rank 0 appends to as well; its directory is made.
    """
    level = logging.INFO if rank == 0 else logging.WARNING
    origin = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {origin}%(levelname)s %(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_CurrentStderr()]
    if log_file is not None and rank == 0:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    LOGGER.handlers = handlers
    for handler in handlers:
        handler.setFormatter(formatter)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
