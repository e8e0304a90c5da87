"""The checkpointer on one rank, with an engine that is a file: what is saved, found, refused and said."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.store import read_manifest
from megatron_ext.errors import UserError
from megatron_ext.parallel.rng import RngStreams
from megatron_ext.runtime.environment import RankInfo
from megatron_ext.runtime.process_group import Processes

IDENTITY = RunIdentity(
    config={"name": "run"}, determining={"seed": 1}, layout={"world_size": 1, "tensor": 1, "zero_stage": 0}
)


@dataclass
class FileEngine:
    """An engine whose state is one number."""

    value: int = 0
    error: Exception | None = None

    def save(self, directory: Path, tag: str) -> None:
        (directory / tag / "engine").write_text(str(self.value))
        if self.error:
            raise self.error

    def load(self, directory: Path, tag: str) -> None:
        self.value = int((directory / tag / "engine").read_text())
        if self.error:
            raise self.error


class OneProcess(Processes):
    """A job of one rank without a process group."""

    def __init__(self) -> None:
        super().__init__(RankInfo(0, 0, 1, 1, "", 0), None, None)  # type: ignore[arg-type]

    def agree_from_main(self, value: object) -> object:
        return value

    def barrier(self) -> None:
        pass


@pytest.fixture
def engine() -> FileEngine:
    return FileEngine()


@pytest.fixture
def checkpointer(tmp_path: Path, engine: FileEngine) -> Checkpointer:
    return _checkpointer(tmp_path, engine)


def _checkpointer(folder: Path, engine: FileEngine, **changes: Any) -> Checkpointer:
    streams = RngStreams(torch.default_generator, torch.Generator().get_state())
    return Checkpointer(
        folder / "checkpoints",
        engine,
        streams=streams,
        processes=OneProcess(),
        identity=replace(IDENTITY, **changes),
        keep_last=3,
    )


def _save(checkpointer: Checkpointer, engine: FileEngine, *steps: int) -> None:
    for step in steps:
        engine.value = step
        checkpointer.save(step=step, tokens=10 * step, loss_ratio={"lowest": float(step)})


def test_resume_takes_the_newest_and_its_random_numbers(checkpointer: Checkpointer, engine: FileEngine) -> None:
    assert checkpointer.resume() is None
    _save(checkpointer, engine, 1, 2)
    drawn = torch.rand(3)
    engine.value = 99
    manifest = checkpointer.resume()
    assert manifest is not None
    assert (manifest.step, manifest.tokens, manifest.loss_ratio, engine.value) == (2, 20, {"lowest": 2.0}, 2)
    assert (manifest.config, manifest.determining, manifest.layout) == ({"name": "run"}, {"seed": 1}, IDENTITY.layout)
    assert torch.equal(torch.rand(3), drawn)


def test_the_newest_are_kept_and_found(checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path) -> None:
    assert checkpointer.newest() is None
    _save(checkpointer, engine, 2, 4, 6, 8)
    found = {limit: checkpointer.newest(not_after=limit) for limit in (8, 7, 6, 4, 3)}
    assert [path and path.name for path in found.values()] == ["step_8", "step_6", "step_6", "step_4", None]
    assert checkpointer.newest() == tmp_path / "checkpoints" / "step_8"


def test_going_on_from_an_older_one(checkpointer: Checkpointer, engine: FileEngine) -> None:
    _save(checkpointer, engine, 2, 4, 6)
    older = checkpointer.newest(not_after=4)
    assert older is not None
    changed = replace(checkpointer.load(older), guard={"rollbacks": 1}, skipped_samples=[[3, 2]])
    checkpointer.go_on_from(older, changed)
    assert checkpointer.newest() == older
    assert read_manifest(older) == changed
    _save(checkpointer, engine, 6)  # the step comes a second time
    assert checkpointer.resume() is not None
    assert engine.value == 6


def test_a_new_run_does_not_mix_with_an_old_one(checkpointer: Checkpointer, engine: FileEngine) -> None:
    checkpointer.check_new()
    _save(checkpointer, engine, 2)
    with pytest.raises(UserError, match=r"checkpoint\.resume is false and .* the newest step_2; give the run another"):
        checkpointer.check_new()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"determining": {"seed": 2}}, "another run: seed is 1 there and 2 here"),
        ({"layout": IDENTITY.layout | {"tensor": 2}}, "another layout: tensor is 1 there and 2 here"),
    ],
)
def test_another_run_is_refused_before_anything_is_loaded(
    checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _save(checkpointer, engine, 2)
    engine.value = 99
    with pytest.raises(UserError, match=message):
        _checkpointer(tmp_path, engine, **changes).resume()
    assert engine.value == 99


@pytest.mark.parametrize("content", [None, b"", b"nothing of torch"])
def test_damaged_random_numbers_are_named(
    checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path, content: bytes | None
) -> None:
    _save(checkpointer, engine, 2)
    path = tmp_path / "checkpoints" / "step_2" / "rng_rank_0.pt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"step_2 cannot be loaded .*; move it away to continue from the checkpoint"):
        checkpointer.resume()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_save_that_fails_leaves_the_one_before(
    checkpointer: Checkpointer, engine: FileEngine, error: Exception
) -> None:
    _save(checkpointer, engine, 2)
    engine.error = error
    with pytest.raises(UserError, match=r"after step 3 could not be written .* 4 checkpoints \(checkpoint\.keep_last"):
        _save(checkpointer, engine, 3)
    engine.error = None
    assert checkpointer.resume() is not None
    assert engine.value == 2
    engine.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        _save(checkpointer, engine, 3)
