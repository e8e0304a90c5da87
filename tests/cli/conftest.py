"""The command line as a user types it, run in this process; what runs leave behind; SLURM's programs."""

import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from megatron_ext.checkpoint.store import Manifest, write_manifest
from megatron_ext.cli import app
from megatron_ext.config.run import RunConfig
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.records import EvalRecord
from tests.metrics.test_records import train_record
from tests.train.small_run import corpus_data, write_config


class Done(NamedTuple):
    """What a command printed."""

    out: str
    err: str


class CommandLine(Protocol):
    """Runs ``megatron-ext`` with the given arguments and checks its exit status."""

    def __call__(self, *arguments: str | Path, code: int = 0) -> Done: ...


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line on a terminal of 80 columns; exit status 2 is one message and no other output."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["megatron-ext", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            app.main()
        done = Done(*capsys.readouterr())
        assert (exited.value.code or 0) == code, done.err
        assert "Traceback" not in done.err
        assert code != 2 or done.out == ""
        return done

    return run


def leave_traces(config: RunConfig, *, step: int, checkpoint: bool = True, loss: float = 3.0) -> None:
    """What a run that was trained to ``step`` leaves behind."""
    tokens = step * config.training.batch_size * config.training.seq_len
    sink = JsonlSink(config.run_dir / "metrics.jsonl")
    for number in range(1, step + 1):
        sink.train(train_record(step=number, tokens=tokens * number // step, loss_ratio=1.25, step_time_s=0.5))
    sink.evaluation(EvalRecord.from_loss(step=step, tokens=tokens, loss=loss))
    sink.close()
    if not checkpoint:
        return
    folder = config.run_dir / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    manifest = Manifest(
        step=step,
        tokens=tokens,
        config=config.model_dump(mode="json"),
        determining=config.determining_values(),
        layout={"world_size": 1, "tensor": 1, "zero_stage": 0},
        loss_ratio={},
    )
    write_manifest(folder, manifest)


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


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """A run of 40 steps, batch 8, in ``tmp_path / "small"``."""
    return write_config(tmp_path, data=corpus_data(corpus))


def queued(programs: Path, *jobs: tuple[str, str]) -> None:
    lines = ["\x1f".join((job, state, "Priority", "n1", "N/A", "9:00")) + "\n" for job, state in jobs]
    (programs / "queue").write_text("".join(lines))
