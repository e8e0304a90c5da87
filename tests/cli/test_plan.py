"""``megatron-ext plan`` as a user runs it."""

import json
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from megatron_ext.cli.app import main
from megatron_ext.cli.plan import Machine, key_steps, plan_report, summarized
from megatron_ext.config.loading import load_config

RUN: dict[str, Any] = {
    "name": "slw",
    "model": {"num_layers": 48, "hidden_size": 1600, "num_attention_heads": 25},
    "data": {"sources": [{"prefix": "corpus"}]},
    "training": {
        "seq_len": 1024,
        "batch_size": 4096,
        "duration": {"tokens": 157_286_400_000},
        "precision": "bf16",
    },
    "curriculum": {"pacing": "linear", "start": 64, "duration": {"steps": 45_000}},
    "learning_rate": {"peak": 6e-4, "min": 1e-5, "warmup": {"steps": 3000}},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    return path


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


class PlanCommand(Protocol):
    def __call__(self, *args: str | Path, code: int = 0) -> Done: ...


@pytest.fixture
def plan_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PlanCommand:
    """Run the command in this process, on a terminal of 80 columns, and check its exit code."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args: str | Path, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["megatron-ext", "plan", *map(str, args)])
        exit_code: object = 0
        try:
            main()
        except SystemExit as done:
            exit_code = done.code or 0
        out, err = capsys.readouterr()
        assert exit_code == code, err
        return Done(stdout=out, stderr=err)

    return run


def test_tables_show_the_run_within_80_columns(plan_command: PlanCommand, config: Path) -> None:
    text = plan_command(config, "--ranks", "64", "--device-tflops", "312").stdout
    words = ["58,770", "157,288,366,080", "1,966,080", "240,721,920", "1,557,686,400", "truncate", "0.0006", "1e-05"]
    for word in [*words, "40% utilization", "64 data-parallel", "saved"]:
        assert word in text, word
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    lengths = text[text.index("Lengths") : text.index("Learning rate")].splitlines()
    assert 10 < len([line for line in lengths if line.strip()]) <= 16


def test_json_is_the_plan_and_its_price(plan_command: PlanCommand, config: Path) -> None:
    answer = json.loads(
        plan_command(config, "--json", "--ranks", "64", "--device-tflops", "312", "--mfu", "0.5").stdout
    )
    plan = load_config(config).plan()
    assert answer["plan"] == json.loads(json.dumps(plan.to_json()))
    assert answer["parameters"]["total"] == 1_557_686_400
    assert answer["estimated_seconds"] == pytest.approx(answer["flops"]["total"] / (64 * 312e12 * 0.5))
    assert 0 < answer["flops"]["saving"] < 1
    assert answer["flops"]["causal"] < answer["flops"]["total"] < answer["flops"]["full_length"]
    assert answer["data_parallel"] == 64
    assert answer["memory_per_rank"]["device"] > 4 * 1_557_686_400


def test_a_full_length_run_saves_nothing(plan_command: PlanCommand, config: Path) -> None:
    answer = json.loads(plan_command(config, "--json", "--set", 'curriculum={"pacing": "constant"}').stdout)
    assert answer["flops"]["saving"] == 0
    assert answer["flops"]["total"] == answer["flops"]["full_length"]
    assert answer["estimated_seconds"] is None


def test_the_plot_is_a_png(plan_command: PlanCommand, config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    out = plan_command(config, "--plot", picture).stdout
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800
    assert height > 600
    assert str(picture) in out


def test_adaptive_pacing_shows_the_plans_that_bound_it(plan_command: PlanCommand, config: Path, tmp_path: Path) -> None:
    bounds = {"fastest": {"steps": 20_000}, "slowest": {"steps": 45_000}}
    override = f"curriculum={json.dumps({'pacing': 'adaptive', 'start': 64} | bounds)}"
    text = plan_command(config, "--set", override, "--plot", tmp_path / "plan.png").stdout
    assert text.index("The fastest plan") < text.index("46,954") < text.index("The slowest plan") < text.index("58,770")
    assert max(len(line) for line in text.splitlines()) <= 80
    answer = json.loads(plan_command(config, "--set", override, "--json").stdout)
    assert list(answer) == ["fastest", "slowest"]
    fixed = load_config(config).plan()
    assert answer["slowest"]["plan"] == json.loads(json.dumps(fixed.to_json()))
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_neither_torch_nor_matplotlib_is_imported(config: Path) -> None:
    code = (
        "import sys\n"
        "from megatron_ext.cli.app import main\n"
        f"sys.argv = ['megatron-ext', 'plan', {str(config)!r}, '--json']\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "found = {'torch', 'matplotlib', 'megatron.core', 'deepspeed'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ranks", "3"], ["--ranks 3", "4096"]),
        (
            ["--ranks", "6", "--set", "parallel.tensor=5", "--set", "model.vocab_multiple=640"],
            ["--ranks is 6", "parallel.tensor 5", "pass 5"],
        ),
        (["--device-tflops", "-1"], ["--device-tflops is -1"]),
        (["--mfu", "1.5"], ["--mfu is 1.5"]),
        (["--plot", "no_such_directory/plan.png"], ["--plot no_such_directory/plan.png", "cannot be written"]),
        (["--plot", "plan.txt"], ["--plot plan.txt", ".png, .pdf or .svg"]),
        (["--set", "curriculum.duration.steps=80000"], ["curriculum", "training.duration"]),
        (["--set", "learning_rate.warmup.steps=60000"], ["learning_rate.warmup", "training.duration"]),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    plan_command: PlanCommand, config: Path, args: list[str], words: list[str]
) -> None:
    done = plan_command(config, *args, code=2)
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_summaries_keep_every_segment_in_order(config: Path) -> None:
    plan = load_config(config).plan()
    groups = summarized(plan.segments, rows=12)
    assert len(groups) == 12
    assert [segment for group in groups for segment in group] == list(plan.segments)
    assert [len(groups[0]), len(groups[-1])] == [1, 1]
    assert all(groups)
    assert summarized(plan.segments[:12], rows=12) == [[segment] for segment in plan.segments[:12]]
    assert all(summarized(plan.segments[:13], rows=12))


def test_key_steps_have_the_peak_and_the_end(config: Path) -> None:
    steps = key_steps(load_config(config).plan())
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert steps[0].step == 0
    assert steps[1].lr == 6e-4
    assert steps[-1].lr == 1e-5
    assert steps[3].lr == pytest.approx((6e-4 + 1e-5) / 2, rel=1e-3)


def test_more_ranks_take_less_memory_each_and_less_time(config: Path) -> None:
    run = load_config(config)
    plan = run.plan()
    machines = [Machine(ranks=ranks, tensor=1, device_tflops=100.0, mfu=0.4) for ranks in (1, 16)]
    one, many = (plan_report(run, plan, machine) for machine in machines)
    assert many.memory.device < one.memory.device
    assert one.seconds is not None
    assert many.seconds == pytest.approx(one.seconds / 16)
