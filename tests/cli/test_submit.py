"""``submit`` and ``status`` without a cluster: what is found before anything is queued, and what is asked of SLURM."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.slurm_options import SlurmOptions
from megatron_ext.config.loading import load_config
from megatron_ext.launch.slurm import jobs_of, live_jobs
from megatron_ext.runtime.run_lock import run_lock
from tests.cli.test_experiment import command as command  # noqa: PLC0414 - the fixture
from tests.cli.test_experiment import leave_traces
from tests.train.small_run import write_config, write_corpus

Command = Callable[..., tuple[object, str, str]]

_SBATCH = """#!/bin/bash
here=$(dirname "$0")
echo "$*" >> "$here/sbatch.arguments"
number=$(wc -l < "$here/sbatch.arguments")
cat > "$here/script.$number"
grep -q refused "$here/script.$number" && { echo "sbatch: error: no" >&2; exit 1; }
echo $number
"""
_SQUEUE = r"""#!/bin/bash
here=$(dirname "$0")
[ -e "$here/queue" ] && cat "$here/queue"
exit 0
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, squeue and scancel, which write down what they were asked."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in (("sbatch", _SBATCH), ("squeue", _SQUEUE), ("scancel", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """A run of 40 steps, batch 8, in ``tmp_path / "small"``."""
    data = {
        "sources": [{"prefix": str(corpus / "corpus")}],
        "split": [90, 10, 0],
        "tokenizer": str(corpus / "tokenizer.json"),
    }
    return write_config(tmp_path, data=data)


def queued(programs: Path, *jobs: tuple[str, str]) -> None:
    lines = ["\x1f".join((job, state, "Priority", "n1", "N/A", "9:00")) + "\n" for job, state in jobs]
    (programs / "queue").write_text("".join(lines))


def test_a_dry_run_prints_the_script_and_makes_nothing(config: Path, command: Command) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1:00:00", "--account", "a b")
    code, out, err = command("submit", str(config), *options, "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", 'account="a b"'):
        assert f"#SBATCH --{line}" in lines
    assert f"    [0]={config.parent}/small" in lines
    assert sum(line.lstrip().startswith("srun ") for line in lines) == 1
    assert "batch_size" not in out, "no hyper-parameters"
    assert not (config.parent / "small").exists()


def test_a_dry_run_needs_no_data(config: Path, command: Command) -> None:
    code, out, err = command("submit", str(config), "--set", "data.tokenizer=nowhere.json", "--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash")
    assert "would be refused" in err
    assert "nowhere.json" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "training.seq_len=60"), "seq_len"),
        (("--set", "data.tokenizer=nowhere.json"), "nowhere.json"),
        (
            (
                "--set",
                "parallel.tensor=2",
            ),
            "parallel.tensor is 2, which does not divide the 1 rank",
        ),
        (("--nodes", "3"), "a batch of 8 sequences does not divide evenly over 3"),
        (("--time", "soon"), "--time is 'soon'"),
        (("--array", "1-3"), "the tasks would train in one directory"),
        (("--array", "1-3", "--set", "name={task}", "--chain", "2"), "use one of the two"),
        (("--sbatch", "wrap=x"), "decides that"),
        (("--container-runtime", "docker"), "'docker' is not one of 'pyxis', 'apptainer'"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_queued(
    config: Path, command: Command, programs: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = command("submit", str(config), *options)
    assert code == 2
    assert message in err
    assert not (programs / "sbatch.arguments").exists()
    assert not (config.parent / "small").exists()


def test_a_checkpoint_of_another_layout_is_found_too(config: Path, command: Command, programs: Path) -> None:
    leave_traces(load_config(config), step=10)
    code, _, err = command("submit", str(config), "--nodes", "2")
    assert code == 2
    assert "world_size is 1 there and 2 here" in err
    assert not (programs / "sbatch.arguments").exists()


def test_a_job_is_on_record_with_what_it_trains(config: Path, command: Command, programs: Path) -> None:
    code, out, _ = command("submit", str(config), "--set", "seed=7", "--retries", "1")
    assert code == 0
    assert "submitted job 1; to end it: scancel 1" in out
    run = config.parent / "small"
    assert [job.job for job in jobs_of(run)] == ["1"]
    assert load_config(run / "slurm" / "config.json") == load_config(config, ["seed=7"])
    script = (programs / "script.1").read_text()
    assert script == (run / "slurm" / "job.sh").read_text()
    assert "attempts=2" in script
    queued(programs, ("1", "PENDING"))
    assert live_jobs([run]) == {run: "1"}
    code, _, err = command("submit", str(config))
    assert code == 2
    assert "has job 1 in the queue" in err


def test_an_array_trains_a_run_in_each_task(config: Path, command: Command, programs: Path) -> None:
    code, out, err = command(
        "submit", str(config), "--array", "2,5%1", "--set", "name=s-{task}", "--set", "seed={task}"
    )
    assert code == 0, err
    assert "submitted array 1" in out
    for task in (2, 5):
        run = config.parent / f"s-{task}"
        assert [job.job for job in jobs_of(run)] == [f"1_{task}"]
        assert load_config(run / "slurm" / "config.json").seed == task
    assert "#SBATCH --array=2,5%1" in (programs / "script.1").read_text()


def test_each_job_of_a_chain_waits_for_all_before(config: Path, command: Command, programs: Path) -> None:
    code, out, _ = command("submit", str(config), "--chain", "3", "--dependency", "afterok:99")
    assert code == 0
    assert "submitted chain of jobs 1 2 3" in out
    first, second, third = (programs / "sbatch.arguments").read_text().splitlines()
    assert "--dependency" not in first
    assert second.endswith("--dependency=afternotok:1 --kill-on-invalid-dep=yes")
    assert third.endswith("--dependency=afternotok:1:2 --kill-on-invalid-dep=yes")
    assert "#SBATCH --dependency=afterok:99" in (programs / "script.1").read_text()
    assert "afterok" not in (programs / "script.2").read_text()
    assert "requeue=0" in (programs / "script.1").read_text()


def test_what_sbatch_refuses_is_told(config: Path, command: Command, programs: Path) -> None:
    code, _, err = command("submit", str(config), "--sbatch", "comment=refused")
    assert code == 2
    assert "sbatch refused the job: sbatch: error: no" in err
    assert jobs_of(config.parent / "small") == []
    assert programs.is_dir()


def test_the_container_sees_what_the_run_reads_and_writes(config: Path, corpus: Path) -> None:
    run = load_config(config)
    found = SlurmOptions(container="image").job([run]).container
    assert found is not None
    assert set(found.mounts) >= {str(corpus), str(config.parent)}
    assert SlurmOptions().job([run]).container is None
    mounted = SlurmOptions(container="image", container_runtime="apptainer", mounts=["/data"]).job([run]).container
    assert mounted is not None
    assert (mounted.runtime, mounted.mounts) == ("apptainer", ("/data",))


def told(command: Command, *arguments: str) -> dict[str, Any]:
    code, out, err = command("status", *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_status_of_a_run_on_this_machine(config: Path, command: Command) -> None:
    run = load_config(config)
    assert told(command, str(config))["state"] == "waiting"
    leave_traces(run, step=20, loss=2.5)
    found = told(command, str(config))
    assert (found["state"], found["step"], found["steps"], found["valid_loss"]) == ("interrupted", 20, 40, 2.5)
    assert found["checkpoint"] == "step_20"
    assert found["eta_s"] == pytest.approx((found["total_tokens"] - found["tokens"]) / found["tokens_per_s"])
    with run_lock(run.run_dir):
        assert told(command, str(config))["state"] == "running"
    leave_traces(run, step=40)
    finished = told(command, str(config))
    assert (finished["state"], finished["eta_s"]) == ("finished", 0.0)
    code, out, _ = command("status", str(config))
    assert code == 0
    assert "40 of 40" in out
    assert "to the end" not in out


def test_status_of_a_job(config: Path, command: Command, programs: Path) -> None:
    assert command("submit", str(config))[0] == 0
    run = config.parent / "small"
    queued(programs, ("1", "PENDING"))
    found = told(command, str(run))
    assert (found["state"], found["job"], found["job_state"], found["job_reason"]) == (
        "queued",
        "1",
        "PENDING",
        "Priority",
    )
    queued(programs, ("1", "RUNNING"))
    assert told(command, str(run))["state"] == "running"
    code, out, _ = command("status", str(run))
    assert code == 0
    assert "1, RUNNING, 9:00 left, on n1" in out
    queued(programs)
    found = told(command, str(run))
    assert (found["state"], found["note"]) == ("failed", "job 1 left the queue without having begun")
    with (run / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"event": "ended", "job": "1", "status": 1}) + "\n")
    found = told(command, str(run))
    assert found["state"] == "failed"
    assert "exit status 1" in found["note"]
    # SLURM starts it again by itself.
    queued(programs, ("1", "PENDING"))
    assert told(command, str(run))["state"] == "queued"
    assert live_jobs([run]) == {run: "1"}


def test_status_of_what_is_no_run(tmp_path: Path, command: Command) -> None:
    code, _, err = command("status", str(tmp_path / "nowhere"))
    assert code == 2
    assert "is no run" in err
