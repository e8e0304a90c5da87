"""The curriculum as a library: numpy and pydantic are all that it needs, and its page runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("torch", "deepspeed", "megatron", "scipy", "matplotlib", "transformers", "typer", "rich")
# None in sys.modules makes an import fail.
PROGRAM = """
from megatron_ext.curriculum import *
pacing = LinearPacing(start=8, duration=Duration(steps=30))
schedule = open_schedule(pacing, RunSpec(seq_len=64, batch_size=6, duration=Duration(tokens=10_000), tail="recycle"))
guard = Guard(GuardsConfig(non_finite="skip"), LossRatio())
for step in schedule.plan:
    batch = rank_block(global_batch(schedule.plan, step.step), 1, 3)
    assert sum(micro_batch_sizes(len(batch), step.seq_len, 128)) == 2
    assert guard.admits(loss=3.0, grad_norm=None)
    schedule.observe(seq_len=step.seq_len, loss=3.0)
assert not guard.admits(loss=float("nan"), grad_norm=1.0)
print(schedule.plan.tokens)
"""


def python(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n{program}"]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


def test_it_works_where_nothing_else_can_be_imported() -> None:
    done = python(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert 10_000 <= int(done.stdout) < 10_000 + 6 * 64


def test_the_page_is_a_program_that_runs_there_too() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    done = python("\n".join(blocks))
    assert done.returncode == 0, done.stderr
