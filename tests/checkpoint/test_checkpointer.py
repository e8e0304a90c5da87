"""The checkpointer on one rank, with an engine that is a file: what is saved, found, refused and said."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.verify import read_manifest
from megatron_ext.config.training import CheckpointConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.rng import RngStreams
from megatron_ext.runtime.environment import RankInfo
from megatron_ext.runtime.process_group import Processes

IDENTITY = RunIdentity(
    config={"name": "run"}, determining={"seed": 1}, layout={"world_size": 1, "tensor": 1, "zero_stage": 0}
)


PLANTED: list[str] = []


def plant(*text: str) -> None:
    """Called by nobody, where files are only read."""
    PLANTED.extend(text)


class Planted:
    """A pickle of it calls ``plant`` when it is executed."""

    def __reduce__(self) -> Any:
        return plant, ("executed",)


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

    def gather(self, value: object) -> list[object]:
        return [value]

    def barrier(self) -> None:
        pass


@pytest.fixture
def engine() -> FileEngine:
    return FileEngine()


@pytest.fixture
def checkpointer(tmp_path: Path, engine: FileEngine) -> Checkpointer:
    return _checkpointer(tmp_path, engine)


def _checkpointer(
    folder: Path, engine: FileEngine, *, verify: bool = True, fallback: bool = True, **changes: Any
) -> Checkpointer:
    streams = RngStreams(torch.default_generator, torch.Generator().get_state())
    return Checkpointer(
        folder / "checkpoints",
        engine,
        streams=streams,
        processes=OneProcess(),
        identity=replace(IDENTITY, **changes),
        config=CheckpointConfig(keep_last=3, verify=verify, fallback=fallback),
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


def _damaged(folder: Path, name: str, content: object) -> Path:
    """Put something in the place of a file of step_2."""
    path = folder / "checkpoints" / "step_2" / name
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("content", [None, b"", b"nothing of torch", [1], {}, {"replicated": 3}, Planted()])
@pytest.mark.parametrize("sums", [True, False])
def test_damaged_random_numbers_are_named(tmp_path: Path, engine: FileEngine, content: object, sums: bool) -> None:
    checkpointer = _checkpointer(tmp_path, engine, verify=sums)
    _save(checkpointer, engine, 2)
    assert checkpointer.resume() is not None
    path = _damaged(tmp_path, "rng_rank_0.pt", content)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=rf"{path} .*; no other checkpoint in .* can be used: remove it to begin"):
        checkpointer.resume()
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.value == 2
    assert not PLANTED


def test_the_next_older_whole_one_is_used(checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path) -> None:
    _save(checkpointer, engine, 2, 4, 6)
    directory = tmp_path / "checkpoints"
    (directory / "step_6" / "engine").write_text("7")
    (directory / "step_9").mkdir()
    (directory / "step_4" / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"step_9 is no checkpoint.*; move .*step_9 away .*checkpoint\.fallback"):
        _checkpointer(tmp_path, engine, fallback=False).resume()
    assert sorted(path.name for path in directory.glob("step*")) == ["step_2", "step_4", "step_6", "step_9"]
    manifest = checkpointer.resume()
    assert manifest is not None
    assert (manifest.step, engine.value) == (2, 2)
    left = ["step_2", "step_4.damaged", "step_6.damaged", "step_9.damaged"]
    assert sorted(path.name for path in directory.glob("step*")) == left, "set aside, not deleted"
    assert (directory / "step_6.damaged" / "engine").read_text() == "7"
    _save(checkpointer, engine, 4, 6, 8)
    (directory / "step_8" / "engine").unlink()
    (directory / "step_6" / "engine").write_text("7")
    assert checkpointer.newest_whole(not_after=6) == directory / "step_4", "step_8 is not asked for"
    assert {"step_6.damaged", "step_6.damaged2", "step_8"} <= {path.name for path in directory.iterdir()}


def test_nothing_is_renamed_where_none_is_whole(checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path) -> None:
    _save(checkpointer, engine, 2, 4)
    for name in ("step_2", "step_4"):
        (tmp_path / "checkpoints" / name / "engine").unlink()
    with pytest.raises(UserError, match=r"step_4/engine is missing; no other checkpoint in .* can be used"):
        checkpointer.resume()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_2", "step_4", "latest"}


def test_another_runs_checkpoint_is_passed_over(checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path) -> None:
    _save(checkpointer, engine, 2)
    other = _checkpointer(tmp_path / "other", engine, determining={"seed": 2})
    _save(other, engine, 5)
    (tmp_path / "other" / "checkpoints" / "step_5").rename(tmp_path / "checkpoints" / "step_5")
    manifest = checkpointer.resume()
    assert manifest is not None
    assert manifest.step == 2


@pytest.mark.parametrize(("sums", "found"), [(True, False), (False, True)])
def test_sums_are_compared_where_they_are_wanted(tmp_path: Path, engine: FileEngine, sums: bool, found: bool) -> None:
    _save(_checkpointer(tmp_path, engine), engine, 2)
    (tmp_path / "checkpoints" / "step_2" / "engine").write_text("3")
    checkpointer = _checkpointer(tmp_path, engine, verify=sums)
    if not found:
        with pytest.raises(UserError, match=r"step_2/engine is damaged: its SHA-256 is not the one in"):
            checkpointer.resume()
        return
    assert checkpointer.resume() is not None
    assert engine.value == 3


@pytest.mark.parametrize("place", ["step_4", "step_6", "step_4.partial", "step_6.partial", "step_2.partial"])
@pytest.mark.parametrize("kind", ["file", "link", "nowhere"])
def test_what_lies_in_the_way_blocks_no_save(
    checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path, place: str, kind: str
) -> None:
    _save(checkpointer, engine, 2)
    path, elsewhere = tmp_path / "checkpoints" / place, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    if kind == "link" and "partial" not in place:
        pytest.skip("a link to a directory is a checkpoint")
    if kind == "file":
        path.write_text("stray")
    else:
        path.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    _save(checkpointer, engine, 4, 6, 8, 10)
    assert checkpointer.resume() is not None
    assert engine.value == 10
    assert (elsewhere / "kept").exists()
    assert not list(path.parent.glob("*.partial"))


def test_a_checkpoint_on_another_disk_is_one(checkpointer: Checkpointer, engine: FileEngine, tmp_path: Path) -> None:
    _save(checkpointer, engine, 2, 4)
    moved = tmp_path / "other disk"
    moved.mkdir()
    for name in ("step_2", "step_4"):
        path = tmp_path / "checkpoints" / name
        path.rename(moved / name)
        path.symlink_to(moved / name)
    manifest = checkpointer.resume()
    assert manifest is not None
    assert manifest.step == 4
    _save(checkpointer, engine, 6, 8, 10)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_6", "step_8", "step_10", "latest"}
    assert (moved / "step_2" / "engine").exists(), "a link is removed, not what lies on another disk"


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
