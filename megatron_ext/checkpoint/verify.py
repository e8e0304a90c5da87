"""What a checkpoint has to be before anything of it is loaded.

Only a run that finds a checkpoint imports this, and what reads one without its run. No torch at import.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from megatron_ext.base import describe_differences
from megatron_ext.checkpoint.store import (
    FORMAT,
    MANIFEST,
    Manifest,
    content_sum,
    file_sum,
    is_checkpoint_name,
    own_files,
    random_states_name,
    step_of,
)
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.checkpointer import EngineState, RunIdentity
    from megatron_ext.parallel.rng import RngStreams

_LARGEST_MANIFEST = 2**26
"""Bytes; one of a run on 10,000 ranks has 3 MB."""


class OtherRunError(UserError):
    """A checkpoint is whole, but another run's or another layout's."""


def read_manifest(checkpoint: Path) -> Manifest:
    """Read checkpoint.json.

    Raises:
        UserError: no checkpoint is there, the file is damaged, or it was written by another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} is no checkpoint: it has no {MANIFEST}; give a directory checkpoints/step_N")
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"more than {_LARGEST_MANIFEST:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); continue from an older checkpoint") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {_short(found)}, this version reads format {FORMAT}")
    own = content.pop("sha256", None)
    if (own is not None or content.get("files")) and own != content_sum(content):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one that it says; continue from an older checkpoint"
        )
    manifest = _validated(content, path)
    if is_checkpoint_name(checkpoint.name) and step_of(checkpoint) != manifest.step:
        raise UserError(f"{path} is of step {manifest.step}, and its directory is called {checkpoint.name}")
    return manifest


def _validated(content: dict[str, Any], path: Path) -> Manifest:
    form = TypeAdapter(Manifest)
    try:
        form.validate_json(json.dumps(content))  # JSON itself: strict types ask for a Manifest otherwise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ascii(".".join(str(part) for part in first["loc"]))[1:-1][:80]
        found = "" if first["type"] == "missing" else f", found {_short(first['input'])}"
        raise UserError(
            f"{path} has other keys or values than format {FORMAT} ({key}: {first['msg']}{found}); continue from an "
            "older checkpoint"
        ) from error
    manifest = Manifest(**content)
    layout, ranges = manifest.layout, manifest.skipped_samples
    whole = all(layout.get(key, -1) >= least for key, least in (("world_size", 1), ("tensor", 1), ("zero_stage", 0)))
    if not (whole and all(len(pair) == 2 for pair in ranges) and all(map(len, manifest.files.values()))):
        raise UserError(
            f"{path} has a layout, skipped_samples or files as no run writes them; continue from an older checkpoint"
        )
    return manifest


def _short(value: object) -> str:
    text = ascii(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check_resumable(manifest: Manifest, *, determining: dict[str, Any], layout: dict[str, int], where: Path) -> None:
    """Raise OtherRunError where a run cannot continue from the checkpoint bit for bit.

    Args:
        manifest: Of the checkpoint.
        determining: What determines weights and data order in the run that is starting.
        layout: world_size, tensor, zero_stage of the ranks that are starting.
        where: The checkpoint, for the message.
    """
    # Guards are there to be changed after they have stopped a run; what they did is on record.
    there, here = ({**values, "guards": None} for values in (manifest.determining, determining))
    if changes := describe_differences(there, here):
        raise OtherRunError(
            f"{where} belongs to another run: {changes}. To train this one, give the run another name, or restore "
            "those values"
        )
    if changes := describe_differences(manifest.layout, layout):
        raise OtherRunError(
            f"{where} was written by another layout: {changes}. To continue it, start the layout it has"
        )


def check(checkpoint: Path, identity: "RunIdentity", *, rank: int, streams: "RngStreams", sums: bool) -> None:
    """Raise UserError where a rank cannot continue from a checkpoint. Changes nothing.

    Args:
        checkpoint: Its directory.
        identity: The run that is starting.
        rank: The rank.
        streams: Its random streams.
        sums: Whether SHA-256 is compared.
    """
    manifest = read_manifest(checkpoint)
    check_resumable(manifest, determining=identity.determining, layout=identity.layout, where=checkpoint)
    check_files(checkpoint, manifest, rank=rank, sums=sums)
    check_random_states(checkpoint / random_states_name(rank), streams)


def load(checkpoint: Path, engine: "EngineState", *, rank: int, streams: "RngStreams") -> Manifest:
    """Load a checkpoint that ``check`` passed on every rank.

    Raises:
        UserError: the engine cannot use its files.
    """
    try:
        engine.load(checkpoint.parent, checkpoint.name)
    except UserError:
        raise
    except Exception as error:
        # Any exception: an engine trips over a file of the wrong content anywhere.
        raise UserError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {error}); move it away to continue from the "
            "checkpoint before it"
        ) from error
    streams.set_rng_state(read_random_states(checkpoint / random_states_name(rank)))
    return read_manifest(checkpoint)


