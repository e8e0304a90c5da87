"""One plain state dict out of the files that DeepSpeed wrote for several ranks."""

import tempfile
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megatron_ext.errors import UserError
from megatron_ext.model.parameters import split_dimension


def consolidated_weights(checkpoint: Path, *, tensor_size: int, zero_stage: int) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights as one rank would hold them.

    Args:
        checkpoint: Directory ``step_N``.
        tensor_size: Tensor-parallel ranks of the run that wrote it.
        zero_stage: ZeRO stage of that run.

    Returns:
        megatron-core's parameter names -> CPU tensors: float32 from ZeRO 3, else the run's own precision.

    Raises:
        UserError: a file is missing or damaged.
    """
    read = _partitioned if zero_stage == 3 else _replicated
    try:
        parts = [read(checkpoint, tensor_rank) for tensor_rank in range(tensor_size)]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be read ({error}); use another checkpoint of the run") from error
    return {name: _merge(name, [part[name] for part in parts]) for name in parts[0]}


def _merge(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    dimension = split_dimension(name)
    return parts[0] if dimension is None else torch.cat(parts, dim=dimension)


def _replicated(checkpoint: Path, tensor_rank: int) -> dict[str, torch.Tensor]:
    path = checkpoint / f"mp_rank_{tensor_rank:02d}_model_states.pt"
    # The file holds DeepSpeed's own objects beside the weights, which weights_only would refuse.
    weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["module"]
    return weights


def _partitioned(checkpoint: Path, tensor_rank: int) -> dict[str, torch.Tensor]:
    # DeepSpeed's reader expects one tensor rank's files in a directory, under the names of tensor rank 0.
    own = f"mp_rank_{tensor_rank:02d}_"
    with tempfile.TemporaryDirectory() as directory:
        for path in checkpoint.glob(f"*{own}*.pt"):
            (Path(directory) / path.name.replace(own, "mp_rank_00_")).symlink_to(path.resolve())
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(directory, tag=".")
    return {name: tensor.clone() for name, tensor in weights.items()}
