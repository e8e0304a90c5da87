"""Where log lines go: rank 0 to the console and the run's log.txt, the other ranks only warnings."""

import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("megatron_ext")

# Libraries that print a page at start; what they warn about still comes through.
_CHATTY = ("DeepSpeed", "deepspeed", "torch.distributed", "megatron")

# Python warnings that are about how those libraries call others, and that no user of ours can act on.
_NOT_FOR_USERS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    ".*all_gather_into_tensor. is deprecated",
    ".*reduce_scatter_tensor. is deprecated",
)


_FILE_ONLY = "megatron_ext_file_only"


def file_only(logger: logging.Logger) -> "logging.LoggerAdapter[logging.Logger]":
    """The logger for what the console shows in another way: its lines go to the log file alone."""
    return logging.LoggerAdapter(logger, {_FILE_ONLY: True})


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a progress bar redirects it to keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, unless it is for the log file alone."""
        if getattr(record, _FILE_ONLY, False):
            return
        self.stream = sys.stderr
        super().emit(record)


class _LogFile(logging.FileHandler):
    """log.txt: a full disk costs lines of it, not the run."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging calls it so
        """Say it once, on the console; what is still buffered is written when there is room."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            LOGGER.warning("%s cannot be written (%s): lines are lost until it can be", self.baseFilename, error)


def configure_logging(rank: int, *, log_file: Path | None = None) -> None:
    """Set up this process's log; call before torch.distributed, DeepSpeed and megatron-core are imported.

    Args:
        rank: Global rank; 0 logs from INFO on, the others from WARNING on with their rank in the line.
        log_file: File that rank 0 appends to as well; its directory is made.

    Raises:
        UserError: the file cannot be written.
    """
    level = logging.INFO if rank == 0 else logging.WARNING
    origin = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {origin}%(levelname)s %(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_CurrentStderr()]
    if log_file is not None and rank == 0:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(log_file))
        except OSError as error:
            from megatron_ext.runtime.places import unwritable

            raise unwritable(log_file, error) from None
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    LOGGER.handlers = handlers
    for handler in handlers:
        handler.setFormatter(formatter)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
