"""SLURM's programs as functions, on programs that answer as they do."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.slurm import commands
from megatron_ext.slurm.commands import QueuedJob

_SQUEUE = """#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$@" > "$here/squeue.arguments"
cat "$here/answer"
cat "$here/error" >&2
[ ! -s "$here/error" ]
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("squeue", _SQUEUE), ("sbatch", "#!/bin/bash\ncat >&2\nexit 1\n"), ("scancel", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "answer").touch()
    (tmp_path / "error").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_the_queue_is_asked_once_for_all_jobs(programs: Path) -> None:
    lines = [("4_1", "PENDING", "Priority", "", "N/A", "1:00"), ("7", "RUNNING", "None", "n[1-2]", "T", "0:59")]
    (programs / "answer").write_text("".join("\x1f".join(line) + "\n" for line in lines))
    assert commands.queue(["4_1", "7", "9", "7"]) == {
        "4_1": QueuedJob("4_1", "PENDING", "Priority", "", "N/A", "1:00"),
        "7": QueuedJob("7", "RUNNING", "None", "n[1-2]", "T", "0:59"),
        "9": QueuedJob("9", "COMPLETED"),
    }
    assert "--jobs=4_1,7,9" in (programs / "squeue.arguments").read_text()
    assert commands.queue([]) == {}


def test_jobs_that_the_controller_forgot_are_over_and_a_silent_one_says_nothing(programs: Path) -> None:
    (programs / "error").write_text("slurm_load_jobs error: Invalid job id specified\n")
    assert commands.queue(["7"])["7"].is_over
    (programs / "error").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert commands.queue(["7"])["7"] == QueuedJob("7", commands.UNKNOWN)
    assert not commands.queue(["7"])["7"].is_over


def test_what_sbatch_says_is_told_and_a_missing_program_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sbatch refused the job: a script\. Do this"):
        commands.submit("a script", remedy="Do this")
    assert commands.has_slurm()
    monkeypatch.setenv("PATH", str(programs / "nowhere"))
    assert not commands.has_slurm()
    with pytest.raises(UserError, match="submit needs sbatch and squeue and scancel, not on PATH"):
        commands.require_slurm("submit")
    assert not commands.cancel("7")
