"""Saving and loading with all ranks: DeepSpeed's files, every rank's RNG streams, and the manifest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from megatron_ext.checkpoint.store import (
    Manifest,
    begin,
    check_resumable,
    checkpoint_name,
    complete_checkpoints,
    drop_after,
    partial_name,
    prune,
    publish,
    read_manifest,
    step_of,
    write_manifest,
)
from megatron_ext.errors import UserError
from megatron_ext.parallel.rng import RngStreams
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes

_WRITER_SIGNS = ("inline_container", "iostream", "PytorchStreamWriter", "No space left")


class EngineState(Protocol):
    """What an engine keeps in a checkpoint: weights, optimizer state and loss scale, in files of its own."""

    def save(self, directory: Path, tag: str) -> None:
        """Write every rank's state to ``directory/tag``. Called by all ranks."""

    def load(self, directory: Path, tag: str) -> None:
        """Read what ``save`` wrote on the same layout. Called by all ranks."""


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to; only a run of the same one may go on from it."""

    config: dict[str, Any]
    """The resolved run config."""

    determining: dict[str, Any]
    """The part of it that determines weights and data order."""

    layout: dict[str, int]
    """world_size, tensor, zero_stage."""


class Checkpointer:
    """The run's checkpoints, on all ranks."""

    def __init__(
        self,
        directory: Path,
        engine: EngineState,
        *,
        streams: RngStreams,
        processes: Processes,
        identity: RunIdentity,
        keep_last: int,
    ) -> None:
        """Keep the newest ``keep_last`` checkpoints in ``directory``, which every node sees; made by the first save."""
        self._directory = directory
        self._engine = engine
        self._streams = streams
        self._processes = processes
        self._identity = identity
        self._keep_last = keep_last

    def save(
        self,
        *,
        step: int,
        tokens: int,
        loss_ratio: dict[str, object],
        curriculum: dict[str, object] | None = None,
        guard: dict[str, int] | None = None,
        skipped_samples: list[list[int]] | None = None,
    ) -> Path:
        """Write and publish the checkpoint after ``step`` finished steps; returns when it is complete on disk.

        Raises:
            UserError: it could not be written; the checkpoints before it are as they were.
        """
        manifest = Manifest(
            step=step,
            tokens=tokens,
            config=self._identity.config,
            determining=self._identity.determining,
            layout=self._identity.layout,
            loss_ratio=loss_ratio,
            curriculum=curriculum or {},
            guard=guard or {},
            skipped_samples=skipped_samples or [],
        )
        with self._explained(step):
            return self._save(step, manifest)

    def _save(self, step: int, manifest: Manifest) -> Path:
        is_main, partial = self._processes.info.is_main, self._directory / partial_name(step)
        if is_main:
            begin(self._directory, step)
        self._processes.barrier()  # no rank writes before the directory is there
        self._engine.save(self._directory, partial.name)
        torch.save(self._streams.rng_state(), partial / _rng_file(self._processes.info.rank))
        if is_main:
            write_manifest(partial, manifest)
        self._processes.barrier()  # no rename before every rank has written
        if is_main:
            publish(self._directory, step)
            prune(self._directory, self._keep_last)
        self._processes.barrier()  # no rank goes on, and perhaps ends, before the checkpoint is there
        return self._directory / checkpoint_name(step)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's file writer raises RuntimeError, and says what it was about, not why it failed.
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _WRITER_SIGNS):
                raise
            room = self._keep_last + 1
            raise UserError(
                f"the checkpoint after step {step} could not be written to {self._directory} ({error}); see to it that "
                f"this user may write there and that {room} checkpoints (checkpoint.keep_last + 1) have room, then "
                "start again: the run goes on from the checkpoint before"
            ) from error

    def resume(self) -> Manifest | None:
        """Load the newest complete checkpoint, or return None where there is none.

        Raises:
            UserError: it belongs to another run or another layout, or one of its files is damaged.
        """
        found = self.newest()
        return None if found is None else self.load(found)

    def check_new(self) -> None:
        """Raise UserError where a run that is to begin anew would mix its checkpoints with those of another."""
        found = self.newest()
        if found is not None:
            raise UserError(
                f"checkpoint.resume is false and {self._directory} holds checkpoints, the newest {found.name}; give "
                "the run another name, or remove its directory to begin anew"
            )

    def newest(self, *, not_after: int | None = None) -> Path | None:
        """The newest complete checkpoint, or the newest after at most ``not_after`` finished steps."""
        found = complete_checkpoints(self._directory)
        if not_after is not None:
            found = [path for path in found if step_of(path) <= not_after]
        # One rank looks, so that all take the same one whatever a network file system shows them at this moment.
        agreed = self._processes.agree_from_main(found[-1] if found else None)
        assert agreed is None or isinstance(agreed, Path)
        return agreed

    def load(self, checkpoint: Path) -> Manifest:
        """Load a complete checkpoint of this run. Raises as ``resume`` does."""
        manifest = read_manifest(checkpoint)
        own = self._identity
        check_resumable(manifest, determining=own.determining, layout=own.layout, where=checkpoint)
        LOGGER.info("resuming from %s", checkpoint)
        try:
            self._engine.load(self._directory, checkpoint.name)
            state = torch.load(checkpoint / _rng_file(self._processes.info.rank), weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            # torch's own words for a damaged pickle advise to trust it.
            reason = "damaged" if isinstance(error, UnpicklingError) else error
            raise UserError(
                f"{checkpoint} cannot be loaded ({reason}); move it away to continue from the checkpoint before it"
            ) from error
        self._streams.set_rng_state(state)
        return manifest

    def go_on_from(self, checkpoint: Path, manifest: Manifest) -> None:
        """Make a complete checkpoint the newest one, with another manifest: later ones belong to steps given up.

        A process killed before the end continues as if this had not been called.
        """
        if self._processes.info.is_main:
            drop_after(self._directory, checkpoint)
            write_manifest(checkpoint, manifest)
        self._processes.barrier()


def _rng_file(rank: int) -> str:
    return f"rng_rank_{rank}.pt"
