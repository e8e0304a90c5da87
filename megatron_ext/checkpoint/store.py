"""The checkpoints directory of a run, as a file system sees it: names, publication, discovery, pruning. No torch.

A checkpoint is written under ``step_N.partial`` and becomes visible by one rename to ``step_N``; ``latest`` names the
newest one and is replaced last. A process killed at any moment leaves complete checkpoints, and perhaps a ``.partial``
that the next save removes.
"""

import re
import shutil
from pathlib import Path

from megatron_ext.runtime.files import replace_text, sync

_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_LATEST = "latest"


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
    """Force the partial checkpoint to disk, give it its final name, then point ``latest`` at it."""
    partial, final = directory / partial_name(step), directory / checkpoint_name(step)
    for path in partial.rglob("*"):
        if path.is_file():
            sync(path)
    sync(partial)
    partial.rename(final)
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
