"""What is set before DeepSpeed and megatron-core are imported."""

import os
import subprocess
import sys

import pytest

from megatron_ext.runtime.environment import RankInfo, prepare_libraries

ALONE = RankInfo(rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="127.0.0.1", master_port=29500)
LOAD = f"""
import sys
from megatron_ext.runtime.environment import RankInfo, prepare_libraries
prepare_libraries({ALONE!r}, "cpu")
import megatron_ext.trainer
print("compiler", "torch._inductor.compile_fx" in sys.modules)
"""


def test_a_rank_starts_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)
    assert "compiler False" in done.stdout


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DS_ACCELERATOR": "cuda", "TORCHDYNAMO_DISABLE": "0", "LOCAL_RANK": "3"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    prepare_libraries(ALONE, "cpu")
    assert {name: os.environ[name] for name in chosen} == chosen
