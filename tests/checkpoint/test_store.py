"""The checkpoints directory: what is complete stays whole and is found, whenever a process is killed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint.recovery import drop_after
from megatron_ext.checkpoint.store import (
    Manifest,
    begin,
    complete_checkpoints,
    newest_checkpoint,
    prune,
    publish,
    step_of,
    write_manifest,
)
from megatron_ext.checkpoint.verify import read_manifest
from megatron_ext.runtime import files


def manifest_of(step: int = 3, **fields: Any) -> Manifest:
    layout = {"world_size": 2, "tensor": 1, "zero_stage": 1}
    values: dict[str, Any] = {"tokens": 10, "config": {}, "determining": {}, "layout": layout, "loss_ratio": {}}
    return Manifest(step=step, **values | fields)


def save(directory: Path, step: int) -> Path:
    """What the checkpointer does on one rank."""
    partial = begin(directory, step)
    (partial / "weights").write_text(f"weights of {step}")
    write_manifest(partial, manifest_of(step))
    return publish(directory, step)


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, each of which is whole."""
    found = complete_checkpoints(directory)
    for path in found:
        assert read_manifest(path).step == step_of(path)
        assert (path / "weights").read_text() == f"weights of {step_of(path)}"
    return [step_of(path) for path in found]


def test_a_checkpoint_is_seen_when_it_is_published(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    assert complete_checkpoints(directory) == []
    assert newest_checkpoint(directory) is None
    partial = begin(directory, 5)
    (partial / "weights").write_text("weights of 5")
    write_manifest(partial, manifest_of(5))
    assert partial.name == "step_5.partial"
    assert steps(directory) == []
    assert publish(directory, 5) == directory / "step_5" == newest_checkpoint(directory)
    assert (directory / "latest").read_text() == "step_5\n"
    assert {path.name for path in directory.iterdir()} == {"step_5", "latest"}


def test_only_complete_checkpoints_are_found_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    for name in ("step_7.partial", "step_x", "step_3_old", "step_8.damaged", "step_031", "step_\u0663", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_4").write_text("a file")
    assert steps(tmp_path) == [9, 20, 100]
    (tmp_path / "latest").write_text("step_9\n")  # as a crash between the two renames leaves it
    assert newest_checkpoint(tmp_path) == tmp_path / "step_100"


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (begin(tmp_path, 3) / "half").write_text("x")
    (tmp_path / "step_9.partial").mkdir()
    assert list(begin(tmp_path, 4).iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"step_4.partial"}


def test_a_checkpoint_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (begin(tmp_path, 3) / "weights").write_text("others")
    with pytest.raises(FileExistsError, match="step_3"):
        publish(tmp_path, 3)
    assert steps(tmp_path) == [3]


@settings(max_examples=40)
@given(kept=st.sets(st.integers(0, 10**6), max_size=6), keep_last=st.integers(1, 8), after=st.integers(0, 10**6))
def test_pruning_and_going_back_keep_what_they_say(
    tmp_path_factory: pytest.TempPathFactory, kept: set[int], keep_last: int, after: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "prune"
    shutil.rmtree(directory, ignore_errors=True)
    for step in kept:
        (directory / f"step_{step}").mkdir(parents=True)
    removed = [step_of(path) for path in prune(directory, keep_last)]
    left = [step_of(path) for path in complete_checkpoints(directory)]
    assert (removed, left) == (sorted(kept)[:-keep_last], sorted(kept)[-keep_last:])
    if left:
        removed = [step_of(path) for path in drop_after(directory, directory / f"step_{min(left, key=after.__sub__)}")]
        assert removed == sorted(removed, reverse=True), "the newest first"


def test_going_back_drops_later_checkpoints(tmp_path: Path) -> None:
    for step in (10, 5, 30, 20):
        save(tmp_path, step)
    removed = drop_after(tmp_path, tmp_path / "step_10")
    assert [path.name for path in removed] == ["step_30", "step_20"], "the newest first"
    assert steps(tmp_path) == [5, 10]
    assert (tmp_path / "latest").read_text() == "step_10\n"
    assert {path.name for path in tmp_path.iterdir()} == {"step_5", "step_10", "latest"}


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let ``call`` changes of the file system happen and end the process at the next."""
    left = call

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*arguments, **options)

        return replaced

    def rmtree_in_steps(path: Path) -> None:
        for child in sorted(path.iterdir()):
            child.unlink()
        path.rmdir()

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(files, "sync", counted(files.sync))
        patch.setattr(shutil, "rmtree", rmtree_in_steps)
        yield


def test_killed_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = 0
    for call in range(200):
        directory = tmp_path / str(call)
        for step in (1, 2):
            save(directory, step)
        try:
            with killed_at(call, monkeypatch):
                save(directory, 3)
                prune(directory, 2)
                drop_after(directory, directory / "step_2")
                finished += 1
        except Killed:
            assert steps(directory) in ([1, 2], [1, 2, 3], [2, 3], [2])
        else:
            assert steps(directory) == [2]
        assert 2 in steps(directory), "what is never given up"
        drop_after(directory, directory / "step_2")
        save(directory, 4)  # what a killed process left is in nobody's way
        assert steps(directory)[-2:] == [2, 4]
        assert not list(directory.glob("*.partial"))
        if finished:
            break
    assert call > 20