def check_files(checkpoint: Path, manifest: Manifest, *, rank: int, sums: bool) -> None:
    """Check the files that a rank reads: there, as long as they were, with their SHA-256, and without code.

    Raises:
        UserError: the first that is not.
    """
    tensor, zero = manifest.layout["tensor"], manifest.layout["zero_stage"]
    names = own_files(sorted(_present(checkpoint) | manifest.files.keys()), rank, tensor, shared=True)
    if not manifest.files:
        # Of an earlier version, which lists none. Named as DeepSpeed names them.
        place = f"zero_pp_rank_{rank // tensor}_mp_rank_{rank % tensor:02d}"
        model = f"mp_rank_{rank % tensor:02d}_model_states.pt"
        needed = [{f"zero_pp_rank_{rank // tensor}_{model}" if zero == 3 else model}]
        needed += [{f"{place}_optim_states.pt", f"bf16_{place}_optim_states.pt"}] if zero else []
        for choice in needed:
            if not choice & set(names):
                raise UserError(f"{checkpoint / max(choice)} is missing")
    check_named_files(checkpoint, manifest, names, sums=sums)


def check_named_files(checkpoint: Path, manifest: Manifest, names: Sequence[str], *, sums: bool = True) -> None:
    """Check these files of a checkpoint. Raises as ``check_files`` does."""
    for name in names:
        path = checkpoint / name
        if path.parent != checkpoint or not path.is_file():
            raise UserError(f"{path} is missing")
        if manifest.files:
            listed = manifest.files.get(name)
            if listed is None:
                if not name.endswith(("_states.pt", "optim_states.pt")):
                    continue  # something that a person put there
                raise UserError(f"{path} is none of the files that {MANIFEST} lists")
            if path.stat().st_size != listed[0]:
                raise UserError(f"{path} is damaged: it has {path.stat().st_size:,} bytes and had {listed[0]:,}")
            if sums and len(listed) == 2 and file_sum(path) != listed:
                raise UserError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        if name.endswith(".pt"):
            _check_pickle(path)


def state_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Names of the files that hold weights or the optimizer's state."""
    return sorted(name for name in _present(checkpoint) | manifest.files.keys() if name.endswith("_states.pt"))


def _present(checkpoint: Path) -> set[str]:
    return {path.name for path in checkpoint.iterdir() if path.name != MANIFEST and path.suffix == ".pt"}


def _check_pickle(path: Path) -> None:
    """Read what a file says beside its tensors, which stay on disk."""
    from megatron_ext.engine.state_files import read_state

    try:
        read_state(path, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def read_random_states(path: Path) -> dict[str, Any]:
    """What ``RngStreams.rng_state`` gave when the checkpoint was written."""
    from megatron_ext.engine.state_files import read_state

    state: dict[str, Any] = read_state(path)
    return state


def check_random_states(path: Path, streams: "RngStreams") -> None:
    """Raise UserError where random states cannot be continued; the streams stay as they are."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    state, now = read_random_states(path), streams.rng_state()
    try:
        streams.set_rng_state(state)
    except UserError as error:
        raise OtherRunError(f"{path}: {error}") from error
    except Exception as error:
        # Any exception: torch, numpy and Python each refuse a wrong state in a way of their own.
        raise UserError(f"{path} holds no random states of this program ({type(error).__name__})") from error
    finally:
        streams.set_rng_state(now)
