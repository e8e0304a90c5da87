"""DeepSpeed's files, read without running anything: tensors, plain values, and the few classes that it writes."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron_ext.errors import UserError

# None of them does anything when it is made or filled with attributes.
_CLASSES: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def read_state(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote; a file that names any other class or function is refused, and none of them called.

    Args:
        path: The file.
        map_location: As torch.load takes it.
        mmap: Leave the tensors on disk until they are used, which makes reading the rest cheap.

    Raises:
        UserError: the file holds code, is damaged, or is none of torch's.
        OSError: it cannot be read.
    """
    with torch.serialization.safe_globals(_CLASSES):
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        except OSError:
            raise
        except Exception as error:
            # Any exception: what a file says in torch's little language may fail anywhere. torch's own words for what
            # is refused advise to trust the file.
            code = _code_in(path) if isinstance(error, UnpicklingError) else []
            if code:
                raise UserError(
                    f"{path} names {', '.join(code)}, which no checkpoint holds: it was not written by this program, "
                    "and nothing of it was run"
                ) from error
            raise UserError(f"{path} is damaged: torch cannot read it ({type(error).__name__})") from error


def _code_in(path: str | Path) -> list[str]:
    """Names of the first classes and functions that are not allowed, as text that is safe to print."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []
    return sorted(ascii(name)[1:-1][:80] for name in found)[:3]
