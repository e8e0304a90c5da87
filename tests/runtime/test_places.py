"""Directories in which nothing can be written are seen beforehand, and told in one message by every command."""

import errno
import os
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.log import configure_logging
from megatron_ext.runtime.places import check_place, explain, problem_of, unwritable
from megatron_ext.runtime.run_lock import run_lock
from tests.train.small_run import cli, write_config, write_corpus

PLACES = [
    ("/dev/null/x", "/dev/null is no directory"),
    ("/proc/x", "/proc is the kernel's own"),
    ("/sys/x", ""),
    ("FILE", "FILE is no directory"),
    ("FILE/x", "FILE is no directory"),
    ("LINK/x", "LINK is a symbolic link to nothing"),
    ("n" * 300, "a name of 300 bytes is too long"),
    ("deep/" + "ü" * 200, "a name of 400 bytes is too long"),
    ("nul\0", "NUL"),
]


def place(folder: Path, text: str) -> Path:
    (folder / "file").touch()
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("nowhere")
    return folder / text.replace("FILE", f"{folder}/file").replace("LINK", f"{folder}/link")


@pytest.mark.parametrize(("text", "told"), PLACES)
def test_what_is_wrong_with_a_place_is_seen_without_writing(tmp_path: Path, text: str, told: str) -> None:
    path = place(tmp_path, text)
    problem = problem_of(path)
    assert problem is not None
    assert told.replace("FILE", f"{tmp_path}/file").replace("LINK", f"{tmp_path}/link") in problem
    with pytest.raises(UserError, match=r"cannot be written.*output_dir and name"):
        check_place(path)
    # And where nobody looked beforehand, as when ranks are started by another launcher:
    with pytest.raises(UserError, match=r"cannot be written.*output_dir and name"), run_lock(path):
        pytest.fail("there is no such place")


def test_good_places_are_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a" / "b", Path("relative"), tmp_path / ("n" * 255)):
        assert problem_of(path) is None
        check_place(path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_place_of_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match=r"log\.txt' cannot be written \(Is a directory"):
        configure_logging(0, log_file=tmp_path / "log.txt")


def test_errors_of_places_are_messages_and_others_are_bugs() -> None:
    assert "No space left on device; make room" in str(explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert "/x/y: Read-only file system" in str(explain(OSError(errno.EROFS, os.strerror(errno.EROFS), "/x/y")))
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None
    assert "(No space left on device)" in str(unwritable(Path.cwd(), OSError(errno.ENOSPC, "No space left on device")))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_directory_of_another_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"run' cannot be written \(Permission denied"), run_lock(tmp_path / "run"):
            pytest.fail("it belongs to root")
    finally:
        os.seteuid(0)


def test_commands_refuse_a_file_in_the_way_in_one_message(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config, file = str(write_config(tmp_path)), place(tmp_path, "FILE")
    before = sorted(tmp_path.rglob("*"))
    commands = (
        ("train", config, "--nproc", "2"),
        ("submit", config, "--dry-run", "--partition", "p", "--time", "1:00:00"),
        ("tune", config, "--dry-run"),
    )
    for command in commands:
        done = cli(*command, "--set", f"output_dir={file}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"{file} is no directory" in done.stderr
    done = cli("validate", config, "--set", f"output_dir={file}")
    assert done.returncode == 0
    assert f"warning: '{file}/small' cannot be written ({file} is no directory)" in done.stderr
    experiment = tmp_path / "experiment.json"
    experiment.write_text(f'{{"name": "e", "output_dir": "{file}", "base": "{config}", "variants": {{"a": {{}}}}}}')
    done = cli("experiment", "run", str(experiment))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{file} is no directory" in done.stderr
    assert sorted(tmp_path.rglob("*")) == sorted([*before, experiment])
