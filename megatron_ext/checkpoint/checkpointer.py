"""Saving and loading with all ranks: DeepSpeed's files, every rank's RNG streams, and the manifest."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_ext.checkpoint.store import (
    Manifest,
    begin,
    checkpoint_name,
    complete_checkpoints,
    file_sum,
    own_files,
    partial_name,
    prune,
    publish,
    random_states_name,
    step_of,
    write_manifest,
)
from megatron_ext.config.training import CheckpointConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.rng import RngStreams
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes


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
        config: CheckpointConfig,
    ) -> None:
        """Keep the newest checkpoints in ``directory``, which every node sees; made by the first save."""
        self._directory = directory
        self._engine = engine
        self._streams = streams
        self._processes = processes
        self._identity = identity
        self._config = config

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
        try:
            return self._save(step, manifest)
        except (OSError, RuntimeError) as error:
            from megatron_ext.checkpoint.recovery import explain_failed_save

            explain_failed_save(error, self._directory, step=step, room=self._config.keep_last + 1)
            raise

    def _save(self, step: int, manifest: Manifest) -> Path:
        info, unfinished = self._processes.info, self._directory / partial_name(step)
        if info.is_main:
            begin(self._directory, step)
        self._processes.barrier()  # no rank writes before the directory is there
        self._engine.save(self._directory, unfinished.name)
        torch.save(self._streams.rng_state(), unfinished / random_states_name(info.rank))
        self._processes.barrier()  # no sums and no rename before every rank has written
        sums = self._sums(unfinished)
        if info.is_main:
            write_manifest(unfinished, replace(manifest, files=sums))
            publish(self._directory, step)
            try:
                prune(self._directory, self._config.keep_last)
            except OSError as error:
                LOGGER.warning("an old checkpoint in %s could not be removed: %s", self._directory, error)
        self._processes.barrier()  # no rank goes on, and perhaps ends, before the checkpoint is there
        return self._directory / checkpoint_name(step)

    def _sums(self, unfinished: Path) -> dict[str, list[int | str]]:
        """Bytes and SHA-256 of every file, each computed by the rank that wrote it, while it lies in memory."""
        names = sorted(path.name for path in unfinished.iterdir())
        sums = self._config.verify
        own = own_files(names, self._processes.info.rank, self._identity.layout["tensor"])
        gathered: list[Any] = self._processes.gather({name: file_sum(unfinished / name, sums=sums) for name in own})
        return {name: entry for part in gathered for name, entry in part.items()}

    def resume(self) -> Manifest | None:
        """Load the newest whole checkpoint, or return None where there is none at all.

        Raises:
            UserError: none is whole and of this run, or without ``fallback`` the newest is not; nothing was changed.
        """
        found = self.newest_whole()
        return None if found is None else self.load(found)

    def newest_whole(self, *, not_after: int | None = None) -> Path | None:
        """As ``newest``, but whole: newer ones that cannot be used are set aside. Raises as ``resume`` does."""
        found = self._found(not_after)
        if not found:
            return None
        from megatron_ext.checkpoint.recovery import choose_whole
        from megatron_ext.checkpoint.verify import check

        rank, sums = self._processes.info.rank, self._config.verify
        check_own = partial(check, identity=self._identity, rank=rank, streams=self._streams, sums=sums)
        return choose_whole(found, check_own, processes=self._processes, fallback=self._config.fallback)

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
        found = self._found(not_after)
        return found[-1] if found else None

    def _found(self, not_after: int | None) -> list[Path]:
        """Complete checkpoints after at most ``not_after`` finished steps, the same ones on all ranks."""
        # One rank looks, so that all take the same one whatever a network file system shows them at this moment.
        found = complete_checkpoints(self._directory) if self._processes.info.is_main else []
        agreed: Any = self._processes.agree_from_main(
            [path for path in found if not_after is None or step_of(path) <= not_after]
        )
        assert isinstance(agreed, list)
        return agreed

    def load(self, checkpoint: Path) -> Manifest:
        """Load a checkpoint that ``newest_whole`` found.

        Raises:
            UserError: it does not hold what this run's engine needs.
        """
        from megatron_ext.checkpoint.verify import load

        LOGGER.info("resuming from %s", checkpoint)
        return load(checkpoint, self._engine, rank=self._processes.info.rank, streams=self._streams)

    def go_on_from(self, checkpoint: Path, manifest: Manifest) -> None:
        """Make a complete checkpoint the newest one, with another manifest: later ones belong to steps given up.

        A process killed before the end continues as if this had not been called.
        """
        from megatron_ext.checkpoint.recovery import drop_after

        if self._processes.info.is_main:
            drop_after(self._directory, checkpoint)
            write_manifest(checkpoint, manifest)
        self._processes.barrier()
