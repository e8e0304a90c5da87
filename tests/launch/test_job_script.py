"""What is asked of SLURM: time limits, arrays, options, containers, the lines that say so; words of bash."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.job_script import (
    Container,
    Resources,
    TrainingJob,
    directive,
    lead_seconds,
    limit_seconds,
    parse_array,
    word,
    words,
)

TEXTS = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def job(**changes: Any) -> TrainingJob:
    given: dict[str, Any] = {
        "name": "run",
        "run_dirs": (Path("/runs/run"),),
        "work_dir": Path("/work dir"),
        "output": Path("/runs/run/slurm"),
        "python": "python3",
    }
    return TrainingJob(**(given | changes))


def directives(given: TrainingJob) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in given.script().splitlines() if line.startswith("#SBATCH")]


def test_every_resource_has_its_line() -> None:
    asked = Resources(
        nodes=4,
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=12,
        partition="gpu",
        account="lab",
        time="1-12",
        extra=("qos=high", "exclusive"),
    )
    assert directives(
        job(resources=asked, dependency="afterok:3", task_ids=(0, 1), run_dirs=(Path("/a"), Path("/b")))
    ) == [
        "--job-name=run",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--partition=gpu",
        "--account=lab",
        "--time=1-12",
        "--array=0,1",
        "--dependency=afterok:3",
        "--requeue",
        "--signal=B:USR1@300",
        "--output=/runs/run/slurm/%A_%a.out",
        "--open-mode=append",
        "--qos=high",
        "--exclusive",
    ]
    assert asked.ranks == 32


def test_a_plain_job_asks_for_little() -> None:
    assert directives(job()) == [
        "--job-name=run",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--requeue",
        "--signal=B:USR1@300",
        "--output=/runs/run/slurm/%j.out",
        "--open-mode=append",
    ]


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("/runs/100%j", "--output=/runs/100%%j/%j.out"),
        ("/runs/a b", '--output="/runs/a b/%j.out"'),
        ("/runs/a\\b", "--output=/dev/null"),
        ("/runs/a\nb", "--output=/dev/null"),
    ],
)
def test_the_output_is_in_the_run_directory_as_far_as_slurm_can_be_told(folder: str, line: str) -> None:
    assert line in directives(job(output=Path(folder)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-1:30", 91800),
        ("1-1:1:1", 90061),
        ("UNLIMITED", None),
        ("infinite", None),
        ("0", None),
    ],
)
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "a-1", "1-", ":5", "-5:00", "1.5", "٣"])
def test_a_limit_in_no_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time is"):
        limit_seconds(text)


def test_the_signal_comes_five_minutes_before_a_long_limit_and_never_at_once() -> None:
    assert lead_seconds(Resources(time="24:00:00")) == 300
    assert lead_seconds(Resources(time="10")) == 60
    assert lead_seconds(Resources(time="1:00:00", signal_seconds=900)) == 900
    with pytest.raises(UserError, match="the run would be stopped at once"):
        lead_seconds(Resources(time="10", signal_seconds=600))
    with pytest.raises(UserError, match="SLURM takes 1 to"):
        lead_seconds(Resources(signal_seconds=70_000))


@pytest.mark.parametrize(
    ("text", "tasks", "at_once"),
    [("0-3", (0, 1, 2, 3), None), ("1,3,5", (1, 3, 5), None), ("0-8:4%2", (0, 4, 8), 2), ("7%1", (7,), 1)],
)
def test_arrays_as_sbatch_reads_them(text: str, tasks: tuple[int, ...], at_once: int | None) -> None:
    assert parse_array(text) == (tasks, at_once)
    array = job(task_ids=tasks, at_once=at_once, run_dirs=tuple(Path(f"/r{task}") for task in tasks))
    limit = f"%{at_once}" if at_once else ""
    assert f"--array={','.join(map(str, tasks))}{limit}" in directives(array)
    assert array.names("9") == [f"9_{task}" for task in tasks]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-2:0", "1%", "1%0", "1 2", "$(x)", "1\n2"])
def test_an_array_in_no_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--array is"):
        parse_array(text)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("output=/x", "the run directory decides that"),
        ("--array=1", "--array decides that"),
        ("a b=1", "KEY=VALUE"),
        ("x\n#SBATCH --uid=0", "KEY=VALUE"),
        ("comment=a\nb", "no line breaks"),
        ("=1", "KEY=VALUE"),
    ],
)
def test_an_option_that_is_not_free_is_refused(option: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        job(resources=Resources(extra=(option,))).script()


def test_containers() -> None:
    pyxis = Container("nvcr.io#image", mounts=("/data", "/a b"))
    assert pyxis.srun_options() == ("--container-image=nvcr.io#image", "--container-mounts=/data:/data,/a b:/a b")
    assert pyxis.prefix() == ()
    apptainer = Container("x.sif", runtime="apptainer", mounts=("/data",))
    assert apptainer.srun_options() == ()
    assert apptainer.prefix() == ("apptainer", "exec", "--nv", "--bind=/data:/data", "x.sif")
    with pytest.raises(UserError, match="takes no ':' and ','"):
        Container("x", mounts=("/a:b",)).srun_options()


def test_a_name_is_a_label_without_control_characters() -> None:
    assert directives(job(name="a\n#SBATCH --uid=0"))[0] == '--job-name="a_#SBATCH --uid=0"'


@given(st.lists(TEXTS, min_size=1, max_size=20))
@example(["", "'", "\\", "\n", "$'\\n'", "a\x017b", "\x7f\\'", "-n", "!!", "~", "*", "\udcff"])
def test_bash_reads_a_word_as_the_text_it_was_made_from(texts: list[str]) -> None:
    line = words(texts)
    assert "\n" not in line
    done = subprocess.run(
        ["bash"], input=os.fsencode(f"printf '%s\\0' {line}"), capture_output=True, check=True, cwd="/"
    )
    assert [os.fsdecode(part) for part in done.stdout.split(b"\0")[:-1]] == texts


def test_plain_text_stays_readable() -> None:
    assert word("/data/run-1") == "/data/run-1"
    assert word("a b") == "'a b'"
    assert word("a\nb") == "$'a\\012b'"
    assert directive("job-name", "slw-seed1") == "#SBATCH --job-name=slw-seed1"
    assert directive("comment", 'a "b" \\') == '#SBATCH --comment="a \\"b\\" \\\\"'
    assert directive("requeue") == "#SBATCH --requeue"


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(UserError, match="null character"):
        word("a\0b")
    with pytest.raises(UserError, match=r"--comment is 'a\\nb': SLURM takes no line breaks"):
        directive("comment", "a\nb")
    with pytest.raises(UserError, match="longer than sbatch's 1000 bytes"):
        directive("comment", "é" * 501)
