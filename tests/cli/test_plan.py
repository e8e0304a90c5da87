"""``megatron-ext plan`` as a user runs it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.plan import PlanReport, key_steps, summarized
from megatron_ext.config.loading import load_config
from tests.cli.conftest import CommandLine

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


def test_tables_show_the_run_within_80_columns(command_line: CommandLine, config: Path) -> None:
    text = command_line("plan", config, "--ranks", "64", "--device-tflops", "312").out
    words = ["58,770", "157,288,366,080", "1,966,080", "240,721,920", "1,557,686,400", "truncate", "0.0006", "1e-05"]
    for word in [*words, "40% utilization", "64 data-parallel", "saved"]:
        assert word in text, word
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    lengths = text[text.index("Lengths") : text.index("Learning rate")].splitlines()
    assert 10 < len([line for line in lengths if line.strip()]) <= 16


def test_json_is_the_plan_and_its_price(command_line: CommandLine, config: Path) -> None:
    answer = json.loads(
        command_line("plan", config, "--json", "--ranks", "64", "--device-tflops", "312", "--mfu", "0.5").out
    )
    plan = load_config(config).plan()
    assert answer["plan"] == json.loads(json.dumps(plan.to_json()))
    assert answer["parameters"]["total"] == 1_557_686_400
    assert answer["estimated_seconds"] == pytest.approx(answer["flops"]["total"] / (64 * 312e12 * 0.5))
    assert 0 < answer["flops"]["saving"] < 1
    assert answer["flops"]["causal"] < answer["flops"]["total"] < answer["flops"]["full_length"]
    assert answer["data_parallel"] == 64
    assert answer["memory_per_rank"]["device"] > 4 * 1_557_686_400
    answer = json.loads(command_line("plan", config, "--json", "--set", 'curriculum={"pacing": "constant"}').out)
    assert answer["flops"]["saving"] == 0
    assert answer["flops"]["total"] == answer["flops"]["full_length"]
    assert answer["estimated_seconds"] is None


BOUNDS = {"fastest": {"steps": 20_000}, "slowest": {"steps": 45_000}}
ADAPTIVE = f"curriculum={json.dumps({'pacing': 'adaptive', 'start': 64} | BOUNDS)}"
SHORT = ("--set", "training.duration.steps=200", "--set", "learning_rate.warmup.steps=10")
PLOTTED = [
    ("curriculum.duration.steps=100",),
    (ADAPTIVE, "curriculum.fastest.steps=50", "curriculum.slowest.steps=99", "learning_rate.decay=constant"),
]


@pytest.mark.parametrize("overrides", PLOTTED, ids=["linear", "adaptive"])
def test_the_plot_is_a_png(overrides: tuple[str, ...], command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    changes = [part for override in overrides for part in ("--set", override)]
    out = command_line("plan", config, *SHORT, *changes, "--plot", picture).out
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800
    assert height > 600
    assert len(content) > 10_000
    assert str(picture) in out.replace("\n", "")


def test_adaptive_pacing_shows_the_plans_that_bound_it(command_line: CommandLine, config: Path) -> None:
    text = command_line("plan", config, "--set", ADAPTIVE).out
    assert text.index("The fastest plan") < text.index("46,954") < text.index("The slowest plan") < text.index("58,770")
    assert max(len(line) for line in text.splitlines()) <= 80
    answer = json.loads(command_line("plan", config, "--set", ADAPTIVE, "--json").out)
    assert list(answer) == ["fastest", "slowest"]
    fixed = load_config(config).plan()
    assert answer["slowest"]["plan"] == json.loads(json.dumps(fixed.to_json()))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ranks", "3"], ["--ranks is 3", "4,096"]),
        (
            ["--ranks", "6", "--set", "parallel.tensor=5", "--set", "model.vocab_multiple=640"],
            ["--ranks is 6", "parallel.tensor is 5", "multiple of 5"],
        ),
        (["--device-tflops", "-1"], ["--device-tflops is -1"]),
        (["--mfu", "1.5"], ["--mfu is 1.5"]),
        (
            [*SHORT, "--set", "curriculum.duration.steps=9", "--plot", "no_such_directory/plan.png"],
            ["--plot no_such_directory/plan.png", "cannot be written"],
        ),
        (["--plot", "plan.txt"], ["--plot plan.txt", ".png, .pdf or .svg"]),
        (["--set", "curriculum.duration.steps=80000"], ["curriculum", "training.duration"]),
        (["--set", "learning_rate.warmup.steps=60000"], ["learning_rate.warmup", "training.duration"]),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    command_line: CommandLine, config: Path, args: list[str], words: list[str]
) -> None:
    message = command_line("plan", config, *args, code=2).err
    for word in words:
        assert word in message


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
    one, many = (PlanReport(run, plan, ranks, device_tflops=100.0) for ranks in (1, 16))
    assert many.memory.device < one.memory.device
    assert one.seconds is not None
    assert many.seconds == pytest.approx(one.seconds / 16)
