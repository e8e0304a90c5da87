"""A checkpoint opened without its run: its manifest, its weights as one rank would hold them, its model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megatron_ext.checkpoint.store import MANIFEST, Manifest, newest_checkpoint
from megatron_ext.checkpoint.verify import check_named_files, read_manifest, state_files
from megatron_ext.config.run import RunConfig
from megatron_ext.engine.state_files import read_state
from megatron_ext.errors import UserError
from megatron_ext.model.gpt import Gpt, build_gpt
from megatron_ext.model.parameters import split_dimension
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group

_TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint on disk. Made by :func:`open_checkpoint`."""

    path: Path
    """Directory ``step_N``."""

    manifest: Manifest

    def config(self) -> RunConfig:
        """The config of its run, in float32 on one rank.

        Raises:
            UserError: this version cannot read it.
        """
        written = self.manifest.config
        content = written | {"parallel": {}, "training": written.get("training", {}) | {"precision": "fp32"}}
        try:
            return RunConfig.model_validate_json(json.dumps(content))
        except ValueError as error:
            raise UserError(f"{self.path}: this version cannot read its config: {error}") from error

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights as one rank would hold them, whatever layout wrote them.

        Returns:
            megatron-core's parameter names -> CPU tensors: float32 from ZeRO 3, else the run's own precision.

        Raises:
            UserError: a file is missing or damaged.
        """
        partitioned = self.manifest.layout["zero_stage"] == 3
        read = _partitioned if partitioned else _replicated
        names = state_files(self.path, self.manifest)
        try:
            # All that a reader may open, before it does: DeepSpeed's runs whatever a file says.
            names = [name for name in names if partitioned or name.endswith("model_states.pt")]
            check_named_files(self.path, self.manifest, names)
            parts = [read(self.path, tensor_rank) for tensor_rank in range(self.manifest.layout["tensor"])]
            return {name: _merge(name, [part[name] for part in parts]) for name in parts[0]}
        except Exception as error:
            # Any exception: a file of the wrong content may fail anywhere.
            text = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{self.path} cannot be read ({text}); use another checkpoint of the run") from error


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on one device, float32, with what it was trained as."""

    model: Gpt
    config: RunConfig
    manifest: Manifest


def find_checkpoint(path: Path) -> Path:
    """Resolve a checkpoint directory, a run directory or its checkpoints directory (then the newest one).

    Raises:
        UserError: there is no complete checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    for directory in (path / "checkpoints", path):
        newest = newest_checkpoint(directory)
        if newest is not None:
            return newest
    raise UserError(f"{path} holds no complete checkpoint; give a run directory or one of its checkpoints/step_N")


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Open a checkpoint directory, or the newest checkpoint of a run; needs no process group and no device.

    Raises:
        UserError: there is no checkpoint, or its manifest cannot be read.
    """
    checkpoint = find_checkpoint(path)
    return StoredCheckpoint(path=checkpoint, manifest=read_manifest(checkpoint))


@contextmanager
def load_model(path: Path, device: Device) -> Iterator[LoadedModel]:
    """Load a checkpoint's model on this process alone, inside a process group of one.

    Raises:
        UserError: there is no checkpoint, it is damaged, or this version cannot read its config.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config()
    with process_group(rank_info(), device, timeout_minutes=_TIMEOUT_MINUTES):
        layout = initialize_parallel(1, _TIMEOUT_MINUTES)
        try:
            streams = seed_streams(config.seed, layout, device.torch_device)
            positions = config.max_positions
            model = build_gpt(config.model, layout=layout, positions=positions, seed=config.seed, streams=streams)
            weights = {name: weight.to(torch.float32) for name, weight in checkpoint.weights().items()}
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(f"{checkpoint.path} holds the weights of another model than its config says") from error
            yield LoadedModel(model=model.to(device.torch_device).eval(), config=config, manifest=checkpoint.manifest)
        finally:
            destroy_parallel()


def _merge(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    dimension = split_dimension(name)
    return parts[0] if dimension is None else torch.cat(parts, dim=dimension)


def _replicated(checkpoint: Path, tensor_rank: int) -> dict[str, torch.Tensor]:
    path = checkpoint / f"mp_rank_{tensor_rank:02d}_model_states.pt"
    weights = read_state(path, mmap=True)["module"]
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError(f"{path.name} holds something else than weights")
    return dict(weights)


def _partitioned(checkpoint: Path, tensor_rank: int) -> dict[str, torch.Tensor]:
    # DeepSpeed's reader expects one tensor rank's files in a directory, under the names of tensor rank 0.
    own = f"mp_rank_{tensor_rank:02d}_"
    with tempfile.TemporaryDirectory() as directory:
        for path in checkpoint.glob(f"*{own}*.pt"):
            (Path(directory) / path.name.replace(own, "mp_rank_00_")).symlink_to(path.resolve())
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(directory, tag=".")
    return {name: tensor.clone() for name, tensor in weights.items()}
