"""checkpoint.json: what a checkpoint is of, readable without torch, and the checks before it is loaded."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.base import describe_differences
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.files import replace_text

FORMAT = 1
_FILE = "checkpoint.json"


@dataclass(frozen=True)
class Manifest:
    """Position in the plan, the config, the layout, and small host state."""

    step: int
    """Finished steps; the next step to run has this number."""

    tokens: int
    """Tokens consumed by those steps."""

    config: dict[str, Any]
    """The resolved run config."""

    determining: dict[str, Any]
    """The part of it that determines weights and data order."""

    layout: dict[str, int]
    """world_size, tensor, zero_stage of the ranks that wrote it."""

    loss_ratio: dict[str, Any]
    """State of the loss-ratio tracker."""

    curriculum: dict[str, Any] = field(default_factory=dict)
    """What adaptive pacing has decided and measured; empty under fixed pacing."""

    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guards; empty without them."""

    skipped_samples: list[list[int]] = field(default_factory=list)
    """(first, count) of the dataset samples that the run passes over, since it rolled back over them."""

    format: int = FORMAT
    """Version of this file's meaning."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write checkpoint.json; in a complete checkpoint the old one is replaced in one go."""
    replace_text(directory / _FILE, json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(checkpoint: Path) -> Manifest:
    """Read checkpoint.json.

    Raises:
        UserError: no checkpoint is there, or it was written by another format.
    """
    path = checkpoint / _FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint} is no checkpoint: it has no {_FILE}; give a directory checkpoints/step_N"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); continue from an older checkpoint") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this version reads format {FORMAT}")
    return Manifest(**content)


def check_resumable(manifest: Manifest, config: RunConfig, *, layout: dict[str, int], where: Path) -> None:
    """Raise UserError where the run in ``config`` cannot continue from the checkpoint bit for bit.

    Args:
        manifest: Of the checkpoint.
        config: The run that is starting.
        layout: world_size, tensor, zero_stage of the ranks that are starting.
        where: The checkpoint, for the message.
    """
    way_out = "give the run another name, or restore those values"
    # Guards are there to be changed after they have stopped a run; what they did is on record.
    there, here = ({**values, "guards": None} for values in (manifest.determining, config.determining_values()))
    if there != here:
        changes = describe_differences(there, here)
        raise UserError(f"{where} belongs to another run: {changes}. To train this one, {way_out}")
    if manifest.layout != layout:
        changes = describe_differences(manifest.layout, layout)
        raise UserError(f"{where} was written by another layout: {changes}. To continue it, start the layout it has")
