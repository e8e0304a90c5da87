"""The curriculum as a library: numpy and pydantic are all that it needs, and its names are those that docs name."""

import re
import subprocess
import sys
from pathlib import Path

import megatron_ext.curriculum as library

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("torch", "deepspeed", "megatron", "scipy", "matplotlib", "transformers", "typer", "rich")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # None makes an import of it fail
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


def test_it_works_where_nothing_else_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 10_000 <= int(done.stdout) < 10_000 + 6 * 64


def test_what_the_page_names_is_exported() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    imported = {
        name.strip()
        for names in re.findall(r"from megatron_ext\.curriculum import \(?([\w,\s]+)", page)
        for name in names.split(",")
        if name.strip()
    }
    assert imported
    assert imported <= set(library.__all__)
