"""The checkpoints directory of a run: names, checkpoint.json, publication, discovery, pruning. No torch.

A checkpoint is written under ``step_N.partial`` and becomes visible by one rename to ``step_N``; ``latest`` names the
newest one and is replaced last. A process killed at any moment leaves complete checkpoints, and perhaps a ``.partial``
that the next save removes.
"""

import errno
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.base import describe_differences
from megatron_ext.errors import UserError
from megatron_ext.runtime.files import publish_directory, replace_text

FORMAT = 1
_FILE = "checkpoint.json"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_LATEST = "latest"


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json: position in the plan, the config, the layout, and small host state."""

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
        UserError: no checkpoint is there, the file is damaged, or it was written by another format.
    """
    path = checkpoint / _FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint} is no checkpoint: it has no {_FILE}; give a directory checkpoints/step_N"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); continue from an older checkpoint") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, this version reads format {FORMAT}")
    try:
        return Manifest(**content)
    except TypeError as error:
        raise UserError(f"{path} has other keys than format {FORMAT} ({error}); use an older checkpoint") from error


def check_resumable(manifest: Manifest, *, determining: dict[str, Any], layout: dict[str, int], where: Path) -> None:
    """Raise UserError where a run cannot continue from the checkpoint bit for bit.

    Args:
        manifest: Of the checkpoint.
        determining: What determines weights and data order in the run that is starting.
        layout: world_size, tensor, zero_stage of the ranks that are starting.
        where: The checkpoint, for the message.
    """
    # Guards are there to be changed after they have stopped a run; what they did is on record.
    there, here = ({**values, "guards": None} for values in (manifest.determining, determining))
    if changes := describe_differences(there, here):
        raise UserError(
            f"{where} belongs to another run: {changes}. To train this one, give the run another name, or restore "
            "those values"
        )
    if changes := describe_differences(manifest.layout, layout):
        raise UserError(f"{where} was written by another layout: {changes}. To continue it, start the layout it has")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` finished steps."""
    return f"step_{step}"


def partial_name(step: int) -> str:
    """Directory name while it is being written."""
    return checkpoint_name(step) + _PARTIAL


def step_of(path: Path) -> int:
    """The step that a checkpoint directory's name says."""
    match = _NAME.fullmatch(path.name)
    assert match, f"not a checkpoint's name: {path.name}"
    return int(match[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in ``directory``, oldest first; empty where the directory does not exist."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint.

    ``latest`` is for people and other tools: a crash between the two renames leaves it one checkpoint behind, so the
    directories themselves decide.
    """
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def begin(directory: Path, step: int) -> Path:
    """Make an empty ``.partial`` directory for ``step`` and remove those that a killed process left."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(stale)
    partial = directory / partial_name(step)
    partial.mkdir()
    return partial


def publish(directory: Path, step: int) -> Path:
    """Force the partial checkpoint to disk, give it its final name, then point ``latest`` at it.

    Raises:
        OSError: it cannot be written, or there is a checkpoint of that step, which stays.
    """
    final = directory / checkpoint_name(step)
    if not publish_directory(directory / partial_name(step), final):
        raise FileExistsError(errno.EEXIST, "there is one already", str(final))
    _name_latest(directory, final)
    return final


def prune(directory: Path, keep_last: int) -> list[Path]:
    """Remove all complete checkpoints but the newest ``keep_last``; return what was removed."""
    removed = complete_checkpoints(directory)[:-keep_last]
    for path in removed:
        _remove(path)
    return removed


def drop_after(directory: Path, checkpoint: Path) -> list[Path]:
    """Remove the complete checkpoints that are newer than ``checkpoint``; return what was removed.

    The newest goes first, so that a process killed in between leaves a run that continues from one of them.
    """
    removed = [path for path in complete_checkpoints(directory) if step_of(path) > step_of(checkpoint)][::-1]
    for path in removed:
        _remove(path)
    _name_latest(directory, checkpoint)
    return removed


def _name_latest(directory: Path, checkpoint: Path) -> None:
    replace_text(directory / _LATEST, checkpoint.name + "\n")


def _remove(path: Path) -> None:
    # Renamed first: a deletion cut short must not leave half a checkpoint under a complete one's name.
    doomed = path.with_name(path.name + _PARTIAL)
    path.rename(doomed)
    shutil.rmtree(doomed)
