"""A checkpoint as a model to use: found by run or step, loaded on one process whatever layout wrote it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.manifest import Manifest, read_manifest
from megatron_ext.checkpoint.store import newest_checkpoint
from megatron_ext.config.run import RunConfig
from megatron_ext.engine.consolidate import consolidated_weights
from megatron_ext.errors import UserError
from megatron_ext.model.gpt import Gpt, build_gpt
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group

_TIMEOUT_MINUTES = 30.0


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
    if (path / "checkpoint.json").is_file():
        return path
    for directory in (path / "checkpoints", path):
        newest = newest_checkpoint(directory)
        if newest is not None:
            return newest
    raise UserError(f"{path} holds no complete checkpoint; give a run directory or one of its checkpoints/step_N")


@contextmanager
def load_model(path: Path, device: Device) -> Iterator[LoadedModel]:
    """Load a checkpoint's model on this process alone, inside a process group of one.

    Raises:
        UserError: there is no checkpoint, it is damaged, or this version cannot read its config.
    """
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    config = _single_rank_config(manifest, checkpoint)
    info = rank_info()
    with process_group(info, device, timeout_minutes=_TIMEOUT_MINUTES):
        layout = initialize_parallel(1, _TIMEOUT_MINUTES)
        try:
            streams = seed_streams(config.seed, layout, device.torch_device)
            positions = config.max_positions
            model = build_gpt(config.model, layout=layout, positions=positions, seed=config.seed, streams=streams)
            weights = consolidated_weights(
                checkpoint, tensor_size=manifest.layout["tensor"], zero_stage=manifest.layout["zero_stage"]
            )
            model.load_state_dict({name: weight.to(torch.float32) for name, weight in weights.items()})
            yield LoadedModel(model=model.to(device.torch_device).eval(), config=config, manifest=manifest)
        finally:
            destroy_parallel()


def _single_rank_config(manifest: Manifest, checkpoint: Path) -> RunConfig:
    content = manifest.config | {"parallel": {}, "training": manifest.config["training"] | {"precision": "fp32"}}
    try:
        return RunConfig.model_validate_json(json.dumps(content))
    except ValueError as error:
        raise UserError(f"{checkpoint}: this version cannot read its config: {error}") from error
