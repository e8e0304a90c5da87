"""Ranks that torchrun starts, and starts again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.runtime.network import free_port
from tests.train.small_run import records, train_records, write_config, write_corpus


@pytest.mark.slow
def test_torchrun_restarts_ranks_that_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path, training={"seq_len": 32, "batch_size": 8, "duration": {"steps": 100}})
    run = tmp_path / "small"
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "megatron_ext.worker", str(config)]
    with subprocess.Popen(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(record["step"] >= 25 for record in train_records(run)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(rank_1_of(process.pid), signal.SIGKILL)
            assert process.wait(timeout=180) == 0
        finally:
            process.kill()
    assert train_records(run)[-1]["step"] == 100
    (resumed,) = (record for record in records(run) if record.get("name") == "resume")
    assert resumed["step"] >= 20


def rank_1_of(launcher: int) -> int:
    """Process id of the child with RANK 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
