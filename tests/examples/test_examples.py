"""The examples as people start them, and without their marked lines: few lines, the plan's lengths, a falling loss."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.curriculum.runs import formula_value

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"^ *# SLW begin\n(.*?)^ *# SLW end\n", re.DOTALL | re.MULTILINE)
SEQ_LEN, WARMUP = 64, {"start": 8, "multiple": 8, "duration": {"steps": 60}}
HAS_TRAINER = all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
EXAMPLES = [
    "plain_pytorch",
    "deepspeed_loop",
    pytest.param("hf_trainer", marks=pytest.mark.skipif(not HAS_TRAINER, reason="needs transformers and accelerate")),
]


def run(program: Path, folder: Path) -> list[tuple[int, int, float]]:
    """(length, tokens so far, loss) of every step."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(program)], check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d+) length (\d+) tokens (\d+) loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in lines] == list(range(len(lines)))
    return [(int(length), int(tokens), float(loss)) for _, length, tokens, loss in lines]


@pytest.mark.parametrize("name", EXAMPLES)
def test_few_lines_turn_the_baseline_into_sequence_length_warmup(name: str, tmp_path: Path) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    added = [line for part in MARKED.findall(source) for line in part.splitlines() if line.strip()]
    assert 3 <= len(added) <= 15
    plain = tmp_path / "baseline.py"
    plain.write_text(MARKED.sub("", source))
    assert "megatron_ext" not in plain.read_text()

    warm, baseline = run(ROOT / "examples" / f"{name}.py", tmp_path), run(plain, tmp_path)
    expected = [formula_value(WARMUP, end=SEQ_LEN, progress=step) for step in range(len(warm))]
    assert [length for length, *_ in warm] == expected
    assert {length for length, *_ in baseline} == {SEQ_LEN}
    # Both end with the step that reaches the budget; a batch is the baseline's first step.
    budget = baseline[-1][1]
    assert abs(warm[-1][1] - budget) < baseline[0][1]
    for losses in ([loss for *_, loss in steps] for steps in (warm, baseline)):
        assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
