"""The checkpoints directory of a run: names, checkpoint.json, publication, discovery, pruning. No torch.

A checkpoint is written under ``step_N.partial`` and becomes visible by one rename to ``step_N``; ``latest`` names the
newest one and is replaced last. A process killed at any moment leaves complete checkpoints, and perhaps a ``.partial``
that the next save removes. A damaged one is set aside as ``step_N.damaged`` (``verify.py``) and never removed.
"""

import errno
import hashlib
import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from megatron_ext.base import NonNegativeInt
from megatron_ext.runtime.files import publish_directory, replace_text

FORMAT = 1
MANIFEST = "checkpoint.json"
# One spelling a step, so that step_031 or step_\u0663 is no checkpoint.
_NAME = re.compile(r"step_(0|[1-9][0-9]*)")
# DeepSpeed's files and ours, each written by one rank: those of ZeRO by any, the others by the first data rank.
_FILES = re.compile(r"(?:rng_rank_([0-9]+)|(?:(?:bf16_)?zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_\w+)\.pt")
_PARTIAL = ".partial"
_LATEST = "latest"


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json: position in the plan, the config, the layout, and small host state."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # what is read is compared with the types

    step: NonNegativeInt
    """Finished steps; the next step to run has this number."""

    tokens: NonNegativeInt
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

    skipped_samples: list[list[NonNegativeInt]] = field(default_factory=list)
    """(first, count) of the dataset samples that the run passes over, since it rolled back over them."""

    files: dict[str, list[int | str]] = field(default_factory=dict)
    """Bytes and SHA-256 of every other file, without ``checkpoint.verify`` bytes alone; empty of earlier versions."""

    format: int = FORMAT
    """Version of this file's meaning."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write checkpoint.json; in a complete checkpoint the old one is replaced in one go."""
    content = asdict(manifest)
    content["sha256"] = content_sum(content)
    replace_text(directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def content_sum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values, without its own key ``sha256``, whatever the order of keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def file_sum(path: Path, *, sums: bool = True) -> list[int | str]:
    """A file's bytes and, with ``sums``, its SHA-256, as the manifest lists them."""
    if not sums:
        return [path.stat().st_size]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def own_files(names: list[str], rank: int, tensor: int, *, shared: bool = False) -> list[str]:
    """The files that a rank writes; with ``shared`` those that it reads. Rank 0 answers for names of no known form."""

    def is_own(name: str) -> bool:
        match = _FILES.fullmatch(name)
        if match is None or name.startswith("rng"):
            return int(match[1] if match else 0) == rank
        if shared and match[2] is None:
            return int(match[3]) == rank % tensor
        return int(match[2] or 0) * tensor + int(match[3]) == rank

    return [name for name in names if is_own(name)]


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` finished steps."""
    return f"step_{step}"


def partial_name(step: int) -> str:
    """Directory name while it is being written."""
    return checkpoint_name(step) + _PARTIAL


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name is taken for a complete checkpoint."""
    return _NAME.fullmatch(name) is not None


def random_states_name(rank: int) -> str:
    """Name of the file of a rank's random states."""
    return f"rng_rank_{rank}.pt"


def step_of(path: Path) -> int:
    """The step that a checkpoint directory's name says."""
    match = _NAME.fullmatch(path.name)
    assert match, f"not a checkpoint's name: {path.name}"
    return int(match[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in ``directory``, oldest first; empty where the directory does not exist."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint. ``latest`` is for people: a crash between the two renames leaves it behind."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def begin(directory: Path, step: int) -> Path:
    """Make an empty ``.partial`` directory for ``step`` and remove those that a killed process left."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"step_*{_PARTIAL}"):
        with suppress(OSError):  # what cannot be deleted is in nobody's way, but that of its own step
            _delete(stale)
    partial = directory / partial_name(step)
    partial.mkdir()
    return partial


def publish(directory: Path, step: int) -> Path:
    """Force the partial checkpoint to disk, give it its final name, then point ``latest`` at it.

    Raises:
        OSError: it cannot be written, or there is a checkpoint of that step, which stays.
    """
    final = directory / checkpoint_name(step)
    if not final.is_dir() and (final.exists() or final.is_symlink()):
        # A file, or a link to nowhere: not ours to delete, but in the way of every start.
        final.rename(free_name(final))
    if not publish_directory(directory / partial_name(step), final):
        raise FileExistsError(errno.EEXIST, "there is one already", str(final))
    name_latest(directory, final)
    return final


def prune(directory: Path, keep_last: int) -> list[Path]:
    """Remove all complete checkpoints but the newest ``keep_last``; return what was removed."""
    removed = complete_checkpoints(directory)[:-keep_last]
    for path in removed:
        remove(path)
    return removed


def name_latest(directory: Path, checkpoint: Path) -> None:
    """Point ``latest`` at a checkpoint."""
    replace_text(directory / _LATEST, checkpoint.name + "\n")


def free_name(path: Path) -> Path:
    """``NAME.damaged``, or the first of ``NAME.damaged2`` and so on that is not taken."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *range(2, 10**6)))
    return next(name for name in names if not (name.exists() or name.is_symlink()))


def remove(path: Path) -> None:
    """Remove a complete checkpoint."""
    # Renamed first: a deletion cut short must not leave half a checkpoint under a complete one's name.
    doomed = path.with_name(path.name + _PARTIAL)
    if doomed.exists() or doomed.is_symlink():
        _delete(doomed)
    _delete(path.rename(doomed))


def _delete(path: Path) -> None:
    """Delete a file, a directory, or a link, whose target (a checkpoint moved to another disk) stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
